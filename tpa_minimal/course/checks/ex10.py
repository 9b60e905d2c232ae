"""Checkers of notebook 10's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge, judge_choices


@exercise
def ex10_1(merge):
    """Rescale each stretch to the common maximum; an empty stretch weighs nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 50, 3, generator=generator, dtype=torch.float64)  # (stretches, positions, heads)
    v = torch.randn(4, 50, 3, 5, generator=generator, dtype=torch.float64)
    logits += 2000  # 2^2000 overflows: the maximum must be subtracted before the power is taken

    def leave(logits):
        m = logits.amax(1)
        weights = torch.exp2(logits - m.clamp_min(-1e9)[:, None])
        return m, weights.sum(1), torch.einsum("imh,imhd->ihd", weights, v)

    for full in (logits, logits.masked_fill(torch.tensor([False, True, False, False])[:, None, None], -math.inf)):
        m, s, y = leave(full)
        exact = torch.einsum("mh,mhd->hd", (full.flatten(0, 1) * math.log(2)).softmax(0), v.flatten(0, 1))
        got = merge(m.clone(), s.clone(), y.clone())
        shrink = torch.exp2(m - m.amax(0))
        natural = torch.exp(m - m.amax(0))
        share = s / s.sum(0)
        mistakes = {
            "the stretches had different maxima: before adding, multiply s and y by 2^(m_i - m)": y.sum(0)
            / s.sum(0)[:, None],
            "logits are in powers of 2 here: exp2, not exp": (natural[..., None] * y).sum(0)
            / (natural * s).sum(0)[:, None],
            "y is rescaled and s is not": (shrink[..., None] * y).sum(0) / s.sum(0)[:, None],
            "a mean of the stretches' outputs: each must weigh as much as the share of the softmax that fell into it": (
                (y / s[..., None]).nan_to_num().mean(0)
            ),
            "weighed by s alone: that forgets how large each stretch's logits were": (
                share[..., None] * (y / s[..., None]).nan_to_num()
            ).sum(0),
            "weighed by 2^(m_i - m) alone: a stretch's share of the softmax is 2^(m_i - m) s_i": (
                shrink[..., None] * (y / s[..., None]).nan_to_num()
            ).sum(0)
            / shrink.sum(0)[:, None],
            "not divided by the merged sum": (shrink[..., None] * y).sum(0),
        }
        if isinstance(got, torch.Tensor) and got.shape == exact.shape and not got.isfinite().all():
            raise WrongAnswer(
                "nan or inf: subtract the largest m before taking powers, and never divide by an empty stretch's s"
            )
        judge(got, exact, mistakes, "not the softmax over all stretches; try with two stretches of one position each")


@exercise
def ex10_2(least_ms):
    """All factors of all positions, once."""
    for case in ((4, 5000, 34, 64, 3, 2, 2, 2e3), (1, 32768, 32, 64, 1, 1, 4, 30.0)):
        B, M, h, d_h, rank_k, rank_v, size, speed = case
        numbers = B * M * (rank_k + rank_v) * (h + d_h)
        unit = size / (speed * 1e9) * 1000
        mistakes = {
            "that is MHA's cache: TPA keeps (R_K + R_V)(h + d_h) numbers per position": 2 * B * M * h * d_h * unit,
            "a rank's two factors are read one by one, h + d_h numbers, not their product": (
                B * M * (rank_k + rank_v) * h * d_h * unit
            ),
            "the head factors are read too: h + d_h numbers for each rank": B * M * (rank_k + rank_v) * d_h * unit,
            "keys and values may have different ranks": 2 * B * M * rank_k * (h + d_h) * unit,
            "one sequence only: each sequence of the batch has its own cache": numbers / B * unit,
            "that counts numbers as if they were bytes": numbers * unit / size,
            "those are seconds": numbers * unit / 1000,
            "bits and bytes: `size` is in bytes already": 8 * numbers * unit,
            "a GB is 10^9 bytes here, not 2^30": numbers * unit * 1e9 / 2**30,
        }
        got = least_ms(*case)
        judge(got, numbers * unit, mistakes, f"for {M} positions you say {got!r} ms, and it is {numbers * unit:.3g} ms")


@exercise
def ex10_3(judgement):
    """What the splitting, the mask, the ranks and the roofline imply."""
    reasons = {
        "a": "Sixty-four sequences already give work to many processors; it is the single one that needs the split.",
        "b": "The merge is an identity: only the order of additions changes.",
        "c": "Factors of 0 give the logit 0, and a logit of 0 takes its part of the softmax's sum.",
        "d": "The query is assembled once; per cached position R_Q no longer occurs.",
        "e": "Under the flat part arithmetic is the limit, and it stays the same.",
    }
    judge_choices(judgement(), {"a": False, "b": True, "c": True, "d": False, "e": False}, reasons)
