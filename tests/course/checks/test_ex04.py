"""The checkers of notebook 04 accept the solution and reject wrong answers, each with its own diagnosis."""

import pytest
import torch
import torch.nn.functional as F

from tpa_minimal.course import checks


def diagnosis(capsys, checker, attempt):
    status = checker(attempt)
    return str(status), capsys.readouterr().out


def todo(*_):
    raise NotImplementedError


@pytest.mark.parametrize("checker", [checks.ex04_1, checks.ex04_2, checks.ex04_3, checks.ex04_4])
def test_an_empty_stub_is_todo(capsys, checker):
    assert "[todo]" in diagnosis(capsys, checker, todo)[1]


def masks(reads):
    return F.one_hot(torch.tensor(reads), max(reads) + 1).T.float()


def equal_groups(reads):
    R, h = max(reads) + 1, len(reads)
    if h % R:
        return (max(reads) + 1) * masks(reads)
    return R * torch.eye(R).repeat_interleave(h // R, dim=1)


def test_ex04_1(capsys):
    assert "[ok]" in diagnosis(capsys, checks.ex04_1, lambda reads: (max(reads) + 1) * masks(reads))[1]
    wrong = {
        "R times too small": masks,
        "the transpose": lambda reads: (max(reads) + 1) * masks(reads).T,
        "h is right only for MHA": lambda reads: len(reads) * masks(reads),
        "equal groups of neighbours": equal_groups,
        "mixes several": lambda reads: torch.ones(max(reads) + 1, len(reads)),
        "must be R in row": lambda reads: (max(reads) + 1) * masks(reads).roll(1, 0),
        "return a tensor": lambda reads: masks(reads).tolist(),
        "must be a float tensor": lambda reads: ((max(reads) + 1) * masks(reads)).long(),
    }
    for words, attempt in wrong.items():
        out = diagnosis(capsys, checks.ex04_1, attempt)[1]
        assert "[fail]" in out and words in out, out


def largest(h, fits):
    return max((G for G in range(1, h + 1) if h % G == 0 and fits(G)), default=1)


def test_ex04_2(capsys):
    right = lambda h, d, R: largest(h, lambda G: G * d <= R * (h + d))  # noqa: E731
    assert "[ok]" in diagnosis(capsys, checks.ex04_2, right)[1]
    wrong = {
        "includes an equal number": lambda h, d, R: largest(h, lambda G: G * d < R * (h + d)),
        "caches its head factors too": lambda h, d, R: largest(h, lambda G: G <= R),
        "on both sides": lambda h, d, R: largest(h, lambda G: G * d <= 2 * R * (h + d)),
        "must be a whole number that divides h": lambda h, d, R: R * (h + d) // d,
        "caches more than TPA": lambda h, d, R: h,
        "h=34, d_h=64, R=2 the answer is 2, and yours is 3": lambda h, d, R: min(h, R * (h + d) // d),
    }
    for words, attempt in wrong.items():
        out = diagnosis(capsys, checks.ex04_2, attempt)[1]
        assert "[fail]" in out and words in out, out


def routing(a_from=0, b_from=4, a=1.0):
    W_a, W_b = torch.zeros(4, 20), torch.zeros(8, 20)
    W_a[:, a_from : a_from + 4] = a * torch.eye(4)
    W_b[:, b_from : b_from + 8] = torch.eye(8)
    return W_a, W_b


def every_head():
    return torch.ones(4, 20), routing()[1]


def word_too():
    W_a, W_b = routing()
    W_b[:, 12:] = torch.eye(8)
    return W_a, W_b


def test_ex04_3(capsys):
    assert "[ok]" in diagnosis(capsys, checks.ex04_3, routing)[1]
    wrong = {
        "the transpose": lambda: tuple(W.T for W in routing()),
        "heads [0, 1, 2, 3] see": every_head,
        "no head can see": lambda: (torch.zeros(4, 20), routing()[1]),
        "one-hot at the speaker": lambda: (routing()[0].roll(1, 0), routing()[1]),
        "b must read entries 4 to 11": word_too,
        "is not the topic": lambda: routing(b_from=12),
        "2 times": lambda: routing(a=2.0),
        "return two tensors": lambda: routing()[0],
        "in the other order": lambda: routing()[::-1],
        "W_b must have shape": lambda: (routing()[0], routing()[0]),
        "for W_a; yours is of type ndarray": lambda: tuple(W.numpy() for W in routing()),
    }
    for words, attempt in wrong.items():
        out = diagnosis(capsys, checks.ex04_3, attempt)[1]
        assert "[fail]" in out and words in out, out


def judge(K, one=None, many=None, distinct=None):
    """The solution, with any of its three measurements replaced by a wrong one."""
    h = K.shape[1]
    one = torch.linalg.matrix_rank(K[0]).item() if one is None else one
    many = torch.linalg.matrix_rank(K.transpose(0, 1).flatten(1)).item() if many is None else many
    distinct = len(torch.unique(K[0].round(decimals=9), dim=0)) if distinct is None else distinct
    if many > one:
        return "contextual A"
    if many == h:
        return "MHA"
    return "fixed A" if distinct == h else "MQA" if distinct == 1 else "GQA"


def test_ex04_4(capsys):
    assert "[ok]" in diagnosis(capsys, checks.ex04_4, judge)[1]
    rank = torch.linalg.matrix_rank
    wrong = {
        "put many tokens side by side": lambda K: judge(K, many=rank(K[0]).item()),
        "one token is of low rank": lambda K: judge(K, one=rank(K.transpose(0, 1).flatten(1)).item()),
        "no two heads have equal keys": lambda K: "GQA" if judge(K) == "fixed A" else judge(K),
        "count the different rows": lambda K: judge(K, distinct=K.shape[1]),
        "there are several groups": lambda K: "MQA" if judge(K) == "GQA" else judge(K),
        "there is one group": lambda K: "GQA" if judge(K) == "MQA" else judge(K),
        "full rank h": lambda K: "fixed A" if judge(K) == "MHA" else judge(K),
        "MQA's are *equal*": lambda K: "MQA" if torch.linalg.matrix_rank(K[0]) == 1 else judge(K),
        "answer one of": lambda K: "TPA",
    }
    for words, attempt in wrong.items():
        out = diagnosis(capsys, checks.ex04_4, attempt)[1]
        assert "[fail]" in out and words in out, out
