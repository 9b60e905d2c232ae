"""The checkers of notebook 13 accept what is right and say what is wrong."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tpa_minimal.course import checks
from tpa_minimal.experiments import evaluate


def by_cross_entropy(logits, tokens, n_context):
    return -F.cross_entropy(logits[n_context - 1 : -1], tokens[n_context:], reduction="sum")


def by_numpy(logits, tokens, n_context):
    logits, tokens = logits.numpy(), tokens.numpy()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.log(p[np.arange(n_context - 1, len(tokens) - 1), tokens[n_context:]]).sum()


def by_gather(logits, tokens, n_context):
    chosen = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return chosen[n_context - 1 :].sum().item()


@pytest.mark.parametrize("way", [by_cross_entropy, by_numpy, by_gather])
def test_a_log_likelihood_in_several_ways(way):
    assert checks.ex13_1(way) == "ok"


def places(n, tokens):
    return torch.arange(n, len(tokens))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda x, t, n: x.log_softmax(-1)[places(n, t), t[n:]].sum(), "the *next* token"),
        (lambda x, t, n: by_gather(x, t, 1), "the context is scored too"),
        (lambda x, t, n: by_gather(x, t, n + 1), "first token is missing"),
        (lambda x, t, n: by_gather(x, t, n - 1), "one token too many"),
        (lambda x, t, n: x[places(n, t) - 1, t[n:]].sum(), "no log-probabilities yet"),
        (lambda x, t, n: x.log_softmax(0)[places(n, t) - 1, t[n:]].sum(), "over the vocabulary"),
        (lambda x, t, n: x.softmax(-1)[places(n, t) - 1, t[n:]].sum(), "you added p"),
        (lambda x, t, n: x.softmax(-1)[places(n, t) - 1, t[n:]].prod(), "return its logarithm"),
        (lambda x, t, n: -by_gather(x, t, n), "negative"),
        (lambda x, t, n: by_gather(x, t, n) / (len(t) - n), "the mean"),
        (lambda x, t, n: by_gather(x, t, n) / math.log(2), "in bits"),
        (lambda x, t, n: x.log_softmax(-1)[places(n, t) - 1, t[n:]], "expected a number"),
        (lambda x, t, n: 1.0, "given all tokens before it"),
    ],
)
def test_wrong_log_likelihoods_are_told_apart(wrong, said, capsys):
    assert checks.ex13_1(wrong) == "fail"
    assert said in capsys.readouterr().out


def by_sorting(scores, endings):
    def first(key):
        return sorted(range(len(scores)), key=key)[-1]

    return [first(lambda n: scores[n]), first(lambda n: scores[n] / len(endings[n].lstrip()))]


def by_tensors(scores, endings):
    scores = torch.tensor(scores)
    letters = torch.tensor([len(ending) - 1 for ending in endings])  # each begins with one space
    return int(scores.argmax()), int((scores / letters).argmax())


@pytest.mark.parametrize("way", [by_sorting, by_tensors])
def test_picks_in_several_ways(way):
    assert checks.ex13_2(way) == "ok"


def per(length, pick=max):
    def picks(scores, endings):
        each = [score / length(ending) for score, ending in zip(scores, endings)]
        return scores.index(max(scores)), each.index(pick(each))

    return picks


def letters(ending):
    return len(ending.strip())


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda s, e: (s.index(min(s)), per(letters, min)(s, e)[1]), "the lowest is picked"),
        (lambda s, e: (s.index(max(s)),) * 2, "both picks are by the sum"),
        (lambda s, e: (per(letters)(s, e)[1],) * 2, "both picks are per letter"),
        (lambda s, e: per(letters)(s, e)[::-1], "exchanged"),
        (per(letters, min), "per letter you pick the lowest"),
        (per(lambda ending: len(ending.split())), "divided by words"),
        (per(len), "strip it"),
        (per(lambda ending: len(ending.strip().encode())), "divided by bytes"),
        (per(lambda ending: letters(ending) - 1), "two places in the list"),
        (per(lambda ending: letters(ending) ** 2), "by its characters, once"),
        (lambda s, e: (s.index(max(s)), e.index(max(e, key=len))), "the longest ending is picked"),
        (per(lambda ending: 1 / letters(ending)), "multiplied"),
        (lambda s, e: (max(s), max(x / letters(y) for x, y in zip(s, e))), "these are the scores"),
        (lambda s, e: tuple(e[n] for n in per(letters)(s, e)), "these are the endings"),
        (lambda s, e: tuple(n + 1 for n in per(letters)(s, e)), "counted from 0"),
        (lambda s, e: 0, "return 2 values"),
        (lambda s, e: (0, 0), "two places in the list"),
    ],
)
def test_wrong_picks_are_told_apart(wrong, said, capsys):
    assert checks.ex13_2(wrong) == "fail"
    assert said in capsys.readouterr().out


def by_trial(p, q):
    n = 1
    while abs(p - q) < 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / n):
        n *= 2
    low, high = n // 2, n
    while high - low > 1:
        middle = (low + high) // 2
        enough = abs(p - q) >= 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / middle)
        low, high = (low, middle) if enough else (middle, high)
    return high


def by_numpy_ceil(p, q):
    return int(np.ceil(1.96**2 * (p - p**2 + q - q**2) / (q - p) ** 2))


@pytest.mark.parametrize("way", [by_trial, by_numpy_ceil])
def test_questions_needed_in_several_ways(way):
    assert checks.ex13_3(way) == "ok"


def needed(variance, power=2, z=1.96**2, whole=math.ceil):
    return lambda p, q: whole(z * variance(p, q) / abs(p - q) ** power)


def both(p, q):
    return p * (1 - p) + q * (1 - q)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (needed(both, whole=float), "no fraction of a question"),
        (needed(both, whole=math.floor), "rounded down"),
        (needed(both, whole=round), "rounded to the nearest"),
        (needed(lambda p, q: p * (1 - p)), "add the variance of the second"),
        (needed(lambda p, q: q * (1 - q)), "add the variance of the first"),
        (needed(lambda p, q: ((p * (1 - p)) ** 0.5 + (q * (1 - q)) ** 0.5) ** 2), "add as squares"),
        (needed(lambda p, q: both(p, q) / 2), "averaged"),
        (needed(lambda p, q: p + q), "not p"),
        (needed(both, power=1), "divide by (p - q)²"),
        (needed(both, z=1.96), "1.96 is squared"),
        (needed(both, z=1), "1.96 is missing"),
        (lambda p, q: math.ceil(math.sqrt(needed(both, whole=float)(p, q))), "square it"),
        (lambda p, q: 7, "and it is"),
    ],
)
def test_wrong_numbers_of_questions_are_told_apart(wrong, said, capsys):
    assert checks.ex13_3(wrong) == "fail"
    assert said in capsys.readouterr().out


KEY = dict(a=False, b=True, c=False, d=False, e=True, f=False)


def test_the_statements_by_the_paper_s_numbers():
    error = 0.61  # of a difference of two averages, at most; notebook 13 computes it

    def gap(size, shots, first, second):
        row = dict(zip(evaluate.PAPER_MECHANISMS, evaluate.PAPER_AVERAGES[size, shots]))
        return row[first] - row[second]

    behind = [max(row) - row[-1] for row in evaluate.PAPER_AVERAGES.values()]
    assert KEY == dict(
        a=gap("small", 0, "tpa", "mla") > 1.96 * error,
        b=gap("small", 2, "tpa", "mqa") > 1.96 * error,
        c=gap("small", 2, "mha", "tpa") > 1.96 * error,
        d=max(evaluate.PAPER_AVERAGES["large", 0]) == evaluate.PAPER_AVERAGES["large", 0][-1],
        e=max(behind) < error,
        f=False,
    )
    assert checks.ex13_4(lambda: dict(KEY)) == "ok"
    assert checks.ex13_4(lambda: {key: np.bool_(value) for key, value in KEY.items()}) == "ok"


@pytest.mark.parametrize("key", KEY)
def test_each_wrong_judgement_has_its_own_reason(key, capsys):
    assert checks.ex13_4(lambda: {**KEY, key: not KEY[key]}) == "fail"
    line = capsys.readouterr().out
    assert f"{key} is not {not KEY[key]}: " in line and len(line) > 80


@pytest.mark.parametrize("wrong", [lambda: None, lambda: ["a"], lambda: {**KEY, "a": ...}, lambda: {**KEY, "a": "no"}])
def test_judgements_in_another_form(wrong):
    assert checks.ex13_4(wrong) == "fail"


@pytest.mark.parametrize("check", [checks.ex13_1, checks.ex13_2, checks.ex13_3, checks.ex13_4])
def test_a_stub_is_to_do(check):
    def stub(*_):
        raise NotImplementedError

    assert check(stub) == "todo"
