"""Checkers of notebook 07's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge_cases
from tpa_minimal.tpa import T6, T6Config


@exercise
def ex07_1(shared_b_heads):
    """The head count at which TPA with B_K = B_V has MHA's weights."""

    def heads(fixed, per_head, d_model, to_int=round):
        return to_int((4 * d_model - fixed) / per_head)

    cases = [(768, 64, 6, 2), (1024, 64, 6, 2), (1600, 64, 6, 2), (2048, 128, 8, 1), (4096, 128, 16, 4)]
    given = [shared_b_heads(*case) for case in cases]
    if not all(isinstance(n, int) for n in given):
        raise WrongAnswer("return a whole number: a layer has no fraction of a head")
    answers = {
        "": lambda d, w, q, r: heads((q + r) * w, q + 2 * r + w, d),
        "you counted two feature factors for keys and values; B_K = B_V is computed once": lambda d, w, q, r: heads(
            (q + 2 * r) * w, q + 2 * r + w, d
        ),
        "you shared the head factors too; only B is shared, A_K and A_V stay separate": lambda d, w, q, r: heads(
            (q + r) * w, q + r + w, d
        ),
        "you shared the head factors instead; it is B that is shared, A_K and A_V stay separate": lambda d, w, q, r: (
            heads((q + 2 * r) * w, q + r + w, d)
        ),
        "the output matrix is missing: d_model · h · d_h weights, so d_h more per head": lambda d, w, q, r: heads(
            (q + r) * w, q + 2 * r, d
        ),
        "the feature factors are missing: (R_Q + R) · d_h weights per input feature, whatever h is": (
            lambda d, w, q, r: heads(0, q + 2 * r + w, d)
        ),
        "always rounded down: the nearest whole number was asked for": lambda d, w, q, r: heads(
            (q + r) * w, q + 2 * r + w, d, math.floor
        ),
        "always rounded up: the nearest whole number was asked for": lambda d, w, q, r: heads(
            (q + r) * w, q + 2 * r + w, d, math.ceil
        ),
    }
    judge_cases(given, {say: [rule(*case) for case in cases] for say, rule in answers.items()}, cases)


@exercise
def ex07_2(top_p):
    """Nucleus sampling's filter."""
    # Row 0 is out of order, and 0.4 + 0.3 crosses p; row 1 is nearly certain.
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.01, 0.01, 0.95, 0.03]]))
    before = logits.clone()
    out = top_p(logits, 0.55)
    if not isinstance(out, torch.Tensor) or out.shape != logits.shape:
        raise WrongAnswer(f"return logits of the shape that came in, {tuple(logits.shape)}")
    if not torch.equal(logits, before):
        raise WrongAnswer("the logits passed in have changed: masked_fill makes a copy, masked_fill_ does not")
    if (out >= 0).all():  # all logits passed in are negative
        raise WrongAnswer("that looks like probabilities: return logits, with -inf outside the nucleus")
    kept = (out > -math.inf).tolist()
    right = [[False, True, False, True], [False, False, True, False]]
    if kept != right:
        if (top_p(before[:1], 0.55) > -math.inf).tolist() == right[:1]:
            raise WrongAnswer("one row alone is right, two together are not: treat each row by itself (dim=-1)")
        if kept[0] == [True, True, False, False] or kept[0] == [True, False, False, False]:
            raise WrongAnswer("the mask is in sorted order: bring it back to the vocabulary's with scatter or gather")
        if not any(kept[1]):
            raise WrongAnswer(
                "a row with one very likely token keeps nothing: the token that crosses p belongs to the nucleus"
            )
        if kept[0] == [False, True, False, False]:
            raise WrongAnswer("the token that crosses p is missing: 0.4 alone is below 0.55, 0.4 + 0.3 reaches it")
        if all(kept[0]):
            raise WrongAnswer("you keep everything: add up probabilities (softmax), not logits")
        if not kept[0][1]:
            raise WrongAnswer("the likeliest token is gone: sort in descending order")
        raise WrongAnswer(f"for the probabilities [0.1, 0.4, 0.2, 0.3] and p = 0.55 you keep {kept[0]}")
    finite = out[out > -math.inf]
    if not torch.allclose(finite, before[out > -math.inf]):
        raise WrongAnswer("the right tokens are kept, but their values changed: return logits, not probabilities")
    many = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    if (top_p(many, 1.0) == -math.inf).sum() > 4:  # rounding may drop the last token of a row
        raise WrongAnswer("p = 1 should keep every token")
    of_equal = (top_p(torch.zeros(1, 4), 0.5) > -math.inf).sum()
    if of_equal == 4:
        raise WrongAnswer(
            "equal tokens: a threshold keeps all of them; keep only as many as are needed (sort and scatter)"
        )
    if of_equal != 2:
        raise WrongAnswer("two of four equal tokens reach p = 0.5 exactly, which is enough: stop at p or more")


@exercise
def ex07_3(moved_by_the_first_step):
    """Which weights have a gradient at the first step, measured on a real model."""
    names = ("embedding", "factor_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
    given = moved_by_the_first_step()
    if not isinstance(given, (set, list, tuple)) or set(given) - set(names):
        raise WrongAnswer(f"return a set of names among {', '.join(names)}")
    model = T6(T6Config(vocab_size=16, n_layer=2, d_model=16, n_head=2, d_head=8))
    tokens = torch.arange(12).view(2, 6)
    with torch.enable_grad():  # the reader may have turned gradients off
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens + 1).flatten()).backward()
    moving = [key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    moved = {name for name in names if any(name in key for key in moving)}
    reasons = {
        "embedding": "it is the output matrix too, and it is reached along the residual stream, where nothing is zero",
        "factor_proj": "its gradient comes back through out_proj, which is zero",
        "gate_proj": "its gradient comes back through down_proj, which is zero",
        "up_proj": "its gradient comes back through down_proj, which is zero",
        "out_proj": "it is zero itself, but what it multiplies is not, and that is what its gradient is made of",
        "down_proj": "it is zero itself, but what it multiplies is not, and that is what its gradient is made of",
    }
    for name in names:
        if (name in given) != (name in moved):
            does = "does move" if name in moved else "does not move"
            raise WrongAnswer(f"{name} {does}: {reasons[name]}")
