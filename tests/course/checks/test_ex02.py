"""The checkers of notebook 02 accept what is right and say what is wrong."""

import math

import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.tpa import T6Config, TensorProductAttention, assemble, factor_bound, rms_norm

# ------------------------------------------------------------------------------------- 1: the best factors


def svd(matrix, R):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :R].mT, s[:R, None], vh[:R]  # (R, h), (R, 1), (R, d_h)


def factors(with_svd):
    return lambda matrix, R: with_svd(*svd(matrix, R), R)


def smallest(matrix, R):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return R * u[:, -R:].mT * s[-R:, None], vh[-R:]


FACTORS = {
    "divides by R": factors(lambda u, s, v, R: (u * s, v)),
    "not to both": factors(lambda u, s, v, R: (R * u * s, R * v)),
    "into both factors: s into one": factors(lambda u, s, v, R: (R * u * s, s * v)),
    "R into none": factors(lambda u, s, v, R: (u * s, s * v)),
    "values are missing": factors(lambda u, s, v, R: (R * u, v)),
    "the factor R are missing": factors(lambda u, s, v, R: (u, v)),
    "smallest singular values": smallest,
    "rank-major": factors(lambda u, s, v, R: ((R * u * s).mT, v)),
    "must be (3, 6)": lambda matrix, R: (matrix.mT, matrix),
    "return two tensors": lambda matrix, R: matrix,
    "not the best rank": factors(lambda u, s, v, R: (R * u * s, v.flip(-1))),
}


@pytest.mark.parametrize(
    "right",
    [
        lambda u, s, v, R: (R * u * s, v),
        lambda u, s, v, R: (u, R * s * v),
        lambda u, s, v, R: (-((R * s).sqrt()) * u, -((R * s).sqrt()) * v),
    ],
)
def test_right_factors_are_accepted(right):
    assert checks.ex02_1(factors(right)) == "ok"


@pytest.mark.parametrize("says", FACTORS)
def test_wrong_factors_are_diagnosed(says, capsys):
    assert checks.ex02_1(FACTORS[says]) == "fail"
    assert says in capsys.readouterr().out


# --------------------------------------------------------------------------------- 2: when factors save room


def by_search(h, d_head):
    return max((R for R in range(1, 200) if 2 * R * (h + d_head) < 2 * h * d_head), default=0)


RANKS = {
    "both take equally much": lambda h, d: h * d // (h + d),
    "twice too large": lambda h, d: (2 * h * d - 1) // (h + d),
    "half of the right rank": lambda h, d: (h * d - 1) // (2 * (h + d)),
    "largest rank there is": min,
    "whole ranks only": lambda h, d: h * d / (h + d),
    "compare R(h + d_h)": lambda h, d: 1,
    "expected a number": lambda h, d: None,
}


def test_the_right_rank_is_accepted():
    assert checks.ex02_2(by_search) == "ok"


@pytest.mark.parametrize("says", RANKS)
def test_a_wrong_rank_is_diagnosed(says, capsys):
    assert checks.ex02_2(RANKS[says]) == "fail"
    assert says in capsys.readouterr().out


# --------------------------------------------------------------------------------------- 3: scaling the input

KEY = dict(a=2, b=4, c=4, d=16, e=8, f=1)


def test_the_answer_key_is_what_the_layers_do():
    x = torch.randn(1, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(5, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def plain(x, which):
        return (x @ w[which]).unflatten(-1, (3, 4))

    def factorized(x):
        a, b = (x @ w[1]).unflatten(-1, (4, 3)), (x @ w[2]).unflatten(-1, (3, 4))[:, :, :2]
        return assemble(a[:, :, :2], b)

    def logits(q, k):
        return torch.einsum("bthd,bshd->bhts", q, k)

    def ratio(function, factor=2):
        before, after = function(x), function(factor * x)
        ratios = after / before
        torch.testing.assert_close(ratios, ratios.flatten()[0].expand_as(ratios))
        return round(ratios.flatten()[0].item(), 9)

    assert KEY == dict(
        a=ratio(lambda x: plain(x, 0)),
        b=ratio(factorized),
        c=ratio(lambda x: logits(plain(x, 0), plain(x, 3))),
        d=ratio(lambda x: logits(factorized(x), factorized(x))),
        e=ratio(lambda x: logits(plain(x, 0), factorized(x))),
        f=ratio(factorized, -1),
    )
    assert checks.ex02_3(lambda: dict(KEY)) == "ok"


@pytest.mark.parametrize("case", KEY)
def test_each_wrong_factor_has_its_own_reason(case, capsys):
    wrong = -1 if case == "f" else 3
    assert checks.ex02_3(lambda: {**KEY, case: wrong}) == "fail"
    line = capsys.readouterr().out
    assert f"case {case}: not {wrong}" in line and len(line) > 60


@pytest.mark.parametrize("answer", [{**KEY, "a": ...}, {"a": 2}, None, {**KEY, "f": True}])
def test_unfinished_factors_fail(answer):
    assert checks.ex02_3(lambda: answer) == "fail"


def test_a_factor_in_quotes_is_diagnosed(capsys):
    assert checks.ex02_3(lambda: {**KEY, "e": "8"}) == "fail"
    assert "case e: give a number, not the str '8'" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- 4: predicting the logits


def predict(config, sum_of_ranks=1, divide=2, per_bound=3, fan=1, dots=1, init=None):
    """The logits' standard deviation with mistakes to choose from; none by default."""
    if init:
        config = T6Config(config.vocab_size, 1, config.d_model, config.n_head, config.d_head, init=init)
    variance = float(config.d_head) ** (dots - 1)
    for rank in (config.rank_q, config.rank_k):
        for width, is_head_factor in ((config.n_head, True), (config.d_head, False)):
            variance *= factor_bound(config, rank, width, is_head_factor) ** 2 / per_bound * config.d_model**fan
        variance *= rank ** (sum_of_ranks - divide)
    return math.sqrt(variance)


LOGITS = {
    "this is the variance": lambda config: predict(config) ** 2,
    "1/R divides the whole sum": lambda config: predict(config, divide=0),
    "divides the variance by R²": lambda config: predict(config, divide=1),
    "is R times that of one": lambda config: predict(config, sum_of_ranks=0),
    "bound²/3": lambda config: predict(config, per_bound=1),
    "sums d_model products": lambda config: predict(config, fan=0),
    "logit is q · k / √d_h": lambda config: predict(config, dots=2),
    "q · k sums d_h products": lambda config: predict(config, dots=0),
    'wrong for "authors"': lambda config: predict(config) if config.init == "paper" else predict(config, init="paper"),
    "expected about": lambda config: 1.0,
}


def test_the_right_prediction_is_accepted():
    assert checks.ex02_4(predict) == "ok"


@pytest.mark.parametrize("says", LOGITS)
def test_a_wrong_prediction_is_diagnosed(says, capsys):
    assert checks.ex02_4(LOGITS[says]) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("init", ["paper", "authors"])
def test_the_prediction_is_what_the_layer_does(init):
    torch.manual_seed(0)
    config = T6Config.preset("small-124M", init=init)
    with torch.no_grad():
        x = rms_norm(torch.randn(1, 128, config.d_model))
        a_q, b_q, a_k, b_k, _, _ = TensorProductAttention(config).factors(x)
    logits = torch.einsum("bthd,bshd->bhts", assemble(a_q, b_q), assemble(a_k, b_k)) / math.sqrt(config.d_head)
    assert logits.std().item() == pytest.approx(predict(config), rel=0.05)


def test_two_notions_of_low_rank():
    """Contextual factors bound each token's rank and not the stack's; a low-rank weight does the opposite."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = draw(100, 20)
    contextual = assemble((x @ draw(20, 12)).unflatten(-1, (2, 6)), (x @ draw(20, 16)).unflatten(-1, (2, 8)))
    static = (x @ draw(20, 2) @ draw(2, 48)).unflatten(-1, (6, 8))
    ranks = [[int(torch.linalg.matrix_rank(m)) for m in (y[0], y.flatten(1))] for y in (contextual, static)]
    assert ranks == [[2, 48], [6, 2]]


@pytest.mark.parametrize("check", [checks.ex02_1, checks.ex02_2, checks.ex02_3, checks.ex02_4])
def test_an_unwritten_exercise_is_a_todo(check):
    def stub(*_):
        raise NotImplementedError

    assert check(stub) == "todo"
