"""TPA on several GPUs: each has some of the heads (tensor parallelism), and one sum puts their outputs together.

A head reads its own columns of the head factors a_q, a_k, a_v and the feature factors b_q, b_k, b_v of all heads. So a
GPU of N computes and caches 1/N of each a and the whole of each b, (R_K + R_V)(h/N + d_h) numbers per token
(`memory.Layer.split`), and has its heads' columns of the output projection. On every process of a group:

    for block in model.blocks:
        block.attention = shard(block.attention)

and the model is used as before. Embedding and SwiGLU stay whole here. Symbols and shapes are those of `tpa.py`.
"""

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tpa_minimal.tpa import TensorProductAttention


@torch.no_grad()
def heads_of(layer: TensorProductAttention, index: int, count: int) -> TensorProductAttention:
    """Share `index` of `count` equal shares of a layer's heads, as a layer: all shares' outputs add up to its own.

    Raises TypeError for a variant (a softmax over all heads, for one, cannot be taken by parts) and ValueError for a
    `count` that does not divide the heads.
    """
    if type(layer) is not TensorProductAttention:
        raise TypeError(f"{type(layer).__name__}: only TensorProductAttention itself is split, not its variants")
    config, weight = layer.config, layer.factor_proj.weight
    if config.n_head % count:
        raise ValueError(f"n_head={config.n_head}: cannot be split over {count} GPUs; use a number that divides it")
    part = TensorProductAttention(replace(config, n_head=config.n_head // count)).to(weight.device, weight.dtype)
    part.attend_in_factor_space = layer.attend_in_factor_space
    factors = [w.unflatten(0, shape) for w, shape in zip(weight.split(layer.sizes), layer.shapes)]  # (R, ·, d_model)
    factors[::2] = [a.chunk(count, dim=1)[index] for a in factors[::2]]  # a_q, a_k, a_v: (R, h/N, d_model)
    part.factor_proj.weight.copy_(torch.cat([w.flatten(0, 1) for w in factors]))
    part.out_proj.weight.copy_(layer.out_proj.weight.chunk(count, dim=1)[index])  # (d_model, h/N · d_h)
    return part


def shard(layer: TensorProductAttention, group=None) -> TensorProductAttention:
    """This process's share of the layer's heads, whose output is summed over the process group (None: all processes).

    Each process calls it with the same whole layer, and the new layer with the same x. For inference: it raises
    RuntimeError where gradients are recorded, since these would lack the other processes' part. Raises as `heads_of`.
    """
    part = heads_of(layer, dist.get_rank(group), dist.get_world_size(group))
    part.register_forward_hook(functools.partial(add_up, group))
    return part


def add_up(group, layer, inputs, out: Tensor) -> Tensor:
    """The forward hook of a sharded layer: (B, T, d_model) summed over all processes."""
    if out.requires_grad:
        raise RuntimeError("a sharded layer is for inference; call it within torch.no_grad()")
    dist.all_reduce(out, group=group)
    return out
