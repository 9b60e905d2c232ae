"""Checkers of notebook 02's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge, judge_choices
from tpa_minimal.tpa import T6Config, factor_bound


@exercise
def ex02_1(attempt):
    """The best rank-R factors of a matrix, as Eq. 3.1 wants them."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 10, dtype=torch.float64, generator=generator)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for R in (3, 1, 6):
        got = attempt(matrix, R)
        if not isinstance(got, tuple) or len(got) != 2:
            raise WrongAnswer("return two tensors, a and b")
        a, b = got
        if a.shape == (6, R) and R != 6:
            raise WrongAnswer(f"a has shape {tuple(a.shape)}: factors are rank-major, one row per rank, (R, h)")
        if a.shape != (R, 6) or b.shape != (R, 10):
            raise WrongAnswer(
                f"for R={R}, h=6, d_h=10 a must be ({R}, 6) and b ({R}, 10), not {tuple(a.shape)}, {tuple(b.shape)}"
            )

        def fit(weights, columns, divisor):
            return (u[:, columns] * weights[columns]) @ vh[columns] / divisor

        first, last = slice(0, R), slice(6 - R, 6)
        judge(
            a.mT @ b / R,
            fit(s, first, 1),
            {
                f"{R} times too small: `assemble` divides by R, so the factors must carry R": fit(s, first, R),
                "R times too large: the factor R belongs to a or to b, not to both": fit(s, first, 1 / R),
                "the singular values went into both factors: s into one of them, or its root into each": fit(
                    s**2, first, 1
                ),
                "the singular values went into both factors, and R into none": fit(s**2, first, R),
                "the singular values are missing: their sizes belong into a or b": fit(s**0, first, 1),
                "the singular values and the factor R are missing": fit(s**0, first, R),
                "these are the smallest singular values; the best fit keeps the largest": fit(s, last, 1),
            },
            f"assemble(a, b) is not the best rank-{R} fit of the matrix",
        )


@exercise
def ex02_2(attempt):
    """The largest rank at which factors take less room than keys and values."""
    for h, d_head in ((12, 64), (64, 128), (34, 64), (64, 64), (4, 4), (2, 2)):
        product, total = h * d_head, h + d_head
        judge(
            attempt(h, d_head),
            (product - 1) // total,
            {
                f"h={h}, d_h={d_head}: at this rank both take equally much; smaller was asked": product // total,
                f"h={h}, d_h={d_head}: twice too large: TPA caches factors of keys *and* of values, 2R(h + d_h)": (
                    2 * product - 1
                )
                // total,
                f"h={h}, d_h={d_head}: half of the right rank: MHA caches keys *and* values, 2 · h · d_h": (product - 1)
                // (2 * total),
                f"h={h}, d_h={d_head}: min(h, d_h) is the largest rank there is, not the largest that saves": min(
                    h, d_head
                ),
                f"h={h}, d_h={d_head}: whole ranks only; round down to an int": product / total,
            },
            f"wrong for h={h}, d_h={d_head}: compare R(h + d_h) numbers with h · d_h",
        )


@exercise
def ex02_3(attempt):
    """What happens to keys and logits when the hidden states are scaled."""
    judge_choices(
        attempt(),
        dict(a=2, b=4, c=4, d=16, e=8, f=1),
        dict(
            a="MHA's key is a linear map of x",
            b="Both factors of TPA's key are linear in x, and the key is their product",
            c="The query doubles and the key doubles",
            d="The query is a product of two factors that double, and so is the key",
            e="Here the query is linear in x; the key is still a product of two factors",
            f="Both factors change their sign, and the key is their product",
        ),
    )


@exercise
def ex02_4(attempt):
    """The logits' standard deviation at the start."""
    small = dict(vocab_size=50304, n_layer=1, d_model=768, n_head=34, d_head=64)
    other = dict(vocab_size=100, n_layer=1, d_model=256, n_head=10, d_head=48, rank_q=3, rank_k=4)
    for config in (T6Config(**small), T6Config(**other), T6Config(**small, init="authors")):
        right = 1.0
        for rank in (config.rank_q, config.rank_k):
            for width, is_head_factor in ((config.n_head, True), (config.d_head, False)):
                right *= factor_bound(config, rank, width, is_head_factor) ** 2 / 3 * config.d_model
            right /= rank
        right **= 0.5
        paper, ranks = config.init == "paper", config.rank_q * config.rank_k
        rule = "" if paper else 'right for init="paper", wrong for "authors"; '
        judge(
            attempt(config),
            right,
            {
                "this is the variance: take its square root": right**2,
                "R_Q · R_K times too large: 1/R divides the whole sum, in q and in k": right * ranks,
                "√(R_Q · R_K) times too large: a factor 1/R divides the variance by R²": right * ranks**0.5,
                "√(R_Q · R_K) times too small: the variance of a sum of R terms is R times that of one": right
                / ranks**0.5,
                "9 times too large: uniform on (-bound, bound) has the variance bound²/3, not bound²": right * 9,
                "too small: each entry of a factor sums d_model products": right / config.d_model**2,
                "√d_h times too large: the logit is q · k / √d_h": right * config.d_head**0.5,
                "√d_h times too small: q · k sums d_h products": right / config.d_head**0.5,
            },
            rule + f"expected about {right:.3g}: first var(a) and var(b), then var(q) and var(k), then q · k / √d_h",
        )
