"""Checkers of notebook 05's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge_cases
from tpa_minimal.tpa import T6Config, TensorProductAttention, assemble, causal_attention


@exercise
def ex05_1(append):
    """Writing into a preallocated cache, with all checks before the write."""
    new = torch.arange(2 * 3 * 2 * 4.0).view(2, 3, 2, 4) + 1
    room = torch.zeros(2, 3, 6, 4)
    room[:, :, :3] = -1.0
    before = room.clone()
    held = append(room, 3, new)
    if not isinstance(held, torch.Tensor):
        raise WrongAnswer("return the tensor of all that is held")
    if held.shape == new.shape:
        raise WrongAnswer("you return the new positions only; attention needs the earlier ones too")
    if held.shape == room.shape:
        raise WrongAnswer("you return the whole room: positions not yet filled would be attended to as zeros")
    if held.shape != (2, 3, 5, 4):
        raise WrongAnswer(f"3 positions held and 2 new should give (2, 3, 5, 4), not {tuple(held.shape)}")
    if not torch.equal(room[:, :, :3], before[:, :, :3]):
        raise WrongAnswer("earlier positions were overwritten: the first new one belongs at index `length`")
    if not torch.equal(room[:, :, 3:5], new):
        raise WrongAnswer("the room does not hold the new positions: write into it, do not build another tensor")
    if held.data_ptr() != room.data_ptr():
        raise WrongAnswer("you return a copy; slicing the room gives a view, whose cost does not grow")
    try:
        if append(room.clone(), 4, new).shape[2] != 6:
            raise WrongAnswer("exactly filling the room should work and return all 6 positions")
    except ValueError:
        raise WrongAnswer("4 held and 2 new fit a room for 6 exactly; yours refuses: use > and not >=") from None
    for wrong, length, what in (
        (new, 5, "5 held and 2 new in a room for 6"),
        (new[:1], 3, "one sequence for a cache of two"),
        (new[:, :1], 3, "one head for a cache of three"),
    ):
        kept = room.clone()
        try:
            append(kept, length, wrong)
        except ValueError:
            pass
        except AssertionError:
            raise WrongAnswer(f"{what}: raise ValueError; an assert is skipped under python -O") from None
        except RuntimeError:
            raise WrongAnswer(f"{what}: PyTorch noticed, not you; compare before writing, and say so") from None
        else:
            raise WrongAnswer(f"{what}: nothing was raised; slices shorten and copy_ broadcasts without a word")
        if not torch.equal(kept, room):
            raise WrongAnswer(f"{what}: you raised, but only after writing; check first")


@exercise
def ex05_2(longest_context):
    """The largest context that fits a budget of bytes."""
    small, large = T6Config.preset("small-124M"), T6Config.preset("xl-1.5B")
    cases = [(c, 10**9, *rest) for c in (small, large) for rest in ((1, 2), (7, 4))]
    cases.append((T6Config(vocab_size=9, n_layer=3, d_model=32, n_head=4, d_head=8, rank_k=1, rank_v=3), 10**5, 2, 2))

    def tokens(numbers, layers=True, batch=True, width=True):
        return [
            n // (numbers(c) * (c.n_layer if layers else 1) * (b if batch else 1) * (w if width else 1))
            for c, n, b, w in cases
        ]

    def right(c):
        return (c.rank_k + c.rank_v) * (c.n_head + c.d_head)

    given = [longest_context(*case) for case in cases]
    if not all(isinstance(n, int) for n in given):
        raise WrongAnswer("return a whole number of tokens, rounded down: // and not /")
    answers = {
        "": tokens(right),
        "every layer has a cache of its own: multiply by n_layer": tokens(right, layers=False),
        "every sequence has a cache of its own: multiply by batch_size": tokens(right, batch=False),
        "those are numbers, not bytes: multiply by bytes_per_number": tokens(right, width=False),
        "that is MHA's cache, 2 · h · d_h; TPA keeps factors": tokens(lambda c: 2 * c.n_head * c.d_head),
        "only the b factors are counted; a_k and a_v are cached too": tokens(
            lambda c: (c.rank_k + c.rank_v) * c.d_head
        ),
        "the queries' factors are never cached: R_Q has no place here": tokens(
            lambda c: (c.rank_q + c.rank_k + c.rank_v) * (c.n_head + c.d_head)
        ),
        "rounded up: the last token would not fit": [n + 1 for n in tokens(right)],
        "config.max_len has no place here: the question is what the budget holds": [
            min(n, case[0].max_len) for n, case in zip(tokens(right), cases)
        ],
        "R_K and R_V can differ: (R_K + R_V), not 2 R_K": tokens(lambda c: 2 * c.rank_k * (c.n_head + c.d_head)),
    }
    labels = [
        f"n_layer={c.n_layer}, n_head={c.n_head}, d_head={c.d_head}, rank_k={c.rank_k}, rank_v={c.rank_v}, "
        f"budget={n}, batch_size={b}, bytes_per_number={w}"
        for c, n, b, w in cases
    ]
    judge_cases(given, answers, labels)


class _Patient(TensorProductAttention):
    """A float64 layer whose use of the cache has the illness named (exercise 05.3)."""

    def __init__(self, illness):
        super().__init__(T6Config(vocab_size=2, n_layer=1, d_model=32, n_head=4, d_head=8, max_len=64))
        torch.nn.init.normal_(self.out_proj.weight, std=0.2)
        self._illness = illness
        self.double().requires_grad_(False)

    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        held = (a_k, b_k, a_v, b_v)
        if start > 0 and self._illness == "rounding":
            held = (factor.half().double() for factor in held)
        if start > 0 and self._illness == "batch":
            held = (factor[:1].expand_as(factor) for factor in held)
        return a_q, b_q, *held

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        if start > 0 and self._illness == "window":
            keep = a_q.shape[1] + 7
            a_k, b_k, a_v, b_v = (factor[:, -keep:] for factor in (a_k, b_k, a_v, b_v))
        return causal_attention(assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v))


_ILLNESSES = ["rounding", "batch", "healthy", "window"]


def patients() -> list:
    """Four layers for exercise 05.3: one healthy, three that misuse their cache."""
    return [_Patient(illness) for illness in _ILLNESSES]


@exercise
def ex05_3(diagnose):
    """Naming three bugs and one healthy layer from how they behave."""
    given = diagnose(patients())
    if not isinstance(given, (list, tuple)) or sorted(given) != sorted(_ILLNESSES):
        raise WrongAnswer(
            'return the words "healthy", "window", "rounding" and "batch", each once, in the patients\' order'
        )
    # Tried in another order, a rule that looks at behaviour finds the same illnesses; a fixed answer does not.
    order = [2, 0, 3, 1]
    again = diagnose([_Patient(_ILLNESSES[i]) for i in order])
    if given == _ILLNESSES and list(again) != [_ILLNESSES[i] for i in order]:
        raise WrongAnswer("right for these four, but not when they come in another order: decide by experiments")
    hints = {
        ("batch", "healthy"): "is right for one sequence; decode two different ones together",
        ("window", "healthy"): "is right while the context is short; decode more than 8 tokens past the prompt's start",
        ("rounding", "healthy"): "is wrong from the fourth digit on; float64 should agree to 1e-10",
        ("rounding", "window"): "is a little wrong everywhere, also when all tokens fit any window",
        ("rounding", "batch"): "is wrong for a single sequence too",
        ("window", "rounding"): "is exact while the context is short, and far off later",
        ("window", "batch"): "is wrong for a single sequence too",
        ("batch", "rounding"): "is exact for a single sequence",
        ("batch", "window"): "is exact for a single sequence, however long",
    }
    for i, (true, said) in enumerate(zip(_ILLNESSES, given)):
        if true != said and (true, said) in hints:
            raise WrongAnswer(f'patient {i} is not "{said}": it {hints[true, said]}')
