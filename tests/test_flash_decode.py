"""The Triton kernel against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so without a GPU these tests run in a process of their own.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

from tpa_minimal.tpa import T6, FactorCache, T6Config, factor_attention
from tpa_minimal.variants import RotateAssembled

pytest.importorskip("triton", reason="Triton is an extra: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED or DEVICE == "cuda":
    from tpa_minimal import flash_decode
here = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in the interpreter's own process")


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests below run in this process")
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert run.stdout.count(".") > 25  # they ran, and were not skipped


def random_factors(B, M, h, d_head, ranks, scale=1.0, dtype=torch.float32):
    shapes = [(t, r, width) for t, r in zip((1, M, M), ranks) for width in (h, d_head)]
    return [(scale * torch.randn(B, t, r, width)).to(DEVICE, dtype) for t, r, width in shapes]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


SHAPES = [
    (1, 1, 1, 2, (1, 1, 1)),
    (2, 150, 20, 24, (3, 2, 1)),  # heads and features that fill no tile, positions that fill no block
    (1, 129, 34, 64, (2, 1, 3)),  # two tiles of heads
    (3, 64, 3, 6, (1, 3, 2)),
]


@here
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("B, M, h, d_head, ranks", SHAPES)
def test_kernel_equals_float64(B, M, h, d_head, ranks, dtype, tolerance, scale):
    factors = random_factors(B, M, h, d_head, ranks, scale, dtype)
    exact = factor_attention(*(f.double() for f in factors), start=M - 1)
    with torch.no_grad():
        got = flash_decode.decode(*factors)
    assert got.shape == (B, 1, h, d_head) and got.dtype == dtype
    assert error(got, exact) <= tolerance


@here
def test_queries_keep_more_digits_than_the_factors():
    """Why the query goes in as three parts: the rounding of bfloat16 queries would be the larger part of the error."""
    factors = random_factors(2, 300, 32, 64, (4, 1, 1), 3.0, torch.bfloat16)
    exact = factor_attention(*(f.double() for f in factors), start=299)
    q = torch.einsum("bqrh,bqrd->bqhd", factors[0].double(), factors[1].double()) / 4
    one_head_each = 32 * torch.eye(32, dtype=torch.double, device=DEVICE).expand(2, 1, 32, 32)
    rounded = factor_attention(one_head_each, q.bfloat16().double(), *(f.double() for f in factors[2:]), start=299)
    assert error(rounded, exact) > 2 * error(flash_decode.decode(*factors), exact)


@here
def test_reads_the_cache_in_its_own_memory_order():
    config = T6Config(10, 1, 16, 6, 8, 2, 2, 2, max_len=100)
    cache = FactorCache(config, 2, device=DEVICE)
    factors = random_factors(2, 70, 6, 8, (2, 2, 2))
    held = cache.append(*factors[2:])
    assert not held[0].is_contiguous()
    torch.testing.assert_close(flash_decode.decode(*factors[:2], *held), flash_decode.decode(*factors))


def small_model(attention=None):
    torch.manual_seed(0)
    config = T6Config(31, 2, 24, 4, 8, max_len=40)
    model = (T6(config, attention=attention) if attention else T6(config)).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@here
def test_use_swaps_the_kernel_in_for_decoding_only(monkeypatch):
    model = small_model()
    tokens = torch.randint(31, (2, 9), device=DEVICE)
    expected = model(tokens)
    assert flash_decode.use(model) is model
    calls = []
    decode = flash_decode.decode
    monkeypatch.setattr(flash_decode, "decode", lambda *factors: calls.append(1) or decode(*factors))
    with torch.no_grad():
        cache = model.new_cache(2)
        parts = [model(part, cache) for part in tokens.split([4, 2, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 * 2  # three single tokens through two layers; not the prompt, nor the two together

    cache = model.new_cache(2)
    with torch.no_grad():
        model(tokens[:, :4], cache)
    model(tokens[:, 4:5], cache).sum().backward()  # a gradient is wanted: PyTorch's path
    assert len(calls) == 6 and model.embedding.weight.grad.abs().sum() > 0


@here
def test_a_copied_model_decodes_with_its_own_weights():
    model = flash_decode.use(small_model())
    other = copy.deepcopy(model)
    assert other.blocks[0].attention.attend.__self__ is other.blocks[0].attention


@here
def test_use_leaves_a_variant_with_its_own_attention_alone():
    model = flash_decode.use(small_model(RotateAssembled))
    assert "attend" not in vars(model.blocks[0].attention)
