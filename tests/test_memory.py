"""The accountant against the paper's tables, the models' own files, and the caches and layers that really exist."""

import functools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import exactly, storages
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tpa_minimal import baselines, memory, variants
from tpa_minimal.experiments import watch_memory
from tpa_minimal.memory import DTYPES, GB, MODELS, PAPER_HEADS, PAPER_SIZES, Layer, Model, match_heads
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention, assemble

few = settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])

# --------------------------------------------------------------------------------------- formulas and real objects

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def real_layer(layer: Layer, config: T6Config):
    """The module whose cache and weights `layer` describes."""
    mla = dict(d_c=layer.d_c, d_c_q=layer.d_c_q, d_rope=layer.d_rope)
    make = {
        "mha": baselines.MultiHeadAttention,
        "gqa": functools.partial(baselines.MultiHeadAttention, n_kv_head=layer.n_kv_head),
        "mqa": functools.partial(baselines.MultiHeadAttention, n_kv_head=1),
        "mla": functools.partial(baselines.MultiHeadLatentAttention, **mla),
        "tpa": TensorProductAttention,
        "tpa-kv-only": variants.KeyValueOnly,
        "tpa-fixed-a": variants.FixedHeadFactors,
        "tpa-fixed-b": variants.FixedFeatureFactors,
    }
    return make[layer.mechanism](config)


@st.composite
def layers(draw):
    """A mechanism and sizes at random."""
    groups = draw(st.integers(1, 4))
    whole = st.integers(1, 12)
    return Layer(
        draw(st.sampled_from(memory.MECHANISMS)),
        d_model=draw(whole),
        n_head=groups * draw(st.integers(1, 4)),
        d_head=2 * draw(st.integers(1, 8)),
        n_kv_head=groups,
        rank_q=draw(whole),
        rank_k=draw(whole),
        rank_v=draw(whole),
        d_c=draw(whole),
        d_c_q=draw(whole),
        d_rope=2 * draw(whole),
    )


@few
@given(layers(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.sampled_from(list(TORCH_DTYPES)))
def test_bytes_of_real_caches_and_weights_of_real_layers_are_the_formulas(layer, n_layer, batch_size, length, dtype):
    ranks = dict(rank_q=layer.rank_q, rank_k=layer.rank_k, rank_v=layer.rank_v)
    config = T6Config(11, n_layer, layer.d_model, layer.n_head, layer.d_head, **ranks, max_len=30, d_ff=3)
    model = T6(config, attention=lambda c: real_layer(layer, c)).to(TORCH_DTYPES[dtype])
    cache = model.new_cache(batch_size)
    for chunk in torch.randint(11, (batch_size, length)).split([1, length - 1] if length > 1 else [1], dim=1):
        model(chunk, cache)
    described = Model("model", layer, n_layer, parameters=0, max_len=30, source="")
    assert cache.nbytes == described.cache_bytes(length, batch_size, dtype)
    assert cache.nbytes == described.bytes_per_token(dtype) * batch_size * length
    weights = sum(p.numel() for p in model.blocks[0].attention.parameters())
    assert weights == layer.parameters


@pytest.mark.parametrize("mechanism", memory.MECHANISMS)
def test_what_is_set_aside_is_the_formula_too(mechanism):
    """nbytes could be a story that the cache tells: count the storages that it really holds."""
    layer = Layer(mechanism, 12, 4, 8, n_kv_head=2)
    cache = real_layer(layer, T6Config(11, 1, 12, 4, 8)).new_cache(3, max_len=50)
    assert sum(storages(cache).values()) == layer.cached_numbers * 3 * 50 * 4


# ------------------------------------------------------------------------------------------------- several GPUs


@few
@given(layers(), st.sampled_from([1, 2, 3, 4, 6, 8]), st.data())
def test_what_a_gpu_caches_is_what_its_heads_read(layer, gpus, data):
    """Counted head by head: query head i reads key-value head i // (h/G), its columns of a, all of b, all of c."""
    h, G = layer.n_head, layer.n_kv_head
    assume(h % gpus == 0)
    mine = range(h // gpus * (gpu := data.draw(st.integers(0, gpus - 1))), h // gpus * (gpu + 1))
    read = set()
    for i in mine:
        if G is not None:
            read |= {(x, i // (h // G), f) for x in "kv" for f in range(layer.d_head)}
        elif layer.mechanism == "mla":
            read |= {("c", f) for f in range(layer.d_c + layer.d_rope)}
        for x, rank in (("k", layer.rank_k), ("v", layer.rank_v)) if layer.mechanism.startswith("tpa") else ():
            if layer.mechanism != "tpa-fixed-a":
                read |= {("a", x, r, i) for r in range(rank)}
            if layer.mechanism != "tpa-fixed-b":
                read |= {("b", x, r, f) for r in range(rank) for f in range(layer.d_head)}
    if G is not None and G % gpus and gpus % G:
        with pytest.raises(ValueError, match=f"gpus={gpus}: cannot share out.*use one of 1, "):
            layer.split(gpus)
    else:
        assert layer.split(gpus).cached_numbers == len(read)


def test_rank_one_on_eight_gpus_caches_more_than_eight_shared_heads():
    shape = dict(d_model=8192, n_head=64, d_head=128, rank_k=1, rank_v=1, n_kv_head=8, d_c=512, d_rope=64)
    per_gpu = {name: Layer(name, **shape).split(8).cached_numbers for name in memory.MECHANISMS}
    assert per_gpu == {
        "mha": 2 * 8 * 128, "mqa": 2 * 128, "gqa": 2 * 128, "mla": 576,
        "tpa": 2 * (8 + 128), "tpa-kv-only": 2 * (8 + 128), "tpa-fixed-a": 2 * 128, "tpa-fixed-b": 2 * 8,
    }  # fmt: skip
    assert Layer("gqa", **shape).split(16).cached_numbers == 2 * 128  # two GPUs keep the same key-value head


def share(whole, part, index, count):
    """Cut each axis of a tensor that is shorter in `part`: `part`'s block for GPU `index` of `count`."""
    for axis, (long, short) in enumerate(zip(whole.shape, part.shape)):
        whole = whole.narrow(axis, index * (long // max(1, short)) // count * short, short)
    return whole


@pytest.mark.parametrize("name, n_kv_head", [("mha", 8), ("gqa", 4), ("gqa", 2), ("mqa", 1), ("mla", 1), ("tpa", 1),
                                             ("tpa-kv-only", 1), ("tpa-fixed-a", 1), ("tpa-fixed-b", 1)])  # fmt: skip
@torch.no_grad()
def test_layers_of_the_split_sizes_add_up_to_the_whole(name, n_kv_head, count=4):
    """So what `Layer.split` says suffices: weights cut to its shapes, 4 GPUs, GQA with fewer and as many heads."""
    layer, x = Layer(name, 12, 8, 4, n_kv_head=n_kv_head, rank_q=3), torch.randn(2, 7, 12, dtype=torch.float64)
    configs = [T6Config(11, 1, 12, h, 4, rank_q=3) for h in (8, 8 // count)]
    whole, part = (real_layer(one, c).double() for one, c in zip((layer, layer.split(count)), configs))
    torch.nn.init.normal_(whole.out_proj.weight)
    expected, found = whole(x), 0
    for index in range(count):
        for parameter, target in zip(whole.parameters(), part.parameters()):
            if parameter is getattr(getattr(whole, "factor_proj", None), "weight", None):
                factors = zip(parameter.split(whole.sizes), whole.shapes, target.split(part.sizes), part.shapes)
                for w, old, t, new in factors:
                    t.copy_(share(w.unflatten(0, old), t.unflatten(0, new), index, count).reshape(t.shape))
            else:
                target.copy_(share(parameter, target, index, count))
        found = found + part(x)
    exactly(found, expected)
    assert sum(p.numel() for p in part.parameters()) == layer.split(count).parameters


@pytest.mark.parametrize("name", MODELS)
def test_a_gpus_share_of_a_model(name):
    model = MODELS[name]
    assert model.split(1) == model
    count = next(n for n in (2, 5) if model.layer.n_head % n == 0)
    others = model.parameters - model.n_layer * model.layer.parameters
    part = model.split(count)
    assert part.parameters == model.n_layer * model.layer.split(count).parameters - (-others // count)
    assert (
        part.cache_bytes(5000, 3) == model.cache_bytes(5000, 3) * part.layer.cached_numbers / model.layer.cached_numbers
    )


@few
@given(st.sampled_from(list(MODELS)), st.floats(1e9, 1e13), st.integers(1, 200_000), st.sampled_from(list(DTYPES)))
def test_the_largest_batch_fits_and_one_more_does_not(name, budget, context, dtype):
    model = MODELS[name]

    def needed(batch_size):
        return model.weight_bytes("int4") + model.cache_bytes(context, batch_size, dtype)

    most = model.largest_batch(budget, context, dtype, weight_dtype="int4")
    assert isinstance(most, int) and budget < needed(most + 1) and (most == 0 or needed(most) <= budget)


@pytest.mark.skipif(sys.platform != "linux", reason="how a process's memory is counted differs elsewhere")
def test_process_memory_grows_by_the_cache():
    """Between steps: the cache to 1 MiB. At the peak of a step: 16 MiB more at most, whatever the mechanism."""
    rows = watch_memory.measure()
    assert set(rows) == {"MQA", "TPA", "MLA", "GQA", "MHA"}
    for name, row in rows.items():
        assert row["cache"] == row["formula"] > 8e6, name
        assert abs(row["between_steps"] - row["formula"]) < 2**20, (name, row)
        assert -(2**20) < row["peak"] - row["formula"] < 16 * 2**20, (name, row)


# ------------------------------------------------------------------------------------------------ the paper's tables

EXAMPLES = {  # App. A.4: d_model, h, d_h, G, (d_c, d_R, d'_c)
    "I": (2048, 32, 64, 4, (256, 32, 768)),
    "II": (4096, 32, 128, 4, (512, 64, 1536)),
    "III": (7168, 64, 128, 8, (512, 64, 1536)),
}
MULTIPLY_ADDS = {  # per cached token
    "mha": (4096, 8192, 16384),
    "gqa": (4096, 8192, 16384),
    "mla": (17408, 34816, 69632),
    (16, 1, 1): (3584, 6656, 11264),
    (16, 2, 2): (7168, 13312, 22528),
    (8, 1, 1): (2816, 5376, 9728),
    (8, 2, 2): (5632, 10752, 19456),
}
MILLIONS = {  # parameters of a layer, as printed
    "mha": ("16.8", "67.1", "235"),
    "gqa": ("9.4", "37.7", "132"),
    "mla": ("9.8", "39.1", "101"),
    (16, 1, 1): ("7.7", "28.6", "83"),
    (16, 2, 2): ("8.1", "29.9", "86.2"),
    (8, 1, 1): ("6.2", "23.3", "72.5"),
    (8, 2, 2): ("6.6", "24.6", "75.2"),
}


def worked(row, example):
    d_model, h, d_h, G, (d_c, d_rope, d_c_q) = EXAMPLES[example]
    if isinstance(row, tuple):
        return Layer("tpa", d_model, h, d_h, rank_q=row[0], rank_k=row[1], rank_v=row[2])
    return Layer(row, d_model, h, d_h, n_kv_head=G, d_c=d_c, d_c_q=d_c_q, d_rope=d_rope)


@pytest.mark.parametrize("row", MULTIPLY_ADDS, ids=str)
def test_worked_costs_of_app_a4(row):
    for context in (1, 1000):
        found = tuple(worked(row, example).decode_multiply_adds(context) for example in EXAMPLES)
        assert found == tuple(context * n for n in MULTIPLY_ADDS[row])


@pytest.mark.parametrize("row", MILLIONS, ids=str)
def test_parameters_of_app_a4_as_printed(row):
    """Within one unit of the last printed digit: 83.49 M is printed as 83, 7.73 M as 7.7, 86.25 M as 86.2."""
    for example, printed in zip(EXAMPLES, MILLIONS[row]):
        digits = len(printed.partition(".")[2])
        unit = 10.0**-digits
        assert abs(worked(row, example).parameters / 1e6 - float(printed)) <= 0.51 * unit, (row, example)


def test_cached_numbers_of_the_papers_own_configurations():
    """The figures that the text quotes, and the configurations in which TPA does not cache least."""
    small = {name: Layer(name, 768, heads, 64, n_kv_head=2) for name, heads in PAPER_HEADS["small-124M"].items()}
    numbers = {name: layer.cached_numbers for name, layer in small.items()}
    assert numbers == {"mha": 1536, "mqa": 128, "gqa": 256, "mla": 288, "tpa-kv-only": 344, "tpa": 392}
    assert memory.ratios(small["tpa"], small["mha"]) == {
        "what the model ships (MHA, 12 heads)": 1536 / 392,
        "MHA with the model's own 12 heads": 1536 / 392,
        "MHA with the layer's own 34 heads": 4352 / 392,
    }
    assert Layer("tpa", 8192, 64, 128, rank_k=1, rank_v=1).cached_numbers == 384
    assert Layer("mha", 8192, 64, 128).cached_numbers == 16384
    for heads in PAPER_HEADS.values():
        tpa = Layer("tpa", 768, heads["tpa"], 64).cached_numbers
        assert max(128, 256) < tpa < 2 * heads["mha"] * 64  # MQA and GQA-2 cache less than TPA at every size


def test_variants_of_table_1():
    sizes = dict(d_model=7, n_head=5, d_head=4, rank_q=3, rank_k=1, rank_v=2)
    table = {
        name: (Layer(name, **sizes).cached_numbers, Layer(name, **sizes).parameters) for name in memory.MECHANISMS[4:]
    }
    assert table == {
        "tpa": (3 * 9, 7 * 6 * 9 + 140),
        "tpa-kv-only": (3 * 9, 7 * 3 * 9 + 280),
        "tpa-fixed-a": (3 * 4, 6 * (28 + 5) + 140),
        "tpa-fixed-b": (3 * 5, 6 * (35 + 4) + 140),
    }


# The nearest head count is the paper's in all but these cells; each has the count that is stated and the nearest.
DEPARTURES = {("small-124M", "mla"): (12, 13), ("small-124M", "tpa-kv-only"): (22, 21), ("small-124M", "tpa"): (34, 33)}


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_head_matching_gives_app_h(size):
    d_model = PAPER_SIZES[size]
    for mechanism, stated in PAPER_HEADS[size].items():
        sizes = {"n_kv_head": 2} if mechanism == "gqa" else {"d_c": 256, "d_c_q": 512} if mechanism == "mla" else {}
        nearest = match_heads(mechanism, 4 * d_model**2, d_model, 64, **sizes)
        assert (stated, nearest) == DEPARTURES.get((size, mechanism), (stated, stated))
        parameters = Layer(mechanism, d_model, stated, 64, **sizes).parameters
        assert 0.92 < parameters / (4 * d_model**2) < 1.04, (mechanism, parameters)


def test_the_stated_widths_of_mla_do_not_fit_its_head_counts():
    found = []
    for size, (d_c, d_c_q) in memory.PAPER_MLA_WIDTHS.items():
        d_model = PAPER_SIZES[size]
        found.append(match_heads("mla", 4 * d_model**2, d_model, 64, d_c=d_c, d_c_q=d_c_q))
    assert found == [13, 11, 18, 29]


@few
@given(st.sampled_from(memory.MECHANISMS), st.integers(1, 60), st.integers(1, 200), st.integers(1, 40))
def test_matched_heads_are_the_nearest(mechanism, heads, d_model, half_d_head):
    d_head, G = 2 * half_d_head, 3 if mechanism == "gqa" else None
    heads *= G or 1

    def parameters(n):
        return Layer(mechanism, d_model, n, d_head, n_kv_head=G).parameters

    sizes = {"n_kv_head": G} if G else {}
    assert match_heads(mechanism, parameters(heads), d_model, d_head, **sizes) == heads
    slope = (parameters(heads + (G or 1)) - parameters(heads)) // 3
    assert match_heads(mechanism, parameters(heads) + slope, d_model, d_head, **sizes) == heads


def test_matched_layers_are_real_layers_of_equal_size():
    budget = Layer("tpa", 128, 16, 32).parameters
    for name in ("mha", "mqa", "gqa", "mla", "tpa"):
        sizes = {"n_kv_head": 2} if name == "gqa" else {}
        heads = match_heads(name, budget, 128, 32, **sizes)
        layer = real_layer(Layer(name, 128, heads, 32, **sizes), T6Config.preset("tiny", vocab_size=64, n_head=heads))
        count = sum(p.numel() for p in layer.parameters())
        assert abs(count / budget - 1) < 0.1, (name, count)
    with pytest.raises(ValueError, match="parameters=100.*raise the number"):
        match_heads("mla", 100, 128, 32)


def test_mla_defaults_agree_with_the_module():
    for d_head in (2, 4, 6, 64, 128):
        layer, config = Layer("mla", 32, 2, d_head), T6Config(11, 1, 32, 2, d_head)
        module = baselines.MultiHeadLatentAttention(config)
        assert (layer.d_c, layer.d_c_q, layer.d_rope) == (module.d_c, module.d_c_q, module.d_rope)


def test_break_even():
    """At R_K + R_V = 2 G d_h / (h + d_h) TPA caches as much as G key-value heads; one rank more and it caches more."""
    assert memory.break_even_ranks(64, 64) == 64 and memory.break_even_ranks(64, 128, 8) == pytest.approx(32 / 3)
    for h, d_h, G in ((12, 64, 12), (64, 128, 8), (32, 128, 1), (40, 8, 20)):
        limit = memory.break_even_ranks(h, d_h, G)
        shared = Layer("gqa", 64, h, d_h, n_kv_head=G).cached_numbers
        for ranks in range(2, 60):
            tpa = Layer("tpa", 64, h, d_h, rank_k=1, rank_v=ranks - 1).cached_numbers
            assert (tpa < shared) == (ranks < limit)


# ------------------------------------------------------------------------------------------------ models people run


def llama_like(vocab, layers, d, h, d_h, G, d_ff, *, tied=False, biases=False, head_norms=False, norms=2):
    """All weights of a decoder with gated feed-forward layers, from the entries of its config.json."""
    attention = 2 * d * d_h * (h + G) + (d_h * (h + 2 * G) if biases else 0) + (2 * d_h if head_norms else 0)
    return vocab * d * (1 if tied else 2) + d + layers * (attention + 3 * d * d_ff + norms * d)


def gpt2(layers, d):
    return 50257 * d + 1024 * d + layers * (12 * d * d + 13 * d) + 2 * d


def deepseek_v3():
    d = 7168
    attention = MODELS["DeepSeek-V3"].layer.parameters + 1536 + 512  # and the gains of the two norms
    experts = 257 * 3 * d * 2048 + 256 * (d + 1)  # 256 routed, 1 shared, the router and its bias
    return 2 * 129280 * d + d + 61 * (attention + 2 * d) + 3 * 3 * d * 18432 + 58 * experts


# From the config.json of each model's repository: these entries must lead to the published number of weights exactly.
PUBLISHED = {
    "GPT-2 small": ((12, 768, 12, 64, 12), gpt2(12, 768)),
    "GPT-2 XL": ((48, 1600, 25, 64, 25), gpt2(48, 1600)),
    "Llama 3 8B": ((32, 4096, 32, 128, 8), llama_like(128256, 32, 4096, 32, 128, 8, 14336)),
    "Llama 3 70B": ((80, 8192, 64, 128, 8), llama_like(128256, 80, 8192, 64, 128, 8, 28672)),
    "Mistral 7B v0.1": ((32, 4096, 32, 128, 8), llama_like(32000, 32, 4096, 32, 128, 8, 14336)),
    "Mistral 7B v0.3": ((32, 4096, 32, 128, 8), llama_like(32768, 32, 4096, 32, 128, 8, 14336)),
    "Qwen2.5 7B": ((28, 3584, 28, 128, 4), llama_like(152064, 28, 3584, 28, 128, 4, 18944, biases=True)),
    "Qwen3 8B": ((36, 4096, 32, 128, 8), llama_like(151936, 36, 4096, 32, 128, 8, 12288, head_norms=True)),
    "Qwen3 32B": ((64, 5120, 64, 128, 8), llama_like(151936, 64, 5120, 64, 128, 8, 25600, head_norms=True)),
    "Gemma 2 9B": ((42, 3584, 16, 256, 8), llama_like(256000, 42, 3584, 16, 256, 8, 14336, tied=True, norms=4)),
    "Gemma 3 27B": (
        (62, 5376, 32, 128, 16),
        llama_like(262208, 62, 5376, 32, 128, 16, 21504, tied=True, head_norms=True, norms=4),
    ),
    "DeepSeek-V3": ((61, 7168, 128, 128, None), deepseek_v3()),
}


def test_presets_are_the_published_configurations():
    assert set(PUBLISHED) == set(MODELS)
    for name, (sizes, parameters) in PUBLISHED.items():
        model = MODELS[name]
        layer = model.layer
        assert (model.n_layer, layer.d_model, layer.n_head, layer.d_head, layer.n_kv_head) == sizes, name
        assert model.parameters == parameters, name
        assert model.source.count("/") == 1 and model.name == name
        assert 0 <= model.n_local <= model.n_layer and (model.window > 0) == (model.n_local > 0)


def test_the_question_everyone_asks():
    """Llama 3 70B, 131,072 tokens, bfloat16: 43 GB as shipped, 8.1 and 16.1 GB with TPA."""
    llama = MODELS["Llama 3 70B"]
    one, two = llama.with_tpa(16, 1, 1), llama.with_tpa(16, 2, 2)
    held = [model.cache_bytes(131_072) for model in (llama, one, two)]
    assert held == [327_680 * 131_072, 61_440 * 131_072, 122_880 * 131_072]
    assert memory.ratios(one.layer, llama.layer) == {
        "what the model ships (GQA, 8 key-value heads)": 16 / 3,
        "MHA with the model's own 64 heads": 128 / 3,
    }
    assert llama.weight_bytes() > 80 * GB  # in bfloat16 the weights alone do not fit
    assert llama.largest_context(80 * GB) == 0
    assert [m.largest_context(80 * GB, weight_dtype="int8") for m in (llama, one, two)] == [28_827, 226_110, 111_007]
    for model in (one, two):
        added = model.parameters - llama.parameters
        assert added == 80 * (model.layer.parameters - llama.layer.parameters) < 0


@few
@given(st.sampled_from(list(MODELS)), st.floats(1e9, 1e13), st.integers(1, 64), st.sampled_from(list(DTYPES)))
def test_the_largest_context_fits_and_the_next_does_not(name, budget, batch_size, dtype):
    model = MODELS[name]

    def needed(context):
        return model.weight_bytes("int4") + model.cache_bytes(context, batch_size, dtype)

    context = model.largest_context(budget, batch_size, dtype, weight_dtype="int4")
    if context == math.inf:
        assert model.n_local == model.n_layer and needed(10**9) <= budget
    elif context == 0:
        assert needed(1) > budget
    else:
        assert isinstance(context, int) and needed(context) <= budget < needed(context + 1)


def test_windows_bound_what_local_layers_hold():
    gemma = MODELS["Gemma 3 27B"]
    per_layer = gemma.layer.cached_numbers * 2
    assert gemma.cache_bytes(1024) == 62 * 1024 * per_layer
    assert gemma.cache_bytes(131_072) == (10 * 131_072 + 52 * 1024) * per_layer
    assert MODELS["Mistral 7B v0.1"].cache_bytes(32_768) == MODELS["Mistral 7B v0.1"].cache_bytes(4096)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: Layer("mhq", 8, 2, 4), "mechanism='mhq'.*choose one of"),
        (lambda: Layer("gqa", 8, 6, 4), "n_kv_head=None"),
        (lambda: Layer("gqa", 8, 6, 4, n_kv_head=4), "n_kv_head=4: must divide n_head=6"),
        (lambda: Layer("tpa", 8, 6, 4, rank_k=0), "rank_k=0: must be a whole number"),
        (lambda: Layer("tpa", 8, 6.0, 4), "n_head=6.0: must be a whole number"),
        (lambda: MODELS["GPT-2 XL"].cache_bytes(10, dtype="bf16"), "dtype='bf16'.*use one of float32"),
        (lambda: MODELS["GPT-2 XL"].largest_context(1e12, batch_size=0), "batch_size=0"),
        (lambda: MODELS["GPT-2 XL"].largest_batch(1e12, 0), "context=0: must be 1 or more"),
        (lambda: MODELS["GPT-2 XL"].split(8), "gpus=8: cannot share out.*n_head=25; use one of 1, 5, 25"),
        (lambda: Layer("tpa", 8, 6, 4).split(0), "gpus=0: .*use one of 1, 2, 3, 6"),
    ],
)
def test_bad_input_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_only_the_standard_library():
    bare = "import importlib.util as u, sys; s = u.spec_from_file_location('memory', {path!r}); "
    bare += "m = u.module_from_spec(s); sys.modules['memory'] = m; s.loader.exec_module(m); "
    bare += "assert 'torch' not in sys.modules and m.MODELS"
    subprocess.run([sys.executable, "-S", "-c", bare.format(path=memory.__file__)], check=True)


def test_keys_have_rank_r_k_per_token_and_more_per_text():
    torch.manual_seed(0)
    layer = TensorProductAttention(T6Config(11, 1, 32, 8, 16)).double()
    _, _, a_k, b_k, _, _ = layer.factors(torch.randn(1, 20, 32, dtype=torch.float64))
    k = assemble(a_k, b_k)[0]
    assert torch.linalg.matrix_rank(k).tolist() == [2] * 20
    assert torch.linalg.matrix_rank(k.flatten(1)) == 20


def test_replacing_a_layer_keeps_the_rest():
    model = MODELS["Qwen3 32B"]
    assert replace(model.with_attention(model.layer), name=model.name) == model
