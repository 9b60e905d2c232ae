"""The checker of notebook 00 accepts the solution and tells wrong answers apart."""

import pytest

from tpa_minimal.course import checks


def test_the_solution_is_accepted():
    assert checks.ex00_1(lambda n_head, d_head: 2 * n_head * d_head) == "ok"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda h, d: h * d, "keys only"),
        (lambda h, d: 2 * d, "each of the n_head heads"),
        (lambda h, d: 3 * h * d, "queries are not kept"),
        (lambda h, d: 2 * h * d * 2, "looks like bytes"),
        (lambda h, d: 2 * h * d * 4, "looks like bytes"),
        (lambda h, d: h + d, "you say 76"),
        (lambda h: h, "your code raised TypeError"),
    ],
)
def test_wrong_answers_are_told_apart(capsys, wrong, said):
    assert checks.ex00_1(wrong) == "fail"
    assert said in capsys.readouterr().out


def test_three_states_and_the_strict_mode(capsys, monkeypatch):
    def stub(n_head, d_head):
        raise NotImplementedError

    assert checks.ex00_1(stub) == "todo"
    assert capsys.readouterr().out.startswith("[todo] ex00_1")
    monkeypatch.setenv("TPA_STRICT", "1")
    for attempt in (stub, lambda n_head, d_head: 0):
        with pytest.raises(AssertionError, match="ex00_1"):
            checks.ex00_1(attempt)
