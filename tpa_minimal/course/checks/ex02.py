"""Checkers of notebook 02's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, agree, exercise, judge, normal, tensor
from tpa_minimal.tpa import T6Config, assemble, factor_bound


def fit(matrix, R, power=1, divisor=1, first=True):
    """A rank-R matrix of R singular directions, the largest first, their values to some power, over some divisor."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = slice(0, R) if first else slice(len(s) - R, len(s))
    return (u[:, keep] * s[keep] ** power) @ vh[keep] / divisor


@exercise
def ex02_1(attempt):
    """The best rank-R factors of a matrix, as Eq. 3.1 wants them."""

    def assembled(matrix, R):
        answer, (h, d_h) = attempt(matrix, R), matrix.shape
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise WrongAnswer("return two tensors, a and b")
        a, b = (tensor(x).double() for x in answer)
        for name, factor, shape in (("a", a, (R, h)), ("b", b, (R, d_h))):
            if tuple(factor.shape) == shape[::-1] != shape:
                raise WrongAnswer(
                    f"{name} has shape {tuple(factor.shape)}: factors are rank-major, one row per rank, {shape}"
                )
            if tuple(factor.shape) != shape:
                raise WrongAnswer(
                    f"for R = {R}, h = {h}, d_h = {d_h} {name} has shape {tuple(factor.shape)}, not {shape}"
                )
        got, best = a.mT @ b / R, fit(matrix, R)
        float32 = any(tensor(x).dtype == torch.float32 for x in answer)
        return got.float() if float32 else got if agree(got, best) else wrong_side(matrix, R, b, got)

    def wrong_side(matrix, R, b, got):
        """The wrong fit, unless no value can tell what b is: then say so."""
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if R < len(s) and agree(b.abs(), u[:R, : b.shape[1]].abs()):
            raise WrongAnswer("b is made of rows of u: b takes the rows of vh, the right singular vectors")
        return got

    judge(
        assembled,
        fit,
        [(normal(6, 10, seed=R), R) for R in (3, 1, 6)] + [(normal(9, 5, seed=4), 2), (normal(4, 4, seed=5), 3)],
        [
            (lambda matrix, R: fit(matrix, R, divisor=R),
             "R times too small: `assemble` divides by R, so the factors must carry R"),
            (lambda matrix, R: fit(matrix, R, divisor=1 / R),
             "R times too large: the factor R belongs to a or to b, not to both"),
            (lambda matrix, R: fit(matrix, R, power=2),
             "the singular values went into both factors: s into one of them, or its root into each"),
            (lambda matrix, R: fit(matrix, R, power=2, divisor=R),
             "the singular values went into both factors, and R into none"),
            (lambda matrix, R: fit(matrix, R, power=0),
             "the singular values are missing: their sizes belong in a or b"),
            (lambda matrix, R: fit(matrix, R, power=0, divisor=R), "the singular values and the factor R are missing"),
            (lambda matrix, R: fit(matrix, R, power=0.5), "√s stands in one factor only: s into one, or √s into each"),
            (lambda matrix, R: fit(matrix, R, first=False),
             "these are the smallest singular values; the best fit keeps the largest"),
        ],
        lambda got, best: (
            f"assemble(a, b) differs from the best fit by {(got - best).norm() / best.norm():.0%} of its size. Take "
            "the first R columns of u, times s, as rows of a, the first R rows of vh as b, and one factor R"
        ),
    )  # fmt: skip


@exercise
def ex02_2(attempt):
    """The largest rank at which factors take less room than keys and values."""
    judge(
        attempt,
        lambda h, d_h: (h * d_h - 1) // (h + d_h),
        [(12, 64), (64, 128), (34, 64), (64, 64), (4, 4), (2, 2), (5, 96), (1, 1)],
        [
            (lambda h, d: h * d // (h + d), "where the rank is met exactly both take equally much; smaller was asked"),
            (lambda h, d: (2 * h * d - 1) // (h + d),
             "twice too large: TPA caches factors of keys *and* of values, 2R(h + d_h)"),
            (lambda h, d: (h * d - 1) // (2 * (h + d)),
             "half of the right rank: MHA caches keys *and* values, 2 · h · d_h"),
            (lambda h, d: min(h, d), "min(h, d_h) is the largest rank there is, not the largest that saves"),
            (lambda h, d: h * d / (h + d), "whole ranks only: round down"),
            (lambda h, d: (h * d - 1) / (h + d), "whole ranks only: round down"),
            (lambda h, d: round(h * d / (h + d)), "rounded to the nearest: where that is up, nothing is saved"),
            (lambda h, d: -(-h * d // (h + d)), "rounded up: at that rank TPA caches as much or more"),
            (lambda h, d: h - 1, "each rank needs a head factor too: h + d_h numbers, not d_h"),
            (lambda h, d: max(1, (h * d - 1) // (h + d)), "where not even rank 1 saves, the answer is 0"),
        ],
        "compare R(h + d_h) numbers with h · d_h",
    )  # fmt: skip


def powers() -> dict:
    """Functions of a hidden state x, and the power with which each grows with the size of x."""
    h, d_h, d_model, R = 3, 4, 5, 2
    A_q, A_k = normal(2, R, h, d_model, seed=1)
    B_q, B_k = normal(2, R, d_h, d_model, seed=2)
    W_q, W_k = normal(2, h, d_h, d_model, seed=3)

    def mha_key(x):
        return W_k @ x

    def tpa_key(x):
        return assemble(A_k @ x, B_k @ x)

    def head_factor(x):
        return A_k @ x

    def mha_logit(x):
        return ((W_q @ x) * mha_key(x)).sum(-1)

    def tpa_logit(x):
        return (assemble(A_q @ x, B_q @ x) * tpa_key(x)).sum(-1)

    def kv_only_logit(x):
        return ((W_q @ x) * tpa_key(x)).sum(-1)

    return {mha_key: 1.0, tpa_key: 2.0, head_factor: 1.0, mha_logit: 2.0, tpa_logit: 4.0, kv_only_logit: 3.0}


@exercise
def ex02_3(attempt):
    """The power with which a function of the hidden state grows, by experiment: attempt(function, x)."""
    power = powers()
    judge(
        attempt,
        lambda function, x: power[function],
        [(function, normal(5, seed=seed)) for seed, function in enumerate(power)],
        [
            (lambda f, x: 2 ** power[f],
             "that is the factor by which it grows when x doubles; the power is its logarithm to base 2"),
            (lambda f, x: 3 ** power[f], "that is the factor for 3 x; the power is its logarithm to base 3"),
            (lambda f, x: power[f] * math.log(2), "a natural logarithm has to be divided: log(ratio) / log(2)"),
            (lambda f, x: power[f] * math.log10(2),
             "a logarithm to base 10 has to be divided: log10(ratio) / log10(2)"),
            (lambda f, x: -power[f], "the ratio is upside down: function(2 * x) over function(x)"),
            (lambda f, x: 2 * power[f], "twice too large: did you square a length without taking its root?"),
            (lambda f, x: power[f] / 2, "half of it: did you take a root too many, or scale by √2?"),
            (lambda f, x: 1, "power 1 is a linear map; TPA's key is a product of two factors, each linear in x"),
            (lambda f, x: 2, "not everything is quadratic: compare function(2 * x) with function(x)"),
        ],
        "by how much does the length of function(2 * x) exceed that of function(x), as a power of 2?",
    )  # fmt: skip


def predicted(config, third=3.0, rows=1.0, sums=1.0, tail=0.0, swapped=False, ranks=None, root=0.5):
    """The logits' standard deviation, with what people forget as options."""
    variance = config.d_head**tail
    for rank in ranks(config) if ranks else (config.rank_q, config.rank_k):
        var_a, var_b = (
            factor_bound(config, rank, width, is_head_factor != swapped) ** 2 / third * config.d_model**rows
            for width, is_head_factor in ((config.n_head, True), (config.d_head, False))
        )
        variance *= var_a * var_b / rank**sums
    return variance**root


@exercise
def ex02_4(attempt):
    """The logits' standard deviation at the start."""
    small = dict(vocab_size=50304, n_layer=1, d_model=768, n_head=34, d_head=64)
    other = dict(vocab_size=100, n_layer=1, d_model=256, n_head=10, d_head=48, rank_q=3, rank_k=4)
    third = dict(vocab_size=100, n_layer=2, d_model=80, n_head=7, d_head=22, rank_q=5, rank_k=1, rank_v=3)
    judge(
        attempt,
        lambda config: predicted(config),
        [(T6Config(**sizes, init=init),) for sizes in (small, other, third) for init in ("paper", "authors")],
        [
            (lambda c: predicted(c, root=1), "this is the variance: take its square root"),
            (lambda c: predicted(c, sums=-1),
             "R_Q · R_K times too large: 1/R divides the whole sum, in q and in k"),
            (lambda c: predicted(c, sums=0),
             "√(R_Q · R_K) times too large: a factor 1/R divides the variance by R²"),
            (lambda c: predicted(c, sums=2),
             "√(R_Q · R_K) times too small: the variance of a sum of R terms is R times that of one"),
            (lambda c: predicted(c, third=1),
             "9 times too large: uniform on (-bound, bound) has the variance bound²/3, not bound²"),
            (lambda c: predicted(c, third=12),
             "the variance of uniform on (-bound, bound) is bound²/3; bound²/12 belongs to an interval of width bound"),
            (lambda c: predicted(c, rows=0), "too small: each entry of a factor sums d_model products"),
            (lambda c: predicted(c, tail=1), "√d_h times too large: the logit is q · k / √d_h"),
            (lambda c: predicted(c, tail=-1), "√d_h times too small: q · k sums d_h products"),
            (lambda c: predicted(c, swapped=True),
             'with init="authors" head and feature factors differ: True for the head factors, False for the others'),
            (lambda c: predicted(T6Config(**{**vars(c), "init": "paper"})),
             'right for init="paper", wrong for "authors": ask factor_bound with this config'),
            (lambda c: predicted(c, ranks=lambda c: (c.rank_q, c.rank_q)), "the keys have rank R_K, not R_Q"),
            (lambda c: predicted(c, ranks=lambda c: (c.rank_k, c.rank_k)), "the queries have rank R_Q, not R_K"),
            (lambda c: predicted(c, ranks=lambda c: (c.rank_k,)), "that is the deviation of k; q is random too"),
            (lambda c: predicted(c, ranks=lambda c: (c.rank_q,)), "that is the deviation of q; k is random too"),
        ],
        lambda got, best: (
            f"{float(got) / best:.3g} times the right value, {best:.3g}: first var(a) = d_model · bound²/3 and var(b), "
            "then var(q) = var(a) var(b) / R_Q and var(k), then q · k / √d_h"
        ),
    )  # fmt: skip
