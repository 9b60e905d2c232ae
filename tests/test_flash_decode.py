"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so without a GPU these tests run in a process of their own.
"""

import copy

import pytest
import torch
from helpers import DEVICE, interpreter_marks, passed_in_the_interpreter

from tpa_minimal import tpa
from tpa_minimal.tpa import T6, FactorCache, T6Config

pytest.importorskip("triton", reason="Triton is an extra: pip install triton")
from tpa_minimal import flash_decode  # noqa: E402

here, elsewhere = interpreter_marks(flash_decode.INTERPRETED)


@elsewhere
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 30  # they ran, and were not skipped


def random_factors(B, M, h, d_head, ranks, scale=1.0, dtype=torch.float32):
    shapes = [(t, r, width) for t, r in zip((1, M, M), ranks) for width in (h, d_head)]
    return [(scale * torch.randn(B, t, r, width)).to(DEVICE, dtype) for t, r, width in shapes]


def exact(factors):
    return tpa.factor_attention(*(f.double() for f in factors), start=factors[2].shape[1] - 1)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


SHAPES = [
    (1, 1, 1, 2, (1, 1, 1)),
    (2, 70, 20, 24, (3, 2, 1)),  # heads and features that fill no tile, positions that fill no block
    (1, 65, 34, 64, (16, 1, 1)),  # the paper's head count; both ranks of the paper
    (1, 33, 34, 64, (6, 2, 2)),
    (3, 64, 3, 6, (1, 3, 2)),
]


@here
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("B, M, h, d_head, ranks", SHAPES)
def test_kernel_equals_float64(B, M, h, d_head, ranks, dtype, tolerance, scale):
    factors = random_factors(B, M, h, d_head, ranks, scale, dtype)
    got = flash_decode.decode(*factors)
    assert got.shape == (B, 1, h, d_head) and got.dtype == dtype
    assert error(got, exact(factors)) <= tolerance


@here
@pytest.mark.parametrize("programs", [2, 3, 7])
def test_any_number_of_splits_gives_the_same(monkeypatch, programs):
    factors = random_factors(1, 100, 4, 8, (2, 2, 1))
    monkeypatch.setattr(flash_decode, "processors", lambda device: (programs, 8))
    assert flash_decode.plan(1, 100, 4, 8, 3, 4, programs, 8)[0][1] > programs / 2  # the cache is cut
    assert error(flash_decode.decode(*factors), exact(factors)) <= 1e-6


@here
def test_a_length_on_the_device_hides_what_lies_beyond(monkeypatch):
    monkeypatch.setattr(flash_decode, "processors", lambda device: (4, 8))  # some splits are beyond the length
    a_q, b_q, *cached = random_factors(3, 90, 4, 8, (2, 2, 2))
    lengths = [1, 40, 90]
    got = flash_decode.decode(a_q, b_q, *cached, torch.tensor(lengths, device=DEVICE))
    for i, length in enumerate(lengths):
        of_row = [x[i : i + 1] for x in (a_q, b_q)] + [x[i : i + 1, :length] for x in cached]
        assert error(got[i : i + 1], exact(of_row)) <= 1e-6


@here
def test_queries_keep_more_digits_than_the_factors():
    """Why the query goes in as two parts: the rounding of bfloat16 queries would be the larger part of the error."""
    factors = random_factors(2, 300, 32, 64, (4, 1, 1), 3.0, torch.bfloat16)
    q = torch.einsum("bqrh,bqrd->bqhd", factors[0].double(), factors[1].double()) / 4
    one_head_each = 32 * torch.eye(32, dtype=torch.double, device=DEVICE).expand(2, 1, 32, 32)
    rounded = exact([one_head_each, q.bfloat16().double(), *factors[2:]])
    assert error(rounded, exact(factors)) > 2 * error(flash_decode.decode(*factors), exact(factors))


@here
def test_reads_the_cache_in_its_own_memory_order():
    cache = FactorCache([(2, 6), (2, 8)] * 2, 2, max_len=100, device=DEVICE)
    a_q, b_q, *new = random_factors(2, 70, 6, 8, (2, 2, 2))
    cached = cache.append(*new)
    assert not cached[0].is_contiguous()
    torch.testing.assert_close(flash_decode.decode(a_q, b_q, *cached), flash_decode.decode(a_q, b_q, *new))


def launches(monkeypatch):
    """How often the kernels have been launched from now on."""
    calls, decode = [], flash_decode.decode
    monkeypatch.setattr(flash_decode, "decode", lambda *factors: calls.append(1) or decode(*factors))
    return calls


@here
def test_all_else_goes_to_pytorch(monkeypatch):
    """Several new tokens, padding, a gradient, mixed dtypes, a T4 (compute capability 7.5): right, and not launched."""
    calls = launches(monkeypatch)
    a_q, b_q, *cached = factors = random_factors(2, 9, 4, 8, (3, 2, 2))
    two = [x.repeat(1, 2, 1, 1) for x in (a_q, b_q)]
    for arguments, others in [
        ([*two, *cached], {"start": 7}),
        (factors, {"start": 8, "padding": torch.tensor([0, 3], device=DEVICE)}),
        (factors, {"start": 5}),  # later positions are there but must not be seen
        ([a_q.requires_grad_(), b_q, *cached], {"start": 8}),
        ([a_q.detach(), b_q, cached[0].double(), *cached[1:]], {"start": 8}),
    ]:
        got = flash_decode.factor_attention(*arguments, **others)
        torch.testing.assert_close(got, tpa.factor_attention(*arguments, **others), rtol=0, atol=0)
    factors = [a_q.detach(), b_q, *cached]
    monkeypatch.setattr(flash_decode, "processors", lambda device: (40, 7))
    torch.testing.assert_close(flash_decode.factor_attention(*factors, start=8), exact(factors).float())
    assert not calls
    monkeypatch.setattr(flash_decode, "processors", lambda device: (40, 8))
    flash_decode.factor_attention(*factors, start=8)
    assert calls


def small_model():
    torch.manual_seed(0)
    model = T6(T6Config(31, 2, 24, 4, 8, max_len=40)).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@here
def test_use_swaps_the_kernels_in_for_decoding_only(monkeypatch):
    model, tokens = small_model(), torch.randint(31, (2, 9), device=DEVICE)
    expected = model(tokens)
    assert flash_decode.use(model) is model
    calls = launches(monkeypatch)
    with torch.no_grad():
        cache = model.new_cache(2)
        parts = [model(part, cache) for part in tokens.split([4, 2, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 * 2  # three single tokens through two layers; not the prompt, nor the two together

    other = copy.deepcopy(model)  # decodes with its own weights
    other.embedding.weight.data.mul_(2)
    with torch.no_grad():
        cache = other.new_cache(2)
        parts = [other(part, cache) for part in tokens.split([8, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), other(tokens), rtol=1e-4, atol=1e-4)


@here
def test_a_compiled_step_is_one_graph_with_the_kernels_in_it():
    """torch.compile(fullgraph=True) raises where it cannot trace."""
    model = flash_decode.use(small_model())
    tokens = torch.randint(31, (2, 9), device=DEVICE)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        cache, own = model.new_cache(2), model.new_cache(2)
        model(tokens[:, :4], cache), model(tokens[:, :4], own)
        for t in range(4, 9):
            expected = model(tokens[:, t : t + 1], own)
            torch.testing.assert_close(step(tokens[:, t : t + 1], cache), expected)
    assert len(graphs) <= 2  # the second takes lengths of all sizes
    names = [str(node.target) for node in graphs[-1].graph.nodes]
    assert sum("tpa_minimal.decode" in name for name in names) == 2
