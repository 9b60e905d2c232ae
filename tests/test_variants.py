"""Each variant: cached = uncached, bytes = Table 1, parameters = Table 1, and its special cases."""

import pytest
import torch

from tpa_minimal import variants
from tpa_minimal.tpa import T6Config


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
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
BYTES = {  # numbers per token as functions of (R_K, R_V, h, d_h)
    variants.FixedHeadFactors: lambda k, v, h, d: (k + v) * d,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", BYTES)
def test_cached_equals_uncached_and_bytes_equal_the_formula(attention, case):
    rank_q, rank_k, rank_v = case["ranks"]
    layer = layer_of(
        attention, rank_q=rank_q, rank_k=rank_k, rank_v=rank_v, n_head=case["n_head"], d_head=case["d_head"]
    )
    x = torch.randn(2, sum(case["chunks"]), 20)
    out, cache = in_chunks(layer, x, case["chunks"])
    torch.testing.assert_close(out, layer(x).detach(), rtol=0, atol=1e-10)
    numbers = BYTES[attention](rank_k, rank_v, case["n_head"], case["d_head"])
    assert cache.nbytes == 2 * x.shape[1] * numbers * 8
    cache.truncate(1)
    assert cache.nbytes == 2 * numbers * 8
