"""Checkers of notebook 06's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge_cases


@exercise
def ex06_1(merge):
    """Merging two parts of an online softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    logits[0, 7] += 20  # the maximum stands in the second part for head 0, in the first for head 1
    logits[1, 2] += 20
    values = torch.randn(12, 5, generator=generator, dtype=torch.float64)

    def part(first, last):
        m = logits[:, first:last].amax(1)
        weights = (logits[:, first:last] - m[:, None]).exp()
        return m, weights.sum(1), weights @ values[first:last]

    one, two, (m, s, y) = part(0, 5), part(5, 12), part(0, 12)
    given = merge(one, two)
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise WrongAnswer("return three tensors: m, s and y")
    for name, got, right in zip("msy", given, (m, s, y)):
        if not isinstance(got, torch.Tensor) or got.shape != right.shape:
            raise WrongAnswer(f"{name} should have the shape that came in, {tuple(right.shape)}")
    got_m, got_s, got_y = given

    def same(x, y):
        return torch.allclose(x, y, rtol=1e-9, atol=1e-12)

    plain_s, plain_y = one[1] + two[1], one[2] + two[2]
    if same(got_s, plain_s) and same(got_y, plain_y):
        raise WrongAnswer("the parts' sums are relative to different maxima: bring both to a common one, then add")
    if same(got_y, s[:, None] * (one[2] / one[1][:, None] + two[2] / two[1][:, None]) / 2):
        raise WrongAnswer("that is the mean of the two averages; each part counts by its s")
    if not same(got_m, m):
        if same(got_y / got_s[:, None], y / s[:, None]):
            raise WrongAnswer("y / s is right, but m is not the maximum, so exp may overflow")
        raise WrongAnswer("m should be the larger of the two maxima, entry by entry")
    if same(got_s, s) and same(got_y, y / s[:, None]):
        raise WrongAnswer("you divided by s already: y is the sum, and the division comes at the very end")
    if same(got_s, s) and not same(got_y, y):
        raise WrongAnswer("s is right and y is not: y needs the same factors, one per head: shrink[:, None]")
    if same(got_y, y) and not same(got_s, s):
        raise WrongAnswer("y is right and s is not: s needs the same factors as y")
    if not same(got_s, s):
        grown = one[1] * (m - one[0]).exp() + two[1] * (m - two[0]).exp()
        if same(got_s, grown):
            raise WrongAnswer("wrong way round: the factor is exp(m_old - m_new), which is at most 1")
        if same(got_s, one[1] * (one[0] - m).exp2() + two[1] * (two[0] - m).exp2()):
            raise WrongAnswer("natural exponentials here: exp, not exp2, which needs logits that hold a factor log2(e)")
        half = (one[1] * (one[0] - m).exp() + two[1], one[1] + two[1] * (two[0] - m).exp())
        if same(got_s, half[0]) or same(got_s, half[1]):
            raise WrongAnswer("only one part is brought to the new maximum; here either may have the smaller one")
        raise WrongAnswer("s and y are not those of the 12 positions together")
    empty = (torch.full_like(m, -math.inf), torch.zeros_like(s), torch.zeros_like(y))
    for parts in ((empty, two), (two, empty)):  # two empty parts are excluded by the exercise: any answer will do
        if not all(same(x, y) for x, y in zip(merge(*parts), two)):
            raise WrongAnswer("merged with a part that has seen nothing, the other part should come out as it was")
    for shift in (800, -800):  # exp(800) and 1 / exp(-800) are infinite
        far = [(m + shift, s, y) for m, s, y in (one, two)]
        if not all(same(x, y) for x, y in zip(merge(*far), (m + shift, s, y))):
            raise WrongAnswer(f"wrong for maxima near {shift}: exp(m) overflows; subtract the maxima before exp")


@exercise
def ex06_2(cheaper_order):
    """When Algorithm 1's table needs fewer multiply-adds than assembled queries."""
    sizes = ((8, 64), (12, 64), (32, 32), (34, 64), (64, 128), (4, 8), (32, 8))
    cases = [(h, d_h, rank_q) for h, d_h in sizes for rank_q in (1, 3, 6, 7, 11, 16, 21, 23, 40, 48, 70)]
    given = [cheaper_order(*case) for case in cases]
    if set(given) - {"table", "queries"}:
        raise WrongAnswer('return "table" or "queries"')

    def rule(table_is_less):
        return ["table" if table_is_less(*case) else "queries" for case in cases]

    answers = {
        "": rule(lambda h, d, q: q * (d + h) < h * (d + 1)),
        "exactly the other way round": rule(lambda h, d, q: q * (d + h) >= h * (d + 1)),
        'for h = 4, d_h = 8, R_Q = 3 both cost 36: equal is not cheaper, so "queries"': rule(
            lambda h, d, q: q * (d + h) <= h * (d + 1)
        ),
        "queries first costs more than its products over d_h: a_k weighs each of them, h · R_K": rule(
            lambda h, d, q: q * (d + h) < h * d
        ),
        "only the products over d_h are counted; each head also weighs its table, h · R_Q · R_K": rule(
            lambda h, d, q: q * d < h * d
        ),
        "R_Q against h is not enough: the table costs d_h + h per rank": rule(lambda h, d, q: q < h),
        "R_Q against d_h is not enough: h enters both counts": rule(lambda h, d, q: q < d),
        "it depends on R_Q; the same answer for all cannot be right": rule(lambda h, d, q: True),
        "it depends on R_Q; one answer for all cannot be right": rule(lambda h, d, q: False),
    }
    judge_cases(given, answers, cases)


@exercise
def ex06_3(largest_rank_q):
    """The largest R_Q with fewer multiply-adds than MHA."""
    sizes = ((32, 64), (64, 128), (34, 64), (12, 64), (32, 32))
    cases = [(h, d_h, rank_k, rank_v) for h, d_h in sizes for rank_k in (1, 2, 3) for rank_v in (1, 2, 3)]
    given = [largest_rank_q(*case) for case in cases]
    if not all(isinstance(n, int) for n in given):
        raise WrongAnswer("return a whole number")
    if any(n < 0 for n in given):
        raise WrongAnswer("a negative rank: return 0 where no R_Q is small enough")

    def largest(per_rank, values, not_reached=1):
        return [max(0, (2 * h * d - values(h, d, v) - not_reached) // per_rank(h, d, k)) for h, d, k, v in cases]

    def table(h, d, k):
        return k * (d + h)

    def v_rows(h, d, v):
        return h * v * d

    answers = {
        "": largest(table, v_rows),
        "fewer, not as many: at h = d_h = 32 and ranks 1, R_Q = 16 needs exactly what MHA needs": largest(
            table, v_rows, not_reached=0
        ),
        "the values are missing: h · R_V · d_h": largest(table, lambda h, d, v: 0),
        "the heads' weighing of P is missing: h · R_Q · R_K": largest(lambda h, d, k: k * d, v_rows),
        "R_K is missing: P has R_Q · R_K entries for each cached token": largest(lambda h, d, k: d + h, v_rows),
        "R_V is missing: the values cost h · R_V · d_h": largest(table, lambda h, d, v: h * d),
    }
    judge_cases(given, answers, cases)
