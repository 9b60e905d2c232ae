"""Checkers of notebook 03's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, describe, exercise, judge, judge_names, normal
from tpa_minimal.tpa import apply_rope, assemble, rope_tables


def operations(d_head: int, seed: int) -> dict:
    """What may be done to the rows of b_k: name -> (operation, whether it commutes with RoPE, why)."""
    left, right, row, gain = normal(3, 3, seed=seed), normal(d_head, d_head, seed=seed), *normal(2, d_head, seed=seed)
    last = torch.ones_like(row).index_fill(0, torch.tensor(d_head - 1), 2.0)
    planes, half = gain[: d_head // 2].repeat(2), d_head // 2
    return {
        "mixing the ranks": (lambda x: left @ x, True, "it acts from the left, on rows, and RoPE from the right"),
        "a matrix from the right": (lambda x: x @ right, False,
            "it stands on the same side as Θ_s, and two matrices rarely commute"),
        "a gain for each feature": (lambda x: x * row, False, "the two features of a plane get different gains"),
        "a gain for each plane": (lambda x: x * planes, True, "both features of a plane get the same gain"),
        "unit length": (lambda x: x / x.norm(dim=-1, keepdim=True), True, "a rotation keeps every length"),
        "adding a row": (lambda x: x + row, False, "the row is rotated in one order and not in the other"),
        "multiplying by a number": (lambda x: 1.7 * x, True, "a number commutes with every matrix"),
        "a gain for one feature": (lambda x: x * last, False,
            "it spares all planes but the last, which is no longer turned as a whole; compare all features"),
        "exchanging the halves": (lambda x: x.roll(half, -1), False, "a mirrored plane rotates the other way"),
        "a quarter turn": (lambda x: torch.cat((x[..., half:], -x[..., :half]), -1), True,
            "rotations of one plane commute with each other"),
        "cutting off negative entries": (lambda x: x.relu(), False, "a rotation changes which entries are negative"),
        "almost a number": (lambda x: x * (1 + 1e-4 * row), False,
            "the gains differ by 1e-4 only; rounding in float64 is 1e-15, so use a tolerance near 1e-9"),
    }  # fmt: skip


@exercise
def ex03_1(attempt):
    """Whether an operation commutes with RoPE, by experiment: attempt(operation, d_head) -> bool."""
    cases = [(d, name, case) for d, seed in ((8, 1), (6, 2)) for name, case in operations(d, seed).items()]
    given = [attempt(operation, d) for d, _, (operation, *_) in cases]
    for answer in given:
        if answer not in (True, False):
            raise WrongAnswer(f"return True or False for every operation, not {describe(answer)}")
    truths = [truth for _, _, (_, truth, _) in cases]
    if all(given):
        raise WrongAnswer(
            "you find that everything commutes. At position 0 nothing is rotated; use others, and compare the values"
        )
    if not any(given):
        raise WrongAnswer("you find that nothing commutes. Rounding: compare with torch.allclose, not with ==")
    if sum(truths) > sum(given) + 1 and all(truth or not answer for answer, truth in zip(given, truths)):
        raise WrongAnswer("right up to rounding, which `==` and torch.equal do not forgive: use torch.allclose")
    for answer, truth, (d, name, (_, _, reason)) in zip(given, truths, cases):
        if answer != truth:
            verb = "commutes" if truth else "does not commute"
            raise WrongAnswer(
                f"{name} (d_head = {d}) {verb} with RoPE: {reason}. Compare operation(apply_rope(b, ...)) with "
                "apply_rope(operation(b), ...) for random b at several positions"
            )


def interleaved(x, cos, sin, sense=1, join="stack"):
    """RoPE with features 2j and 2j + 1 as plane j."""
    x1, x2, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sense * sin[:, None]
    parts = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    return torch.cat(parts, -1) if join == "cat" else torch.stack(parts, -1).flatten(-2)


def overwritten(x, cos, sin):
    x1, x2, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    x1 = x1 * cos + x2 * sin
    return torch.stack((x1, x2 * cos - x1 * sin), -1).flatten(-2)


def of_the_inputs_dtype(attempt):
    """The attempt, whose result must have the dtype of its first argument."""

    def checked(x, *rest):
        y = attempt(x, *rest)
        if isinstance(y, torch.Tensor) and y.dtype != x.dtype:
            raise WrongAnswer(
                f"the result is in {y.dtype} and the input in {x.dtype}: keep the type, or digits are lost"
            )
        return y

    return checked


@exercise
def ex03_2(attempt):
    """RoPE with feature 2j paired with feature 2j + 1: attempt(x, cos, sin)."""
    sizes = ((2, 5, 3, 8), (1, 4, 2, 6), (3, 2, 1, 12))
    judge(
        of_the_inputs_dtype(attempt),
        interleaved,
        [(normal(*size), *rope_tables(torch.arange(1, size[1] + 1), size[3], 100.0, torch.float64)) for size in sizes],
        [
            (apply_rope,
             "this is the half-split layout again: pair feature 2j with 2j + 1, x[..., 0::2] and x[..., 1::2]"),
            (lambda x, cos, sin: interleaved(x, cos, sin, join="cat"),
             "the numbers are right but in the wrong places: the even features come first, then the odd ones. "
             "Interleave them again, with torch.stack(..., dim=-1).flatten(-2)"),
            (lambda x, cos, sin: interleaved(x, cos, sin, sense=-1),
             "this rotates the other way: for rows, x Θ_t has first feature x1 cos + x2 sin and second x2 cos "
             "- x1 sin"),
            (lambda x, cos, sin: interleaved(x, cos.flip(-1), sin.flip(-1)),
             "the planes use the tables in reverse order: plane j = (2j, 2j + 1) uses column j"),
            (lambda x, cos, sin: interleaved(x, sin, cos), "cos and sin are exchanged"),
            (overwritten, "x2's new value must use the old x1, which you have overwritten"),
            (lambda x, cos, sin: x, "nothing is rotated"),
        ],
        lambda got, right: (
            "expected another pairing or another column: plane j = (2j, 2j + 1) uses column j of the tables, with an "
            "axis for `any`, cos[:, None]"
            if abs(float(torch.as_tensor(got).norm() / right.norm()) - 1) < 1e-9
            else "lengths change, so this is not a rotation: check the signs, and that x2's new value uses the old x1"
        ),
    )  # fmt: skip


def interleaved_tables(cos, sin):
    """The tables doubled as for the half-split layout and then read at even places."""
    return torch.cat((cos, cos), -1)[:, ::2], torch.cat((sin, sin), -1)[:, ::2]


def rotated(b, positions, base=1e4, dtype=torch.float64):
    return apply_rope(b, *rope_tables(positions, b.shape[-1], base, dtype))


@exercise
def ex03_3(attempt):
    """Move pre-rotated keys back by some positions: attempt(b_k, by, base)."""

    def moved(b_k, by, base, to=-1, dtype=torch.float64):
        return rotated(b_k, torch.tensor([to * by]), base, dtype)

    def own(b_k, by):
        return torch.arange(by, by + b_k.shape[1])

    bare = [(normal(2, 6, 3, 8), 7, 10000.0), (normal(1, 4, 2, 6, seed=1), 3, 500.0), (normal(2, 3, 1, 4), 20, 50.0)]
    judge(
        of_the_inputs_dtype(attempt),
        moved,
        [(rotated(b, own(b, by), base), by, base) for b, by, base in bare],
        [
            (lambda b, by, base: b, "the factors are still at their old positions"),
            (lambda b, by, base: moved(b, by, base, to=1), "the tokens moved forward by `by`: rotate by -by"),
            (lambda b, by, base: rotated(b, -own(b, by), base),
             "this undoes the whole rotation: all tokens are at position 0 now; each must keep its distances"),
            (lambda b, by, base: rotated(b, own(b, by) - by, base),
             "the cached factors are already rotated, and you rotated them by their new positions on top. "
             "What is the difference between the old and the new angle of one token?"),
            (lambda b, by, base: moved(b, by, 1e4), "use the base that is handed in, not 10000"),
            (lambda b, by, base: moved(b, by, base, dtype=torch.float32),
             "nearly right, off by rounding: build the tables in b_k.dtype"),
            (lambda b, by, base: b[:, by:], "you cut tokens off; they are cut off already, and all that is left moves"),
        ],
        lambda got, right: (
            "the tokens are not at (old position - by): Θ_s is to become Θ_(s - by) = Θ_s Θ_(-by)"
            if abs(float(torch.as_tensor(got).norm() / right.norm()) - 1) < 1e-9
            else "lengths change, so this is not a rotation: use apply_rope with the tables of one position"
        ),
    )  # fmt: skip


class HiddenLayer:
    """An attention layer as a black box: layer(x, start) -> logits (1, h, T, T) and outputs (1, T, h, d_h)."""

    def __init__(self, kind, scale, seed):
        self.d_model, self._kind = 24, kind
        self._weights = [scale * normal(24, 2 * width, seed=10 * seed + i) / 5 for i, width in enumerate((4, 16) * 3)]

    def __call__(self, x, start=0):
        a_q, b_q, a_k, b_k, a_v, b_v = ((x.double() @ w).unflatten(-1, (2, -1)) for w in self._weights)
        tables = rope_tables(torch.arange(start, start + x.shape[1]), 16, 10000.0, torch.float64)
        if self._kind == "bfloat16 tables":
            tables = [table.bfloat16() for table in tables]
        which = {"only keys rotated": "k", "values rotated too": "qkv"}.get(self._kind, "qk")
        b_q, b_k, b_v = (apply_rope(b, *tables) if n in which else b for n, b in zip("qkv", (b_q, b_k, b_v)))
        logits = torch.einsum("bthd,bshd->bhts", assemble(a_q, b_q), assemble(a_k, b_k)) / math.sqrt(16)
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(ahead, -math.inf).softmax(-1)
        return logits, torch.einsum("bhts,bshd->bthd", weights, assemble(a_v, b_v))


@exercise
def ex03_4(attempt):
    """Tell from outside what is wrong with a layer's RoPE: attempt(layer) -> one of four names."""
    right, keys, values, narrow = "right", "only keys rotated", "values rotated too", "bfloat16 tables"
    unseen = "its logits do not change with start; only its outputs do"
    far = "its logits change with start by all of their size"
    hints = {
        (right, keys): "its logits do not change with start",
        (right, values): "its outputs do not change with start",
        (right, narrow): "rounding in float64 is about 1e-15 of the values' size, bfloat16 about 1e-3",
        (narrow, right): "compare relative to the size of the values, with a tolerance well below 1e-3",
        (narrow, keys): "its logits change by about 1e-3 of their size, not by all of it",
        (narrow, values): "its logits change too, by about 1e-3 of their size",
        (values, right): "its logits are perfect; look at the outputs too",
        (values, keys): unseen,
        (values, narrow): unseen,
        (keys, values): "its logits change with start; rotated values would leave them alone",
        (keys, right): "compare the logits at start=0 and, say, at start=1000",
        (keys, narrow): f"{far}, and bfloat16 is 1e-3 of it",
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        cases = []
        for scale in (1.0, 0.03, 3.0):
            remark = "" if scale == 1.0 else (
                f". (Right at ordinary size, wrong with weights {scale} times as large: divide the change by the size "
                "of what changes.)"
            )  # fmt: skip
            cases += [
                (HiddenLayer(kind, scale, i), kind, remark) for i, kind in enumerate((right, keys, values, narrow))
            ]
        judge_names(attempt, cases + [cases[2], cases[0]], hints)
    finally:
        torch.random.set_rng_state(state)
