"""MHA, MQA, GQA and MLA against explicit loops, and decoding against the full pass; float64 unless said otherwise."""

import dataclasses
import functools
import math

import pytest
import torch
from helpers import exactly
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.tpa import DECODE_TOKENS, T6, Cache, T6Config, apply_rope, rope_tables

few = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])

# name: a function of a config that gives the layer
MAKERS = {
    "mha": MultiHeadAttention,
    "gqa": functools.partial(MultiHeadAttention, n_kv_head=2),
    "mqa": functools.partial(MultiHeadAttention, n_kv_head=1),
    "mla": MultiHeadLatentAttention,
    "mla, odd widths": functools.partial(MultiHeadLatentAttention, d_c=5, d_c_q=7, d_rope=6),
}
every_baseline = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def some_config(**changes):
    return T6Config(**{**dict(vocab_size=31, n_layer=2, d_model=12, n_head=4, d_head=8, max_len=64), **changes})


def randomized(module, seed=0):
    """The module in float64 with every weight drawn at random, the zero ones too, so that no part is silent."""
    torch.manual_seed(seed)
    module = module.double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def rotated(x, base):
    """RoPE of x (T, d) at positions 0, 1, ..."""
    tables = rope_tables(torch.arange(len(x)), x.shape[-1], base, torch.float64)
    return apply_rope(x[None, :, None], *tables)[0, :, 0]


def softmax_rows(q, k, v, scale):
    """One head, one query at a time: q (T, ·), k (T, ·), v (T, ·)."""
    rows = []
    for t in range(len(q)):
        weights = torch.stack([(q[t] * k[s]).sum() * scale for s in range(t + 1)]).exp()
        rows.append(sum(w * v[s] for s, w in enumerate(weights)) / weights.sum())
    return torch.stack(rows)


def mha_by_loops(layer, x):
    """x (T, d_model): each head's rows of the weights, its group's key and value, its softmax."""
    h, d_h, base = layer.config.n_head, layer.config.d_head, layer.config.rope_base
    heads = []
    for i in range(h):
        j = i * layer.n_kv_head // h
        q = rotated(x @ layer.q_proj.weight[i * d_h : (i + 1) * d_h].T, base)
        k = rotated(x @ layer.k_proj.weight[j * d_h : (j + 1) * d_h].T, base)
        v = x @ layer.v_proj.weight[j * d_h : (j + 1) * d_h].T
        heads.append(softmax_rows(q, k, v, 1 / math.sqrt(d_h)))
    return torch.cat(heads, dim=-1) @ layer.out_proj.weight.T


def mla_by_loops(layer, x):
    """The equations of DeepSeek-V2's Sec. 2.1, head by head."""
    h, d_h, base = layer.config.n_head, layer.config.d_head, layer.config.rope_base

    def norm(y):
        return y / (y.pow(2).mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt()

    c_q = norm(x @ layer.q_down.weight.T)
    c = norm(x @ layer.kv_down.weight[: layer.d_c].T)
    k_rope = rotated(x @ layer.kv_down.weight[layer.d_c :].T, base)
    heads, width = [], d_h + layer.d_rope
    for i in range(h):
        W_q = layer.q_up.weight[i * width : (i + 1) * width]
        rows = slice(i * d_h, (i + 1) * d_h)
        q = torch.cat((c_q @ W_q[:d_h].T, rotated(c_q @ W_q[d_h:].T, base)), dim=-1)
        k = torch.cat((c @ layer.k_up.weight[rows].T, k_rope), dim=-1)
        heads.append(softmax_rows(q, k, c @ layer.v_up.weight[rows].T, 1 / math.sqrt(width)))
    return torch.cat(heads, dim=-1) @ layer.out_proj.weight.T


@every_baseline
def test_layers_equal_explicit_loops(make):
    layer = randomized(make(some_config(rope_base=100.0)))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    loops = mla_by_loops if isinstance(layer, MultiHeadLatentAttention) else mha_by_loops
    exactly(layer(x), torch.stack([loops(layer, sequence) for sequence in x]))


# ------------------------------------------------------------------------------------------------------- decoding


@st.composite
def cases(draw):
    """A config, one of the mechanisms, a batch size and the lengths of the chunks in which a sequence arrives."""
    groups = draw(st.integers(1, 3))
    n_head = groups * draw(st.integers(1, 4))
    config = some_config(
        n_layer=1, d_model=draw(st.integers(1, 9)), n_head=n_head, d_head=2 * draw(st.integers(1, 6)), rope_base=100.0
    )
    make = draw(
        st.sampled_from(
            [
                MultiHeadAttention,
                functools.partial(MultiHeadAttention, n_kv_head=groups),
                functools.partial(MultiHeadAttention, n_kv_head=1),
                MultiHeadLatentAttention,
                functools.partial(
                    MultiHeadLatentAttention,
                    d_c=draw(st.integers(1, 9)),
                    d_c_q=draw(st.integers(1, 9)),
                    d_rope=2 * draw(st.integers(1, 4)),
                ),
            ]
        )
    )
    # Chunks on both sides of DECODE_TOKENS, so that both ways of attending meet a filled cache.
    chunks = draw(st.lists(st.sampled_from([1, 1, 2, 3, 16, 17, 20]), min_size=1, max_size=4))
    return config, make, draw(st.integers(1, 3)), chunks


@few
@given(cases())
def test_any_chunking_equals_the_full_pass(case):
    config, make, batch_size, chunks = case
    layer = randomized(make(config))
    x = torch.randn(batch_size, sum(chunks), config.d_model, dtype=torch.float64)
    cache = layer.new_cache(batch_size, max_len=sum(chunks))
    exactly(torch.cat([layer(chunk, cache) for chunk in x.split(chunks, dim=1)], dim=1), layer(x))
    assert cache.length == sum(chunks)


@every_baseline
def test_a_model_decodes_truncates_and_generates_as_without_a_cache(make):
    model = randomized(T6(some_config(rope_base=100.0), attention=make))
    tokens = torch.randint(31, (3, 30))
    full = model(tokens)
    cache = model.new_cache(3)
    assert isinstance(cache, Cache)
    model(tokens[:, :25], cache)
    model(torch.randint(31, (3, 4)), cache)  # a continuation that is then dropped
    cache.truncate(25)
    exactly(model(tokens[:, 25:26], cache), full[:, 25:26])
    model(tokens)  # calls without the cache leave it alone
    exactly(model(tokens[:, 26:], cache), full[:, 26:])
    assert cache.length == 30
    greedy = functools.partial(model.generate, tokens[:, :5], 12, temperature=0.0)
    assert torch.equal(greedy(), greedy(use_cache=False))


@few
@given(st.integers(1, 20), st.integers(0, 25), st.integers(1, 4), st.integers(1, 9), st.integers(1, 4))
def test_absorbed_mla_equals_expanded(T, past, h, d_c, half_rope):
    layer = randomized(MultiHeadLatentAttention(some_config(n_head=h), d_c=d_c, d_rope=2 * half_rope))
    q, q_rope = torch.randn(2, T, h, 8, dtype=torch.float64), torch.randn(2, T, h, 2 * half_rope, dtype=torch.float64)
    latent = torch.randn(2, past + T, 1, d_c + 2 * half_rope, dtype=torch.float64)
    exactly(layer.attend_absorbed(q, q_rope, latent), layer.attend_expanded(q, q_rope, latent))


def test_decoding_mla_never_expands_the_past(monkeypatch):
    layer = randomized(MultiHeadLatentAttention(some_config()))
    cache = layer.new_cache(1)
    layer(torch.randn(1, 20, 12, dtype=torch.float64), cache)

    def expand(*_):
        raise AssertionError("keys and values of the past were rebuilt")

    monkeypatch.setattr(layer, "attend_expanded", expand)
    layer(torch.randn(1, 1, 12, dtype=torch.float64), cache)
    layer(torch.randn(1, DECODE_TOKENS, 12, dtype=torch.float64), cache)


@every_baseline
@pytest.mark.parametrize(
    "dtype, cache_dtype, tolerance",
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 0.1),  # 8 bits of what is stored
        (torch.bfloat16, torch.bfloat16, 0.1),  # 8 bits of every product
    ],
)
def test_reduced_precision_decodes_as_the_exact_full_pass(make, dtype, cache_dtype, tolerance):
    layer = randomized(make(some_config()))
    x = torch.randn(2, 24, 12)
    exact = layer(x.double())
    layer = layer.to(dtype)
    cache = layer.new_cache(2, dtype=cache_dtype)
    out = torch.cat([layer(chunk.to(dtype), cache) for chunk in x.split([20, 1, 3], dim=1)], dim=1)
    assert out.dtype == dtype
    exactly(out.double(), exact, tolerance)


@every_baseline
def test_gradients_reach_every_weight(make):
    layer = randomized(make(some_config()))
    layer(torch.randn(1, 5, 12, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@every_baseline
def test_a_model_starts_as_the_identity(make):
    x = torch.randn(1, 5, 12)
    assert make(some_config())(x).abs().max() == 0  # the output projection starts at zero, as TPA's


# --------------------------------------------------------------------------------------------------------- caches


@every_baseline
def test_a_full_cache_refuses_and_keeps_what_it_held(make):
    layer = randomized(make(some_config()))
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    full, cache = layer(x), layer.new_cache(2, max_len=8)
    layer(x[:, :6], cache)
    with pytest.raises(ValueError, match="holds 6 of 8 positions.*4 more.*max_len=10"):
        layer(x[:, 6:], cache)
    assert cache.length == 6 and cache.max_len == 8
    exactly(layer(x[:, 6:8], cache), full[:, 6:8])
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(9)
    with pytest.raises(ValueError, match="shape"):
        cache.truncate(2)
        layer(x[:1, 2:4], cache)
    assert cache.length == 2


@every_baseline
def test_caches_follow_the_layers_dtype_and_the_callers_wishes(make):
    layer = make(some_config()).half()
    assert layer.new_cache(1).max_len == 64
    half, wide = layer.new_cache(2, 8), layer.new_cache(2, 8, dtype=torch.float64)
    x = torch.randn(2, 5, 12).half()
    layer(x, half), layer(x, wide)
    assert half.nbytes > 0 and wide.nbytes == 4 * half.nbytes
    half.truncate(0)
    assert half.nbytes == 0


def test_a_kv_cache_hands_back_what_it_was_given():
    cache = MultiHeadAttention(some_config(n_head=3)).new_cache(2)
    k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    cache.append(k[:, :4], v[:, :4])
    held = cache.append(k[:, 4:], v[:, 4:])
    assert torch.equal(held[0], k) and torch.equal(held[1], v)


# ---------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("n_kv_head", [0, 3, 5, -1, 2.0, 8])
def test_groups_must_be_of_one_size(n_kv_head):
    with pytest.raises(ValueError, match=r"n_kv_head=.*must divide n_head=4.*use one of 1, 2, 4"):
        MultiHeadAttention(some_config(), n_kv_head=n_kv_head)


@pytest.mark.parametrize("change", [dict(d_c=0), dict(d_c_q=1.5), dict(d_rope=3), dict(d_rope=-2), dict(d_c=True)])
def test_impossible_latent_widths_are_named(change):
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        MultiHeadLatentAttention(some_config(), **change)


def test_mla_defaults_are_the_papers_small_model():
    layer = MultiHeadLatentAttention(T6Config.preset("small-124M"))
    assert (layer.d_c, layer.d_c_q, layer.d_rope) == (256, 512, 32)


def test_gqa_is_mha_with_shared_weights():
    """Sec. 4: repeating each group's key and value weights for its heads gives the same function."""
    config = some_config()
    gqa, mha = randomized(MultiHeadAttention(config, n_kv_head=2)), randomized(MultiHeadAttention(config))
    for name, weight in gqa.named_parameters():
        if name.startswith(("k_proj", "v_proj")):
            weight = weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        mha.get_parameter(name).data.copy_(weight)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    exactly(gqa(x), mha(x), 1e-12)


def test_the_config_stays_as_given():
    config = some_config(rank_k=3)
    layer = MultiHeadAttention(config)
    layer.new_cache(1)
    assert layer.config is config and dataclasses.replace(config) == config


# --------------------------------------------------------------------------------------------------- ragged batches


@every_baseline
def test_a_left_padded_row_gives_what_it_gives_alone(make):
    torch.manual_seed(0)
    model = randomized(T6(some_config(max_len=60), make))
    rows, padding = [torch.randint(31, (1, length)) for length in (25, 7, 1)], torch.tensor([0, 18, 24])
    batch = torch.cat([torch.nn.functional.pad(row, (25 - row.shape[1], 0), value=30) for row in rows])
    cache = model.new_cache(3)
    parts = [model(chunk, cache, padding) for chunk in batch.split([20, 4, 1], dim=1)]
    for logits in (model(batch, padding=padding), torch.cat(parts, dim=1)):
        for got, row in zip(logits, rows):
            exactly(got[-row.shape[1] :], model(row)[0])
    together = model.generate(batch, 30, temperature=0, padding=padding)
    for got, row in zip(together, rows):
        assert torch.equal(got[-30:], model.generate(row, 30, temperature=0)[0, -30:])
