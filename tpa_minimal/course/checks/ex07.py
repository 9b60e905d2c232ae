"""Checkers of notebook 07's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge, judge_choices, normal, tensor


@exercise
def ex07_1(attempt):
    """The head count at which TPA with B_K = B_V has MHA's weights."""

    def heads(fixed, per_head, whole=round, budget=4):
        return lambda d_model, d_head, rank_q, rank: whole(
            (budget * d_model - fixed(d_head, rank_q, rank)) / per_head(d_head, rank_q, rank)
        )

    def fixed(w, q, r):
        return (q + r) * w

    def per_head(w, q, r):
        return q + 2 * r + w

    def right(d_model, d_head, rank_q, rank):
        return heads(fixed, per_head)(d_model, d_head, rank_q, rank)

    judge(
        attempt,
        right,
        [(768, 64, 6, 2), (1024, 64, 6, 2), (1600, 64, 6, 2), (2048, 128, 8, 1), (4096, 128, 16, 4), (512, 32, 3, 5)],
        [
            (heads(lambda w, q, r: (q + 2 * r) * w, per_head),
             "you counted two feature factors for keys and values; B_K = B_V is computed once"),
            (heads(fixed, lambda w, q, r: q + r + w),
             "you shared the head factors too; only B is shared, A_K and A_V stay separate"),
            (heads(lambda w, q, r: (q + 2 * r) * w, lambda w, q, r: q + r + w),
             "you shared the head factors instead; it is B that is shared, A_K and A_V stay separate"),
            (heads(fixed, lambda w, q, r: q + 2 * r),
             "the output projection is missing: d_model · h · d_h weights, so d_h more per head"),
            (heads(lambda w, q, r: 0, per_head),
             "the feature factors are missing: (R_Q + R) · d_h weights per input feature, whatever h is"),
            (heads(fixed, per_head, math.floor), "always rounded down: the nearest whole number was asked for"),
            (heads(fixed, per_head, math.ceil), "always rounded up: the nearest whole number was asked for"),
            (heads(fixed, per_head, float), "a whole number was asked for: a layer has no fraction of a head"),
            (heads(fixed, per_head, budget=3),
             "MHA has four matrices of d_model² weights: queries, keys, values, output"),
            (lambda d, w, q, r: d // w, "that is MHA's own head count, d_model / d_h"),
        ],
        "weights / d_model = (R_Q + 2R) h + (R_Q + R) d_h + h d_h, and MHA's is 4 d_model",
    )  # fmt: skip


def nucleus(logits, p, descending=True, exclusive=False, unsort=True, flat=False, probabilities=None):
    """Top-p filtering, with what people do wrong as options."""
    if flat:
        return nucleus(logits.view(1, -1), p, descending, exclusive, unsort).view(logits.shape)
    ordered, order = logits.sort(dim=-1, descending=descending)
    shares = ordered.softmax(-1) if probabilities is None else probabilities(ordered)
    outside = shares.cumsum(-1) > p if exclusive else shares.cumsum(-1) - shares >= p
    if unsort:
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
    return logits.masked_fill(outside, -math.inf)


@exercise
def ex07_2(attempt):
    """Nucleus sampling's filter."""
    # Row 0 is out of order, and 0.4 + 0.3 crosses p; row 1 is nearly certain.
    small = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.01, 0.01, 0.95, 0.03]])) + 3.0
    cases = [(small, 0.55), (small - 2.0, 0.85)]
    cases += [(2 * normal(B, V, seed=V).float() + 1, p) for B, V, p in ((3, 7, 0.6), (1, 20, 0.9), (5, 11, 0.3))]

    def otherwise(got, right):
        if (
            isinstance(got, torch.Tensor)
            and got.shape == right.shape
            and ((got > -math.inf) == (right > -math.inf)).all()
        ):
            return "the right tokens are kept, but their values changed: return the logits as they came"
        return "sort by probability, add up, keep all tokens up to the one that reaches p, and put the rest to -inf"

    def inside(change):
        return lambda logits, p: change(nucleus(logits, p))

    judge(
        attempt,
        nucleus,
        cases,
        [
            (lambda x, p: nucleus(x, p, unsort=False),
             "the mask is in sorted order: bring it back to the vocabulary's with scatter or gather"),
            (lambda x, p: nucleus(x, p, exclusive=True),
             "the token that crosses p belongs to the nucleus; you drop it, and a nearly certain token too"),
            (lambda x, p: nucleus(x, p, descending=False), "the most likely token is gone: sort in descending order"),
            (lambda x, p: nucleus(x, p, flat=True), "rows are mixed: treat each row by itself (dim=-1)"),
            (inside(lambda y: y.softmax(-1)),
             "that looks like probabilities: return logits, with -inf outside the nucleus"),
            (inside(lambda y: y.exp()), "that looks like probabilities: return logits, with -inf outside the nucleus"),
            (lambda x, p: nucleus(x, p).masked_fill(nucleus(x, p).isinf(), 0.0),
             "outside the nucleus a logit must be -inf: 0 is an ordinary logit"),
            (inside(lambda y: y.log_softmax(-1)),
             "the right tokens are kept, but their values changed: log_softmax is not the logits"),
            (lambda x, p: x.log_softmax(-1).masked_fill(nucleus(x, p).isinf(), -math.inf),
             "the right tokens are kept, but their values changed: log_softmax is not the logits"),
            (lambda x, p: nucleus(x, p, probabilities=lambda y: y), "add up probabilities (softmax), not logits"),
            (lambda x, p: x.masked_fill(x.softmax(-1) < p, -math.inf),
             "p is no threshold for a single probability: add them up"),
            (lambda x, p: x.masked_fill(x.softmax(-1) < 1 - p, -math.inf),
             "1 - p is no threshold for a single probability: add them up"),
            (lambda x, p: x, "nothing is filtered"),
        ],
        otherwise,
    )  # fmt: skip
    many = 3 * normal(4, 50, seed=1).float()
    if (tensor(attempt(many, 1.0)) == -math.inf).sum() > 4:  # rounding may drop the last token of a row
        raise WrongAnswer("p = 1 should keep every token")
    of_equal = (tensor(attempt(torch.zeros(1, 4), 0.5)) > -math.inf).sum()
    if of_equal == 4:
        raise WrongAnswer(
            "equal tokens: a threshold keeps all of them; keep only as many as are needed (sort and scatter)"
        )
    if of_equal != 2:
        raise WrongAnswer("two of four equal tokens reach p = 0.5 exactly, which is enough: stop at p or more")


@exercise
def ex07_3(attempt):
    """Which weights have a gradient at the first step."""
    names = ("embedding", "factor_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
    given = attempt()
    if isinstance(given, str) or not isinstance(given, (set, frozenset, list, tuple)) or set(given) - set(names):
        raise WrongAnswer(f"return a set of names among {', '.join(names)}")
    down = "its gradient comes back through down_proj, which is zero"
    itself = "it is zero itself, but what it multiplies is not, and that is what its gradient is made of"
    stream = "it is the output layer too, and it is reached along the residual stream, where nothing is zero"
    key = {
        "embedding": (True, f"it does move: {stream}"),
        "factor_proj": (False, "it does not move: its gradient comes back through out_proj, which is zero"),
        "gate_proj": (False, f"it does not move: {down}"),
        "up_proj": (False, f"it does not move: {down}"),
        "out_proj": (True, f"it does move: {itself}"),
        "down_proj": (True, f"it does move: {itself}"),
    }
    judge_choices({name: name in given for name in names}, key)
