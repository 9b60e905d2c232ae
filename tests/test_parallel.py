"""A layer split by heads gives what the whole one gives: its shares added up, and two processes that do so."""

import pytest
import torch
import torch.distributed as dist
from helpers import exactly

from tpa_minimal import cpu_decode, memory
from tpa_minimal.parallel import heads_of, shard
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention
from tpa_minimal.variants import SoftmaxHeadFactors

CONFIG = T6Config(31, 2, 24, 6, 8, rank_q=3, rank_k=2, rank_v=1, max_len=40)


def model_of(config=CONFIG):
    """Equal in every process; its output projections are not zero."""
    torch.manual_seed(0)
    model = T6(config).double()
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.out_proj.weight)
        torch.nn.init.normal_(block.mlp.down_proj.weight)
    return model


def described(model):
    """The accountant's words for the model."""
    c = model.config
    ranks = dict(rank_q=c.rank_q, rank_k=c.rank_k, rank_v=c.rank_v)
    layer = memory.Layer("tpa", c.d_model, c.n_head, c.d_head, **ranks)
    return memory.Model("", layer, c.n_layer, parameters=0, max_len=c.max_len, source="")


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@torch.no_grad()
def test_shares_add_up_to_the_whole_layer(count):
    layer = model_of().blocks[0].attention
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    expected, parts = layer(x), [heads_of(layer, i, count) for i in range(count)]
    exactly(sum(part(x) for part in parts), expected)
    shared = memory.Layer("tpa", 24, 6, 8, rank_q=3, rank_k=2, rank_v=1).split(count)
    for part in parts:
        cache = part.new_cache(2, 9)
        part(x, cache)
        assert cache.nbytes == shared.cached_numbers * 2 * 9 * 8
        assert sum(p.numel() for p in part.parameters()) == shared.parameters


@torch.no_grad()
def _one_of_two(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=index, world_size=2)
    tokens, whole, model = torch.randint(31, (2, 30)), model_of(), model_of()
    dist.broadcast(tokens, 0)
    for block in model.blocks:
        block.attention = shard(block.attention)
    expected = whole(tokens)
    assert expected.std() > 0.1
    exactly(model(tokens), expected)
    cache = model.new_cache(2)
    chunks = tokens.split([11, 1, 1, 5, 12], dim=1)  # a prompt, tokens, and chunks against the cache
    exactly(torch.cat([model(chunk, cache) for chunk in chunks], dim=1), expected)
    assert cache.nbytes == described(whole).split(2).cache_bytes(30, 2, "float32") * 2  # float64
    prompt, padding = tokens[:, :7], torch.tensor([0, 3])
    for decoding in (lambda model: model, cpu_decode.use):
        ragged = [decoding(m).generate(prompt, 9, temperature=0, padding=padding) for m in (whole, model)]
        assert torch.equal(*ragged)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(tokens)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_give_the_output_of_one_and_cache_what_the_formula_says(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (tmp_path,), nprocs=2)


def test_what_cannot_be_split_is_named():
    with pytest.raises(ValueError, match="n_head=6: cannot be split over 4 GPUs"):
        heads_of(TensorProductAttention(CONFIG), 0, 4)
    with pytest.raises(TypeError, match="SoftmaxHeadFactors"):
        heads_of(SoftmaxHeadFactors(CONFIG), 0, 2)


def test_heads_of_a_layer_that_was_told_how_to_decode():
    layer = cpu_decode.use(TensorProductAttention(CONFIG))
    assert heads_of(layer, 0, 2).attend_in_factor_space is cpu_decode.factor_attention
