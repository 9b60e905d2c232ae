"""TPA, its cache and T6 against independent oracles, in float64 unless said otherwise.

Tests whose only fixture is `tpa` are also run on the wrong TPAs of tests/mutants, each of which must fail one.
"""

import ast
import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import exactly, random_factors, storages
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

SOURCE = Path(__file__).resolve().parents[1] / "tpa_minimal" / "tpa.py"
# Sizes are small as drawn, so a failure is reported as found: shrinking it would only cost time.
few = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def some_config(tpa, **changes):
    sizes = dict(vocab_size=31, n_layer=2, d_model=12, n_head=3, d_head=8, rank_q=3, rank_k=2, rank_v=4, max_len=40)
    return tpa.T6Config(**{**sizes, **changes})


def random_model(tpa, config, seed=0):
    """A T6 in float64 with every weight drawn at random, the zero ones too, so that no part is silent."""
    torch.manual_seed(seed)
    model = tpa.T6(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def attention_by_loops(a_q, b_q, a_k, b_k, a_v, b_v, start):
    """Each token's Q, K and V by explicit outer products, each head's softmax by itself: slow and plain."""
    (B, T, _, h), d_h, M = a_q.shape, b_q.shape[-1], a_k.shape[1]

    def matrix(a, b):  # Σ_r a_r ⊗ b_r / R for one token
        return sum(torch.outer(a[r], b[r]) for r in range(len(a))) / len(a)

    out = torch.empty(B, T, h, d_h, dtype=a_q.dtype)
    for n in range(B):
        k = [matrix(a_k[n, s], b_k[n, s]) for s in range(M)]
        v = [matrix(a_v[n, s], b_v[n, s]) for s in range(M)]
        for t in range(T):
            q = matrix(a_q[n, t], b_q[n, t])
            seen = min(M, start + t + 1)
            for i in range(h):
                logits = torch.stack([q[i] @ k[s][i] / math.sqrt(d_h) for s in range(seen)])
                out[n, t, i] = sum(w * v[s][i] for s, w in enumerate(logits.softmax(0)))
    return out


# -------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(d_head=7), "d_head=7"),
        (dict(rank_q=0), "rank_q=0"),
        (dict(rank_k=0), "rank_k=0"),
        (dict(rank_v=-1), "rank_v=-1"),
        (dict(n_head=2.5), "n_head=2.5"),
        (dict(n_layer=True), "n_layer=True"),
        (dict(max_len=0), "max_len=0"),
        (dict(rope_base=0.5), "rope_base=0.5"),
        (dict(init="xavier"), "'xavier'"),
    ],
)
def test_a_config_that_cannot_work_says_so_in_one_line(tpa, change, said):
    with pytest.raises(ValueError) as error:
        some_config(tpa, **change)
    assert said in str(error.value) and "must be" in str(error.value) and "\n" not in str(error.value)


def test_config_defaults_and_presets(tpa):
    config = tpa.T6Config(100, 1, 768, 34, 64)
    assert (config.rank_q, config.rank_k, config.rank_v, config.d_ff, config.init) == (6, 2, 2, 2048, "paper")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_head = 3
    for name, millions in {"small-124M": 124, "medium-353M": 353, "large-773M": 773, "xl-1.5B": 1554}.items():
        with torch.device("meta"):
            count = tpa.T6(tpa.T6Config.preset(name)).num_parameters()
        assert abs(count / 1e6 - millions) / millions < 0.005, (name, count)
    assert tpa.T6Config.preset("tiny", vocab_size=300).vocab_size == 300
    with pytest.raises(ValueError, match="'huge'.*tiny.*small-124M"):
        tpa.T6Config.preset("huge")


# ----------------------------------------------------------------------------------------------------- RoPE


def rotation(position, d_h, base):
    """T_t of Sec. 3.2 as a full matrix, for features paired i with i + d_h/2."""
    T = torch.zeros(d_h, d_h, dtype=torch.float64)
    for j in range(d_h // 2):
        angle = position * base ** (-2 * j / d_h)
        pair = [j, j + d_h // 2]
        block = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        T[torch.tensor(pair)[:, None], torch.tensor(pair)] = torch.tensor(block, dtype=torch.float64)
    return T


def test_rope_is_the_papers_row_vector_rotation(tpa):
    positions = torch.tensor([0, 1, 7, 500])
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    rotated = tpa.apply_rope(x, *tpa.rope_tables(positions, 8, 100.0, torch.float64))
    for t, position in enumerate(positions.tolist()):
        exactly(rotated[:, t], x[:, t] @ rotation(position, 8, 100.0), 1e-12)


def test_rotating_b_is_rotating_the_assembled_matrix(tpa):
    """Theorem 3.1: RoPE_t(Q_t) = (1/R) Aᵀ (B T_t)."""
    a, b = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    tables = tpa.rope_tables(torch.arange(5), 8, 10000.0, torch.float64)
    exactly(tpa.assemble(a, tpa.apply_rope(b, *tables)), tpa.apply_rope(tpa.assemble(a, b), *tables), 1e-12)


def test_float32_tables_keep_the_relative_position_identity(tpa):
    """Q̃_t K̃_sᵀ = Q_t T_{t-s} K_sᵀ also for a bfloat16 layer, whose tables must not be rounded to bfloat16."""
    layer = tpa.TensorProductAttention(some_config(tpa, d_head=32)).bfloat16()
    x = torch.randn(1, 1, 12, dtype=torch.bfloat16)
    turned = layer.factors(x, start=4001)[1].double()
    flat = layer.factors(x, start=0)[1].double()
    exact = tpa.apply_rope(flat, *tpa.rope_tables(torch.tensor([4001]), 32, 10000.0, torch.float64))
    assert (turned - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding of the result
    q, k = torch.randn(2, 1, 1, 1, 32)
    dots = []
    for s in (0, 3000):
        t = tpa.apply_rope(q, *tpa.rope_tables(torch.tensor([s + 9]), 32, 10000.0))
        dots.append((t * tpa.apply_rope(k, *tpa.rope_tables(torch.tensor([s]), 32, 10000.0))).sum())
    assert_close(dots[0], dots[1], rtol=0, atol=1e-5)


def test_tables_are_exact_far_into_the_context(tpa):
    cos, sin = tpa.rope_tables(torch.tensor([500_000]), 64, 10000.0)
    angles = [500_000 * 10000.0 ** (-2 * j / 64) for j in range(32)]
    assert cos.dtype == torch.float32
    assert_close(cos[0].double(), torch.tensor([math.cos(a) for a in angles], dtype=torch.float64), rtol=0, atol=1e-7)
    assert_close(sin[0].double(), torch.tensor([math.sin(a) for a in angles], dtype=torch.float64), rtol=0, atol=1e-7)


@given(seed=st.integers(0, 10**6), shift=st.integers(1, 5000))
@few
def test_shifting_all_positions_changes_nothing(tpa, seed, shift):
    torch.manual_seed(seed)
    layer = tpa.TensorProductAttention(some_config(tpa)).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    here, there = layer.factors(x, 0), layer.factors(x, shift)
    exactly(tpa.factor_attention(*there, start=0), tpa.factor_attention(*here, start=0))
    exactly(there[5], here[5], 1e-12)  # b_v carries no position
    assert (there[3] - here[3]).abs().max() > 1e-3  # b_k does
    assert (there[1] - here[1]).abs().max() > 1e-3  # and so does b_q


# -------------------------------------------------------------------------------------------------- factors


def test_assemble_is_a_mean_of_outer_products(tpa):
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    q = tpa.assemble(a, b)
    for n in range(2):
        for t in range(3):
            exactly(q[n, t], sum(torch.outer(a[n, t, r], b[n, t, r]) for r in range(4)) / 4, 1e-12)
    assert torch.linalg.matrix_rank(tpa.assemble(a[:, :, :2], b[:, :, :2])).max() == 2


def test_factors_are_linear_maps_laid_out_rank_by_rank(tpa):
    config = some_config(tpa)
    layer = tpa.TensorProductAttention(config).double()
    x = torch.randn(2, 1, 12, dtype=torch.float64)
    weights = iter(layer.factor_proj.weight.split(layer.sizes))
    for got in layer.factors(x, 0):  # at position 0 RoPE is the identity
        W = next(weights)
        for r in range(got.shape[2]):
            rows = W[r * got.shape[3] : (r + 1) * got.shape[3]]
            exactly(got[:, 0, r], x[:, 0] @ rows.T, 1e-12)


def test_parameters_are_table_1s(tpa):
    for config in (some_config(tpa), some_config(tpa, n_head=5, d_head=2, rank_q=1)):
        layer = tpa.TensorProductAttention(config)
        c, ranks = config, config.rank_q + config.rank_k + config.rank_v
        expected = c.d_model * ranks * (c.n_head + c.d_head) + c.d_model * c.n_head * c.d_head
        assert sum(p.numel() for p in layer.parameters()) == expected
        model = tpa.T6(config)
        mlp = 3 * c.d_model * c.d_ff
        assert model.num_parameters() == c.vocab_size * c.d_model + c.n_layer * (expected + mlp)


def test_initialization_bounds(tpa):
    """The largest entries of W_b^Q and W_a^Q in each initialization, for d_model 128, h 8, d_h 32 and R_Q 6."""
    for init, b_q, a_q in (("paper", 0.1369, 0.1846), ("authors", 0.0374, 0.0857)):
        config = tpa.T6Config(10, 1, 128, 8, 32, init=init)
        layer = tpa.TensorProductAttention(config)
        W_a, W_b, *_ = layer.factor_proj.weight.split(layer.sizes)
        for W, bound in ((W_a, a_q), (W_b, b_q)):
            assert 0.99 * bound < W.abs().max() < 1.001 * bound
            assert_close(W.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05, atol=0)
        assert layer.out_proj.weight.abs().max() == 0
        assert tpa.T6(config).blocks[0].mlp.down_proj.weight.abs().max() == 0


def test_initial_loss_is_about_that_of_guessing(tpa):
    """A little above ln V: with a tied embedding the untrained model leans towards repeating the present token."""
    model = tpa.T6(tpa.T6Config.preset("tiny", vocab_size=1000))
    tokens = torch.randint(1000, (4, 33))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert math.log(1000) < loss.item() < math.log(1000) + 1


# ---------------------------------------------------------------------------------- attention in factor space

shapes = dict(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    start=st.integers(0, 9),
    h=st.integers(1, 4),
    d_h=st.sampled_from([2, 4, 6]),
    ranks=st.tuples(*[st.integers(1, 4)] * 3),
    block_size=st.integers(1, 16),
)


@given(**shapes)
@few
def test_factor_space_attention_equals_loops_over_outer_products(tpa, seed, B, T, start, h, d_h, ranks, block_size):
    torch.manual_seed(seed)
    factors = random_factors(B, T, start + T, h, d_h, ranks)
    got = tpa.factor_attention(*factors, start=start, block_size=block_size)
    exactly(got, attention_by_loops(*factors, start))
    exactly(tpa.factor_attention(*factors, start=start), got)


@given(**shapes)
@few
def test_factor_space_attention_equals_assembled_attention(tpa, seed, B, T, start, h, d_h, ranks, block_size):
    """Outputs, and gradients with respect to all six factors."""
    torch.manual_seed(seed)
    factors = [f.requires_grad_() for f in random_factors(B, T, start + T, h, d_h, ranks)]
    q, k, v = (tpa.assemble(a, b) for a, b in zip(factors[::2], factors[1::2]))
    assembled = tpa.causal_attention(q, k, v)
    direct = tpa.factor_attention(*factors, start=start, block_size=block_size)
    exactly(direct, assembled)
    weights = torch.randn_like(direct)
    for one, other in zip(
        torch.autograd.grad((direct * weights).sum(), factors),
        torch.autograd.grad((assembled * weights).sum(), factors),
    ):
        exactly(one, other)


def test_assembled_attention_equals_loops(tpa):
    factors = random_factors(2, 4, 9, 3, 4, (2, 3, 2))
    q, k, v = (tpa.assemble(a, b) for a, b in zip(factors[::2], factors[1::2]))
    exactly(tpa.causal_attention(q, k, v), attention_by_loops(*factors, start=5))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_factor_space_attention_is_accurate_for_large_logits(tpa, dtype, tolerance, scale):
    factors = [f.to(dtype) for f in random_factors(1, 2, 1003, 4, 16, (3, 2, 2), scale)]
    exact = tpa.factor_attention(*(f.double() for f in factors), start=1001)
    got = tpa.factor_attention(*factors, start=1001, block_size=100)
    assert got.dtype == dtype
    assert ((got.double() - exact).norm() / exact.norm()) <= tolerance


def test_gradcheck_of_the_layer(tpa):
    layer = tpa.TensorProductAttention(some_config(tpa, d_model=6, n_head=2, d_head=4)).double()
    torch.nn.init.normal_(layer.out_proj.weight)
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_temporary_memory_is_bounded_by_the_block(tpa):
    """No tensor made while decoding is as large as the logits of all positions, let alone K."""
    from torch.utils._python_dispatch import TorchDispatchMode

    M, block, largest = 4096, 128, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:  # not a view
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    factors = random_factors(1, 1, M, 4, 8, (3, 2, 2))
    with Watch(), torch.no_grad():
        tpa.factor_attention(*factors, start=M - 1, block_size=block)
    assert largest[0] <= 2 * 4 * block * 2  # R · h · block, twice to spare; K alone would be 4 · 8 · M


# ---------------------------------------------------------------------------------------------------- cache


@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 5),
    h=st.integers(1, 4),
    d_h=st.sampled_from([2, 4, 8]),
    ranks=st.tuples(*[st.integers(1, 4)] * 3),
    cuts=st.lists(st.integers(1, 19), max_size=6),
)
@few
def test_prefill_chunks_and_single_tokens_agree(tpa, seed, B, h, d_h, ranks, cuts):
    """Any chunking of 20 tokens gives the logits of the whole pass, whichever attention path a chunk takes."""
    names = ("rank_q", "rank_k", "rank_v")
    config = some_config(tpa, n_head=h, d_head=d_h, **dict(zip(names, ranks)))
    model = random_model(tpa, config, seed)
    tokens = torch.randint(config.vocab_size, (B, 20))
    whole = model(tokens)
    edges = [0, *sorted(set(cuts)), 20]
    for largest in (0, 3, 100):  # chunks assembled; some; all in factor space
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpa, "DECODE_TOKENS", largest)
            cache = model.new_cache(B)
            parts = []
            for first, last in zip(edges, edges[1:]):
                parts.append(model(tokens[:, first:last], cache))
                model(tokens[:, :5])  # calls without the cache leave it alone
        exactly(torch.cat(parts, dim=1), whole)
        assert cache.length == 20


def test_token_by_token_is_the_whole_pass_in_float32_and_float64(tpa):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = random_model(tpa, some_config(tpa)).to(dtype)
        tokens = torch.randint(31, (3, 17))
        cache = model.new_cache(3)
        steps = torch.cat([model(tokens[:, t : t + 1], cache) for t in range(17)], dim=1)
        exactly(steps, model(tokens), tolerance)
        assert steps.dtype == dtype


def test_no_token_sees_a_later_one(tpa):
    model = random_model(tpa, some_config(tpa))
    tokens = torch.randint(31, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 31
    before, after = model(tokens), model(changed)
    exactly(before[:, :8], after[:, :8], 1e-12)
    assert (before[:, 8:] - after[:, 8:]).abs().amax(-1).min() > 1e-6


def test_truncate_goes_back_in_time(tpa):
    model = random_model(tpa, some_config(tpa))
    tokens, other = torch.randint(31, (2, 2, 10))
    cache = model.new_cache(2)
    model(tokens, cache)
    cache.truncate(6)
    assert cache.length == 6
    again = model(other[:, :3], cache)
    exactly(again, model(torch.cat((tokens[:, :6], other[:, :3]), 1))[:, 6:])
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=rf"truncate\({wrong}\).*9"):
            cache.truncate(wrong)
    assert cache.length == 9


def test_a_full_cache_says_so_and_keeps_what_it_held(tpa):
    model = random_model(tpa, some_config(tpa))
    tokens = torch.randint(31, (1, 9))
    cache = model.new_cache(1, max_len=6)
    model(tokens[:, :5], cache)
    with pytest.raises(ValueError, match=r"holds 5 of 6 positions.*max_len=9.*truncate"):
        model(tokens[:, 5:], cache)
    assert cache.length == 5
    exactly(model(tokens[:, 5:6], cache), model(tokens[:, :6])[:, 5:])


def test_a_cache_of_another_batch_size_is_refused(tpa):
    model = random_model(tpa, some_config(tpa))
    cache = model.new_cache(3)
    with pytest.raises(ValueError, match="expects tensors of shapes"):
        model(torch.randint(31, (1, 4)), cache)
    assert cache.length == 0
    for batch_size, max_len in ((0, 5), (1, 0)):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}, max_len={max_len}"):
            model.new_cache(batch_size, max_len)


def test_cache_bytes_are_the_formulas(tpa):
    config = some_config(tpa, n_head=5)
    per_token = (config.rank_k + config.rank_v) * (config.n_head + config.d_head)
    for dtype, element in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)):
        model = tpa.T6(config).to(dtype)
        cache = model.new_cache(3, max_len=20)
        assert cache.nbytes == 0
        model(torch.randint(31, (3, 7)), cache)
        assert cache.nbytes == per_token * element * config.n_layer * 7 * 3
        assert len(cache) == config.n_layer


def test_the_cache_holds_factors_and_nothing_of_the_size_of_k(tpa):
    config = some_config(tpa, n_head=6, d_head=8, rank_k=1, rank_v=2)
    cache = tpa.TensorProductAttention(config).new_cache(2, max_len=10)
    stored = storages(cache)
    assert sum(stored.values()) == 2 * 10 * 3 * (6 + 8) * 4
    assert max(stored.values()) < 2 * 10 * 6 * 8 * 4
    x = [torch.randn(2, 4, rank, width) for rank, width in ((1, 6), (1, 8), (2, 6), (2, 8))]
    for view, new in zip(cache.append(*x), x):
        assert_close(view, new)
        assert view.untyped_storage().data_ptr() in stored


def test_the_layer_caches_b_k_as_rotated(tpa):
    layer = tpa.TensorProductAttention(some_config(tpa)).double()
    cache = layer.new_cache(1)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    for chunk in x.split(4, dim=1):
        layer(chunk, cache)
    held = [view.clone() for view in cache.view(0, 9)]
    for kept, whole in zip(held, layer.factors(x, 0)[2:]):
        exactly(kept, whole, 1e-12)


def test_gradients_do_not_flow_into_a_cache(tpa):
    """Else each decoded token would keep the graph of all earlier ones alive."""
    cache = tpa.FactorCache([(2, 3), (1, 4)], batch_size=1, max_len=5)
    new = torch.randn(1, 2, 2, 3, requires_grad=True), torch.randn(1, 2, 1, 4, requires_grad=True)
    assert not any(view.requires_grad for view in cache.append(*new))
    layer = tpa.TensorProductAttention(some_config(tpa)).double()
    torch.nn.init.normal_(layer.out_proj.weight)
    held = layer.new_cache(1)
    x = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    out = layer(x, held)  # the first call needs nothing from the cache, and keeps its gradients
    assert torch.autograd.grad(out[:, -1].sum(), x)[0][:, 0].abs().sum() > 0


def test_the_cache_takes_any_shapes(tpa):
    """Keys and values of MHA or the latent of MLA are other shapes of the same class."""
    cache = tpa.FactorCache([(3, 8), (3, 8), (1, 5)], batch_size=2, max_len=9, dtype=torch.float16)
    new = [torch.randn(2, 6, *shape).half() for shape in ((3, 8), (3, 8), (1, 5))]
    cache.append(*(x[:, :2] for x in new))
    for view, x in zip(cache.append(*(x[:, 2:] for x in new)), new):
        assert torch.equal(view, x)
    assert cache.nbytes == 2 * 6 * (24 + 24 + 5) * 2 and cache.length == 6
    assert all(torch.equal(view, x[:, 1:4]) for view, x in zip(cache.view(1, 4), new))
    for wrong in (new[:2], [*new, new[2]], [new[0], new[2], new[1]]):
        with pytest.raises(ValueError, match="expects tensors of shapes"):
            cache.append(*(x[:, :1] for x in wrong))
    assert cache.length == 6


# ------------------------------------------------------------------------------------------- decoding, in factors


@pytest.mark.parametrize("T", [1, 3, 16])
def test_decoding_never_assembles_keys_or_values(tpa, T):
    """No tensor of M · h · d_h numbers is made, and `assemble` meets queries alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    config = some_config(tpa, n_head=10, d_head=16, rank_q=3, rank_k=1, rank_v=1, max_len=400)
    layer = tpa.TensorProductAttention(config).double()
    cache = layer.new_cache(1)
    layer(torch.randn(1, 300, 12, dtype=torch.float64), cache)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.shape.numel())
            return out

    with torch.no_grad(), Watch():
        layer(torch.randn(1, T, 12, dtype=torch.float64), cache)
    assert largest[0] < 300 * 10 * 16 or T > 1  # with T queries the scores have T · h · M numbers of their own
    with pytest.MonkeyPatch.context() as patch:
        assemble = tpa.assemble

        def only_queries(a, b):
            assert a.shape[1] == T, "keys or values were assembled"
            return assemble(a, b)

        patch.setattr(tpa, "assemble", only_queries)
        layer(torch.randn(1, T, 12, dtype=torch.float64), cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_cache_is_summed_in_float32(tpa, dtype):
    """Many equal values: accumulated in half precision, their sum would stop growing long before the end."""
    M = 6000
    a_q, b_q = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.zeros(1, 1, 1, 4, dtype=dtype)
    a, b = torch.ones(1, M, 1, 2, dtype=dtype), torch.ones(1, M, 1, 4, dtype=dtype)
    out = tpa.factor_attention(a_q, b_q, a, b, a, b, start=M - 1, block_size=50)
    assert out.dtype == dtype
    assert_close(out.float(), torch.ones(1, 1, 2, 4), rtol=0, atol=1e-3)
    half = [x.to(dtype) for x in random_factors(1, 1, 500, 3, 8, (2, 2, 2))]
    exact = tpa.factor_attention(*(x.double() for x in half), start=499)
    got = tpa.factor_attention(*half, start=499, block_size=64).double()
    assert_close(
        got, exact, rtol=0, atol=exact.abs().max().item() * 2 ** {torch.float16: -10, torch.bfloat16: -7}[dtype]
    )


@pytest.mark.parametrize("B, T, start", [(4, 5, 0), (3, 4, 9), (2, 1, 13)])
def test_padding_is_seen_by_nobody(tpa, B, T, start):
    """A left-padded row gives what its text gives alone, in factor space and assembled, in any blocks."""
    M = start + T
    factors = random_factors(B, T, M, 3, 8, (3, 2, 4))
    padding = torch.arange(B) if start == 0 else torch.randint(0, start + 1, (B,))
    q, k, v = (tpa.assemble(a, b) for a, b in zip(factors[::2], factors[1::2]))
    outs = [tpa.factor_attention(*factors, start=start, block_size=n, padding=padding) for n in (1, 3, 1000)]
    for out in (*outs, tpa.causal_attention(q, k, v, padding)):
        assert out.isfinite().all()  # of the padding's own rows too
        for i, first in enumerate(padding.tolist()):
            row = [x[i : i + 1, first:] if x.shape[1] == M else x[i : i + 1] for x in factors]
            row[:2] = [x[i : i + 1] for x in factors[:2]]
            if start == 0:
                row = [x[i : i + 1, first:] for x in factors]
            alone = tpa.factor_attention(*row, start=start - first if start else 0)
            exactly(out[i : i + 1, -alone.shape[1] :], alone)


def test_unequal_prompts_generate_as_alone(tpa):
    model = random_model(tpa, some_config(tpa))
    rows, padding = [torch.randint(31, (1, length)) for length in (20, 3, 11)], torch.tensor([0, 17, 9])
    batch = torch.cat([torch.nn.functional.pad(row, (20 - row.shape[1], 0)) for row in rows])
    for use_cache in (True, False):
        out = model.generate(batch, 20, temperature=0, padding=padding, use_cache=use_cache)
        for got, row in zip(out, rows):
            assert torch.equal(got[-20:], model.generate(row, 20, temperature=0)[0, -20:])
    cache = model.new_cache(3)
    logits = [model(chunk, cache, padding) for chunk in batch.split([18, 1, 1], dim=1)][-1]
    for got, row in zip(logits, rows):
        exactly(got[-1], model(row)[0, -1])


def test_layers_share_the_tables_of_a_pass_where_their_rotations_are_equal(tpa):
    model = random_model(tpa, some_config(tpa, n_layer=3))
    tokens = torch.randint(31, (2, 9))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        tables = tpa.rope_tables

        def counted(*given):
            made.append(given)
            return tables(*given)

        patch.setattr(tpa, "rope_tables", counted)
        shared = model(tokens)
        assert len(made) == 1
        model.blocks[1].attention.rope = tpa.RoPE(8, 50.0)  # now each layer has to make its own
        own = model(tokens)
        assert len(made) == 4
    assert (own - shared).abs().max() > 1e-3
    x = model.embedding(tokens)
    for block in model.blocks:
        x = block(x)
    exactly(own, model.logits(model.norm(x)))


def test_a_layer_rotates_by_the_configs_base(tpa):
    config = some_config(tpa, rope_base=100.0)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    layer = tpa.TensorProductAttention(config).double()
    cos, sin = tpa.rope_tables(torch.arange(2, 7), 8, 100.0, torch.float64)
    exactly(layer.factors(x, 2)[3], tpa.apply_rope(layer.project(x)[3], cos, sin), 1e-12)


def test_tables_are_never_narrower_than_float32(tpa):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert tpa.rope_tables(torch.arange(3), 8, 100.0, dtype)[0].dtype == torch.float32
    assert tpa.rope_tables(torch.arange(3), 8, 100.0, torch.float64)[1].dtype == torch.float64


# ------------------------------------------------------------------------------------------------------- T6


def test_any_module_with_forward_and_new_cache_serves_as_attention(tpa):
    class Mean(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.shapes = [(1, config.d_model)]

        def new_cache(self, batch_size, max_len=None):
            return tpa.FactorCache(self.shapes, batch_size, max_len, dtype=torch.float64)

        def forward(self, x, cache=None):
            seen = x if cache is None else cache.append(x.unsqueeze(2))[0].squeeze(2)
            means = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1).unsqueeze(-1)
            return means[:, -x.shape[1] :]

    model = tpa.T6(some_config(tpa), attention=Mean).double()
    tokens, cache = torch.randint(31, (2, 8)), model.new_cache(2, 8)
    exactly(torch.cat([model(part, cache) for part in tokens.split(3, dim=1)], dim=1), model(tokens))
    with pytest.raises(TypeError, match="padding"):
        model(tokens, padding=torch.tensor([0, 1]))


def test_a_layer_alone_needs_no_vocabulary(tpa):
    config = tpa.T6Config.for_layer(d_model=12, n_head=3, d_head=8, rank_k=1)
    assert (config.rank_q, config.rank_k, config.max_len) == (6, 1, 1024)
    assert tpa.TensorProductAttention(config)(torch.randn(2, 5, 12)).shape == (2, 5, 12)


def test_the_hidden_width_is_floored(tpa):
    assert [some_config(tpa, d_model=n).d_ff for n in (12, 13, 14, 100)] == [32, 34, 37, 266]


def test_a_tiny_temperature_is_greedy(tpa):
    model = random_model(tpa, some_config(tpa))
    tokens = torch.randint(31, (2, 4))
    greedy = model.generate(tokens, 9, temperature=0)
    try:
        sampled = model.generate(tokens, 9, temperature=1e-40)
    except RuntimeError as error:
        pytest.fail(f"no probabilities to draw from: {error}")
    assert torch.equal(sampled, greedy)


def test_each_step_of_generate_reads_one_token(tpa):
    model = random_model(tpa, some_config(tpa))
    hidden, lengths = model.hidden, iter([4, 1, 1, 1])

    def watched(tokens, *others):
        assert tokens.shape[1] == next(lengths)
        return hidden(tokens, *others)

    model.hidden = watched
    model.generate(torch.randint(31, (2, 4)), 4)


def test_generate_with_and_without_a_cache_gives_the_same_tokens(tpa):
    model = random_model(tpa, some_config(tpa))
    prompt = torch.randint(31, (3, 5))
    for options in (dict(temperature=0), dict(temperature=0.8), dict(temperature=1.3, top_k=4)):
        runs = [
            model.generate(prompt, 20, generator=torch.Generator().manual_seed(1), use_cache=use_cache, **options)
            for use_cache in (True, False)
        ]
        assert runs[0].shape == (3, 25) and torch.equal(runs[0][:, :5], prompt)
        assert torch.equal(*runs)


def test_generate_samples_as_told(tpa):
    model = random_model(tpa, some_config(tpa))
    prompt = torch.randint(31, (1, 4)).expand(2000, 4)
    greedy = model.generate(prompt[:1], 1, temperature=0)
    assert greedy[0, 4] == model(prompt[:1])[0, -1].argmax()
    assert torch.equal(model.generate(prompt[:1], 6, top_k=1), model.generate(prompt[:1], 6, temperature=0))
    draws = model.generate(prompt, 1, top_k=3, temperature=0.7, generator=torch.Generator().manual_seed(0))[:, 4]
    top = model(prompt[:1])[0, -1].topk(3)
    share = torch.stack([(draws == token).double().mean() for token in top.indices])
    assert_close(share, (top.values / 0.7).softmax(0), rtol=0, atol=0.05)
    assert model.generate(prompt[:1], 0).shape == (1, 4)


@pytest.mark.parametrize(
    "prompt, new, options, said",
    [
        (30, 11, {}, r"a prompt of 30 \+ 11 new tokens.*max_len=40"),
        (0, 3, {}, "a prompt of 0"),
        (3, -1, {}, "-1 new tokens"),
        (3, 3, dict(temperature=-1), "temperature=-1"),
        (3, 3, dict(temperature=math.nan), "temperature=nan"),
        (3, 3, dict(temperature=math.inf), "temperature=inf"),
        (3, 3, dict(top_k=0), "top_k=0"),
        (3, 3, dict(top_k=2.5), "top_k=2.5"),
        (3, 3, dict(padding=torch.tensor([3])), r"padding=\[3\]"),
        (3, 3, dict(padding=torch.tensor([-1])), r"padding=\[-1\]"),
        (3, 3, dict(padding=torch.tensor([0, 0])), r"padding=\[0, 0\]"),
    ],
)
def test_generate_refuses_what_cannot_work(tpa, prompt, new, options, said):
    with pytest.raises(ValueError, match=said):
        random_model(tpa, some_config(tpa)).generate(torch.zeros(1, prompt, dtype=torch.long), new, **options)


def test_the_block_is_llamas(tpa):
    config = some_config(tpa)
    model = random_model(tpa, config)
    block, x = model.blocks[0], torch.randn(1, 4, 12, dtype=torch.float64)

    def normed(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    y = x + block.attention(normed(x))
    gate, up, down = (getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    n = normed(y)
    gated = (n @ gate.T) * torch.sigmoid(n @ gate.T) * (n @ up.T)
    exactly(block(x), y + gated @ down.T)
    assert model.embedding.weight.shape == (31, 12)
    hidden = model.hidden(torch.randint(31, (1, 4)))
    exactly(hidden.pow(2).mean(-1), torch.ones(1, 4, dtype=torch.float64), 1e-6)


def test_bfloat16_autocast_trains_and_decodes(tpa):
    config = some_config(tpa, d_model=32, n_head=4, d_head=16)
    model = random_model(tpa, config).float()
    tokens = torch.randint(31, (2, 24))
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        whole.float().logsumexp(-1).mean().backward()
        with torch.no_grad():
            cache = model.new_cache(2)
            steps = torch.cat([model(part, cache) for part in (tokens[:, :10], *tokens[:, 10:].split(1, dim=1))], 1)
    scale = exact.abs().max()
    assert (whole - exact).abs().max() < 0.1 * scale
    assert (steps - exact).abs().max() < 0.1 * scale
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_torch_compile_captures_the_model_whole(tpa):
    model = random_model(tpa, some_config(tpa, n_layer=1))
    tokens = torch.randint(31, (2, 7))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exactly(compiled(tokens), model(tokens))
    with torch.no_grad():
        cache = model.new_cache(2)
        parts = [compiled(part, cache) for part in (tokens[:, :4], *tokens[:, 4:].split(1, dim=1))]
    exactly(torch.cat(parts, 1), model(tokens))


# ------------------------------------------------------------------------------------------- the file itself


def test_the_file_stands_alone_and_trains(tmp_path):
    """Copied into an empty folder it imports nothing but torch, and a step of training lowers the loss."""
    shutil.copy(SOURCE, tmp_path / "tpa.py")
    code = """
import sys, torch
from tpa import T6, T6Config
assert not any(name.startswith("tpa_minimal") for name in sys.modules)
torch.manual_seed(0)
model = T6(T6Config(50, 2, 32, 4, 8, max_len=64))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
tokens = torch.randint(50, (4, 17))
losses = []
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
assert losses[2] < losses[0], losses
print(model.generate(tokens[:, :4], 5).shape)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "torch.Size([4, 9])" in out.stdout


def test_the_file_is_short_and_needs_only_torch():
    text = SOURCE.read_text(encoding="utf-8")
    tree = ast.parse(text)
    modules = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} <= {"torch", "math", "dataclasses", "typing"}
    documented = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    strings = [n.body[0] for n in documented if ast.get_docstring(n)]
    in_strings = {line for s in strings for line in range(s.lineno, s.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    code = [line for i, line in lines if i not in in_strings and line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 260, f"{len(code)} lines of code: move something out"


@pytest.mark.parametrize("B, rank", [(1, 1), (1, 2), (3, 1)])
def test_compiled_decoding_needs_no_new_graph_for_each_step(B, rank):
    """torch.compile meets all lengths of the cache with a handful of graphs, none of them broken."""
    from torch._dynamo.testing import CompileCounter

    from tpa_minimal import tpa

    torch._dynamo.reset()
    config = tpa.T6Config(31, 1, 16, 4, 8, rank_k=rank, rank_v=rank, max_len=48)
    model, graphs = random_model(tpa, config, 0), CompileCounter()
    step = torch.compile(model, backend=graphs, fullgraph=True)
    tokens = torch.randint(31, (B, 40))
    with torch.no_grad():
        cache = model.new_cache(B)
        out = [model(tokens[:, :5], cache), *(step(token, cache) for token in tokens[:, 5:].split(1, dim=1))]
        assert graphs.frame_count <= 6
        torch.testing.assert_close(torch.cat(out, dim=1), model(tokens))
