"""The checkers of notebook 05 accept the solutions and say what is wrong with wrong answers."""

import pytest
import torch

from tpa_minimal.course import checks


def append(room, length, new, *, check=True, check_shape=True, strict=False, at=0):
    end = length + new.shape[2]
    if check and (end >= room.shape[2] if strict else end > room.shape[2]):
        raise ValueError("full")
    place = room[:, :, length + at : end + at]
    if check_shape and place.shape != new.shape:
        raise ValueError("shape")
    place.copy_(new[:, :, : place.shape[2]])
    return room[:, :, :end]


def with_assert(room, length, new):
    assert length + new.shape[2] <= room.shape[2] and new.shape[:2] == room.shape[:2]
    return append(room, length, new)


def write_then_check(room, length, new):
    end = min(length + new.shape[2], room.shape[2])
    room[:, :, length:end] = new[:, :, : end - length]
    if new.shape[:2] != room.shape[:2] or length + new.shape[2] > room.shape[2]:
        raise ValueError("too late")
    return room[:, :, :end]


def context(config, budget, batch_size, bytes_per_number):
    numbers = (config.rank_k + config.rank_v) * (config.n_head + config.d_head)
    return budget // (numbers * config.n_layer * batch_size * bytes_per_number)


def diagnose(patients):
    def error(patient, batch_size):
        x = torch.randn(batch_size, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cache = patient.new_cache(batch_size)
        cached = torch.cat([patient(part, cache) for part in x.split([20] + [1] * 20, dim=1)], dim=1)
        return (cached - patient(x)).abs().max()

    words = []
    for patient in patients:
        alone, together = error(patient, 1), error(patient, 2)
        ill = "batch" if alone < 1e-10 else "rounding" if alone < 0.05 else "window"
        words.append("healthy" if together < 1e-10 else ill)
    return words


def todo(*_):
    raise NotImplementedError


CHECKS = [(checks.ex05_1, append), (checks.ex05_2, context), (checks.ex05_3, diagnose)]


@pytest.mark.parametrize("check, solution", CHECKS, ids=["05.1", "05.2", "05.3"])
def test_accepts_the_solution_and_knows_a_stub(check, solution):
    torch.manual_seed(0)
    assert check(solution) == "ok"
    assert check(todo) == "todo"


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda room, n, new: append(room, n, new)[:, :, n:], "new positions only"),
        (lambda room, n, new: append(room, n, new) is None or room, "whole room"),
        (lambda room, n, new: append(room, n, new).clone(), "a copy"),
        (lambda room, n, new: torch.cat((room[:, :, :n], new), dim=2), "write into it"),
        (lambda room, n, new: append(room, n, new, at=-1), "earlier positions"),
        (lambda room, n, new: append(room, n, new, strict=True), "use > and not >="),
        (lambda room, n, new: append(room, n, new, check=False, check_shape=False), "5 held and 2 new"),
        (lambda room, n, new: append(room, n, new, check_shape=False), "broadcasts without a word"),
        (write_then_check, "only after writing"),
        (with_assert, "raise ValueError"),
        (lambda room, n, new: None, "return the tensor"),
    ],
)
def test_05_1_diagnoses(attempt, says, capsys):
    assert checks.ex05_1(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda c, n, b, w: context(c, n, b, w) * 1.0, "whole number"),
        (lambda c, n, b, w: context(c, n * c.n_layer, b, w), "n_layer"),
        (lambda c, n, b, w: context(c, n * b, b, w), "batch_size"),
        (lambda c, n, b, w: context(c, n * w, b, w), "bytes_per_number"),
        (lambda c, n, b, w: n // (2 * c.n_head * c.d_head * c.n_layer * b * w), "MHA's cache"),
        (lambda c, n, b, w: n // ((c.rank_k + c.rank_v) * c.d_head * c.n_layer * b * w), "only the b factors"),
        (lambda c, n, b, w: n // ((c.rank_q + c.rank_k + c.rank_v) * (c.n_head + c.d_head) * c.n_layer * b * w), "R_Q"),
        (lambda c, n, b, w: n // (2 * c.rank_k * (c.n_head + c.d_head) * c.n_layer * b * w), "can differ"),
        (lambda c, n, b, w: context(c, n, b, w) + 1, "rounded up"),
        (lambda c, n, b, w: min(context(c, n, b, w), c.max_len), "max_len has no place"),
        (lambda c, n, b, w: 7, "bytes_per_number=2 you say 7"),
    ],
)
def test_05_2_diagnoses(attempt, says, capsys):
    assert checks.ex05_2(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer, says",
    [
        (["rounding", "batch", "healthy", "window"], "another order"),
        (["rounding", "healthy", "batch", "window"], "one sequence"),
        (["healthy", "batch", "rounding", "window"], "fourth digit"),
        (["rounding", "batch", "window", "healthy"], "context is short"),
        (["window", "batch", "healthy", "rounding"], "a little wrong"),
        (["healthy"] * 4, "each once, in the patients' order"),
    ],
)
def test_05_3_diagnoses(answer, says, capsys):
    assert checks.ex05_3(lambda patients: answer) == "fail"
    assert says in capsys.readouterr().out


def test_the_patients_are_as_ill_as_the_exercise_says():
    torch.manual_seed(1)
    assert diagnose(checks.ex05.patients()) == ["rounding", "batch", "healthy", "window"]
