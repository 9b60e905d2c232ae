"""Weights in and out: attention layers and LLaMA models as TPA, the authors' T6 checkpoints, files and hubs.

    mha_to_tpa(layer)  tpa_to_mha(layer)                     MHA, MQA and GQA layers ↔ fixed-A TPA (Sec. 4), exact
    llama_to_t6(model)                                       Hugging Face LLaMA → T6 with fixed-A TPA, the same logits
    reduce_rank(model, tokens, ...)                          from there down in rank, fitted to real activations
    use_tpa(model)                                           TPA as `self_attn` of a Hugging Face LLaMA
    authors_t6_state_dict(state, config)  t6_to_authors_state_dict(state, config)
    save_pretrained(model, folder)  from_pretrained(name)  push_to_hub(model, repo_id)

`transformers` is imported by nothing here: the functions that have to do with it take its models as arguments.
"""

import copy
import json
import os
import re
import tempfile
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpa_minimal import baselines, variants
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention, rms_norm
from tpa_minimal.variants import FixedHeadFactors, KeyValueOnly

# ------------------------------------------------------------------------------------ MHA, MQA and GQA as TPA


def group_factors(n_head: int, n_kv_head: int) -> Tensor:
    """The constant head factors that make TPA of rank G share each key among h/G heads: G · mask_j (Sec. 4).

    Returns A (G, h): row j is G on the heads of group j and 0 elsewhere. G = h gives h · I (MHA), G = 1 ones (MQA).
    Raises ValueError unless G divides h.
    """
    if n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"n_kv_head={n_kv_head}: must divide n_head={n_head}, so that all groups are of one size")
    return n_kv_head * torch.eye(n_kv_head).repeat_interleave(n_head // n_kv_head, dim=1)


@torch.no_grad()
def _fixed_head_tpa(config: T6Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> FixedHeadFactors:
    """The fixed-A TPA with copies of the weights q (h · d_h, d_model), k and v (G · d_h, d_model), and out."""
    h, G = config.n_head, k.shape[0] // config.d_head
    layer = FixedHeadFactors(replace(config, rank_q=h, rank_k=G, rank_v=G)).to(out)
    for constant, n_kv_head in ((layer.a_q, h), (layer.a_k, G), (layer.a_v, G)):
        constant.copy_(group_factors(h, n_kv_head)).requires_grad_(False)
    layer.factor_proj.weight.copy_(torch.cat((q, k, v)))
    layer.out_proj.weight.copy_(out)
    return layer


def mha_to_tpa(layer: baselines.MultiHeadAttention) -> FixedHeadFactors:
    """The fixed-A TPA that computes what an MHA, MQA or GQA layer computes, from copies of its weights (Sec. 4).

    With h query heads and G key-value heads the result has ranks (h, G, G), the projections of the heads as feature
    factors, and `group_factors` as head factors. These are frozen, so that training goes on as it would have for
    `layer`. The cache holds 2 G d_h numbers per token, as GQA's does. Decoding multiplies by the zeros of the masks
    too, and so takes G times GQA's multiply–adds: this is for starting from a model, not for speed.
    """
    if not isinstance(layer, baselines.MultiHeadAttention):
        raise TypeError(f"{type(layer).__name__}: only a MultiHeadAttention, with any number of groups, converts")
    weights = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, layer.out_proj.weight)
    return _fixed_head_tpa(layer.config, *weights).train(layer.training)


@torch.no_grad()
def tpa_to_mha(layer: FixedHeadFactors) -> baselines.MultiHeadAttention:
    """The MHA layer that computes what a fixed-A TPA of any ranks computes: W_i = (1/R) Σ_r a_r,i W_r^b for head i.

    Fixed-A TPA is thus MHA whose heads' matrices are mixtures of R ones. The result's cache is MHA's, 2 h d_h.
    """
    if not isinstance(layer, FixedHeadFactors):
        raise TypeError(f"{type(layer).__name__}: only FixedHeadFactors are MHA")
    mha = baselines.MultiHeadAttention(layer.config).to(layer.out_proj.weight)
    b_rows = layer.factor_proj.weight.split(layer.sizes)[1::2]
    for proj, a, rows in zip((mha.q_proj, mha.k_proj, mha.v_proj), (layer.a_q, layer.a_k, layer.a_v), b_rows):
        per_head = a.mT @ (rows.unflatten(0, (len(a), -1)).flatten(1) / len(a))  # (h, d_h · d_model)
        proj.weight.copy_(per_head.view_as(proj.weight))
    mha.out_proj.weight.copy_(layer.out_proj.weight)
    return mha.train(layer.training)


# ------------------------------------------------------------------------------------------------------- LLaMA


def llama_norm(x: Tensor, eps: float, in_float32: bool) -> Tensor:
    """RMSNorm with LLaMA's eps, its gain left to the weights that follow; in float32 if transformers does it so."""
    wide = x.float() if in_float32 else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class LlamaT6(T6):
    """A T6 with the three things that LLaMA has besides: an eps, frequencies, and an output matrix, of its own.

    norm_eps: added to the mean square in every norm. inv_freq: the d_h/2 angles per position, as numbers, so that
    no cast of the model rounds them. rope_scale: factor on the cosines and sines (1 but for YaRN).
    in_float32: norms and rotary tables are computed in float32 even in a float64 model, as transformers does.
    """

    def __init__(
        self,
        config: T6Config,
        attention=FixedHeadFactors,
        *,
        norm_eps: float,
        inv_freq: list[float],
        rope_scale: float = 1.0,
        in_float32: bool = True,
    ):
        super().__init__(config, attention)
        self.norm = partial(llama_norm, eps=norm_eps, in_float32=in_float32)
        self.llama = dict(norm_eps=norm_eps, inv_freq=inv_freq, rope_scale=rope_scale, in_float32=in_float32)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for block in self.blocks:
            block.norm = self.norm
            block.attention.rope = _llama_rope(self.llama)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output matrix, into which the gain of the last norm went: (..., d_model) -> (..., vocab_size)."""
        return self.output(hidden)


class LlamaRoPE(NamedTuple):
    """RoPE with the d_h/2 angles per position `inv_freq`, as transformers computes it; used as `tpa.RoPE` is."""

    inv_freq: tuple[float, ...]
    rope_scale: float
    in_float32: bool

    def tables(self, start: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (T, d_h/2), for the tokens of x (B, T, ...), the first of which is at position `start`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = torch.float32 if self.in_float32 else dtype
        positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=wide)
        angles = positions[:, None] * torch.tensor(self.inv_freq, dtype=wide, device=x.device)
        return (angles.cos() * self.rope_scale).to(dtype), (angles.sin() * self.rope_scale).to(dtype)


def _llama_rope(extras: dict) -> LlamaRoPE:
    return LlamaRoPE(tuple(extras["inv_freq"]), extras["rope_scale"], extras["in_float32"])


def _llama_extras(model) -> dict:
    """What LlamaT6 needs beside weights from a LlamaForCausalLM. Raises ValueError for what it cannot carry over."""
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(f"{type(model).__name__}: needed is a transformers.LlamaForCausalLM")
    if any(isinstance(module, LlamaSelfAttention) for module in model.modules()):
        raise ValueError("the model has TPA as self_attn already: take one that was just loaded")
    c = model.config
    if c.model_type != "llama":
        raise ValueError(f"model_type={c.model_type!r}: only LLaMA-style checkpoints, of model_type 'llama', convert")
    if c.attention_bias or c.mlp_bias:
        raise ValueError(
            f"attention_bias={c.attention_bias}, mlp_bias={c.mlp_bias}: TPA and T6 have no biases, so this model "
            "cannot be carried over exactly; take one trained without them"
        )
    if c.hidden_act != "silu":
        raise ValueError(f"hidden_act={c.hidden_act!r}: T6's feed-forward layer is SwiGLU, so only 'silu' converts")
    rotary, norm = model.model.rotary_emb, model.model.norm
    if rotary.rope_type not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(
            f"rope_type={rotary.rope_type!r}: its frequencies change with the length of the text, which a cache of "
            "rotated factors cannot follow; models with default, linear, llama3 or yarn RoPE convert"
        )
    # transformers rounds to float32 within each norm, even of a float64 model. Ask this model's own norm.
    x = torch.linspace(-1, 1, c.hidden_size, dtype=torch.float64, device=norm.weight.device)
    with torch.no_grad():
        exact = norm.weight * llama_norm(x, c.rms_norm_eps, in_float32=False)
        in_float32 = not torch.allclose(norm(x).double(), exact.double(), rtol=1e-12, atol=0)
    return dict(
        norm_eps=c.rms_norm_eps,
        inv_freq=rotary.inv_freq.tolist(),
        rope_scale=float(rotary.attention_scaling),
        in_float32=in_float32,
    )


def _llama_config(c, max_len: int | None) -> T6Config:
    return T6Config(
        vocab_size=c.vocab_size,
        n_layer=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_head=c.num_attention_heads,
        d_head=c.head_dim,
        rank_q=c.num_attention_heads,
        rank_k=c.num_key_value_heads,
        rank_v=c.num_key_value_heads,
        max_len=c.max_position_embeddings if max_len is None else max_len,
        rope_base=float(c.rope_parameters["rope_theta"]),
        d_ff=c.intermediate_size,
    )


def _llama_attention(self_attn, config: T6Config, gain: Tensor | None = None) -> FixedHeadFactors:
    """One LLaMA attention layer as fixed-A TPA; `gain` is that of the norm before it, to be folded into the weights."""
    # transformers turns queries and keys by +θ where the paper has -θ. Negating the second half of the features,
    # x ↦ x D, turns one into the other, D T_t D = T_tᵀ, and cancels in the product q D D kᵀ.
    turn = torch.ones(config.d_head, 1).to(self_attn.q_proj.weight)
    turn[config.d_head // 2 :] = -1

    def heads(proj, factor=1):
        weight = proj.weight if gain is None else proj.weight * gain
        return (weight.unflatten(0, (-1, config.d_head)) * factor).flatten(0, 1)

    q, k, v = heads(self_attn.q_proj, turn), heads(self_attn.k_proj, turn), heads(self_attn.v_proj)
    return _fixed_head_tpa(config, q, k, v, self_attn.o_proj.weight)


@torch.no_grad()
def llama_to_t6(model, max_len: int | None = None) -> LlamaT6:
    """The T6 with fixed-A TPA that gives the same logits as a `transformers.LlamaForCausalLM` (MHA, GQA or MQA).

    All weights are copied, in the dtype and on the device of `model`. The norms' gains go into the matrices that
    follow them. RoPE of the types default, linear, llama3 and yarn is carried over; biases, other activations and
    RoPE that depends on the length raise ValueError. max_len: of the result's config, if not the model's own.

    Per token and layer the cache holds 2 G d_h numbers, as the model's own; `reduce_rank` goes below.

    The logits agree to rounding, in float64 too. That takes an imitation: transformers computes norms and rotary
    tables in float32 whatever the model's dtype, which moves a float64 model's logits by about 1e-7, and so the
    result does it too. Where the given model's norm is exact in float64, so is the result (`LlamaT6.in_float32`).
    """
    extras, config = _llama_extras(model), _llama_config(model.config, max_len)
    weight = model.lm_head.weight
    with torch.device("meta"):  # sizes only: the weights come next
        t6 = LlamaT6(config, **extras)
    state = {
        "embedding.weight": model.model.embed_tokens.weight.clone(),
        "output.weight": weight * model.model.norm.weight,
    }
    for i, layer in enumerate(model.model.layers):
        attention = _llama_attention(layer.self_attn, config, layer.input_layernorm.weight)
        state |= {f"blocks.{i}.attention.{name}": value for name, value in attention.state_dict().items()}
        gain = layer.post_attention_layernorm.weight
        state[f"blocks.{i}.mlp.gate_proj.weight"] = layer.mlp.gate_proj.weight * gain
        state[f"blocks.{i}.mlp.up_proj.weight"] = layer.mlp.up_proj.weight * gain
        state[f"blocks.{i}.mlp.down_proj.weight"] = layer.mlp.down_proj.weight.clone()
    t6.load_state_dict(state, assign=True)
    for block in t6.blocks:
        for constant in (block.attention.a_q, block.attention.a_k, block.attention.a_v):
            constant.requires_grad_(False)
    return t6.train(model.training)


class LlamaSelfAttention(nn.Module):
    """Any TPA of this package as `self_attn` of a Hugging Face LLaMA's layer, so that `model.generate` works.

    The cache is transformers' own `DynamicCache`, or with R_K = R_V also its `StaticCache`. In the place of keys and
    values it holds, per rank, a_k and b_k side by side, and a_v and b_v, so its reordering for beam search, cropping
    and lengths work as ever. Positions are counted along the cache; a left-padded batch is right all the same, since
    RoPE sees distances alone and the mask hides the padding. With such a mask keys and values are assembled for the
    call. Masks with holes between tokens, and `position_ids` of one's own, are not supported.
    """

    def __init__(self, attention: TensorProductAttention, layer_idx: int):
        super().__init__()
        if not isinstance(attention, TensorProductAttention):
            raise ValueError(f"{type(attention).__name__} attends in a way of its own, to which no mask can be given")
        self.attention = attention
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, attention_mask=None, past_key_values=None, **_) -> tuple[Tensor, None]:
        """hidden_states: (B, T, d_model) -> (the same, None for attention weights that are never formed)."""
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length(self.layer_idx))
        a_q, b_q, a_k, b_k, a_v, b_v = self.attention.factors(hidden_states, start)
        if past_key_values is not None:
            new = (torch.cat(pair, -1).transpose(1, 2) for pair in ((a_k, b_k), (a_v, b_v)))  # (B, R, T, ·)
            # What a static cache returns goes beyond what it holds; a mask hides that.
            end = start + hidden_states.shape[1] if attention_mask is None else None
            k, v = (held[:, :, :end].transpose(1, 2) for held in past_key_values.update(*new, self.layer_idx))
            a_k, b_k = k.split((a_k.shape[-1], b_k.shape[-1]), dim=-1)
            a_v, b_v = v.split((a_v.shape[-1], b_v.shape[-1]), dim=-1)
        padding = None
        if attention_mask is not None:
            if attention_mask.ndim != 4:
                raise ValueError(
                    f"attention_mask with {attention_mask.ndim} axes: needed is one of shape (B, 1, T, M); load the "
                    'model with attn_implementation="sdpa"'
                )
            end = start + hidden_states.shape[1]
            a_k, b_k, a_v, b_v = (factor[:, :end] for factor in (a_k, b_k, a_v, b_v))
            seen = attention_mask[:, 0, -1, :end]  # of the newest token
            seen = seen if seen.dtype == torch.bool else seen == 0
            padding = (~seen).sum(-1).expand(len(hidden_states))
        out = self.attention.attend(a_q, b_q, a_k, b_k, a_v, b_v, start, padding)
        return self.attention.out_proj(out.flatten(2)), None


def use_tpa(model):
    """Replace each `self_attn` of a `transformers.LlamaForCausalLM`, in place, by the fixed-A TPA that equals it.

    Returns the model, whose `forward` and `generate` go on as before. Its weights have new names: to keep a model on
    disk, save it before, and call this again after loading. Raises ValueError as `llama_to_t6` does, also for a model
    that has been through this already.
    """
    rope, config = _llama_rope(_llama_extras(model)), _llama_config(model.config, None)
    for i, layer in enumerate(model.model.layers):
        attention = _llama_attention(layer.self_attn, config)
        attention.rope = rope
        layer.self_attn = LlamaSelfAttention(attention, i).train(model.training)
    return model


# ------------------------------------------------------------------------------------------------ down in rank


def _least_squares(x: Tensor, known: Tensor, y: Tensor, ridge: float = 1e-6) -> Tensor:
    """The maps W (R, o, d_model) that minimize Σ ‖y_n - (1/R) Σ_r (W_r x_n) ⊗ known_n,r‖².

    x: (N, d_model), known: (N, R, w), y: (N, o, w). `ridge` is relative to the mean of the normal matrix's diagonal.
    """
    d_model, R = x.shape[1], known.shape[1]
    known = known / R
    gram = torch.einsum("nrw,nsw->rsn", known, known)  # (R, R, N)
    normal = torch.stack([torch.stack([(x.mT * gram[r, s]) @ x for s in range(R)]) for r in range(R)])
    normal = normal.transpose(1, 2).reshape(R * d_model, R * d_model)
    right = torch.einsum("nm,nro->rmo", x, torch.einsum("nrw,now->nro", known, y)).flatten(0, 1)  # (R · d_model, o)
    normal += ridge * normal.diagonal().mean() * torch.eye(len(normal), dtype=x.dtype, device=x.device)
    return torch.linalg.solve(normal, right).unflatten(0, (R, d_model)).mT


def fit_fixed(y: Tensor, rank: int) -> Tensor:
    """The constant head factors A (R, h) with the least error Σ_n ‖y_n - (1/R) Aᵀ B_n‖² when B_n = A y_n / R.

    y: (N, h, d_h), keys or values of N tokens. Closed form: the R leading eigenvectors of Σ_n y_n y_nᵀ, times R.
    """
    directions = torch.linalg.eigh(torch.einsum("nhd,ngd->hg", y, y)).eigenvectors  # in ascending order
    return rank * directions[:, -rank:].mT


def fit_contextual(x: Tensor, y: Tensor, rank: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Maps W_a (R, h, d_model), W_b (R, d_h, d_model) with y_n ≈ (1/R) Σ_r (W_a,r x_n) ⊗ (W_b,r x_n).

    x: (N, d_model), inputs of the layer; y: (N, h, d_h), its keys or values. Alternating least squares: with one
    factor held, the other is a linear regression. It starts from the feature factors of `fit_fixed`.
    """
    b = fit_fixed(y, rank) @ y / rank  # (N, R, d_h)
    for _ in range(iterations):
        W_a = _least_squares(x, b, y)
        W_b = _least_squares(x, torch.einsum("rhm,nm->nrh", W_a, x), y.mT)
        b = torch.einsum("rdm,nm->nrd", W_b, x)
    return W_a, W_b


@torch.no_grad()
def reduce_rank(model: T6, tokens: Tensor, rank_k: int, rank_v: int, contextual: bool = False) -> T6:
    """A copy of a model of `FixedHeadFactors` with ranks rank_k and rank_v, fitted to its activations on `tokens`.

    tokens: (B, T). Keys and values of each layer are fitted before rotation, which changes no error. By default head
    factors stay fixed: `fit_fixed`, the cache falls to (R_K + R_V) d_h numbers and the full rank is exact. With
    `contextual`, layers become `KeyValueOnly` by `fit_contextual`, and the cache (R_K + R_V)(h + d_h). Queries are
    kept. Raises ValueError if a layer has other attention, or for a rank that is not 1 to n_head.
    """
    inputs, hooks = [], []
    if not 1 <= min(rank_k, rank_v) <= max(rank_k, rank_v) <= model.config.n_head:
        raise ValueError(f"rank_k={rank_k}, rank_v={rank_v}: ranks 1 to n_head={model.config.n_head} work")
    for block in model.blocks:
        if not isinstance(block.attention, FixedHeadFactors):
            raise ValueError(f"{type(block.attention).__name__}: only FixedHeadFactors; see mha_to_tpa, llama_to_t6")
    for block in model.blocks:
        hooks.append(block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    small = copy.deepcopy(model)
    for block, x in zip(small.blocks, inputs):
        block.attention = _reduced(block.attention, x, rank_k, rank_v, contextual)
    small.config = replace(model.config, rank_q=small.blocks[0].attention.config.rank_q, rank_k=rank_k, rank_v=rank_v)
    return small


def _reduced(layer: FixedHeadFactors, x: Tensor, rank_k: int, rank_v: int, contextual: bool):
    """`layer` at lower ranks, fitted to its keys and values at the inputs x (N, d_model)."""
    config, mha = replace(layer.config, rank_k=rank_k, rank_v=rank_v), tpa_to_mha(layer)
    small = (KeyValueOnly if contextual else FixedHeadFactors)(config).to(layer.out_proj.weight)
    if contextual:
        rows = [mha.q_proj.weight]
    else:
        rows = [layer.factor_proj.weight[: layer.sizes[1]]]
        small.a_q = layer.a_q
    for name, rank, proj in (("a_k", rank_k, mha.k_proj), ("a_v", rank_v, mha.v_proj)):
        wide = torch.promote_types(x.dtype, torch.float32)  # eigenvectors and least squares need it
        y = proj(x).unflatten(-1, (config.n_head, config.d_head)).to(wide)
        if contextual:
            rows += [W.flatten(0, 1) for W in fit_contextual(x.to(wide), y, rank)]
        else:
            a = fit_fixed(y, rank)
            getattr(small, name).copy_(a)
            per_head = proj.weight.to(wide).unflatten(0, (config.n_head, -1)).flatten(1)  # (h, d_h · d_model)
            rows.append((a / rank @ per_head).view(-1, config.d_model))
    small.factor_proj.weight.copy_(torch.cat(rows))
    small.out_proj.weight.copy_(layer.out_proj.weight)
    small.rope = layer.rope
    return small


# ------------------------------------------------------------------------------------ the authors' checkpoints

_AUTHORS_MLP = {"gate_proj": "c_fc1", "up_proj": "c_fc2", "down_proj": "c_proj"}


def authors_t6_state_dict(state_dict: dict[str, Tensor], config: T6Config) -> dict[str, Tensor]:
    """The authors' T6 weights (their `model/T6.py`) as a state dict for `T6(config)`.

    Their head factors are laid out head by head, (h, R), ours rank by rank; all else is renamed. Prefixes that
    torch.compile and DistributedDataParallel leave are dropped. Their tables of RoPE are bfloat16, ours are not: see
    `rope_tables`. Raises ValueError, naming it, for a weight that is missing, left over, or does not fit `config`.
    """
    state = {re.sub(r"^((_orig_mod|module)\.)+", "", name): value for name, value in state_dict.items()}
    tied = [state.pop(name) for name in ("lm_head.weight", "transformer.wte.weight") if name in state]
    if not tied:
        raise ValueError("neither transformer.wte.weight nor lm_head.weight is there: not a T6 checkpoint")
    if not torch.equal(tied[0], tied[-1]):
        raise ValueError("lm_head.weight and transformer.wte.weight differ: T6 has one tensor for both")
    ours = {"embedding.weight": _fitting("transformer.wte.weight", tied[0], (config.vocab_size, config.d_model))}
    h, d_head, d_model, width = config.n_head, config.d_head, config.d_model, config.n_head * config.d_head

    def take(name, *shape):
        if name not in state:
            raise ValueError(f"{name} is missing: for n_layer={config.n_layer} the checkpoint should have it")
        return _fitting(name, state.pop(name), shape)

    for i in range(config.n_layer):
        rows = []
        for letter, rank in (("q", config.rank_q), ("k", config.rank_k), ("v", config.rank_v)):
            head_major = take(f"transformer.h.{i}.attn.c_qkv.W_A_{letter}.weight", h * rank, d_model)
            rows.append(head_major.unflatten(0, (h, rank)).transpose(0, 1).flatten(0, 1))
            rows.append(take(f"transformer.h.{i}.attn.c_qkv.W_B_{letter}.weight", rank * d_head, d_model))
        ours[f"blocks.{i}.attention.factor_proj.weight"] = torch.cat(rows)
        ours[f"blocks.{i}.attention.out_proj.weight"] = take(f"transformer.h.{i}.attn.c_proj.weight", d_model, width)
        for name, theirs in _AUTHORS_MLP.items():
            shape = (d_model, config.d_ff) if name == "down_proj" else (config.d_ff, d_model)
            ours[f"blocks.{i}.mlp.{name}.weight"] = take(f"transformer.h.{i}.mlp.{theirs}.weight", *shape)
    if state:
        raise ValueError(
            f"{', '.join(sorted(state)[:4])}: T6(config) with n_layer={config.n_layer} has no place for it"
        )
    return ours


def _fitting(name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    if weight.shape != shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}, but the config asks for {tuple(shape)}: correct the config")
    return weight


def t6_to_authors_state_dict(state_dict: dict[str, Tensor], config: T6Config) -> dict[str, Tensor]:
    """The weights of `T6(config)` under the names and in the layout of the authors' `model/T6.py`.

    The inverse of `authors_t6_state_dict`. Their model has d_ff = ⌊8/3 · d_model⌋, a RoPE base of 10000 and one rank
    for keys and values; a config with others raises ValueError, as do weights that are not those of T6(config).
    """
    if config.d_ff != 8 * config.d_model // 3 or config.rope_base != 10000.0:
        raise ValueError(
            f"d_ff={config.d_ff}, rope_base={config.rope_base}: the authors' model has d_ff={8 * config.d_model // 3}, "
            "⌊8/3 · d_model⌋, and base 10000, and no other"
        )
    if config.rank_k != config.rank_v:
        raise ValueError(f"rank_k={config.rank_k}, rank_v={config.rank_v}: the authors' model has one rank for both")
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in T6(config).state_dict().items()}
    for name in sorted(expected.keys() | state_dict.keys()):
        found = state_dict[name].shape if name in state_dict else None
        if found != expected.get(name):
            raise ValueError(f"{name} has shape {found} where T6(config) has {expected.get(name)}: correct the config")
    ranks = [rank for rank in (config.rank_q, config.rank_k, config.rank_v) for _ in "AB"]
    widths = (config.n_head, config.d_head) * 3
    embedding = state_dict["embedding.weight"]
    theirs = {"transformer.wte.weight": embedding, "lm_head.weight": embedding}
    for i in range(config.n_layer):
        parts = state_dict[f"blocks.{i}.attention.factor_proj.weight"].split([R * w for R, w in zip(ranks, widths)])
        for name, rank, part in zip(("A_q", "B_q", "A_k", "B_k", "A_v", "B_v"), ranks, parts):
            if name[0] == "A":
                part = part.unflatten(0, (rank, config.n_head)).transpose(0, 1).flatten(0, 1)
            theirs[f"transformer.h.{i}.attn.c_qkv.W_{name}.weight"] = part.clone()
        theirs[f"transformer.h.{i}.attn.c_proj.weight"] = state_dict[f"blocks.{i}.attention.out_proj.weight"]
        for name, their_name in _AUTHORS_MLP.items():
            theirs[f"transformer.h.{i}.mlp.{their_name}.weight"] = state_dict[f"blocks.{i}.mlp.{name}.weight"]
    return theirs


# --------------------------------------------------------------------------------------------- files and hubs

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
# Which attention a file may ask for, and the arguments that it may give: nothing is looked up by name elsewhere.
_ATTENTIONS = {
    "TensorProductAttention": (TensorProductAttention, ()),
    "KeyValueOnly": (variants.KeyValueOnly, ()),
    "FixedHeadFactors": (variants.FixedHeadFactors, ()),
    "FixedFeatureFactors": (variants.FixedFeatureFactors, ()),
    "SharedFeatureFactors": (variants.SharedFeatureFactors, ()),
    "SigmoidHeadFactors": (variants.SigmoidHeadFactors, ()),
    "SoftmaxHeadFactors": (variants.SoftmaxHeadFactors, ()),
    "ThirdOrderFactors": (variants.ThirdOrderFactors, ("d_b",)),
    "RotateAssembled": (variants.RotateAssembled, ()),
    "PartialRoPE": (variants.PartialRoPE, ("rotary_dim",)),
    "MultiHeadAttention": (baselines.MultiHeadAttention, ("n_kv_head",)),
    "MultiHeadLatentAttention": (baselines.MultiHeadLatentAttention, ("d_c", "d_c_q", "d_rope")),
}


def _as_built(model: T6) -> bool:
    """Whether class, norms and RoPE of `model` are those that `_from_description` gives it."""
    if type(model) not in (T6, LlamaT6):
        return False
    norm, rope = rms_norm, None
    if type(model) is LlamaT6:
        norm = partial(llama_norm, eps=model.llama["norm_eps"], in_float32=model.llama["in_float32"])
        rope = _llama_rope(model.llama)

    def same(f, g):
        parts = [(p.func, p.args, p.keywords) if isinstance(p, partial) else p for p in (f, g)]
        return parts[0] == parts[1]

    def same_base(block):
        return getattr(block.attention.rope, "base", None) == model.config.rope_base

    return same(model.norm, norm) and all(
        same(block.norm, norm) and (block.attention.rope == rope if rope else same_base(block))
        for block in model.blocks
    )


def _description(model: T6) -> dict:
    """All that is needed to build `model` again, as JSON has it."""
    kinds, ranks = [], []
    for block in model.blocks:
        name, c = type(block.attention).__name__, block.attention.config
        ranks.append(dict(rank_q=c.rank_q, rank_k=c.rank_k, rank_v=c.rank_v))  # of a converted layer, not the model's
        if _ATTENTIONS.get(name, (None,))[0] is not type(block.attention):
            raise ValueError(f"attention {name} cannot be saved by name; known are {', '.join(_ATTENTIONS)}")
        kinds.append({"name": name, **{key: getattr(block.attention, key) for key in _ATTENTIONS[name][1]}})
    if not _as_built(model):
        raise ValueError("the model has a norm, a RoPE or a class of its own, which the config cannot describe")
    if any(kind != kinds[0] for kind in kinds) or any(some != ranks[0] for some in ranks):
        raise ValueError("the blocks have attention of different kinds or ranks; a file describes one for all")
    return {
        "model_type": "t6",
        "config": asdict(replace(model.config, **ranks[0])),
        "attention": kinds[0],
        "llama": model.llama if isinstance(model, LlamaT6) else None,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


def _write_whole(path: Path, write) -> None:
    """Let `write` make the file under another name, and give it its own when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(model: T6, save_directory: str | os.PathLike) -> None:
    """Write `model` into a folder: model.safetensors and config.json, each of them whole or not at all.

    Any T6 or LlamaT6 with attention of this package. The folder is made if need be. Raises ValueError, before
    anything is written, for attention that the config cannot describe.
    """
    description, folder = _description(model), Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    _write_whole(folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    text = json.dumps(description, indent=2) + "\n"
    _write_whole(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def from_pretrained(name: str | os.PathLike, *, revision: str | None = None, token=None, device="cpu") -> T6:
    """Read a model that `save_pretrained` or `push_to_hub` wrote, in its dtype, in evaluation mode.

    name: a folder, or a repository "user/name" on the hub, of which `revision` is a branch, tag or commit. Files are
    data alone: JSON and safetensors, and attention only by the names of this package. Raises ValueError for a config
    that is none of ours or does not fit the weights.
    """
    folder = Path(name)
    if folder.is_dir():
        config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    elif folder.is_absolute() or len(folder.parts) > 2 or str(name).startswith("."):
        raise FileNotFoundError(f"{name}: there is no such folder")
    else:
        from huggingface_hub import hf_hub_download  # only those who go to the hub need it

        config_path, weights_path = (
            hf_hub_download(str(name), file, revision=revision, token=token) for file in (CONFIG_FILE, WEIGHTS_FILE)
        )
    try:
        model = _from_description(json.loads(Path(config_path).read_text(encoding="utf-8")), name)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: {CONFIG_FILE} is damaged or incomplete ({error!r}); copy it anew") from error
    try:
        state = load_file(weights_path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{name}: {WEIGHTS_FILE} is damaged or cut short ({error}); copy it anew") from error
    expected = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [key for key in expected.keys() | state.keys() if key not in state or state[key].shape != expected.get(key)]
    if wrong:
        raise ValueError(f"{name}: {sorted(wrong)[0]} in {WEIGHTS_FILE} is not as {CONFIG_FILE} describes it")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _from_description(found: dict, name) -> T6:
    """A model without memory (on the device "meta") from what `_description` returned."""
    if not isinstance(found, dict) or found.get("model_type") != "t6":
        kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{name}: model_type={kind!r} in {CONFIG_FILE}, not 't6'; a LLaMA goes through "
            "llama_to_t6(transformers.LlamaForCausalLM.from_pretrained(...))"
        )
    unknown = found["config"].keys() - {field.name for field in fields(T6Config)}
    attention = dict(found["attention"])
    kind = attention.pop("name")
    if unknown or kind not in _ATTENTIONS or attention.keys() - set(_ATTENTIONS[kind][1]):
        raise ValueError(
            f"{name}: {CONFIG_FILE} asks for {sorted(unknown) or found['attention']}, which this version does not know"
        )
    make = partial(_ATTENTIONS[kind][0], **attention)
    try:
        with torch.device("meta"):
            config = T6Config(**found["config"])
            model = LlamaT6(config, make, **found["llama"]) if found.get("llama") else T6(config, make)
    except ValueError as error:
        raise ValueError(f"{name}: {CONFIG_FILE}: {error}") from error
    for parameter in found.get("frozen", []):
        model.get_parameter(parameter).requires_grad_(False)
    return model


def push_to_hub(
    model: T6, repo_id: str, *, private: bool | None = None, revision=None, token=None, commit_message="Upload T6"
) -> str:
    """Save `model` to the repository "user/name" on the hub, made if need be; returns the commit's address."""
    from huggingface_hub import HfApi  # only those who go to the hub need it

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url
