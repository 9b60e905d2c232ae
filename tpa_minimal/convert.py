"""Weights in and out: MHA, MQA, GQA and LLaMA layers as TPA, and the authors' T6 checkpoints."""

from dataclasses import replace

import torch
from torch import nn

from tpa_minimal.variants import FixedHeadFactors


def group_factors(n_head: int, n_kv_head: int) -> torch.Tensor:
    """The constant head factors that make TPA of rank G share each key among h/G heads: G · mask_j (Sec. 4).

    Returns A (G, h): row j is G on the heads of group j and 0 elsewhere. G = h gives h · I (MHA), G = 1 ones (MQA).
    Raises ValueError unless G divides h.
    """
    if n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"n_kv_head={n_kv_head}: must divide n_head={n_head}, so that all groups are of one size")
    return n_kv_head * torch.eye(n_kv_head).repeat_interleave(n_head // n_kv_head, dim=1)


@torch.no_grad()
def mha_to_tpa(layer: nn.Module) -> FixedHeadFactors:
    """The fixed-A TPA that computes what an MHA, MQA or GQA layer computes, from copies of its weights (Sec. 4).

    layer: a `baselines.MultiHeadAttention` with h query heads and G key-value heads. The result has ranks (h, G, G),
    the projections of the heads as its feature factors and `group_factors` as constants; these are frozen, so that
    training goes on as it would have for `layer`. Its cache holds 2 G d_h numbers per token, as GQA's does.
    """
    h, d_head = layer.config.n_head, layer.config.d_head
    G = layer.k_proj.out_features // d_head
    tpa = FixedHeadFactors(replace(layer.config, rank_q=h, rank_k=G, rank_v=G))
    tpa = tpa.to(layer.out_proj.weight)
    for constant, n_kv_head in ((tpa.a_q, h), (tpa.a_k, G), (tpa.a_v, G)):
        constant.copy_(group_factors(h, n_kv_head)).requires_grad_(False)
    tpa.factor_proj.weight.copy_(torch.cat((layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight)))
    tpa.out_proj.weight.copy_(layer.out_proj.weight)
    return tpa.train(layer.training)
