"""The 8-bit and 4-bit factor cache: rounding, bytes, and attention equal to that over the dequantized cache."""

import functools

import pytest
import torch
from helpers import exactly, random_factors, storages
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_memory import layers, real_layer

from tpa_minimal import baselines, cpu_decode, quantized, variants
from tpa_minimal.quantized import QuantizedCache, quantize
from tpa_minimal.tpa import T6, FactorCache, T6Config, TensorProductAttention, factor_attention

few = settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@few
@given(st.integers(1, 9), st.sampled_from([4, 8]), st.floats(-30, 30))
def test_no_number_is_off_by_more_than_half_a_step(width, bits, exponent):
    x = torch.randn(2, 5, 3, width, dtype=torch.float64) * 2**exponent
    back = quantize(x, bits).to(torch.float64)
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # The scale is rounded to 8 bits: that moves the step by 2⁻⁸ at most, and the largest number by half a step or less.
    assert ((back - x).abs() <= step * (0.5 + 2**-8) * (1 + 2**-8)).all()
    assert back.shape == x.shape


def test_each_row_has_a_scale_of_its_own():
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64)
    x[0, 0, 1] *= 1e4
    back = quantize(x, 8).to(torch.float64)
    exactly(back[0, 0, 0], x[0, 0, 0], 0.02)
    one_scale = (x / x.abs().max() * 127).round() * x.abs().max() / 127
    assert (one_scale[0, 0, 0] == 0).all()  # what a common scale would have left of the small row


def test_zeros_and_the_largest_number_of_a_row():
    x = torch.tensor([[0.0, 0.0], [3.0, -3.0], [1e-44, 0.0]]).view(1, 1, 3, 2)
    for bits in (8, 4):
        back = quantize(x, bits).to(torch.float32)
        assert torch.equal(back[0, 0, 0], torch.zeros(2)) and back.isfinite().all()
        exactly(back[0, 0, 1], x[0, 0, 1], 0.01)


@pytest.mark.parametrize("attend", [factor_attention, cpu_decode.factor_attention])
@few
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 4),
    start=st.integers(0, 30),
    h=st.integers(1, 5),
    half=st.integers(1, 4),
    ranks=st.tuples(*[st.integers(1, 3)] * 3),
    block_size=st.sampled_from([1, 8, 17, 16384]),
    bits=st.sampled_from([4, 8, (8, 4, 4, 8)]),
)
@torch.no_grad()
def test_attention_equals_that_over_the_dequantized_cache(attend, B, T, start, h, half, ranks, block_size, bits):
    a_q, b_q, *factors = random_factors(B, T, start + T, h, 2 * half, ranks)
    cache = QuantizedCache([x.shape[2:] for x in factors], B, start + T, dtype=torch.float64, bits=bits)
    rows = cache.append(*factors)
    plain = [row.to(torch.float64) for row in rows]
    assert not any(torch.equal(x, y) for x, y in zip(plain, factors) if x.numel() > 40)  # it did round
    got = attend(a_q, b_q, *rows, start=start, block_size=block_size)
    exactly(got, factor_attention(a_q, b_q, *plain, start=start))


def model_of(attention=TensorProductAttention, **sizes):
    model = T6(T6Config(31, 2, 12, 4, 8, **{"max_len": 60, **sizes}), attention).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


class RoundedCache(FactorCache):
    """Keeps at full width what QuantizedCache would give back."""

    bits = 8

    def append(self, *new):
        return super().append(*(quantize(x, self.bits).to(x.dtype) for x in new))


MECHANISMS = [
    TensorProductAttention,
    variants.KeyValueOnly,
    baselines.MultiHeadAttention,
    functools.partial(baselines.MultiHeadAttention, n_kv_head=2),
    baselines.MultiHeadLatentAttention,
]


@pytest.mark.parametrize("attention", MECHANISMS, ids=["tpa", "kv-only", "mha", "gqa", "mla"])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_model_decodes_as_from_the_dequantized_cache(attention, bits, monkeypatch):
    monkeypatch.setattr(RoundedCache, "bits", bits)
    model, tokens = model_of(attention), torch.randint(31, (2, 50))
    cache, rounded = quantized.new_cache(model, 2, bits=bits), model.new_cache(2)
    for layer in rounded:
        layer.__class__ = RoundedCache
    for chunk in tokens.split([9, 20, 1, 5, 1, 14], dim=1):  # chunks above and below DECODE_TOKENS
        exactly(model(chunk, cache), model(chunk, rounded))
    assert (model(tokens[:, :1], cache) - model(tokens[:, :1], model.new_cache(2))).abs().max() > 1e-6


@torch.no_grad()
def test_no_factor_is_kept_or_rebuilt_at_full_width(monkeypatch):
    model = model_of()
    for block in model.blocks:
        block.attention.attend_in_factor_space = functools.partial(factor_attention, block_size=4)
    cache = quantized.new_cache(model, 1)
    model(torch.randint(31, (1, 40)), cache)
    longest, to = [], quantized.Rows.to

    def watched(self, dtype):
        longest.append(self.shape[1])
        return to(self, dtype)

    monkeypatch.setattr(quantized.Rows, "to", watched)
    model(torch.randint(31, (1, 1)), cache)
    assert len(longest) == 2 * 4 * 11 and max(longest) == 4  # two layers, four factors, eleven blocks of 41 positions
    wide = 41 * 4 * (4 + 8) * 8
    assert cache[0].nbytes < wide / 5


@few
@given(layers().filter(lambda layer: "fixed" not in layer.mechanism), st.sampled_from([4, 8]), st.integers(1, 3))
def test_bytes_are_the_formula_and_what_is_really_kept(layer, bits, batch_size):
    ranks = dict(rank_q=layer.rank_q, rank_k=layer.rank_k, rank_v=layer.rank_v)
    module = real_layer(layer, T6Config.for_layer(layer.d_model, layer.n_head, layer.d_head, **ranks))
    kept = module.new_cache(batch_size, 7).view(0, 7)
    cache = QuantizedCache([x.shape[2:] for x in kept], batch_size, 7, bits=bits)
    cache.append(*(torch.randn(x.shape) for x in kept))
    assert cache.nbytes == layer.quantized_bytes(bits) * 7 * batch_size
    assert sum(storages(cache.codes).values()) + sum(storages(cache.scales).values()) == cache.nbytes
    cache.truncate(3)
    assert cache.length == 3 and cache.nbytes == layer.quantized_bytes(bits) * 3 * batch_size


def test_bytes_by_hand():
    cache = QuantizedCache([(2, 34), (2, 64)] * 2, 1, 10, bits=8)  # the paper's small model: 392 numbers
    cache.append(*(torch.randn(1, 10, 2, width) for width in (34, 64) * 2))
    assert cache.nbytes == 10 * (392 + 8 * 2)
    four = QuantizedCache([(2, 35), (2, 64)] * 2, 1, 10, bits=4)  # an odd width: 18 bytes, not 17.5
    four.append(*(torch.randn(1, 10, 2, width) for width in (35, 64) * 2))
    assert four.nbytes == 10 * (4 * (18 + 32) + 8 * 2)


def test_what_does_not_fit_is_refused_and_nothing_is_lost():
    cache = QuantizedCache([(2, 3), (1, 4)], batch_size=1, max_len=5, bits=4)
    first = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 1, 4)
    before = [row.to(torch.float32) for row in cache.append(*first)]
    wrong = [
        [x[:, :2] for x in first],  # too long
        [x[:, :1].repeat(2, 1, 1, 1) for x in first],  # a batch of two
        [first[0][:, :1]],  # a factor is missing
        [first[0][:, :1, :, :2], first[1][:, :1]],  # a width of 2 in place of 3
        [first[0][:, :1], first[1][:, :1, :, :3]],  # 3 in place of 4, in as many bytes
        [*(x[:, :1] for x in first), first[1][:, :1]],
    ]
    for new in wrong:
        with pytest.raises(ValueError, match="cache"):
            cache.append(*new)
        after = [row.to(torch.float32) for row in cache.view(0, 4)]
        assert cache.length == cache.scales.length == 4 and all(map(torch.equal, before, after))


@pytest.mark.parametrize("bits", [0, 2, 16, (8, 4), "8"])
def test_bits_that_cannot_work(bits):
    with pytest.raises(ValueError, match="4 or 8"):
        QuantizedCache([(2, 3), (1, 4), (1, 1)], 1, 5, bits=bits)


def test_a_constant_factor_is_refused():
    layer = variants.FixedHeadFactors(T6Config.for_layer(8, 2, 4))
    with pytest.raises(ValueError, match="no width may be 0"):
        QuantizedCache(layer.shapes[2:], 1, 5)
