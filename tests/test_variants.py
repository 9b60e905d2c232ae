"""Each variant: cached = uncached, bytes = Table 1, parameters = Table 1, and its special cases."""

import pytest
import torch
from helpers import storages

from tpa_minimal import variants
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention, apply_rope, rope_tables


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config(**changes) -> T6Config:
    sizes = dict(vocab_size=11, n_layer=2, d_model=20, n_head=5, d_head=8, rank_q=3, rank_k=2, rank_v=2, max_len=48)
    return T6Config(**{**sizes, **changes})


def layer_of(attention, **changes):
    layer = attention(config(**changes))
    torch.nn.init.normal_(layer.out_proj.weight)  # zero at the start would hide everything
    return layer


def in_chunks(layer, x, sizes, max_len=48):
    cache = layer.new_cache(x.shape[0], max_len)
    with torch.no_grad():
        out = torch.cat([layer(chunk, cache) for chunk in x.split(sizes, dim=1)], dim=1)
    return out, cache


# ranks (q, k, v), n_head, d_head, chunking: one token, factor space, the assembled path (above 16) and mixtures
CASES = [
    dict(ranks=(3, 2, 2), n_head=5, d_head=8, chunks=[1] * 9),
    dict(ranks=(1, 1, 1), n_head=4, d_head=6, chunks=[7, 1, 1]),
    dict(ranks=(2, 3, 3), n_head=3, d_head=4, chunks=[5, 18, 3, 1]),
    dict(ranks=(6, 2, 2), n_head=7, d_head=12, chunks=[1, 16, 17, 2]),
]
NUMBERS = {  # cached per token, as functions of (R_K, R_V, h, d_h)
    variants.KeyValueOnly: lambda k, v, h, d: (k + v) * (h + d),
    variants.FixedHeadFactors: lambda k, v, h, d: (k + v) * d,
    variants.FixedFeatureFactors: lambda k, v, h, d: (k + v) * h,
    variants.SharedFeatureFactors: lambda k, v, h, d: k * (2 * h + d),
    variants.SigmoidHeadFactors: lambda k, v, h, d: (k + v) * (h + d),
    variants.SoftmaxHeadFactors: lambda k, v, h, d: (k + v) * (h + d),
    variants.ThirdOrderFactors: lambda k, v, h, d: (k + v) * (h + sum(THIRD_ORDER[d])),
    variants.RotateAssembled: lambda k, v, h, d: (k + v) * (h + d),
    variants.PartialRoPE: lambda k, v, h, d: (k + v) * (h + d),
}
THIRD_ORDER = {8: (2, 4), 6: (2, 3), 4: (2, 2), 12: (4, 3)}  # d_head -> the default d_b, d_c
WEIGHTS = {  # of the layer, as functions of (d_model, R_Q, R_K, R_V, h, d_h); the output projection is added below
    variants.KeyValueOnly: lambda m, q, k, v, h, d: m * (k + v) * (h + d) + m * h * d,
    variants.FixedHeadFactors: lambda m, q, k, v, h, d: (q + k + v) * (m * d + h),
    variants.FixedFeatureFactors: lambda m, q, k, v, h, d: (q + k + v) * (m * h + d),
    variants.SharedFeatureFactors: lambda m, q, k, v, h, d: m * (q * (h + d) + k * (2 * h + d)),
    variants.SigmoidHeadFactors: lambda m, q, k, v, h, d: m * (q + k + v) * (h + d),
    variants.SoftmaxHeadFactors: lambda m, q, k, v, h, d: m * (q + k + v) * (h + d),
    variants.ThirdOrderFactors: lambda m, q, k, v, h, d: m * (q + k + v) * (h + sum(THIRD_ORDER[d])),
    variants.RotateAssembled: lambda m, q, k, v, h, d: m * (q + k + v) * (h + d),
    variants.PartialRoPE: lambda m, q, k, v, h, d: m * (q + k + v) * (h + d),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", NUMBERS)
def test_cached_equals_uncached_and_bytes_equal_the_formula(attention, case):
    (rank_q, rank_k, rank_v), h, d_head = case["ranks"], case["n_head"], case["d_head"]
    layer = layer_of(attention, rank_q=rank_q, rank_k=rank_k, rank_v=rank_v, n_head=h, d_head=d_head)
    x = torch.randn(2, sum(case["chunks"]), 20)
    out, cache = in_chunks(layer, x, case["chunks"])
    torch.testing.assert_close(out, layer(x).detach(), rtol=0, atol=1e-10)
    numbers = NUMBERS[attention](rank_k, rank_v, h, d_head)
    assert cache.nbytes == 2 * x.shape[1] * numbers * 8
    assert sum(storages(cache).values()) == 2 * 48 * numbers * 8  # nothing else is kept, rotated copies for instance
    cache.truncate(1)
    torch.testing.assert_close(layer(x[:, 1:3], cache), layer(x)[:, 1:3], rtol=0, atol=1e-10)
    weights = WEIGHTS[attention](20, rank_q, rank_k, rank_v, h, d_head) + 20 * h * d_head
    assert sum(p.numel() for p in layer.parameters()) == weights


@pytest.mark.parametrize("attention", NUMBERS)
def test_a_variant_in_the_backbone_generates_the_same_with_and_without_its_cache(attention):
    model = T6(config(), attention=attention)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.out_proj.weight)
    prompt = torch.randint(11, (2, 4))
    with_cache = model.generate(prompt, 12, temperature=0)
    assert torch.equal(with_cache, model.generate(prompt, 12, temperature=0, use_cache=False))


@pytest.mark.parametrize("attention", NUMBERS)
def test_a_variant_learns_by_all_of_its_weights_and_casts_to_bfloat16(attention):
    layer = layer_of(attention)
    layer(torch.randn(1, 6, 20)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    layer.bfloat16()
    x = torch.randn(1, 6, 20).bfloat16()
    out, cache = in_chunks(layer, x, [4, 1, 1])
    whole = layer(x).float()
    assert out.dtype == torch.bfloat16 and (out.float() - whole).abs().max() < 0.05 * whole.abs().max()


def with_a_constant_coordinate(*shape):
    """Inputs whose last coordinate is 1: on them a linear map can be a constant."""
    x = torch.randn(*shape)
    x[..., -1] = 1
    return x


def rows(layer):
    """The six parts of the projection's weight, by name."""
    return dict(zip("a_q b_q a_k b_k a_v b_v".split(), layer.factor_proj.weight.detach().split(layer.sizes)))


def base_with(layer, constants, **changes):
    """A TPA with the rows of `layer`, those of `constants` answering to the constant coordinate alone."""
    base = TensorProductAttention(config(**changes))
    with torch.no_grad():
        theirs = rows(layer)
        for name, weight in rows(base).items():
            if name in constants:
                weight.zero_()
                weight[:, -1] = constants[name].flatten()
            else:
                weight.copy_(theirs[name])
        base.out_proj.weight.copy_(layer.out_proj.weight)
    return base


def assert_same(layer, other, x):
    expected = other(x).detach()
    for got in (layer(x).detach(), in_chunks(layer, x, [5, 1, 1, 2])[0]):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("letter,attention", [("a", variants.FixedHeadFactors), ("b", variants.FixedFeatureFactors)])
def test_fixed_factors_are_tpa_on_inputs_with_a_constant_coordinate(letter, attention):
    layer = layer_of(attention)
    constants = {f"{letter}_{x}": getattr(layer, f"{letter}_{x}").detach() for x in "qkv"}
    assert_same(layer, base_with(layer, constants), with_a_constant_coordinate(2, 9, 20))


def test_kv_only_is_tpa_with_full_rank_queries():
    layer = layer_of(variants.KeyValueOnly)
    base = base_with(layer, {"a_q": 5 * torch.eye(5)}, rank_q=5)
    assert_same(layer, base, with_a_constant_coordinate(2, 9, 20))


def test_shared_feature_factors_are_tpa_with_equal_key_and_value_rows():
    layer = layer_of(variants.SharedFeatureFactors)
    base = TensorProductAttention(config())
    with torch.no_grad():
        theirs = rows(layer)
        theirs["b_k"] = theirs["b_v"]
        base.factor_proj.weight.copy_(torch.cat([theirs[name] for name in rows(base)]))
        base.out_proj.weight.copy_(layer.out_proj.weight)
    assert_same(layer, base, torch.randn(2, 9, 20))


@pytest.mark.parametrize(
    "attention,share", [(variants.SigmoidHeadFactors, 1 / 2), (variants.SoftmaxHeadFactors, 1 / 5)]
)
def test_nonlinear_head_factors_of_zero_are_fixed_ones(attention, share):
    layer, fixed = layer_of(attention), layer_of(variants.FixedHeadFactors)
    with torch.no_grad():
        theirs = rows(layer)
        for name in ("a_q", "a_k", "a_v"):
            theirs[name].zero_()
            getattr(fixed, name).fill_(share)
        fixed.factor_proj.weight.copy_(torch.cat([theirs[name] for name in ("b_q", "b_k", "b_v")]))
        fixed.out_proj.weight.copy_(layer.out_proj.weight)
    assert_same(layer, fixed, torch.randn(2, 9, 20))


def test_third_order_with_c_of_one_is_tpa():
    layer = variants.ThirdOrderFactors(config(), d_b=8)
    torch.nn.init.normal_(layer.out_proj.weight)
    base = TensorProductAttention(config())
    with torch.no_grad():
        base.out_proj.weight.copy_(layer.out_proj.weight)
        for name, weight in rows(layer).items():
            if name[0] == "b":
                weight = weight.view(-1, 9, 20)
                weight[:, 8] = 0
                weight[:, 8, -1] = 1
                weight = weight[:, :8].flatten(0, 1)
            rows(base)[name].copy_(weight)
    assert_same(layer, base, with_a_constant_coordinate(2, 9, 20))


def test_rotating_b_alone_is_rope_of_the_third_order_product():
    """Theorem C.1 against an explicit matrix: vec(b ⊗ c) (I ⊗ R_tᵀ)ᵀ with d_c copies of RoPE's d_b × d_b matrix."""
    layer = layer_of(variants.ThirdOrderFactors, d_head=12)
    x = torch.randn(1, 7, 20)
    flat, turned = (torch.stack(layer.vec(b)[0].unbind(0)) for b in (layer.project(x)[3], layer.factors(x, 30)[3]))
    for t in range(7):
        theta = (30 + t) * 10000.0 ** (-torch.arange(2) / 2)
        R = torch.zeros(4, 4)  # pairs (i, i + 2), blocks [[cos, -sin], [sin, cos]] acting on row vectors
        R[[0, 1], [0, 1]] = R[[2, 3], [2, 3]] = theta.cos()
        R[[0, 1], [2, 3]] = -theta.sin()
        R[[2, 3], [0, 1]] = theta.sin()
        torch.testing.assert_close(turned[t], flat[t] @ torch.kron(torch.eye(3), R), rtol=0, atol=1e-12)


def test_vec_stacks_columns():
    layer = variants.ThirdOrderFactors(config(d_head=12))
    bc = torch.randn(7)
    b, c = bc[:4], bc[4:]
    assert torch.equal(layer.vec(bc[None, None, None])[0, 0, 0], torch.outer(b, c).T.flatten())


def test_rotating_the_assembled_q_and_k_is_the_same_function():
    layer = layer_of(variants.RotateAssembled)
    base = TensorProductAttention(config())
    base.load_state_dict(layer.state_dict())
    assert_same(layer, base, torch.randn(2, 9, 20))
    assert_same(base, layer, torch.randn(2, 9, 20))


def test_partial_rope_of_all_features_is_tpa_and_of_none_ignores_order():
    base = layer_of(TensorProductAttention)
    x = torch.randn(2, 9, 20)
    for rotary_dim in (0, 4, 8):
        layer = variants.PartialRoPE(config(), rotary_dim)
        layer.load_state_dict(base.state_dict())
        if rotary_dim == 8:
            assert_same(layer, base, x)
        last = layer(x)[:, -1], layer(torch.cat((x[:, :-1].flip(1), x[:, -1:]), 1))[:, -1]
        assert torch.allclose(*last, atol=1e-12) == (rotary_dim == 0)


def test_partial_rope_follows_the_authors_layout_up_to_the_order_of_features():
    """Rotating the first 4 of 8 features, pairs (0, 2) and (1, 3), is ours with features 2, 3 and 4, 5 exchanged."""
    layer = variants.PartialRoPE(config(), 4)
    b, positions = torch.randn(1, 5, 2, 8), torch.arange(3, 8)
    authors = torch.cat((apply_rope(b[..., :4], *rope_tables(positions, 4, 10000.0, b.dtype)), b[..., 4:]), -1)
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    ours = apply_rope(b[..., order], *layer.rope.tables(3, b))
    torch.testing.assert_close(ours, authors[..., order], rtol=0, atol=1e-12)


def test_values_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="rank_k=2, rank_v=1.*rank_k=rank_v=2"):
        variants.SharedFeatureFactors(config(rank_v=1))
    for d_b in (3, 2.0, True):
        with pytest.raises(ValueError, match=f"d_b={d_b}.*one of 2, 4, 8"):
            variants.ThirdOrderFactors(config(), d_b=d_b)
    for rotary_dim in (3, -2, 10, 2.0, "2", True):
        with pytest.raises(ValueError, match=f"rotary_dim={rotary_dim!r}.*d_head=8"):
            variants.PartialRoPE(config(), rotary_dim)


def test_fixed_factors_start_with_the_spread_of_contextual_ones():
    torch.manual_seed(1)
    sizes = dict(d_model=256, n_head=64, d_head=64, rank_q=8, rank_k=8, rank_v=8)
    x = torch.randn(1, 200, 256)
    contextual = TensorProductAttention(config(**sizes)).factors(x)
    heads, features = variants.FixedHeadFactors(config(**sizes)), variants.FixedFeatureFactors(config(**sizes))
    assert abs(heads.a_k.std() / contextual[2].std() - 1) < 0.1
    assert abs(features.b_v.std() / contextual[5].std() - 1) < 0.1


@pytest.mark.parametrize("attention", NUMBERS)
def test_every_variant_starts_from_either_initialization(attention):
    """Also those without some of the factors, whose fans are 0 then."""
    for init in ("paper", "authors"):
        weights = attention(config(init=init)).state_dict().values()
        assert all(torch.isfinite(weight).all() for weight in weights)
