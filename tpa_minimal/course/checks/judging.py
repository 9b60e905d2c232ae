"""The exercises' checkers: each prints [todo], [ok] or [fail] with a diagnosis of the most likely mistake.

A checker `exNN_K(attempt)` tries the reader's function on several cases and raises WrongAnswer with what is probably
wrong. Mistakes are pairs: a function that makes the mistake, and what to say to somebody whose answers are its answers.
With the environment variable TPA_STRICT=1 anything but [ok] raises, so that the solved notebooks test themselves.
"""

import copy
import dis
import functools
import inspect
import math
import os

import numpy as np
import torch


class WrongAnswer(Exception):
    """An attempt that runs but is not right; the message says what is probably wrong."""


class Raised(Exception):
    """The reader's own code raised `error`."""

    def __init__(self, error: Exception | SystemExit):
        super().__init__(error)
        self.error = error


class Status(str):
    """ "todo", "ok" or "fail"; a notebook shows the printed line only, not this value again."""

    def _ipython_display_(self):
        pass


def guarded(function):
    """The reader's function; what it raises comes out as Raised, and None, a forgotten `return`, as WrongAnswer."""

    @functools.wraps(function, updated=())
    def call(*args, **kwargs):
        try:
            answer = function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise Raised(error) from error
        if answer is None:
            raise WrongAnswer("your function returned None: is there a `return`?")
        return answer

    return call


def is_stub(error: Exception, attempt) -> bool:
    """Whether the attempt's own `raise NotImplementedError` raised this, and no library that it calls."""
    if not isinstance(error, NotImplementedError):
        return False
    innermost = error.__traceback__
    while innermost.tb_next:
        innermost = innermost.tb_next
    parts = (attempt, *getattr(attempt, "__dict__", {}).values())  # a class: its methods
    own = {part.__code__.co_filename for part in parts if hasattr(part, "__code__")}
    code = innermost.tb_frame.f_code
    return code.co_filename in own and dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"


def exercise(check):
    """Turn a function that raises WrongAnswer into a checker: it prints one line and returns "todo", "ok" or "fail"."""

    @functools.wraps(check)
    def run(attempt):
        try:
            check(guarded(attempt))
            status, message = "ok", "well done"
        except WrongAnswer as wrong:
            status, message = "fail", str(wrong)
        except Raised as raised:
            error = raised.error
            if is_stub(error, attempt):
                status, message = "todo", "not written yet: replace `raise NotImplementedError` and run this cell again"
            else:  # say how it broke, without a page of traceback
                text = (str(error).splitlines() or [""])[0]
                status, message = "fail", f"your code raised {type(error).__name__}: {text}"
        except Exception as error:  # an answer so strange that the checker itself stumbles over it
            text = f"(the checker stopped with {type(error).__name__})"
            status, message = "fail", f"your answer is not of the kind that the exercise asks for {text}"
        line = f"[{status}] {check.__name__}: {message}"
        print(line)
        if status != "ok" and os.environ.get("TPA_STRICT") == "1":
            raise AssertionError(line)
        return Status(status)

    return run


def tensor(x) -> torch.Tensor:
    """A tensor of what may be an array, a number, or a list of such; Python's floats become float64."""
    if isinstance(x, (tuple, list)):
        return torch.stack([tensor(part) for part in x]) if x else torch.zeros(0)
    if isinstance(x, (np.ndarray, np.generic)):  # torch takes no other byte order, negative stride, or longdouble
        x = np.array(x, np.float64 if x.dtype == np.longdouble else x.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(x, dtype=None if hasattr(x, "dtype") else torch.float64)


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def agree(got, expected, scale: float | None = None) -> bool:
    """Whether two answers agree: numbers and tensors up to rounding in the type of `got`, everything else exactly.

    NumPy's scalars and arrays, tensors, lists and tuples may stand for each other. Rounding is measured relative to
    `scale`, the size of the largest number expected; types narrower than float32 must agree exactly.
    """
    try:
        if isinstance(expected, dict):
            return set(got) == set(expected) and all(agree(got[key], expected[key]) for key in expected)
        if isinstance(expected, (tuple, list)):
            if all(map(is_number, expected)):
                scale = max(map(abs, expected), default=None)
            pairs = zip(got, expected, strict=True)
            return not isinstance(got, (str, dict, set)) and all(agree(g, e, scale) for g, e in pairs)
        if isinstance(got, str) or isinstance(expected, str):
            return isinstance(got, str) and got == expected
        expected_tensor = isinstance(expected, torch.Tensor)
        if not expected_tensor and hasattr(got, "item"):
            got = tensor(got)
            dtype, got = got.dtype, got.item()
        else:
            got = tensor(got) if expected_tensor else got
            dtype = getattr(got, "dtype", torch.float64)
        if isinstance(got, bool) != isinstance(expected, bool) or dtype.is_complex:
            return False
        rtol = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 0.0)
        if rtol and getattr(expected, "dtype", None) == torch.float32:
            rtol = 1e-5
        if not expected_tensor:
            if isinstance(expected, (bool, int)) and scale is None:
                return got == expected
            return math.isclose(got, expected, rel_tol=0, abs_tol=rtol * (scale or abs(expected)))
        if got.shape != expected.shape or (dtype == torch.bool) != (expected.dtype == torch.bool):
            return False
        got, expected = got.detach().double(), expected.detach().double()
        sizes = expected[expected.isfinite()].abs()
        atol = rtol * sizes.max().item() if len(sizes) else 0.0
        return torch.allclose(got, expected, rtol=0, atol=atol, equal_nan=True)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # not even comparable
        return False


def describe(value) -> str:
    """A value in a few words, for a diagnosis."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if hasattr(value, "shape") and len(value.shape) > 0:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and any(getattr(part, "shape", ()) for part in value):
        return f"{type(value).__name__} of {len(value)}: " + ", ".join(map(describe, value))
    value = value.item() if hasattr(value, "item") else value
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.80}"


def misfit(got, expected) -> str:
    """What is wrong with the kind or the shape of an answer; empty if nothing is."""
    if isinstance(expected, torch.Tensor):
        shape = tuple(expected.shape)
        if not hasattr(got, "shape"):
            return f"expected a tensor of shape {shape}, not {describe(got)}"
        if tuple(got.shape) != shape:
            return f"expected shape {shape}, not {tuple(got.shape)}"
        if isinstance(got, torch.Tensor) and got.dtype in (torch.bfloat16, torch.float16):
            return f"your result is in {got.dtype}, the input in {expected.dtype}: digits are lost"
        if not torch.as_tensor(got).isfinite().all() and expected.isfinite().all():
            return "your result contains nan or inf"
    elif isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            return f"return {len(expected)} values, not {describe(got)}"
        return next(filter(None, (misfit(g, e) for g, e in zip(got, expected))), "")
    elif is_number(expected):
        plain = got.item() if getattr(got, "shape", None) == () else got
        if not is_number(plain):
            return f"expected a number, not {describe(got)}"
        if isinstance(expected, int) and plain != int(plain):
            return f"expected a whole number, not {describe(got)}"
    return ""


def judge(attempt, right, cases, mistakes=(), otherwise="") -> None:
    """Raise WrongAnswer unless the attempt answers every case as the function `right` does, and leaves its input alone.

    `mistakes` are pairs (wrong function, what to say); the first that gives the same answers speaks, or else the first
    that gives the same wrong ones. If none does, the first wrong case is named, with `otherwise`: a text, or a function
    of (got, right).
    """
    handed, answers, given, wrong = copy.deepcopy(cases), [right(*case) for case in cases], [], []
    for i, case in enumerate(handed):
        try:
            given.append(attempt(*case))
        except Raised:
            if wrong:
                break  # the wrong answers to earlier cases say more
            raise
        if not agree(given[i], answers[i]):
            wrong.append(i)
    if wrong:
        # A mistake that gives the right answers as well comes first. Of two words the wrong one explains nothing.
        for places in (range(len(given)), wrong if not isinstance(answers[0], str) else range(len(given))):
            for mistake, say in mistakes:
                if all(agree(given[i], mistake(*cases[i])) for i in places):
                    raise WrongAnswer(say)
        got, answer, case = given[wrong[0]], answers[wrong[0]], cases[wrong[0]]
        named = zip(inspect.signature(right).parameters, case)
        where = ", ".join(f"{name} = {describe(value)}" for name, value in named)
        wrongly = misfit(got, answer)
        say = otherwise if not callable(otherwise) else "" if wrongly else otherwise(got, answer)
        if not wrongly and not isinstance(answer, (torch.Tensor, tuple)):
            wrongly = f"you say {describe(got)}, and it is {describe(answer)}"
        raise WrongAnswer(f"for {where}: " + "; ".join(filter(None, (wrongly, say))))
    for before, after in zip(cases, handed):
        if any(not agree(new, old) for old, new in zip(before, after) if isinstance(old, (torch.Tensor, tuple, list))):
            raise WrongAnswer(
                "the values are right, but you changed the input in place: `x *= 2`, `x[i] = ...` and functions whose "
                "name ends in _ write into what the caller still needs; `x = x * 2` makes a new tensor"
            )


def judge_choices(given, key: dict, options=(True, False)) -> None:
    """Raise WrongAnswer for the first case that is open or answered wrongly; `key` maps case to (answer, reason)."""
    if not isinstance(given, dict) or set(given) != set(key):
        raise WrongAnswer(f"return a dict with exactly these keys: {', '.join(key)}")
    for case, (right, reason) in key.items():
        got = given[case]
        if got is ...:
            raise WrongAnswer(f"{case} is still open")
        if not any(agree(got, option) for option in options):
            raise WrongAnswer(f"{case}: answer {' or '.join(map(repr, options))}, not {describe(got)}")
        if not agree(got, right):
            raise WrongAnswer(f"{case} is not {describe(got)}: {reason}")


def judge_names(attempt, cases, hints: dict) -> None:
    """Raise WrongAnswer unless the attempt names each case rightly; `cases` are (what to name, its name, remark).

    `hints` maps (name, wrong name) to how the two differ, seen from outside, for all pairs.
    """
    names = sorted({name for pair in hints for name in pair})
    for thing, truth, remark in cases:
        answer = attempt(thing)
        if not isinstance(answer, str) or answer not in names:
            raise WrongAnswer(f"answer one of {', '.join(names)}; yours was {describe(answer)}")
        if answer != truth:
            raise WrongAnswer(f"you say {answer!r} where it is {truth!r}: {hints[truth, answer]}{remark}")


def normal(*shape, seed: int = 0) -> torch.Tensor:
    """Normal random numbers in float64, the same for the same seed and shape."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
