"""Checkers of notebook 09's exercises."""

import math

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge_cases


@exercise
def ex09_1(tpa_cache_bytes):
    """The bytes of a TPA model's cache, some layers of which look back a window only."""
    # n_layer, n_head, d_head, rank_k, rank_v, context, batch_size, bytes_per_number, n_local, window
    cases = [
        (80, 64, 128, 1, 3, 131_072, 1, 2, 0, 0),
        (12, 34, 64, 2, 3, 1024, 8, 4, 0, 0),
        (62, 32, 128, 2, 1, 50_000, 2, 1, 52, 1024),
        (32, 32, 128, 1, 4, 1000, 2, 2, 16, 4096),
    ]

    def numbers(h, d, k, v):
        return (k + v) * (h + d)

    def positions(L, n, M, w):
        return (L - n) * M + n * min(M, w)

    def rule(numbers=numbers, positions=positions, batch=True):
        return [
            numbers(h, d, k, v) * positions(L, n, M, w) * (B if batch else 1) * size
            for L, h, d, k, v, M, B, size, n, w in cases
        ]

    answers = {
        "": rule(),
        "that is MHA's cache, 2 h d_h per token and layer; TPA keeps (R_K + R_V)(h + d_h)": rule(
            lambda h, d, k, v: 2 * h * d
        ),
        "a pair of factors is h + d_h numbers, not h · d_h: the outer product is never stored": rule(
            lambda h, d, k, v: (k + v) * h * d
        ),
        "ranks are counted separately, R_K for the keys and R_V for the values: their sum, not twice R_K": rule(
            lambda h, d, k, v: 2 * k * (h + d)
        ),
        "each sequence of the batch has a cache of its own": rule(batch=False),
        "local layers keep `window` tokens, not the whole context": rule(positions=lambda L, n, M, w: L * M),
        "a context shorter than the window fills local layers with the context only: min(context, window)": rule(
            positions=lambda L, n, M, w: (L - n) * M + n * w
        ),
        "n_local layers are the ones with a window, the other n_layer - n_local keep all: yours are swapped": rule(
            positions=lambda L, n, M, w: n * M + (L - n) * min(M, w)
        ),
        "local layers are counted twice: only n_layer - n_local layers keep the whole context": rule(
            positions=lambda L, n, M, w: L * M + n * min(M, w)
        ),
        "only the local layers are counted; the others keep the whole context": rule(
            positions=lambda L, n, M, w: n * min(M, w)
        ),
    }
    judge_cases([tpa_cache_bytes(*case) for case in cases], answers, cases)


@exercise
def ex09_2(largest_rank):
    """The largest R = R_K = R_V at which TPA caches at least `times` times less than G shared heads."""
    # n_head, d_head, n_kv_head, times
    cases = [(64, 128, 8, 2), (64, 128, 8, 1), (12, 64, 12, 1), (64, 64, 64, 8), (128, 128, 2, 3), (32, 128, 8, 1.5)]
    given = [largest_rank(*case) for case in cases]
    if not all(isinstance(n, int) for n in given):
        if all(isinstance(n, (int, float)) and n % 1 == 0 for n in given):
            raise WrongAnswer("return an int: // of floats gives 3.0")
        raise WrongAnswer("return a whole number: there is no fraction of a rank")

    def rule(whole=math.floor, mha=False, both=2):
        return [whole(2 * (h if mha else G) * d / (both * times * (h + d))) for h, d, G, times in cases]

    answers = {
        "": rule(),
        "rounded up: at that rank the saving is smaller than was asked for": rule(math.ceil),
        "rounded to the nearest: where that is up, the saving is smaller than was asked for": rule(round),
        "one rank too few where the saving is met exactly: `at least` includes equality": rule(
            lambda x: max(0, math.ceil(x) - 1)
        ),
        "the baseline is what the model ships, its n_kv_head shared heads, not MHA with n_head": rule(mha=True),
        "keys and values both have rank R, so TPA keeps 2 R (h + d_h) numbers per token": rule(both=1),
        "where even rank 1 saves too little, the answer is 0": [max(1, n) for n in rule()],
        "multiplied by `times`: TPA's cache times `times` must fit into the shipped one, so divide": [
            math.floor(G * d * times / (h + d)) for h, d, G, times in cases
        ],
        "`times` is not used: that is break-even": [math.floor(G * d / (h + d)) for h, d, G, _ in cases],
    }
    judge_cases(given, answers, cases)


@exercise
def ex09_3(leaflet):
    """Six sentences of an advertisement, and the baseline that each needs."""
    right = dict(a="baseline", b="true", c="false", d="false", e="baseline", f="false")
    why = dict(
        a="per token and layer: MHA with 64 heads 16,384, the shipped GQA 2,048, TPA 384. Which two give 42.7?",
        b="(2 + 2)(64 + 128) numbers, 80 layers, 2 bytes, 131,072 tokens: work it out",
        c="70.6 billion weights (66.4 with TPA) at 2 bytes each come before any cache",
        d="how many GB is the cache of 1,000 tokens at 328 kB each, and how many are the weights?",
        e="392 numbers with 34 heads. The MHA of the comparison has 12 heads; which MHA has 4,352 numbers?",
        f="DeepSeek-V3 ships no shared heads: its latent is 576 numbers; with 128 heads TPA keeps 4 · (128 + 128)",
    )
    given = leaflet()
    if not isinstance(given, dict) or set(given) != set(right):
        raise WrongAnswer("return a dict with the keys a to f")
    for key, answer in given.items():
        if answer not in ("true", "false", "baseline"):
            raise WrongAnswer(f'{key}: {answer!r} is none of "true", "false" and "baseline"')
    for key, answer in given.items():
        if answer != right[key]:
            raise WrongAnswer(f"{key} is not {answer!r}: {why[key]}")
