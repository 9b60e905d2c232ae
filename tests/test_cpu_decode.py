"""The function tuned for a CPU computes what the plain one computes, and `use` gives it to a model."""

import copy

import pytest
import torch
from helpers import exactly, random_factors
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tpa_minimal import cpu_decode, tpa, variants
from tpa_minimal.baselines import MultiHeadAttention


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    start=st.integers(0, 40),
    h=st.integers(1, 5),
    half=st.integers(1, 4),
    ranks=st.tuples(*[st.integers(1, 3)] * 3),
    block_size=st.sampled_from([1, 3, 8, 17, 16384]),
    grad=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_it_equals_the_plain_function(B, T, start, h, half, ranks, block_size, grad):
    factors = random_factors(B, T, start + T, h, 2 * half, ranks)
    with torch.set_grad_enabled(grad):
        got = cpu_decode.factor_attention(*factors, start=start, block_size=block_size)
        exactly(got, tpa.factor_attention(*factors, start=start, block_size=block_size))


def test_gradients_are_the_plain_functions():
    factors = [factor.requires_grad_() for factor in random_factors(2, 3, 9, 3, 4, (2, 2, 3))]
    got, plain = (
        function(*factors, start=6, block_size=9) for function in (cpu_decode.factor_attention, tpa.factor_attention)
    )
    direction = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, factors, direction), torch.autograd.grad(plain, factors, direction)
    ):
        exactly(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_caches_lose_no_more_than_their_own_digits(dtype):
    factors = random_factors(1, 1, 3000, 4, 8, (3, 2, 1), dtype=dtype)
    exact = tpa.factor_attention(*(factor.double() for factor in factors), start=2999)
    got = cpu_decode.factor_attention(*factors, start=2999, block_size=512)
    assert got.dtype == dtype
    exactly(got.double(), exact, torch.finfo(dtype).eps)


def small_model(attention=tpa.TensorProductAttention):
    model = tpa.T6(tpa.T6Config(31, 2, 12, 4, 8, max_len=40), attention)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@pytest.mark.parametrize(
    "attention", [tpa.TensorProductAttention, variants.FixedHeadFactors, variants.SharedFeatureFactors]
)
def test_use_swaps_it_in_for_decoding_alone(attention, monkeypatch):
    plain = small_model(attention).double()
    model = cpu_decode.use(copy.deepcopy(plain))
    calls = []

    def watched(*factors, **options):
        calls.append(factors[0].shape[1])
        return cpu_decode.factor_attention(*factors, **options)

    for block in model.blocks:
        assert block.attention.attend_in_factor_space is cpu_decode.factor_attention
        block.attention.attend_in_factor_space = watched
    tokens, cache = torch.randint(31, (2, 30)), model.new_cache(2)
    out = torch.cat([model(part, cache) for part in tokens.split([8, 1, 3, 18], dim=1)], dim=1)
    exactly(out, plain(tokens))
    assert calls == [1, 1, 3, 3]  # two layers; the prompt and the long chunk are assembled
    again = copy.deepcopy(cpu_decode.use(plain))
    assert torch.equal(again.generate(tokens[:, :5], 6, temperature=0), plain.generate(tokens[:, :5], 6, temperature=0))


def test_use_leaves_other_attention_alone():
    model = small_model(MultiHeadAttention)
    assert cpu_decode.use(model) is model and not hasattr(model.blocks[0].attention, "attend_in_factor_space")


def test_a_ragged_batch_is_right_too():
    factors, padding = random_factors(3, 2, 12, 3, 4, (2, 2, 2)), torch.tensor([0, 4, 9])
    got = cpu_decode.factor_attention(*factors, start=10, padding=padding)
    exactly(got, tpa.factor_attention(*factors, start=10, padding=padding))
