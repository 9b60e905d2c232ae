"""The checkers of notebook 10 accept the solutions and say what is wrong with wrong answers."""

import pytest
import torch

from tpa_minimal.course import checks


def merge(m, s, y, *, power=torch.exp2, rescale_s=True, common=True, divide=True):
    shrink = power(m - (m.amax(0) if common else 0))
    total = (shrink * s if rescale_s else s).sum(0)
    out = (shrink[..., None] * y).sum(0)
    return out / total[:, None] if divide else out


def least_ms(B, M, h, d_h, rank_k, rank_v, size, speed):
    return B * M * (rank_k + rank_v) * (h + d_h) * size / (speed * 1e9) * 1000


RIGHT = {"a": False, "b": True, "c": True, "d": False, "e": False}


@pytest.mark.parametrize(
    "check, solution",
    [(checks.ex10_1, merge), (checks.ex10_2, least_ms), (checks.ex10_3, lambda: RIGHT)],
    ids=["10.1", "10.2", "10.3"],
)
def test_accepts_the_solution(check, solution):
    assert check(solution) == "ok"


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda m, s, y: y.sum(0) / s.sum(0)[:, None], "different maxima"),
        (lambda m, s, y: merge(m, s, y, power=torch.exp), "exp2, not exp"),
        (lambda m, s, y: merge(m, s, y, rescale_s=False), "s is not"),
        (lambda m, s, y: merge(m, s, y, divide=False), "not divided"),
        (lambda m, s, y: merge(m, s, y, common=False), "subtract the largest m"),
        (lambda m, s, y: (y / s[..., None]).mean(0), "a mean of"),
        (lambda m, s, y: merge(m, torch.ones_like(s), (y / s[..., None]).nan_to_num()), "by 2^(m_i - m) alone"),
        (lambda m, s, y: torch.zeros(3, 5, dtype=y.dtype), "not the softmax"),
        (lambda m, s, y: y[0].mT, "expected shape"),
    ],
)
def test_10_1_diagnoses(attempt, says, capsys):
    assert checks.ex10_1(attempt) == "fail"
    assert says in capsys.readouterr().out


def test_10_1_notices_an_empty_stretch(capsys):
    """Dividing each stretch by its own sum is right until a stretch is empty."""

    def mean_of_outputs(m, s, y):
        weights = (torch.exp2(m - m.amax(0)) * s)[..., None]
        return (weights * (y / s[..., None])).sum(0) / weights.sum(0)

    assert checks.ex10_1(mean_of_outputs) == "fail"
    assert "empty stretch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda B, M, h, d, k, v, size, speed: 2 * B * M * h * d * size / speed / 1e6, "MHA's cache"),
        (lambda B, M, h, d, k, v, size, speed: B * M * (k + v) * d * size / speed / 1e6, "head factors"),
        (lambda B, M, h, d, k, v, size, speed: B * M * (k + v) * h * d * size / speed / 1e6, "not their product"),
        (lambda B, M, h, d, k, v, size, speed: 2 * B * M * k * (h + d) * size / speed / 1e6, "different ranks"),
        (lambda B, M, h, d, k, v, size, speed: least_ms(1, M, h, d, k, v, size, speed), "one sequence"),
        (lambda B, M, h, d, k, v, size, speed: least_ms(B, M, h, d, k, v, 1, speed), "as if they were bytes"),
        (lambda *sizes: least_ms(*sizes) / 1000, "those are seconds"),
        (lambda *sizes: None, "expected a number"),
        (lambda *sizes: 1.0, "you say 1.0"),
    ],
)
def test_10_2_diagnoses(attempt, says, capsys):
    assert checks.ex10_2(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("case, says", [("a", "single one"), ("c", "takes its part"), ("d", "assembled once")])
def test_10_3_diagnoses(case, says, capsys):
    assert checks.ex10_3(lambda: {**RIGHT, case: not RIGHT[case]}) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("check", [checks.ex10_1, checks.ex10_2, checks.ex10_3])
def test_an_empty_stub_is_todo(check):
    def stub(*_):
        raise NotImplementedError

    assert check(stub) == "todo"
