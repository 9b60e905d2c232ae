"""The exercises' checkers: each prints [todo], [ok] or [fail] with a diagnosis of the likely mistake.

A checker `exNN_K(attempt)` tries the reader's function and raises WrongAnswer with what is probably wrong.
With the environment variable TPA_STRICT=1 anything but [ok] raises, so that the solved notebooks test themselves.
"""

import functools
import os

import torch


class WrongAnswer(Exception):
    """An attempt that runs but is not right; the message says what is probably wrong."""


class Status(str):
    """ "todo", "ok" or "fail"; a notebook shows the printed line only, not this value again."""

    def _ipython_display_(self):
        pass


def exercise(check):
    """Turn a function that raises WrongAnswer into a checker: it prints one line and returns "todo", "ok" or "fail"."""

    @functools.wraps(check)
    def run(attempt, *more):
        try:
            check(attempt, *more)
            status, message = "ok", "well done"
        except NotImplementedError:
            status, message = "todo", "not written yet: replace `raise NotImplementedError` and run this cell again"
        except WrongAnswer as wrong:
            status, message = "fail", str(wrong)
        except Exception as error:  # the reader's code broke: say how, without a page of traceback
            status, message = "fail", f"your code raised {type(error).__name__}: {error}"
        line = f"[{status}] {check.__name__}: {message}"
        print(line)
        if status != "ok" and os.environ.get("TPA_STRICT") == "1":
            raise AssertionError(line)
        return Status(status)

    return run


def equals(got, expected, rtol: float = 1e-9) -> bool:
    """Whether two numbers or tensors agree up to rounding, relative to the scale of what is expected."""
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    if got.shape != expected.shape:
        return False
    error = (got.double() - expected.double()).abs().max()
    return bool(error <= rtol * expected.double().abs().max())  # False for nan


def judge(got, expected, mistakes: dict, otherwise: str) -> None:
    """Raise WrongAnswer unless `got` equals `expected`; `mistakes` maps each diagnosis to what that mistake gives."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise WrongAnswer(f"expected a tensor of shape {tuple(expected.shape)}, got {type(got).__name__}")
        if got.shape != expected.shape:
            raise WrongAnswer(f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    elif isinstance(got, bool) or not isinstance(got, (int, float)):
        raise WrongAnswer(f"expected a number, got {got!r}")
    if equals(got, expected):
        return
    for diagnosis, wrong in mistakes.items():
        if equals(got, wrong):
            raise WrongAnswer(diagnosis)
    if isinstance(got, torch.Tensor) and got.isnan().any():
        raise WrongAnswer("the result contains nan: does some softmax see no key at all?")
    raise WrongAnswer(otherwise)


def judge_choices(got, key: dict, reasons: dict) -> None:
    """Raise WrongAnswer for the first case of `key` that is answered wrongly or left open, with its reason."""
    if not isinstance(got, dict) or set(got) != set(key):
        raise WrongAnswer(f"return a dict with the keys {', '.join(key)}")
    for case, right in key.items():
        if got[case] is ...:
            raise WrongAnswer(f"case {case} is still open")
        if isinstance(got[case], str):
            kind = "True or False" if isinstance(right, bool) else "a number"
            raise WrongAnswer(f"case {case}: give {kind}, not the str {got[case]!r}")
        if isinstance(got[case], bool) != isinstance(right, bool) or got[case] != right:
            raise WrongAnswer(f"case {case}: not {got[case]}. {reasons[case]}")


def judge_cases(given, answers, cases):
    """Raise WrongAnswer with the key of `answers` whose list equals `given`; the key "" is the right one."""
    if given == answers[""]:
        return
    for say, values in answers.items():
        if given == values:
            raise WrongAnswer(say)
    case, got, right = next(row for row in zip(cases, given, answers[""]) if row[1] != row[2])
    raise WrongAnswer(f"for {case} you say {got}, and it is {right}")


def close(x, y) -> bool:
    return x.shape == y.shape and torch.allclose(x, y.to(x.dtype), rtol=1e-6, atol=1e-9)


def expect_tensor(answer, shape, name="the result") -> torch.Tensor:
    """The reader's answer, if it is a tensor of the shape asked for."""
    if not isinstance(answer, torch.Tensor):
        raise WrongAnswer(
            f"return a tensor of shape {tuple(shape)} for {name}; yours is of type {type(answer).__name__}"
        )
    if answer.shape != shape:
        raise WrongAnswer(f"{name} must have shape {tuple(shape)}; yours has {tuple(answer.shape)}")
    return answer
