"""The checkers of notebook 08 accept what is right and say what is wrong."""

import math
import re

import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.experiments import train


def windows(shift=1, first=0, extra=0):
    def cut(tokens, starts, seq_len):
        rows = [tokens[s + first : s + first + seq_len + extra] for s in starts.tolist()]
        moved = [tokens[s + first + shift : s + first + shift + seq_len + extra] for s in starts.tolist()]
        return torch.stack(rows), torch.stack(moved)

    return cut


@pytest.mark.parametrize(
    ("attempt", "status", "diagnosis"),
    [
        (windows(), "ok", "well done"),
        (windows(extra=1), "fail", "a window holds seq_len \\+ 1"),
        (windows(first=1), "fail", "begin at the start itself"),
        (windows(shift=0), "fail", "repeating what it sees"),
        (windows(shift=2), "fail", "the token that follows"),
    ],
)
def test_windows(attempt, status, diagnosis, capsys):
    assert checks.ex08_1(attempt) == status
    assert re.search(diagnosis, capsys.readouterr().out)


def test_targets_before_the_inputs(capsys):
    def backwards(tokens, starts, seq_len):
        places = starts[:, None] + torch.arange(seq_len)
        return tokens[places], tokens[places] - 1

    assert checks.ex08_1(backwards) == "fail" and "predict the past" in capsys.readouterr().out


def schedule(rise=1, low=0.05, shape=lambda p: (1 + math.cos(math.pi * p)) / 2, offset=0, whole=False):
    def rate(step, steps, warmup, peak):
        if step < warmup:
            return peak * (step + rise) / warmup
        progress = step / steps if whole else (step - warmup + offset) / (steps - warmup)
        return peak * (low + (1 - low) * shape(progress))

    return rate


@pytest.mark.parametrize(
    ("attempt", "status", "diagnosis"),
    [
        (schedule(), "ok", "well done"),
        (schedule(rise=0), "fail", "its batch is wasted"),
        (schedule(rise=2), "fail", "the warm-up goes from"),
        (schedule(whole=True), "fail", "with progress 0"),
        (schedule(low=0.0), "fail", "ends at 0"),
        (schedule(shape=lambda p: 1 - p), "fail", "falls along a straight line"),
        (schedule(low=0.1), "fail", "should be peak / 20 = 0.1"),
        (schedule(shape=lambda p: 1 - p**2), "fail", "progress should be"),
    ],
)
def test_schedule(attempt, status, diagnosis, capsys):
    assert checks.ex08_2(attempt) == status
    assert diagnosis in capsys.readouterr().out


def test_the_schedule_asked_for_is_the_one_that_trains():
    assert [schedule()(s, 110, 11, 2.0) for s in range(110)] == pytest.approx(
        [train.learning_rate(s, 110, 2.0) for s in range(110)]
    )


NEEDED = dict(weights=True, moments=True, step=True, gradients=False, validation_losses=False)


def test_what_to_save(capsys):
    assert checks.ex08_3(lambda: dict(NEEDED)) == "ok"
    assert checks.ex08_3(lambda: {"weights": True}) == "fail" and "exactly these keys" in capsys.readouterr().out


@pytest.mark.parametrize("name", NEEDED)
def test_each_wrong_choice_has_its_own_reason(name, capsys):
    assert checks.ex08_3(lambda: {**NEEDED, name: not NEEDED[name]}) == "fail"
    assert f"{name} is {NEEDED[name]}" in capsys.readouterr().out


def interval(sign=1, power=0.5, correction=1, paired=True):
    def of(first, second, t):
        first, second = (torch.tensor(x, dtype=torch.float64) for x in (first, second))
        d = sign * (first - second)
        s = d.std(correction=correction) if paired else (first.var() + second.var()).sqrt()
        half = t * s / len(d) ** power
        return d.mean() - half, d.mean() + half

    return of


@pytest.mark.parametrize(
    ("attempt", "status", "diagnosis"),
    [
        (interval(), "ok", "well done"),
        (interval(sign=-1), "fail", "sign is turned round"),
        (interval(power=0), "fail", "too wide"),
        (interval(power=1), "fail", "not by n"),
        (interval(correction=0), "fail", "divides by n - 1"),
        (interval(paired=False), "fail", "not paired"),
        (lambda a, b, t: interval()(a, b, t)[::-1], "fail", "low is above high"),
        (lambda a, b, t: (0.0, 1.0), "fail", "the middle is"),
        (lambda a, b, t: interval()(a, b, 1.96), "fail", "and should reach"),
    ],
)
def test_interval(attempt, status, diagnosis, capsys):
    assert checks.ex08_4(attempt) == status
    assert diagnosis in capsys.readouterr().out
