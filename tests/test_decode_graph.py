"""A step of static shapes gives what the model gives, and is few kernels; the kernels are interpreted without a GPU.

The interpreter must be chosen before Triton is imported, so without a GPU these tests run in a process of their own.
"""

import copy

import pytest
import torch
from helpers import DEVICE, interpreter_marks, passed_in_the_interpreter
from torch.utils._python_dispatch import TorchDispatchMode

from tpa_minimal import tpa, variants
from tpa_minimal.tpa import T6, T6Config

pytest.importorskip("triton", reason="Triton is an extra: pip install triton")
from tpa_minimal import decode_graph, flash_decode  # noqa: E402

here, elsewhere = interpreter_marks(flash_decode.INTERPRETED)


@elsewhere
def test_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) > 9  # they ran, and were not skipped


def models(dtype=torch.float32, n_layer=2, **sizes):
    """A model, and its copy that decodes by one graph."""
    torch.manual_seed(0)
    plain = T6(T6Config(31, n_layer, 24, **{"n_head": 5, "d_head": 6, "rank_q": 3, "max_len": 12, **sizes}))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = plain.to(DEVICE, dtype)
    return plain, decode_graph.use(copy.deepcopy(plain))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [dict(rank_k=2, rank_v=1), dict(rank_q=1, rank_k=1, rank_v=3, n_head=8, d_head=4)])
@torch.no_grad()
def test_every_step_is_the_models(dtype, ranks):
    """Up to the last position, and again after truncate(): as near to float64 as the model itself, cache included."""
    plain, graph = models(dtype, **ranks)
    runs = [(copy.deepcopy(plain).double(), []), (plain, []), (graph, [])]
    tokens = torch.randint(31, (3, 12), device=DEVICE)
    for model, seen in runs:
        cache = model.new_cache(3)
        model(tokens[:, :9], cache)
        for back in (0, 2):
            cache.truncate(cache.length - back)
            seen += [model(tokens[:, t : t + 1], cache) for t in range(cache.length, 12)]
        assert cache.length == 12 and hasattr(cache, "step") == (model is graph)
        seen += [x for layer in cache for x in layer.view(0, 12)]
    with pytest.raises(ValueError, match="holds 12 of 12 positions"):
        graph(tokens[:, :1], cache)
    exact, own, got = (torch.cat([x.double().flatten() for x in seen]) for _, seen in runs)
    assert (got - exact).norm() <= 1.5 * (own - exact).norm() > 0


@here
def test_generate_goes_through_it(monkeypatch):
    plain, graph = models()
    steps, launch = [], decode_graph.Step.launch
    monkeypatch.setattr(decode_graph.Step, "launch", lambda step: steps.append(1) or launch(step))
    prompt = torch.randint(31, (2, 4), device=DEVICE)
    got = graph.generate(prompt, 5, temperature=0)
    assert torch.equal(got, plain.generate(prompt, 5, temperature=0))
    assert DEVICE == "cuda" or len(steps) == 3  # not the prompt, nor the first token after it


@here
@torch.no_grad()
def test_a_copy_decodes_with_its_own_weights():
    _, graph = models()
    other = copy.deepcopy(graph)
    other.embedding.weight.mul_(2)
    tokens, cache = torch.randint(31, (2, 6), device=DEVICE), other.new_cache(2)
    parts = [other(part, cache) for part in tokens.split([3, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), other(tokens), rtol=1e-4, atol=1e-4)
    assert cache.step is not None


@here
def test_all_else_is_the_models_own(monkeypatch):
    """No cache, a prompt, padding, a gradient, another dtype in the cache, autocast, a card without tensor cores."""
    plain, graph = models()
    monkeypatch.setattr(decode_graph, "Step", None)
    tokens = torch.randint(31, (2, 7), device=DEVICE)

    def same(model, padding=None, **options):
        cache = (
            model.new_cache(2) if not options else tpa.Cache(b.attention.new_cache(2, **options) for b in model.blocks)
        )
        return torch.cat([model(part, cache, padding) for part in tokens.split([4, 1, 1, 1], dim=1)], 1)

    def compare(**options):
        torch.testing.assert_close(same(graph, **options), same(plain, **options), rtol=1e-4, atol=1e-4)

    compare()  # with a gradient
    with torch.no_grad():
        compare(padding=torch.tensor([0, 2], device=DEVICE))
        compare(dtype=torch.float64)
        torch.testing.assert_close(graph(tokens), plain(tokens))
        monkeypatch.setattr(flash_decode, "processors", lambda device: (40, 7))
        compare()


def test_variants_have_none():
    model = T6(T6Config(31, 1, 8, 2, 4), attention=variants.FixedHeadFactors)
    with pytest.raises(ValueError, match="FixedHeadFactors has no graph"):
        decode_graph.use(model)


class Launches(TorchDispatchMode):
    """Names of the operators that compute something: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if not operator.is_view and not operator.name().startswith(
            ("aten::empty", "aten::new_empty", "aten::_unsafe_")
        ):
            self.names.append(operator.name())
        return operator(*arguments, **(options or {}))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_layer_is_at_most_15_kernels(dtype):
    """Counted as the operators that PyTorch calls, `decode` as its two kernels.

    On CUDA rms_norm is one kernel (from PyTorch 2.9 on), where a CPU has several; one operator stands in for it here.
    """
    counts = []
    for n_layer in (1, 3):
        _, model = models(dtype, n_layer)
        for part in (model, *model.blocks):
            part.norm = torch.neg
        step = decode_graph.Step(model, model.new_cache(2))
        with Launches() as launches:
            step.launch()
        counts.append(len(launches.names) + launches.names.count("tpa_minimal::decode"))
    assert counts[1] - counts[0] == 2 * 14  # of two more layers
    assert counts[0] == 14 + 2  # and once: the embedding and the last norm
