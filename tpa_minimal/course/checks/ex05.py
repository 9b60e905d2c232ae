"""Checkers of notebook 05's exercises."""

import torch

from tpa_minimal.course.checks.judging import Raised, WrongAnswer, describe, exercise, judge, normal
from tpa_minimal.tpa import T6Config, TensorProductAttention, assemble, causal_attention


@exercise
def ex05_1(attempt):
    """Writing into a preallocated cache, with all checks before the write."""
    for B, h, max_len, d_h, length, T in ((2, 3, 6, 4, 3, 2), (3, 2, 9, 5, 4, 1), (1, 4, 8, 2, 0, 5)):
        new, room = normal(B, h, T, d_h, seed=1), torch.zeros(B, h, max_len, d_h, dtype=torch.float64)
        room[:, :, :length] = -1.0
        before, end = room.clone(), length + T
        cached = attempt(room, length, new.clone())
        if not isinstance(cached, torch.Tensor):
            raise WrongAnswer(f"return the tensor of all that is cached, not {describe(cached)}")
        if length and cached.shape == new.shape:
            raise WrongAnswer("you return the new positions only; attention needs the earlier ones too")
        if cached.shape == room.shape:
            raise WrongAnswer("you return the whole room: positions not yet filled would be attended to as zeros")
        if cached.shape != (B, h, end, d_h):
            raise WrongAnswer(
                f"{length} cached positions and {T} new ones should give {(B, h, end, d_h)}, not {tuple(cached.shape)}"
            )
        if not torch.equal(room[:, :, :length], before[:, :, :length]):
            raise WrongAnswer("earlier positions were overwritten: the first new one belongs at index `length`")
        if not torch.equal(room[:, :, length:end], new):
            raise WrongAnswer("the room does not hold the new positions: write into it, do not build another tensor")
        if room[:, :, end:].any():
            raise WrongAnswer("positions after the new ones were written too")
        if cached.data_ptr() != room.data_ptr() or not torch.equal(cached, room[:, :, :end]):
            raise WrongAnswer("you return a copy; slicing the room gives a view, whose cost does not grow")
    B, h, max_len, d_h = 2, 3, 6, 4
    room, new = normal(B, h, max_len, d_h, seed=2), normal(B, h, 2, d_h, seed=3)
    try:
        if attempt(room.clone(), 4, new).shape[2] != 6:
            raise WrongAnswer("exactly filling the room should work and return all 6 positions")
    except Raised as raised:
        if not isinstance(raised.error, ValueError):
            raise
        say = "4 cached and 2 new positions fit a room for 6 exactly; yours refuses: use > and not >="
        raise WrongAnswer(say) from None
    for wrong, length, what in (
        (new, 5, "5 cached and 2 new positions in a room for 6"),
        (normal(B, h, 9, d_h), 0, "9 new positions in a room for 6"),
        (new[:1], 3, "one sequence for a cache of two"),
        (normal(3, h, 2, d_h), 3, "three sequences for a cache of two"),
        (new[:, :1], 3, "one head for a cache of three"),
        (normal(B, 4, 2, d_h), 3, "four heads for a cache of three"),
        (new.transpose(0, 1), 3, "heads and sequences exchanged"),
        (new[..., :1], 3, "heads of width 1 for a cache of width 4"),
        (new[..., :2], 3, "heads of width 2 for a cache of width 4"),
        (normal(B, h, 2, 8), 3, "heads of width 8 for a cache of width 4"),
    ):
        kept = room.clone()
        try:
            attempt(kept, length, wrong)
        except Raised as raised:
            if isinstance(raised.error, AssertionError):
                raise WrongAnswer(f"{what}: raise ValueError; an assert is skipped under python -O") from None
            if isinstance(raised.error, RuntimeError):
                raise WrongAnswer(f"{what}: PyTorch noticed, not you; compare before writing, and say so") from None
            if not isinstance(raised.error, ValueError):
                raise
        else:
            raise WrongAnswer(f"{what}: nothing was raised; slices shorten and copy_ broadcasts silently")
        if not torch.equal(kept, room):
            raise WrongAnswer(f"{what}: you raised, but only after writing; check first")


@exercise
def ex05_2(attempt):
    """The largest context that fits a budget of bytes."""

    def numbers(c, ranks=None):
        return (ranks or c.rank_k + c.rank_v) * (c.n_head + c.d_head) * c.n_layer

    def right(config, budget, batch_size, bytes_per_number):
        return budget // (numbers(config) * batch_size * bytes_per_number)

    models = (
        T6Config.preset("small-124M"),
        T6Config.preset("xl-1.5B"),
        T6Config(vocab_size=9, n_layer=3, d_model=32, n_head=4, d_head=8, rank_k=1, rank_v=3),
        T6Config(vocab_size=9, n_layer=7, d_model=96, n_head=6, d_head=20, rank_q=4, rank_k=4, rank_v=1, max_len=64),
    )
    judge(
        attempt,
        right,
        [(c, n, *rest) for c, n in zip(models, (10**9, 10**9, 10**5, 10**7)) for rest in ((1, 2), (7, 4), (2, 1))],
        [
            (lambda c, n, B, size: right(c, n, B, size) * c.n_layer,
             "every layer has a cache of its own: multiply by n_layer"),
            (lambda c, n, B, size: n // (numbers(c) // c.n_layer * B * size),
             "every layer has a cache of its own: multiply by n_layer"),
            (lambda c, n, B, size: right(c, n, 1, size),
             "every sequence has a cache of its own: multiply by batch_size"),
            (lambda c, n, B, size: right(c, n, B, 1), "those are numbers, not bytes: multiply by bytes_per_number"),
            (lambda c, n, B, size: n // (2 * c.n_head * c.d_head * c.n_layer * B * size),
             "that is MHA's cache, 2 · h · d_h; TPA caches factors"),
            (lambda c, n, B, size: n // ((c.rank_k + c.rank_v) * c.d_head * c.n_layer * B * size),
             "only the b factors are counted; a_k and a_v are cached too"),
            (lambda c, n, B, size: n // ((c.rank_k + c.rank_v) * c.n_head * c.d_head * c.n_layer * B * size),
             "factors are cached, h + d_h numbers per rank, not their product"),
            (lambda c, n, B, size: n // (numbers(c, c.rank_q + c.rank_k + c.rank_v) * B * size),
             "the queries' factors are never cached: R_Q has no place here"),
            (lambda c, n, B, size: right(c, n, B, size) + 1, "rounded up: the last token would not fit"),
            (lambda c, n, B, size: n / (numbers(c) * B * size), "whole tokens only: round down, // and not /"),
            (lambda c, n, B, size: min(right(c, n, B, size), c.max_len),
             "config.max_len has no place here: the question is what the budget holds"),
            (lambda c, n, B, size: n // (numbers(c, 2 * c.rank_k) * B * size),
             "R_K and R_V can differ: (R_K + R_V), not 2 R_K"),
        ],
        "count the bytes that one more token of every conversation costs, in all layers",
    )  # fmt: skip


class Patient(TensorProductAttention):
    """A float64 layer whose use of the cache has the illness named (exercise 05.3)."""

    def __init__(self, illness):
        super().__init__(T6Config(vocab_size=2, n_layer=1, d_model=32, n_head=4, d_head=8, max_len=64))
        torch.nn.init.normal_(self.out_proj.weight, std=0.2)
        self._illness = illness
        self.double().requires_grad_(False)

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start, padding=None):
        cached = (a_k, b_k, a_v, b_v)
        if start > 0 and self._illness == "rounding":
            cached = (factor.half().double() for factor in cached)
        if start > 0 and self._illness == "batch":
            cached = (factor[:1].expand_as(factor) for factor in cached)
        if start > 0 and self._illness == "window":
            cached = (factor[:, -(a_q.shape[1] + 7) :] for factor in cached)
        a_k, b_k, a_v, b_v = cached
        return causal_attention(assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v), padding)


ILLNESSES = ["rounding", "batch", "healthy", "window"]


def patients() -> list:
    """Four layers for exercise 05.3: one healthy, three that misuse their cache."""
    return [Patient(illness) for illness in ILLNESSES]


@exercise
def ex05_3(attempt):
    """Naming three bugs and one healthy layer from how they behave, in any order."""
    hints = {
        ("healthy", "window"): "agrees with its full pass however long the context",
        ("healthy", "rounding"): "agrees with its full pass to 1e-10; is your comparison in float64?",
        ("healthy", "batch"): "is right for several different sequences together",
        ("batch", "healthy"): "is right for one sequence; decode two different ones together",
        ("batch", "rounding"): "is exact for a single sequence",
        ("batch", "window"): "is exact for a single sequence, however long",
        ("window", "healthy"): "is right while the context is short; decode more than 8 tokens past the prompt's start",
        ("window", "rounding"): "is exact while the context is short, and far off later",
        ("window", "batch"): "is wrong for a single sequence too",
        ("rounding", "healthy"): "is wrong from the fourth digit on; float64 should agree to 1e-10",
        ("rounding", "window"): "is a little wrong everywhere, also when all tokens fit any window",
        ("rounding", "batch"): "is wrong for a single sequence too",
    }
    right_so_far = False
    for order in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)):  # a rule that looks at behaviour does not mind the order
        truths = [ILLNESSES[i] for i in order]
        given = attempt([Patient(illness) for illness in truths])
        if isinstance(given, str) or not isinstance(given, (list, tuple)):
            raise WrongAnswer(f"return a list of four words, not {describe(given)}")
        if len(given) != 4:
            raise WrongAnswer(f"there are four patients, and your list has {len(given)} words")
        unknown = [word for word in given if word not in ILLNESSES]
        if unknown:
            raise WrongAnswer(f'{unknown[0]!r} is not one of the words "healthy", "window", "rounding" and "batch"')
        for i, (truth, said) in enumerate(zip(truths, given)):
            if truth != said:
                if right_so_far:
                    raise WrongAnswer(
                        "right for these four, but not when they come in another order: decide by experiments"
                    )
                raise WrongAnswer(f'patient {i} is not "{said}": it {hints[truth, said]}')
        right_so_far = True
