"""Checkers of notebook 06's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import agree, exercise, judge, normal


def merged(part_1, part_2, power=torch.exp, shrink=(True, True, True, True), upside_down=False):
    """Both parts of an online softmax together; `shrink`: whether s_1, s_2, y_1 and y_2 are brought to the new m."""
    (m_1, s_1, y_1), (m_2, s_2, y_2) = part_1, part_2
    m = torch.maximum(m_1, m_2)
    f_1, f_2 = (power(m - old if upside_down else old - m) for old in (m_1, m_2))
    s = (f_1 if shrink[0] else 1) * s_1 + (f_2 if shrink[1] else 1) * s_2
    y = (f_1[:, None] if shrink[2] else 1) * y_1 + (f_2[:, None] if shrink[3] else 1) * y_2
    return m, s, y


def softmax_parts():
    """Random positions in two parts, each as its own m, s and y; in some heads the later part has the maximum."""
    cases = []
    for seed, (h, d_h, cut) in enumerate(((3, 5, 5), (4, 2, 9), (1, 6, 1))):
        logits, values = 4 * normal(h, 12, seed=seed), normal(12, d_h, seed=seed + 9)
        logits[0, 7] += 20  # the maximum stands in the second part for head 0, in the first for the last head
        logits[-1, 0] += 30
        parts = []
        for section in (slice(0, cut), slice(cut, 12)):
            m = logits[:, section].amax(1)
            weights = (logits[:, section] - m[:, None]).exp()
            parts.append((m, weights.sum(1), weights @ values[section]))
        cases.append(tuple(parts))
    return cases


def judge_extremes(attempt, cases):
    """Merge with a part that has seen nothing, and near maxima whose exponentials overflow."""
    for one, two in cases:
        empty = (torch.full_like(one[0], -math.inf), torch.zeros_like(one[1]), torch.zeros_like(one[2]))
        judge(
            attempt,
            merged,
            [(empty, two), (one, empty)],
            otherwise="merged with a part that has seen nothing, the other part should come out as it was",
        )
        for shift in (800, -800):  # exp(800) and 1 / exp(-800) are infinite
            far = tuple((m + shift, s, y) for m, s, y in (one, two))
            judge(
                attempt,
                merged,
                [far],
                otherwise=f"wrong for maxima near {shift}: exp(m) overflows; subtract the maxima before exp",
            )


@exercise
def ex06_1(attempt):
    """Merging two parts of an online softmax."""
    cases = softmax_parts()

    def averaged(one, two):
        m, s, y = merged(one, two)
        return m, s, s[:, None] * (one[2] / one[1][:, None] + two[2] / two[1][:, None]) / 2

    def naive(one, two):
        """Powers of m itself, which overflow; relative to a maximum of 0."""
        return torch.zeros_like(one[0]), *(
            sum(p[0].exp().view(-1, *[1] * i) * p[i + 1] for p in (one, two)) for i in (0, 1)
        )

    def divided(one, two):
        m, s, y = merged(one, two)
        return m, s, y / s[:, None]

    def otherwise(got, right):
        (m, s, y), right_ = (torch.as_tensor(x, dtype=torch.float64) for x in got), right
        fits = [agree(x, x_right) for x, x_right in zip((m, s, y), right_)]
        if not fits[0] and agree(y / s[:, None], right_[2] / right_[1][:, None]):
            return "y / s is right, but m is not the larger of the two maxima, so later powers may overflow"
        return {
            (False, True, True): "s and y are right; m should be the larger of the two maxima, entry by entry",
            (True, True, False): "s is right and y is not: y needs the same factors, one per head: shrink[:, None]",
            (True, False, True): "y is right and s is not: s needs the same factors as y",
        }.get(tuple(fits), "s and y are not those of all positions together: s = s_1 e^(m_1 - m) + s_2 e^(m_2 - m)")

    judge(
        attempt,
        merged,
        cases,
        [
            (lambda one, two: merged(one, two, shrink=(False,) * 4),
             "the parts' sums are relative to different maxima: bring both to a common one, then add"),
            (lambda one, two: merged(one, two, upside_down=True),
             "wrong way round: the factor is exp(m_old - m_new), which is at most 1"),
            (lambda one, two: merged(one, two, power=torch.exp2),
             "natural exponentials here: exp, not exp2, which needs logits that hold a factor log2(e)"),
            (lambda one, two: merged(one, two, shrink=(True, False, True, False)),
             "only the first part is brought to the new maximum; here either may have the smaller one"),
            (lambda one, two: merged(one, two, shrink=(False, True, False, True)),
             "only the second part is brought to the new maximum; here either may have the smaller one"),
            (lambda one, two: merged(one, two, shrink=(True, True, False, False)),
             "s is right and y is not: y needs the same factors, one per head: shrink[:, None]"),
            (lambda one, two: merged(one, two, shrink=(False, False, True, True)),
             "y is right and s is not: s needs the same factors as y"),
            (averaged, "that is the mean of the two averages; each part counts by its s"),
            (divided, "you divided by s already: y is the sum, and the division comes at the very end"),
            (lambda one, two: (one[0] + two[0], *merged(one, two)[1:]),
             "m is the larger of the two maxima, not their sum"),
        ],
        otherwise,
    )  # fmt: skip
    judge_extremes(attempt, cases)


@exercise
def ex06_2(attempt):
    """When computing P first (Algorithm 1) needs fewer multiply-adds than assembling the queries first."""

    def rule(P_is_less):
        return lambda h, d_h, rank_q: "P first" if P_is_less(h, d_h, rank_q) else "queries first"

    sizes = ((8, 64), (12, 64), (32, 32), (34, 64), (64, 128), (4, 8), (32, 8))
    judge(
        attempt,
        rule(lambda h, d_h, rank_q: rank_q * (d_h + h) < h * (d_h + 1)),
        [(h, d_h, rank_q) for h, d_h in sizes for rank_q in (1, 3, 6, 7, 11, 16, 21, 23, 40, 48, 70)],
        [
            (rule(lambda h, d, q: q * (d + h) >= h * (d + 1)), "exactly the other way round"),
            (rule(lambda h, d, q: q * (d + h) > h * (d + 1)), "exactly the other way round"),
            (rule(lambda h, d, q: q * (d + h) <= h * (d + 1)),
             'for h = 4, d_h = 8, R_Q = 3 both cost 36: equal is not cheaper, so "queries first"'),
            (rule(lambda h, d, q: q * (d + h) < h * d),
             "queries first costs more than its products over d_h: a_k weighs each of them, h · R_K"),
            (rule(lambda h, d, q: q * d < h * d),
             "only the products over d_h are counted; each head also weighs P, h · R_Q · R_K"),
            (rule(lambda h, d, q: q < d), "R_Q against d_h is not enough: h enters both counts"),
            (rule(lambda h, d, q: q * d * h < h * (d + 1)),
             "P has no head index: R_Q · R_K products over d_h, not h times"),
            (rule(lambda h, d, q: True), "it depends on R_Q; the same answer for all cannot be right"),
            (rule(lambda h, d, q: False), "it depends on R_Q; one answer for all cannot be right"),
        ],
        'return "P first" or "queries first": R_Q R_K d_h + h R_Q R_K against h R_K d_h + h R_K multiply-adds',
    )  # fmt: skip


@exercise
def ex06_3(attempt):
    """The largest R_Q with fewer multiply-adds than MHA."""

    def largest(per_rank, values, margin=1, budget=2, whole=True, least=0):
        def rule(h, d_h, rank_k, rank_v):
            left = budget * h * d_h - values(h, d_h, rank_v) - margin
            return max(least, left // per_rank(h, d_h, rank_k) if whole else left / per_rank(h, d_h, rank_k))

        return rule

    def P(h, d, k):
        return k * (d + h)

    def V(h, d, v):
        return h * v * d

    def right(h, d_h, rank_k, rank_v):
        return largest(P, V)(h, d_h, rank_k, rank_v)

    sizes = ((32, 64), (64, 128), (34, 64), (12, 64), (32, 32), (5, 24))
    judge(
        attempt,
        right,
        [(h, d_h, rank_k, rank_v) for h, d_h in sizes for rank_k in (1, 2, 3) for rank_v in (1, 2, 3)],
        [
            (largest(P, V, least=-math.inf), "a negative rank: return 0 where no R_Q is small enough"),
            (largest(P, V, margin=0, least=-math.inf), "a negative rank: return 0 where no R_Q is small enough"),
            (largest(P, V, margin=0),
             "fewer, not as many: at h = d_h = 32 and ranks 1, R_Q = 16 needs exactly what MHA needs"),
            (largest(P, V, margin=0, whole=False), "whole ranks only: round down"),
            (largest(P, V, whole=False), "whole ranks only: round down"),
            (largest(P, lambda h, d, v: 0), "the values are missing: h · R_V · d_h"),
            (largest(lambda h, d, k: k * d, V), "the heads' weighing of P is missing: h · R_Q · R_K"),
            (largest(lambda h, d, k: k * h, V), "the products for P are missing: R_Q · R_K · d_h"),
            (largest(lambda h, d, k: d + h, V), "R_K is missing: P has R_Q · R_K entries for each cached token"),
            (largest(P, lambda h, d, v: h * d), "R_V is missing: the values cost h · R_V · d_h"),
            (largest(P, V, budget=1), "MHA multiplies with keys and values: 2 · h · d_h"),
            (largest(P, V, least=1), "where not even R_Q = 1 needs fewer, the answer is 0"),
        ],
        "R_Q R_K (d_h + h) + h R_V d_h against 2 h d_h",
    )  # fmt: skip
