"""Checkers of notebook 10's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import exercise, judge, judge_choices, normal


@exercise
def ex10_1(attempt):
    """Rescale each split to the common maximum; an empty split weighs nothing."""
    cases = []
    for n, M, h, d_h, empty in ((4, 50, 3, 5, ()), (4, 50, 3, 5, (1,)), (2, 9, 2, 4, (0,)), (1, 7, 5, 2, ())):
        logits, v = 3 * normal(n, M, h, seed=n) + 2000, normal(n, M, h, d_h, seed=n + 9)  # 2^2000 overflows
        logits[list(empty)] = -math.inf
        m = logits.amax(1)
        weights = torch.exp2(logits - m.clamp_min(-1e9)[:, None])
        cases.append((m, weights.sum(1), torch.einsum("imh,imhd->ihd", weights, v)))

    def right(m, s, y, power=torch.exp2, for_y=True, for_s=True):
        shrink = power(m - m.amax(0))
        return ((shrink if for_y else 1 + 0 * s)[..., None] * y).sum(0) / ((shrink if for_s else 1) * s).sum(0)[:, None]

    def outputs(s, y):
        return (y / s[..., None]).nan_to_num()

    def shrinks(m):
        return torch.exp2(m - m.amax(0))

    judge(
        attempt,
        right,
        cases,
        [
            (lambda m, s, y: right(m, s, y, for_y=False, for_s=False),
             "the splits had different maxima: before adding, multiply s and y by 2^(m_i - m)"),
            (lambda m, s, y: right(m, s, y, power=torch.exp), "logits are in powers of 2 here: exp2, not exp"),
            (lambda m, s, y: right(m, s, y, for_s=False), "y is rescaled and s is not"),
            (lambda m, s, y: right(m, s, y, for_y=False), "s is rescaled and y is not"),
            (lambda m, s, y: outputs(s, y).mean(0),
             "a mean of the splits' outputs: each must weigh as much as the share of the softmax that fell into it"),
            (lambda m, s, y: ((s / s.sum(0))[..., None] * outputs(s, y)).sum(0),
             "weighed by s alone: that forgets how large each split's logits were"),
            (lambda m, s, y: (shrinks(m)[..., None] * outputs(s, y)).sum(0) / shrinks(m).sum(0)[:, None],
             "weighed by 2^(m_i - m) alone: a split's share of the softmax is 2^(m_i - m) s_i"),
            (lambda m, s, y: (shrinks(m)[..., None] * y).sum(0), "not divided by the merged sum"),
            (lambda m, s, y: right(m, s, y, power=lambda x: torch.exp2(-x)),
             "wrong way round: the factor is 2^(m_i - m), which is at most 1"),
            (lambda m, s, y: right(m, s, s[..., None] * (y / s[..., None])),
             "each split is divided by its own s, and an empty one by 0: add first, divide at the end"),
        ],
        "subtract the largest m before taking powers, never divide by an empty split's s, and try with two "
        "splits of "
        "one position each",
    )  # fmt: skip


@exercise
def ex10_2(attempt):
    """All factors of all positions, once."""

    def right(batch, M, h, d_h, rank_k, rank_v, size, gb_per_s):
        return batch * M * (rank_k + rank_v) * (h + d_h) * size / (gb_per_s * 1e9) * 1000

    def numbers(count):
        return lambda B, M, h, d_h, k, v, size, speed: (
            right(B, M, h, d_h, k, v, size, speed) * (count(h, d_h, k, v) / ((k + v) * (h + d_h)))
        )

    judge(
        attempt,
        right,
        [(4, 5000, 34, 64, 3, 2, 2, 2e3), (1, 32768, 32, 64, 1, 1, 4, 30.0), (9, 777, 8, 96, 1, 4, 1, 3350.0)],
        [
            (numbers(lambda h, d, k, v: 2 * h * d),
             "that is MHA's cache: TPA caches (R_K + R_V)(h + d_h) numbers per position"),
            (numbers(lambda h, d, k, v: (k + v) * h * d),
             "a rank's two factors are read one by one, h + d_h numbers, not their product"),
            (numbers(lambda h, d, k, v: (k + v) * d), "the head factors are read too: h + d_h numbers for each rank"),
            (numbers(lambda h, d, k, v: 2 * k * (h + d)), "keys and values may have different ranks"),
            (numbers(lambda h, d, k, v: k * (h + d)), "the values are read too: R_K + R_V"),
            (lambda B, *rest: right(1, *rest), "one sequence only: each sequence of the batch has its own cache"),
            (lambda *case: right(*case[:6], 1, case[7]), "that counts numbers as if they were bytes"),
            (lambda *case: right(*case) / 1000, "those are seconds"),
            (lambda *case: right(*case) * 1e9 / 2**30, "a GB is 10^9 bytes here, not 2^30"),
            (lambda *case: 1 / right(*case), "upside down: bytes divided by bytes per second"),
        ],
        "batch · M · (R_K + R_V)(h + d_h) numbers of `size` bytes are read once",
    )  # fmt: skip


@exercise
def ex10_3(attempt):
    """What the splitting, the mask, the ranks and the roofline imply."""
    judge_choices(
        attempt(),
        dict(
            a=(
                False,
                "sixty-four sequences already give work to many processors; it is the single one that needs the split",
            ),
            b=(True, "the merge is an identity: only the order of additions changes"),
            c=(True, "factors of 0 give the logit 0, and a logit of 0 takes its part of the softmax's sum"),
            d=(False, "the query is assembled once; per cached position R_Q no longer occurs"),
            e=(False, "under the flat part arithmetic is the limit, and it stays the same"),
        ),
    )
