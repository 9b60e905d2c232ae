"""The checkers of notebook 14 accept what is right and say what is wrong."""

import math

import numpy as np
import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.memory import Layer
from tpa_minimal.serving import PagedCache, Pages


def by_counting(prompts, answers):
    used = wasted = 0
    for p, a in zip(prompts, answers):
        used += p + a
        wasted += max(prompts) - p + max(answers) - a
    return wasted / (used + wasted)


def by_numpy(prompts, answers):
    p, a = np.array(prompts), np.array(answers)
    return 1 - (p.mean() + a.mean()) / (p.max() + a.max())


@pytest.mark.parametrize("way", [by_counting, by_numpy])
def test_wasted_places_in_several_ways(way):
    assert checks.ex14_1(way) == "ok"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda p, a: 1 - by_counting(p, a), "the waste is the rest"),
        (lambda p, a: 100 * by_numpy(p, a), "not a percentage"),
        (lambda p, a: len(p) * (max(p) + max(a)) - sum(p) - sum(a), "divide by all places"),
        (lambda p, a: len(p) * (max(p) + max(a)) / (sum(p) + sum(a)) - 1, "divided by the tokens"),
        (lambda p, a: 1 - (sum(p) + sum(a)) / len(p) / max(map(sum, zip(p, a))), "of different rows"),
        (lambda p, a: 1 - np.mean(p) / max(p), "wait for the longest answer"),
        (lambda p, a: 1 - np.mean(a) / max(a), "prompts are padded too"),
        (lambda p, a: 1 - (np.mean(p) / max(p) + np.mean(a) / max(a)) / 2, "averaged"),
        (lambda p, a: 1 - (sum(p) + sum(a)) / (max(p) + max(a)), "there are len(prompts) rows"),
        (lambda p, a: [0.5] * len(p), "expected a number"),
        (lambda p, a: 0.5, "longest prompt and the longest answer"),
    ],
)
def test_wrong_shares_are_told_apart(wrong, said, capsys):
    assert checks.ex14_1(wrong) == "fail"
    assert said in capsys.readouterr().out


def by_a_real_pool(prefix, lengths, page_size):
    pages = Pages([(1, 1)], 1000, page_size)
    system = PagedCache(pages)
    system.append(torch.zeros(1, prefix, 1, 1))
    texts = [system.fork() for _ in lengths]
    for text, n in zip(texts, lengths):
        text.append(torch.zeros(1, n, 1, 1))
    return 1000 - pages.free


def by_cases(prefix, lengths, page_size):
    full, rest = divmod(prefix, page_size)
    return full + bool(rest) + sum(math.ceil((rest + n) / page_size) for n in lengths)


def numpy_pages(prefix, lengths, page_size):
    ends = np.ceil((prefix + np.array(lengths)) / page_size) - prefix // page_size
    return np.ceil(prefix / page_size) + ends.sum()


@pytest.mark.parametrize("way", [by_a_real_pool, by_cases, numpy_pages])
def test_pages_in_several_ways(way):
    assert checks.ex14_2(way) == "ok"


def ceil(x, s):
    return math.ceil(x / s)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda p, ns, s: sum(ceil(p + n, s) for n in ns), "nothing is shared"),
        (lambda p, ns, s: ceil(p, s) + sum(ceil(p + n, s) for n in ns), "kept once"),
        (lambda p, ns, s: ceil(p, s) + sum(ceil(n, s) for n in ns), "does not begin with a page of its own"),
        (lambda p, ns, s: ceil(p, s) + sum(ceil(p + n, s) - ceil(p, s) for n in ns), "count the copies"),
        (lambda p, ns, s: by_cases(p, ns, s) - ceil(p, s), "are held as well"),
        (lambda p, ns, s: by_cases(p, ns, s) - bool(p % s), "still holds its last page"),
        (lambda p, ns, s: p // s + sum((p + n) // s - p // s for n in ns), "a page begun"),
        (lambda p, ns, s: ceil(p + sum(ns), s), "do not share pages with each other"),
        (lambda p, ns, s: s * by_cases(p, ns, s), "these are positions"),
        (lambda p, ns, s: ceil(p, s) + sum(ceil(n, s) + (0 < s - p % s < n % s) for n in ns), "writes on in the"),
        (lambda p, ns, s: by_cases(p, ns, s) / 4, "expected a whole number"),
        (lambda p, ns, s: [1], "expected a number"),
        (lambda p, ns, s: 7, "and it is"),
    ],
)
def test_wrong_numbers_of_pages_are_told_apart(wrong, said, capsys):
    assert checks.ex14_2(wrong) == "fail"
    assert said in capsys.readouterr().out


def by_loop(proposed, says):
    taken = []
    for i, token in enumerate(says):
        taken.append(token)
        if i == len(proposed) or proposed[i] != token:
            break
    return taken


def by_cumprod(proposed, says):
    right = np.cumprod(np.array(proposed) == np.array(says[:-1])).sum()
    return [int(token) for token in says[: int(right) + 1]]


def by_tensors(proposed, says):
    p, s = torch.tensor(proposed, dtype=torch.long), torch.tensor(says)
    return s[: (p == s[:-1]).long().cumprod(0).sum() + 1].tolist()


@pytest.mark.parametrize("way", [by_loop, by_cumprod, by_tensors])
def test_acceptance_in_several_ways(way):
    assert checks.ex14_3(way) == "ok"


def count(p, s):
    return len(by_loop(p, s)) - 1


def equal(p, s):
    return [x for x, y in zip(p, s) if x == y]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda p, s: p[: count(p, s)], "one token more is for free"),
        (lambda p, s: p[: count(p, s) + 1], "first wrong proposal is kept"),
        (lambda p, s: equal(p, s) + [s[len(equal(p, s))]], "after the first wrong proposal nothing counts"),
        (equal, "stop at the first wrong one"),
        (lambda p, s: s, "all that the model says is taken"),
        (lambda p, s: p, "taken unchecked"),
        (lambda p, s: s[:-1], "all but the last"),
        (lambda p, s: p + s[-1:], "and one token after them"),
        (lambda p, s: by_loop(p, s)[-1:], "right proposals belong to the answer"),
        (count, "the number of right proposals"),
        (lambda p, s: by_loop(p, s)[-1], "return a list"),
        (lambda p, s: [0], "and one more"),
        (lambda p, s: by_loop(p[:4], s), "one token more is for free"),
    ],
)
def test_wrong_acceptances_are_told_apart(wrong, said, capsys):
    assert checks.ex14_3(wrong) == "fail"
    assert said in capsys.readouterr().out


KEY = dict(a=False, b=True, c=False, d=False, e=True, f=False)


def test_the_statements_by_the_accountant():
    shape = dict(d_model=8192, n_head=64, d_head=128)
    tpa, gqa = Layer("tpa", **shape, rank_q=16, rank_k=1, rank_v=1), Layer("gqa", **shape, n_kv_head=8)
    assert KEY["a"] == (tpa.split(8).cached_numbers < gqa.split(8).cached_numbers)
    assert KEY["b"] == (tpa.cached_numbers < gqa.cached_numbers)
    assert (tpa.cached_numbers, gqa.cached_numbers) == (384, 2048)
    assert (tpa.split(8).cached_numbers, gqa.split(8).cached_numbers) == (272, 256)
    assert checks.ex14_4(lambda: dict(KEY)) == "ok"


@pytest.mark.parametrize("key", KEY)
def test_each_wrong_judgement_has_its_own_reason(key, capsys):
    assert checks.ex14_4(lambda: {**KEY, key: not KEY[key]}) == "fail"
    line = capsys.readouterr().out
    assert f"{key} is not {not KEY[key]}: " in line and len(line) > 80


@pytest.mark.parametrize("wrong", [lambda: None, lambda: ["a"], lambda: {**KEY, "a": ...}, lambda: {**KEY, "a": "no"}])
def test_judgements_in_another_form(wrong):
    assert checks.ex14_4(wrong) == "fail"


@pytest.mark.parametrize("check", [checks.ex14_1, checks.ex14_2, checks.ex14_3, checks.ex14_4])
def test_a_stub_is_to_do(check):
    def stub(*_):
        raise NotImplementedError

    assert check(stub) == "todo"
