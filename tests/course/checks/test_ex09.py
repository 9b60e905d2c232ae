"""The checkers of notebook 09 accept what is right and say what is wrong."""

import math

import pytest

from tpa_minimal.course import checks
from tpa_minimal.memory import MODELS, Layer, Model, ratios


def by_the_accountant(L, h, d, k, v, context, B, size, n_local, window):
    layer = Layer("tpa", 8, h, d, rank_k=k, rank_v=v)
    model = Model("", layer, L, 0, 0, "", n_local=n_local, window=window)
    return model.cache_bytes(context, B, {1: "int8", 2: "float16", 4: "float32"}[size])


def test_the_cache_with_windows():
    assert checks.ex09_1(by_the_accountant) == "ok"


def places(L, n, M, w):
    return (L - n) * M + n * min(M, w)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda L, h, d, k, v, M, B, s, n, w: 2 * h * d * places(L, n, M, w) * B * s, "MHA's cache"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * h * d * places(L, n, M, w) * B * s, "h + d_h numbers"),
        (lambda L, h, d, k, v, M, B, s, n, w: 2 * k * (h + d) * places(L, n, M, w) * B * s, "counted separately"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * places(L, n, M, w) * s, "each sequence"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * L * M * B * s, "local layers keep"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * ((L - n) * M + n * w) * B * s, "shorter than the"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * n * min(M, w) * B * s, "only the local layers"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * places(L, L - n, M, w) * B * s, "swapped"),
        (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * (L * M + n * min(M, w)) * B * s, "counted twice"),
        (lambda *_: 1, "and it is"),
    ],
)
def test_wrong_caches_are_told_apart(wrong, said, capsys):
    assert checks.ex09_1(wrong) == "fail"
    assert said in capsys.readouterr().out


def by_trial(h, d, G, times):
    shipped = Layer("gqa", 8, h, d, n_kv_head=G).cached_numbers if h % G == 0 else 2 * G * d
    fits = [R for R in range(1, 999) if shipped >= times * Layer("tpa", 8, h, d, rank_k=R, rank_v=R).cached_numbers]
    return max(fits, default=0)


def test_the_largest_rank():
    assert checks.ex09_2(by_trial) == "ok"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda h, d, G, t: math.ceil(G * d / (t * (h + d))), "rounded up"),
        (lambda h, d, G, t: round(G * d / (t * (h + d))), "rounded to the nearest"),
        (lambda h, d, G, t: max(0, math.ceil(G * d / (t * (h + d))) - 1), "includes equality"),
        (lambda h, d, G, t: math.floor(h * d / (t * (h + d))), "not MHA"),
        (lambda h, d, G, t: math.floor(2 * G * d / (t * (h + d))), "both have rank R"),
        (lambda h, d, G, t: max(1, math.floor(G * d / (t * (h + d)))), "the answer is 0"),
        (lambda h, d, G, t: math.floor(G * d / (h + d)), "`times` is not used"),
        (lambda h, d, G, t: math.floor(G * d * t / (h + d)), "multiplied by `times`"),
        (lambda h, d, G, t: G * d / (t * (h + d)), "whole number"),
        (lambda h, d, G, t: G * d // (t * (h + d)), "// of floats gives 3.0"),
        (lambda h, d, G, t: 7, "and it is"),
    ],
)
def test_wrong_ranks_are_told_apart(wrong, said, capsys):
    assert checks.ex09_2(wrong) == "fail"
    assert said in capsys.readouterr().out


KEY = dict(a="baseline", b="true", c="false", d="false", e="baseline", f="false")


def test_the_leaflet_by_the_accountant():
    llama, deepseek = MODELS["Llama 3 70B"], MODELS["DeepSeek-V3"]
    one, two = llama.with_tpa(16, 1, 1), llama.with_tpa(16, 2, 2)
    shipped, mha = (round(ratio, 1) for ratio in ratios(one.layer, llama.layer).values())
    _, own, same = (round(r, 1) for r in ratios(Layer("tpa", 768, 34, 64), Layer("mha", 768, 12, 64)).values())
    total = [model.weight_bytes() + model.cache_bytes(1000) for model in (llama, one)]
    assert KEY == dict(
        a="baseline" if mha == 42.7 != shipped else "",
        b="true" if round(two.cache_bytes(131_072) / 1e9, 1) == 16.1 else "false",
        c="true" if two.weight_bytes() + two.cache_bytes(131_072) <= 80e9 else "false",
        d="true" if total[1] < total[0] / 2 else "false",
        e="baseline" if same == 11.1 != own else "",
        f="true" if deepseek.with_tpa(16, 2, 2).layer.cached_numbers < deepseek.layer.cached_numbers else "false",
    )
    assert checks.ex09_3(lambda: dict(KEY)) == "ok"


@pytest.mark.parametrize("key", KEY)
def test_each_wrong_judgement_has_its_own_reason(key, capsys):
    wrong = "true" if KEY[key] != "true" else "false"
    assert checks.ex09_3(lambda: {**KEY, key: wrong}) == "fail"
    line = capsys.readouterr().out
    assert f"{key} is not {wrong!r}: " in line and len(line) > 80


def test_a_leaflet_in_another_form():
    assert checks.ex09_3(lambda: ["true"] * 6) == "fail"
    assert checks.ex09_3(lambda: {**KEY, "a": "maybe"}) == "fail"


@pytest.mark.parametrize("check", [checks.ex09_1, checks.ex09_2, checks.ex09_3])
def test_a_stub_is_to_do(check):
    def stub(*_):
        raise NotImplementedError

    assert check(stub) == "todo"
