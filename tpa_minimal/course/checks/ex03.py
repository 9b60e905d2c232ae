"""Checkers of notebook 03's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, close, exercise, expect_tensor
from tpa_minimal.tpa import apply_rope, assemble, rope_tables


@exercise
def ex03_1(attempt):
    """What may be done to b_k either before or after RoPE: {name: bool}."""
    why = {
        "mix_ranks": (True, "it acts from the left, on the rows, and RoPE acts from the right: Theorem 3.1 itself"),
        "feature_matrix": (False, "it stands on the same side as T_s, and two matrices rarely commute: MLA's trouble"),
        "feature_gain": (False, "the two features of a plane get different gains, so turning then stretching a plane "
                                "is not stretching then turning it"),
        "unit_length": (True, "a rotation keeps every length, so it does not matter when you divide by it"),
        "bias": (False, "added before RoPE the bias is rotated by T_s, added after it is not"),
        "number": (True, "a number commutes with every matrix"),
    }  # fmt: skip
    answers = attempt()
    if not isinstance(answers, dict) or set(answers) != set(why):
        raise WrongAnswer(f"return a dict with exactly these keys: {', '.join(why)}")
    for name, (truth, reason) in why.items():
        if answers[name] not in (True, False):
            raise WrongAnswer(f"{name}: answer True or False, not {answers[name]!r}")
        if bool(answers[name]) != truth:
            verb = "does commute" if truth else "does not commute"
            raise WrongAnswer(f"{name} {verb} with RoPE: {reason}. Try it with apply_rope at position 1")


def _interleaved(x, cos, sin, sense=1):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sense * sin[:, None]
    return x1 * cos + x2 * sin, x2 * cos - x1 * sin


@exercise
def ex03_2(attempt):
    """RoPE with feature 2j paired with feature 2j + 1: attempt(x, cos, sin)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64)
    cos, sin = rope_tables(torch.arange(1, 6), 8, 100.0, torch.float64)
    try:
        y = attempt(x.clone(), cos, sin)
    except RuntimeError as error:
        if "must match the size" not in str(error):
            raise
        raise WrongAnswer(
            f"your code raised RuntimeError: {error}. Probably the tables need an axis for `any`: cos[:, None]"
        ) from error
    y = expect_tensor(y, x.shape)
    right = _interleaved(x, cos, sin)
    if close(y, torch.stack(right, dim=-1).flatten(-2)):
        return
    if close(y, apply_rope(x, cos, sin)):
        raise WrongAnswer(
            "this is the half-split layout again: pair feature 2j with 2j + 1, x[..., 0::2] and x[..., 1::2]"
        )
    if close(y, torch.cat(right, dim=-1)):
        raise WrongAnswer(
            "the numbers are right but in the wrong places: the even features come first, then the odd ones. "
            "Interleave them again, with torch.stack(..., dim=-1).flatten(-2)"
        )
    if close(y, torch.stack(_interleaved(x, cos, sin, sense=-1), dim=-1).flatten(-2)):
        raise WrongAnswer(
            "this turns the other way: for rows, x T_t has first feature x1 cos + x2 sin and second x2 cos - x1 sin"
        )
    if not close(y.norm(dim=-1), x.norm(dim=-1)):
        raise WrongAnswer(
            "lengths change, so this is not a rotation: check the signs, and that x2's new value uses the old x1"
        )
    raise WrongAnswer(
        "a rotation, but not the one asked for: check that plane j = (2j, 2j + 1) uses column j of the tables"
    )


@exercise
def ex03_3(attempt):
    """Move pre-rotated keys back by some positions: attempt(b_k, by, base)."""
    generator = torch.Generator().manual_seed(0)
    for by, base in ((7, 10000.0), (3, 500.0)):
        bare = torch.randn(2, 6, 3, 8, generator=generator, dtype=torch.float64)

        def at(positions, b=bare, base=base):
            return apply_rope(b, *rope_tables(positions, 8, base, torch.float64))

        held = torch.arange(by, by + 6)
        b_k = at(held)
        y = expect_tensor(attempt(b_k.clone(), by, base), b_k.shape)
        if close(y, at(held - by)):
            continue
        if close(y, b_k):
            raise WrongAnswer("the factors are still at their old positions")
        if close(y, at(held + by)):
            raise WrongAnswer(f"the tokens moved forward by {by} instead of back: turn by -by")
        if close(y, bare):
            raise WrongAnswer(
                "this undoes the whole rotation: all tokens are at position 0 now; each must keep its distances"
            )
        if close(y, at(held - by, b_k)):
            raise WrongAnswer(
                "the cached factors are already rotated, and you rotated them by their new positions on top. "
                "What is the difference between the old and the new angle of one token?"
            )
        if base != 10000.0 and close(y, apply_rope(b_k, *rope_tables(torch.tensor([-by]), 8, 1e4, torch.float64))):
            raise WrongAnswer("use the base that is handed in, not 10000")
        if torch.allclose(y.double(), at(held - by), rtol=0, atol=1e-5):
            raise WrongAnswer("nearly right, off by rounding: build the tables in b_k.dtype")
        if not close(y.norm(dim=-1), b_k.norm(dim=-1)):
            raise WrongAnswer(
                "lengths change, so this is not a rotation: use apply_rope with the tables of one position"
            )
        raise WrongAnswer("the tokens are not at (old position - by): T_s is to become T_(s - by) = T_s T_(-by)")


class _Layer:
    """An attention layer as a black box: layer(x, start) -> logits (1, h, T, T) and outputs (1, T, h, d_h)."""

    def __init__(self, kind, scale, seed):
        generator = torch.Generator().manual_seed(seed)
        self.d_model, self._h, self._d_head, self._kind = 24, 4, 16, kind
        self._weights = [
            scale * torch.randn(24, 2 * width, generator=generator, dtype=torch.float64) / 5 for width in (4, 16) * 3
        ]

    def __call__(self, x, start=0):
        a_q, b_q, a_k, b_k, a_v, b_v = (
            (x.double() @ w).unflatten(-1, (2, -1)) for w in self._weights
        )  # (1, T, 2, h or d_h)
        dtype = torch.bfloat16 if self._kind == "bfloat16 tables" else torch.float64
        tables = rope_tables(torch.arange(start, start + x.shape[1]), self._d_head, 10000.0, dtype)
        rotated = {"only keys rotated": "k", "values rotated too": "qkv"}.get(self._kind, "qk")
        b_q, b_k, b_v = (apply_rope(b, *tables) if n in rotated else b for n, b in zip("qkv", (b_q, b_k, b_v)))
        logits = torch.einsum("bthd,bshd->bhts", assemble(a_q, b_q), assemble(a_k, b_k)) / math.sqrt(self._d_head)
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(ahead, -math.inf).softmax(-1)
        return logits, torch.einsum("bhts,bshd->bthd", weights, assemble(a_v, b_v))


@exercise
def ex03_4(attempt):
    """Tell from outside what is wrong with a layer's RoPE: attempt(layer) -> one of four names."""
    hints = {
        ("right", "bfloat16 tables"): "rounding in float64 is about 1e-15 of the values' size, bfloat16 about 1e-3",
        ("bfloat16 tables", "right"): "compare relative to the size of the values, with a tolerance well below 1e-3",
        ("bfloat16 tables", "only keys rotated"): "its logits change by about 1e-3 of their size, not by all of it",
        ("values rotated too", "right"): "its logits are perfect; look at the outputs too",
        ("values rotated too", "only keys rotated"): "its logits do not change with start; only its outputs do",
        ("values rotated too", "bfloat16 tables"): "its logits do not change with start; only its outputs do",
        (
            "only keys rotated",
            "values rotated too",
        ): "its logits change with start; rotated values would leave them alone",
        ("only keys rotated", "right"): "compare the logits at start=0 and, say, at start=1000",
    }
    state = torch.random.get_rng_state()
    try:
        for scale in (1.0, 0.03, 3.0):
            for seed, truth in enumerate(("right", "only keys rotated", "values rotated too", "bfloat16 tables")):
                torch.manual_seed(seed)
                answer = attempt(_Layer(truth, scale, seed))
                if answer == truth:
                    continue
                names = {name for pair in hints for name in pair}
                if answer not in names:
                    raise WrongAnswer(f"answer one of {', '.join(sorted(names))}; yours was {answer!r}")
                size = "" if scale == 1.0 else (
                    f" (Right at ordinary size, wrong with weights {scale} times as large: "
                    "divide the change by the size of what changes.)"
                )  # fmt: skip
                hint = hints.get(
                    (truth, answer), "shift the start and see which of logits and outputs change, and how much"
                )
                raise WrongAnswer(f"you called '{answer}' a layer that is '{truth}': {hint}.{size}")
    finally:
        torch.random.set_rng_state(state)
