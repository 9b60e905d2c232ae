"""Weights in and out: attention layers and LLaMA models as TPA, the authors' T6 checkpoints, files and hubs.

    mha_to_tpa(layer)  tpa_to_mha(layer)                     MHA, MQA and GQA layers ↔ fixed-A TPA (Sec. 4), exact
    llama_to_t6(model)                                       Hugging Face LLaMA → T6 with fixed-A TPA, the same logits
    reduce_rank(model, tokens, ...)                          from there down in rank, fitted to real activations
    use_tpa(model)                                           TPA as `self_attn` of a Hugging Face LLaMA
    authors_t6_state_dict(state, config)  t6_to_authors_state_dict(state, config)
    save_pretrained(model, folder)  from_pretrained(name)  push_to_hub(model, repo_id)
    T6ForCausalLM(t6)                                        T6 as a transformers model: generate, Trainer, PEFT

`import tpa_minimal.huggingface` makes transformers' AutoConfig and AutoModelForCausalLM open what `save_pretrained`
wrote. It does not import transformers, which takes seconds: T6ForCausalLM and T6PretrainedConfig do, at first use.
"""

import contextlib
import copy
import importlib.abc
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import asdict, fields, replace
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tpa_minimal import baselines, variants
from tpa_minimal.files import FileError, read_json, regular, sha256, write_whole
from tpa_minimal.tpa import T6, Cache, FactorCache, T6Config, TensorProductAttention, unseen
from tpa_minimal.variants import FixedHeadFactors, KeyValueOnly

# --------------------------------------------------------------------------------------------- parts of one's own

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DECISIVE = ("in_features", "out_features", "num_embeddings", "embedding_dim", "max_norm")  # of layers
_DECISIVE += ("variance_epsilon", "scaling", "is_causal", "num_key_value_groups")  # of transformers' modules


def _altered(module: nn.Module) -> str:
    """What acts on a module besides its class and its weights: a hook, or a method of one's own; "" if nothing does."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not str(getattr(hook, "__module__", "")).startswith("transformers."):  # those only look
            return f"a hook, {getattr(hook, '__qualname__', type(hook).__name__)}"
    for name in vars(module):  # where attention is computed in factor space does not change what it is
        if inspect.isfunction(getattr(type(module), name, None)) and name != "attend_in_factor_space":
            return f"a {name} of its own"
    return ""


def _refuse_foreign(model: nn.Module, plain: nn.Module) -> None:
    """Raise ValueError unless `model` consists of the parts of `plain`, and nothing acts on these from outside.

    plain: newly built from the configuration of `model`, on any device.
    """
    expected, seen = dict(plain.named_modules()), {}
    for name, module in model.named_modules(remove_duplicate=False):
        where, kind, other = name or "the model", type(module), expected.pop(name, None)
        if other is None:
            raise ValueError(f"{where} is a part that the config does not describe: correct the config, or remove it")
        if type(other) is not kind:
            raise ValueError(
                f"{where} is a {kind.__name__}, whose function would be lost; merge adapters and dequantize first "
                "(model.merge_and_unload(), model.dequantize()), and replace other classes by plain layers"
            )
        for key in _DECISIVE:
            if (there := getattr(module, key, None)) != (said := getattr(other, key, None)):
                raise ValueError(f"{where} has {key}={there}, and by its config {said}: correct one of the two")
        if what := _altered(module):
            raise ValueError(f"{where} has {what}, whose function would be lost: remove it first")
        for key, value in module.named_parameters(recurse=False):
            if type(value.data) is not Tensor or value.dtype not in _FLOATS:
                raise ValueError(f"{name}.{key} is a {type(value.data).__name__} of {value.dtype}: dequantize it first")
            if seen.setdefault(id(module), name) != name:
                raise ValueError(f"{where} is {seen[id(module)]} again: give it a copy (copy.deepcopy)")
    if expected:
        raise ValueError(f"{next(iter(expected))} is missing, which the config describes: correct the config")


def _refuse_biases(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "bias", None) is not None and module.bias.any():
            raise ValueError(f"{name} has a bias: TPA and T6 have no biases; take a model trained without them")


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
    if type(layer) is not baselines.MultiHeadAttention:
        raise TypeError(f"{type(layer).__name__}: only a MultiHeadAttention, with any number of groups, converts")
    with torch.device("meta"):
        _refuse_foreign(layer, baselines.MultiHeadAttention(layer.config, layer.n_kv_head))
    _refuse_biases(layer)
    weights = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, layer.out_proj.weight)
    tpa = _fixed_head_tpa(layer.config, *weights).train(layer.training)
    tpa.rope = layer.rope
    return tpa


@torch.no_grad()
def tpa_to_mha(layer: FixedHeadFactors) -> baselines.MultiHeadAttention:
    """The MHA layer that computes what a fixed-A TPA of any ranks computes: W_i = (1/R) Σ_r a_r,i W_r^b for head i.

    Fixed-A TPA is thus MHA whose heads' matrices are mixtures of R ones. The result's cache is MHA's, 2 h d_h.
    """
    if type(layer) is not FixedHeadFactors:
        raise TypeError(f"{type(layer).__name__}: only FixedHeadFactors are MHA")
    with torch.device("meta"):
        _refuse_foreign(layer, FixedHeadFactors(layer.config))
    _refuse_biases(layer)
    mha = baselines.MultiHeadAttention(layer.config).to(layer.out_proj.weight)
    mha.rope = layer.rope  # a converted LLaMA's is its own
    b_rows = layer.factor_proj.weight.split(layer.sizes)[1::2]
    for proj, a, rows in zip((mha.q_proj, mha.k_proj, mha.v_proj), (layer.a_q, layer.a_k, layer.a_v), b_rows):
        per_head = a.mT @ (rows.unflatten(0, (len(a), -1)).flatten(1) / len(a))  # (h, d_h · d_model)
        proj.weight.copy_(per_head.view_as(proj.weight))
    mha.out_proj.weight.copy_(layer.out_proj.weight)
    return mha.train(layer.training)


# ------------------------------------------------------------------------------------------------------- LLaMA


class LlamaNorm(NamedTuple):
    """RMSNorm with LLaMA's eps, its gain left to the weights that follow; in float32 if transformers does it so."""

    eps: float
    in_float32: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., d_model) -> the same."""
        wide = x.float() if self.in_float32 else x
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LlamaT6(T6):
    """A T6 with the three things that LLaMA has besides: an eps, frequencies, and an output layer, of its own.

    norm_eps: added to the mean square in every norm. inv_freq: the d_h/2 angles per position, as numbers, so that
    no cast of the model rounds them. rope_scale: factor on the cosines and sines (1 but for YaRN).
    in_float32: norms and rotary tables are computed in float32 even in a float64 model, as transformers does.
    """

    def __init__(
        self, config: T6Config, attention=FixedHeadFactors, *, norm_eps, inv_freq, rope_scale=1.0, in_float32=True
    ):
        super().__init__(config, attention)
        if len(inv_freq) != config.d_head // 2:
            raise ValueError(f"inv_freq of {len(inv_freq)} numbers: d_head={config.d_head} needs {config.d_head // 2}")
        if not all(map(math.isfinite, (norm_eps, rope_scale, *inv_freq))) or norm_eps < 0:
            raise ValueError(
                f"norm_eps={norm_eps}, rope_scale={rope_scale}, or inv_freq: finite numbers, eps 0 or more"
            )
        self.norm = LlamaNorm(float(norm_eps), bool(in_float32))
        self.llama = dict(norm_eps=norm_eps, inv_freq=inv_freq, rope_scale=rope_scale, in_float32=in_float32)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for block in self.blocks:
            block.norm = self.norm
            block.attention.rope = _llama_rope(self.llama)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, into which the gain of the last norm went: (..., d_model) -> (..., vocab_size)."""
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
    return LlamaRoPE(tuple(map(float, extras["inv_freq"])), float(extras["rope_scale"]), bool(extras["in_float32"]))


# One architecture; the last two may have a window or biases besides.
_FAMILY = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


def _refuse_old(transformers) -> None:
    version = transformers.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (5, 20):
        raise ImportError(f"transformers {version}: needed is 5.20 or newer; pip install -U transformers")


def _refuse_inexact(model, max_len: int) -> None:
    """Raise for a model of which a part has no place in a T6 or would be passed by."""
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(f"{type(model).__name__}: needed is a transformers.LlamaForCausalLM")
    if any(isinstance(module, LlamaSelfAttention) for module in model.modules()):
        raise ValueError("the model has TPA as self_attn already: take one that was just loaded")
    c = model.config
    if c.model_type not in _FAMILY:
        raise ValueError(f"model_type={c.model_type!r}: only {', '.join(_FAMILY)} checkpoints convert")
    _refuse_old(sys.modules["transformers"])
    with torch.device("meta"):
        plain = getattr(sys.modules["transformers"], f"{_FAMILY[c.model_type]}ForCausalLM")(copy.deepcopy(c))
    _refuse_foreign(model, plain)
    _refuse_biases(model)
    if dropout := max(layer.self_attn.attention_dropout for layer in model.model.layers):
        raise ValueError(f"attention_dropout={dropout}: TPA has none; load the model with attention_dropout=0")
    if c.hidden_act != "silu":
        raise ValueError(f"hidden_act={c.hidden_act!r}: T6's feed-forward layer is SwiGLU, so only 'silu' converts")
    if not getattr(c, "is_causal", True):
        raise ValueError("is_causal=False: TPA and T6 see earlier tokens alone; only causal models convert")
    window = getattr(c, "sliding_window", None)
    if window is not None and window < max_len:
        raise ValueError(
            f"sliding_window={window}: TPA sees all of a text, which is the same up to max_len={window} only; "
            f"llama_to_t6(model, max_len={window}) converts so much"
        )
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(
            f"rope_type={rotary.rope_type!r}: its frequencies change with the length of the text, which a cache of "
            "rotated factors cannot follow; models with default, linear, llama3 or yarn RoPE convert"
        )


def _llama_extras(model) -> dict:
    """What LlamaT6 needs beside weights."""
    c, rotary = model.config, model.model.rotary_emb
    # transformers rounds to float32 within each norm, even of a float64 model. Ask this model's kind of norm, on the
    # CPU, since not every device has float64.
    norm = type(model.model.norm)(c.hidden_size, c.rms_norm_eps).to("cpu", torch.float64)
    x = torch.linspace(-1, 1, c.hidden_size, dtype=torch.float64, device="cpu")
    in_float32 = not torch.allclose(norm(x), LlamaNorm(c.rms_norm_eps, False)(x), rtol=1e-12, atol=0)
    return dict(
        norm_eps=c.rms_norm_eps,
        inv_freq=rotary.inv_freq.tolist(),
        rope_scale=float(rotary.attention_scaling),
        in_float32=in_float32,
    )


def _llama_config(c, max_len: int) -> T6Config:
    return T6Config(
        vocab_size=c.vocab_size,
        n_layer=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_head=c.num_attention_heads,
        d_head=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        rank_q=c.num_attention_heads,
        rank_k=c.num_key_value_heads,
        rank_v=c.num_key_value_heads,
        max_len=max_len,
        rope_base=float(c.rope_parameters["rope_theta"]),
        d_ff=c.intermediate_size,
    )


def _mirror(weight: Tensor, d_head: int) -> Tensor:
    """A query or key projection for RoPE in the other sense, and back again.

    transformers rotates queries and keys by +θ where the paper has -θ. Negating the second half of the features,
    x ↦ x D, turns one into the other, D T_t D = T_tᵀ, and cancels in the product q D D kᵀ.
    """
    sign = torch.ones(d_head, 1, dtype=weight.dtype, device=weight.device)
    sign[d_head // 2 :] = -1
    return (weight.unflatten(0, (-1, d_head)) * sign).flatten(0, 1)


def _llama_attention(self_attn, config: T6Config, gain: Tensor | None = None) -> FixedHeadFactors:
    """One LLaMA attention layer as fixed-A TPA; `gain` is that of the norm before it, to be folded into the weights."""
    q, k, v = (
        proj.weight if gain is None else proj.weight * gain
        for proj in (self_attn.q_proj, self_attn.k_proj, self_attn.v_proj)
    )
    q, k = _mirror(q, config.d_head), _mirror(k, config.d_head)
    return _fixed_head_tpa(config, q, k, v, self_attn.o_proj.weight)


@torch.no_grad()
def llama_to_t6(model, max_len: int | None = None) -> LlamaT6:
    """The T6 with fixed-A TPA that gives the same logits as a `transformers.LlamaForCausalLM` (MHA, GQA or MQA).

    All weights are copied, in the dtype and on the device of `model`. The norms' gains go into the matrices that
    follow them. RoPE of the types default, linear, llama3 and yarn is carried over. Mistral and Qwen2 are the same
    architecture but for a window of attention and for biases. max_len: of the result's config, if not the model's own.
    Raises ValueError for what would not be exact: biases that are not zero, a window shorter than max_len, other
    activations, RoPE that depends on the length, dropout, adapters, hooks, and parts other than the config describes.

    Per token and layer the cache holds 2 G d_h numbers, as the model's own; `reduce_rank` goes below.

    The logits agree to rounding, in float64 too. That takes an imitation: transformers computes norms and rotary
    tables in float32 whatever the model's dtype, which moves a float64 model's logits by about 1e-7, and so the
    result does it too. Where the given model's norm is exact in float64, so is the result (`LlamaT6.in_float32`).
    """
    if max_len is None:
        max_len = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    _refuse_inexact(model, max_len)
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
    for name, weight in state.items():
        if not (weight.is_meta or weight.isfinite().all()):
            raise ValueError(
                f"{name} holds NaN or infinity, as where {weight.dtype} is too narrow: model.float() first"
            )
    t6.load_state_dict(state, assign=True)
    for block in t6.blocks:
        for constant in (block.attention.a_q, block.attention.a_k, block.attention.a_v):
            constant.requires_grad_(False)
    return t6.train(model.training)


class LlamaSelfAttention(nn.Module):
    """Any TPA of this package as `self_attn` of a Hugging Face LLaMA's layer, so that `model.generate` works.

    The cache is transformers' own `DynamicCache`, or for fixed A with R_K = R_V also its `StaticCache`. In the place of
    keys and values it holds, per rank, a_k and b_k side by side, and a_v and b_v, so its reordering for beam search,
    cropping and lengths work as ever. Positions are counted along the cache; a left-padded batch is right all the same,
    since RoPE sees distances alone and the mask hides the padding. Masks with holes between tokens, and `position_ids`
    that do not count one by one, raise ValueError.

    While `attention` is what `use_tpa` put there, its weights are saved and loaded as LLaMA's own, q_proj to o_proj:
    what `model.save_pretrained` writes is a LLaMA, to be loaded as such and given to `use_tpa` again.
    """

    def __init__(self, attention: TensorProductAttention, layer_idx: int):
        super().__init__()
        if not isinstance(attention, TensorProductAttention):
            raise ValueError(f"{type(attention).__name__} attends in a way of its own, to which no mask can be given")
        self.attention = attention
        self.layer_idx = layer_idx
        self.checks = True  # positions and masks; where they are the same for all layers, the first is enough

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        output_attentions=False,
        cache=None,
        **_,
    ) -> tuple[Tensor, None]:
        """hidden_states: (B, T, d_model) -> (the same, None for attention weights that are never formed)."""
        if output_attentions:
            raise ValueError("output_attentions: TPA never forms attention weights; leave it out")
        (B, T), start = hidden_states.shape[:2], 0
        past_key_values = cache if past_key_values is None else past_key_values  # its name from transformers 5.24 on
        if past_key_values is not None:
            start = int(past_key_values.get_seq_length(self.layer_idx))
        padding = None if attention_mask is None else self._padding(attention_mask, B, start, T)
        if self.checks:
            _check_positions(position_ids, start, T, padding)
        a_q, b_q, *factors = self.attention.factors(hidden_states, start)
        if past_key_values is not None:
            new = [torch.cat(pair, -1).transpose(1, 2) for pair in (factors[:2], factors[2:])]  # (B, R, T, ·)
            self._refuse_other_sizes(past_key_values, *new)
            widths = [x.shape[-1] for x in factors]
            # What a static cache returns goes beyond what it holds.
            k, v = (x[:, :, : start + T].transpose(1, 2) for x in past_key_values.update(*new, self.layer_idx))
            self._refuse_window(k.shape[1], start + T)
            factors = [*k.split(widths[:2], dim=-1), *v.split(widths[2:], dim=-1)]
        out = self.attention.attend(a_q, b_q, *factors, start, padding)
        return self.attention.out_proj(out.flatten(2)), None

    def _padding(self, mask, batch_size: int, start: int, T: int) -> Tensor:
        """Tokens of left padding in each row (B,), from a mask (B or 1, 1, T, M), True or 0 where a key is seen."""
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
            axes = f"axes {tuple(mask.shape)}" if isinstance(mask, Tensor) else "blocks"
            raise ValueError(
                f"attention_mask with {axes}: needed is one of shape (B, 1, T, M); load the model with "
                'attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
            )
        mask = mask[:, 0, :, : start + T]
        self._refuse_window(mask.shape[-1], start + T)
        seen = (mask if mask.dtype == torch.bool else mask == 0).expand(batch_size, -1, -1)
        padding = (seen[:, -1].cumsum(-1) == 0).sum(-1)  # before the first that the last token sees
        if self.checks:
            if mask.dtype != torch.bool and ((mask != 0) & (mask > -1e3)).any():
                raise ValueError("attention_mask that adds to the scores, as ALiBi does: only 0 and -inf are honoured")
            positions = torch.arange(start + T, device=mask.device)
            tokens = seen[:, :, start:].diagonal(dim1=1, dim2=2).unsqueeze(-1)  # padding does not see itself
            if (tokens & (seen == unseen(positions, positions[start:], padding))).any():
                raise ValueError(
                    "attention_mask with holes between tokens, as packed texts have: TPA sees all tokens before; give "
                    "each text a row of its own, padded on the left"
                )
        return padding

    def _refuse_window(self, there: int, needed: int) -> None:
        """A cache with a window forgets, and its mask is as long."""
        if there != needed:
            raise ValueError(
                f"{there} of {needed} tokens, as with sliding_window: TPA sees all tokens before, which is the same up "
                "to the window only; keep to shorter texts"
            )

    def _refuse_other_sizes(self, cache, k: Tensor, v: Tensor) -> None:
        """A cache that was set aside for LLaMA's keys and values takes only factors of their sizes."""
        if cache.is_compileable and len(cache.layers) > self.layer_idx:
            layer = cache.layers[self.layer_idx]
            room = [x.shape[1::2] for x in (layer.keys, layer.values)] if layer.is_initialized else []
            if k.shape[1] != v.shape[1] or (room and room != [k.shape[1::2], v.shape[1::2]]):
                raise ValueError(
                    f"{type(cache).__name__} has no room for factors of R_K={k.shape[1]} and R_V={v.shape[1]}, "
                    f"{k.shape[3]} and {v.shape[3]} wide; leave cache_implementation out"
                )


_CONSTANTS, _PROJECTIONS = ("a_q", "a_k", "a_v"), ("q_proj", "k_proj", "v_proj")


def _as_llama(module: LlamaSelfAttention, state: dict, prefix: str, _) -> None:
    """Rename, and mirror back, in a state dict that was just made; an adapter's weights stay as they are."""
    layer, ours = module.attention, f"{prefix}attention."
    if f"{ours}factor_proj.weight" not in state or f"{ours}out_proj.weight" not in state:
        return
    h, G = layer.config.n_head, layer.config.rank_k
    for name, groups in zip(_CONSTANTS, (h, G, G)):
        if not torch.equal(state.pop(ours + name).cpu().float(), group_factors(h, groups)):
            raise ValueError(f"{ours}{name} was trained: LLaMA's weights cannot express that; convert by llama_to_t6")
    parts = state.pop(f"{ours}factor_proj.weight").split(layer.sizes[1::2])
    for name, part in zip(_PROJECTIONS, parts):
        state[f"{prefix}{name}.weight"] = part.clone() if name == "v_proj" else _mirror(part, layer.config.d_head)
    state[f"{prefix}o_proj.weight"] = state.pop(f"{ours}out_proj.weight")


def _from_llama(module: LlamaSelfAttention, state: dict, prefix: str, *_) -> None:
    """The way back, before a state dict is loaded."""
    layer, ours = module.attention, f"{prefix}attention."
    names = [f"{prefix}{name}.weight" for name in (*_PROJECTIONS, "o_proj")]
    if not all(name in state for name in names):
        return
    q, k, v, out = (state.pop(name) for name in names)
    q, k = (_mirror(weight, layer.config.d_head) for weight in (q, k))
    state[f"{ours}factor_proj.weight"] = torch.cat((q, k, v))
    state[f"{ours}out_proj.weight"] = out
    state |= {ours + name: getattr(layer, name).detach() for name in _CONSTANTS}


def use_tpa(model):
    """Replace each `self_attn` of a `transformers.LlamaForCausalLM`, in place, by the fixed-A TPA that equals it.

    Returns the model, whose `forward`, `generate` and `save_pretrained` go on as before: what it saves, fine-tuned or
    not, is a LLaMA, to which this can be done again. Raises ValueError as `llama_to_t6` does, also for a model that has
    been through this already.
    """
    _refuse_inexact(model, getattr(getattr(model, "config", None), "max_position_embeddings", None))
    rope = _llama_rope(_llama_extras(model))
    config = _llama_config(model.config, model.config.max_position_embeddings)
    for i, layer in enumerate(model.model.layers):
        attention = _llama_attention(layer.self_attn, config)
        attention.rope = rope
        layer.self_attn = LlamaSelfAttention(attention, i).train(model.training)
        layer.self_attn.checks = i == 0
        layer.self_attn.register_state_dict_post_hook(_as_llama)  # in a file its weights have LLaMA's names
        layer.self_attn.register_load_state_dict_pre_hook(_from_llama)
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

_AUTHORS_NAMES = {
    "attention.out_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.c_fc1",
    "mlp.up_proj": "mlp.c_fc2",
    "mlp.down_proj": "mlp.c_proj",
}


def _authors_layout(config: T6Config) -> dict[str, dict[str, tuple[int, int]]]:
    """For each weight of T6(config), the names and shapes of the authors' that make it up, one below the other."""
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in T6(config).state_dict().items()}
    layout = {"embedding.weight": {"transformer.wte.weight": shapes["embedding.weight"]}}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        layout[f"{ours}.attention.factor_proj.weight"] = {
            f"{theirs}.attn.c_qkv.W_{kind}_{letter}.weight": (rank * width, config.d_model)
            for letter, rank in (("q", config.rank_q), ("k", config.rank_k), ("v", config.rank_v))
            for kind, width in (("A", config.n_head), ("B", config.d_head))
        }
        for name, other in _AUTHORS_NAMES.items():
            layout[f"{ours}.{name}.weight"] = {f"{theirs}.{other}.weight": shapes[f"{ours}.{name}.weight"]}
    return layout


def _regrouped(name: str, weight: Tensor, groups: int) -> Tensor:
    """The rows of head factors, (groups, n), in the order (n, groups); other weights as they are."""
    return weight.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1) if "c_qkv.W_A_" in name else weight


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
    state["transformer.wte.weight"] = tied[0]
    ours = {}
    for our_name, parts in _authors_layout(config).items():
        for name, shape in parts.items():
            if name not in state:
                raise ValueError(f"{name} is missing: for n_layer={config.n_layer} the checkpoint should have it")
            if (found := tuple(state[name].shape)) != shape:
                raise ValueError(f"{name} is {found}, but the config asks for {shape}: correct the config")
        ours[our_name] = torch.cat([_regrouped(name, state.pop(name), config.n_head) for name in parts])
    if state:
        raise ValueError(f"{', '.join(sorted(state)[:4])}: T6 with n_layer={config.n_layer} has no place for it")
    return ours


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
    layout, expected, theirs = _authors_layout(config), {}, {}
    for name, parts in layout.items():
        rows, columns = zip(*parts.values())
        expected[name] = (sum(rows), columns[0])
    for name in sorted(expected.keys() | state_dict.keys()):
        found = tuple(state_dict[name].shape) if name in state_dict else None
        if found != expected.get(name):
            raise ValueError(f"{name} has shape {found} where T6(config) has {expected.get(name)}: correct the config")
    for our_name, parts in layout.items():
        split = state_dict[our_name].split([rows for rows, _ in parts.values()])
        for name, weight in zip(parts, split):
            groups = weight.shape[0] // config.n_head  # as many as the rank
            theirs[name] = _regrouped(name, weight, groups).clone()
    return {**theirs, "lm_head.weight": theirs["transformer.wte.weight"]}


# --------------------------------------------------------------------------------------------- files and hubs

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_PREFIX = "model."  # `T6ForCausalLM` keeps the T6 as `model`, and both read the same file
# Which attention a file may ask for, and the arguments that it may give: nothing is looked up by name elsewhere.
_ATTENTIONS = {
    kind.__name__: (kind, arguments)
    for kind, *arguments in [
        (TensorProductAttention,),
        (variants.KeyValueOnly,),
        (variants.FixedHeadFactors,),
        (variants.FixedFeatureFactors,),
        (variants.SharedFeatureFactors,),
        (variants.SigmoidHeadFactors,),
        (variants.SoftmaxHeadFactors,),
        (variants.ThirdOrderFactors, "d_b"),
        (variants.RotateAssembled,),
        (variants.PartialRoPE, "rotary_dim"),
        (baselines.MultiHeadAttention, "n_kv_head"),
        (baselines.MultiHeadLatentAttention, "d_c", "d_c_q", "d_rope"),
    ]
}
_LAYER_SIZES = ("n_head", "d_head", "rank_q", "rank_k", "rank_v")  # of a converted layer, not always the model's


def describe(model: T6) -> dict:
    """What config.json says of `model`: all that it takes to build it again.

    Raises ValueError for what such a file cannot express: classes, norms or rotations of one's own, or layers that are
    not all alike.
    """
    first = model.blocks[0].attention
    name = type(first).__name__
    if _ATTENTIONS.get(name, (None,))[0] is not type(first):
        raise ValueError(f"attention {name} cannot be saved by name; known are {', '.join(_ATTENTIONS)}")
    changes = {size: getattr(first.config, size) for size in _LAYER_SIZES}
    changes |= {"rope_base": getattr(first.rope, "base", first.config.rope_base)}
    changes |= {"vocab_size": model.embedding.num_embeddings}
    description = {
        "model_type": "t6",
        "architectures": ["T6ForCausalLM"],
        "dtype": str(reduce(torch.promote_types, (weight.dtype for weight in model.parameters()))).split(".")[1],
        "sizes": asdict(replace(model.config, **changes)),
        "attention": {"name": name, **{key: getattr(first, key) for key in _ATTENTIONS[name][1]}},
        "llama": model.llama if isinstance(model, LlamaT6) else None,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }
    with torch.device("meta"):
        again = _built({**description, "frozen": ()})
    if (type(model), model.norm) != (type(again), again.norm):
        raise ValueError(f"{type(model).__name__}: a class or a norm of its own, which {CONFIG_FILE} cannot describe")
    for i, (block, other) in enumerate(zip(model.blocks, again.blocks)):
        mine, theirs = _traits(block), _traits(other)
        if different := [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
            raise ValueError(
                f"layer {i} has {', '.join(different)} of its own, but {CONFIG_FILE} describes one kind of layer for "
                "all: save the model's state_dict, and build it by your own code"
            )
    if _shapes(model) != _shapes(again):
        raise ValueError(f"the model has weights that {CONFIG_FILE} does not describe; merge or remove adapters first")
    _refuse_foreign(model, again)
    weights = dict(model.named_parameters(remove_duplicate=False))
    if shared := weights.keys() - dict(model.named_parameters()):
        raise ValueError(f"{min(shared)} is another weight too, which a file cannot say; give it a copy (.clone())")
    return description


def _traits(block) -> dict:
    """What decides about a block's function, its weights aside."""
    own = {key: value for key, value in vars(block.attention).items() if key[0] != "_"}
    for name in ("config", "training", "attend_in_factor_space"):  # the last computes the same, wherever it is
        own.pop(name, None)
    sizes = [getattr(block.attention.config, size) for size in _LAYER_SIZES]
    return {"attention": type(block.attention), "norm": block.norm, "sizes": sizes, **own}


def _shapes(model: nn.Module) -> dict:
    return {_PREFIX + name: list(value.shape) for name, value in model.state_dict().items()}


def _built(description: dict) -> T6:
    """The model that `describe` described, with weights of a start."""
    attention = dict(description["attention"])
    kind, arguments = _ATTENTIONS.get(attention.pop("name"), (None, ()))
    unknown = description["sizes"].keys() - {field.name for field in fields(T6Config)}
    if unknown or kind is None or attention.keys() - set(arguments):
        wanted = sorted(unknown) or description["attention"]
        raise ValueError(f"asks for {wanted}, which this version does not know")
    config, make = T6Config(**description["sizes"]), partial(kind, **attention)
    model = LlamaT6(config, make, **description["llama"]) if description.get("llama") else T6(config, make)
    return _frozen(model, description.get("frozen", ()))


def _frozen(model: T6, names) -> T6:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def save_pretrained(model: T6, save_directory: str | os.PathLike, **notes) -> None:
    """Write `model` into a folder: model.safetensors and config.json, both or neither.

    Any T6 or LlamaT6 with attention of this package; transformers reads them too. notes: anything to be added to
    config.json, as tokenizer="gpt2". The folder is made if need be. Raises ValueError, before anything is written, for
    what `describe` cannot describe.
    """
    description, folder = describe(model), Path(save_directory)
    if taken := sorted(description.keys() & notes.keys()):
        raise ValueError(f"{', '.join(taken)}: {CONFIG_FILE} has this already; choose another name for the note")
    state = {_PREFIX + name: value.detach().contiguous() for name, value in model.state_dict().items()}
    text = json.dumps({**description, **notes}, indent=2, default=float) + "\n"  # NumPy's numbers are none of JSON's

    def write(path):
        path.write_text(text, encoding="utf-8")
        write_whole(folder / WEIGHTS_FILE, lambda weights: save_file(state, weights, metadata={"format": "pt"}))

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG_FILE, write)


def from_pretrained(name: str | os.PathLike, *, revision: str | None = None, token=None, device="cpu") -> T6:
    """Read a model that `save_pretrained`, `push_to_hub` or a run wrote, in its dtype, in evaluation mode.

    name: a folder, a run's folder, of which the last checkpoint is read, or a repository "user/name" on the hub, of
    which `revision` is a branch, tag or commit. Files are data alone: JSON and safetensors, and attention only by the
    names of this package. Raises ValueError, before memory is set aside, for files that are not ours, do not fit each
    other or hold weights that are not finite numbers; OSError for a pull that failed.
    """
    folder = _local(name) or _pulled(name, revision=revision, token=token)
    model = _checked(folder)
    with safe_open(folder / WEIGHTS_FILE, "pt", device=str(device)) as file:
        # Without the copy a weight would be the file: to overwrite that would change the live model.
        state = {key.removeprefix(_PREFIX): file.get_tensor(key).clone() for key in file.keys()}
    model.load_state_dict(state, assign=True)
    _refuse_nan(model, folder)
    return model.eval()


def _local(name: str | os.PathLike) -> Path | None:
    """The folder of weights that `name` stands for, of a run that of its last checkpoint; None for one on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) > 2 or str(name).startswith("."):
            raise FileNotFoundError(f"{name}: there is no such folder")
        return None
    if (folder / WEIGHTS_FILE).exists():
        return folder
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / WEIGHTS_FILE).exists()]
    steps = [(int(path.name[11:]), path) for path in checkpoints if path.name[11:].isdecimal()]
    return max(steps)[1] if steps else folder


def _pulled(name, **options) -> Path:
    """The folder in the hub's cache that holds the two files of repository `name`."""
    from huggingface_hub import hf_hub_download  # only those who go to the hub need it

    try:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            path = hf_hub_download(str(name), file, **options)
    except Exception as error:  # the client's, its HTTP library's, the socket's: they have no base class in common
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{name}: no folder here, and could not be pulled from the hub ({reason}); try again") from error
    return Path(path).parent


def _checked(folder: Path) -> T6:
    """The model of a folder without its weights (on the device "meta"), once config.json and their header agree."""
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    found = read_json(config_path)
    kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
    if kind != "t6":
        raise ValueError(
            f"{config_path}: model_type={kind!r}, not 't6'; a LLaMA goes through "
            "llama_to_t6(transformers.LlamaForCausalLM.from_pretrained(...))"
        )
    if (folder / "state.json").exists():  # a checkpoint of a run, which holds the sums of its files
        state = read_json(folder / "state.json")
        sums = state.get("sums") if isinstance(state, dict) else None
        for path in (config_path, weights_path) if isinstance(sums, dict) else ():
            if sha256(path) != sums.get(path.name):
                raise FileError(f"{path}: its SHA-256 sum is another than in state.json: damaged; copy it again")
    try:
        with safe_open(regular(weights_path), "pt") as file:
            header = {key: file.get_slice(key).get_shape() for key in file.keys()}
            types = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{weights_path}: is damaged or cut short ({error}); copy it again") from error
    try:
        _compare_sizes(found["sizes"], header)  # first of all: building 10^9 layers would take all memory
        with torch.device("meta"):
            model = _built(found)
        expected = _shapes(model)
        for key in sorted(expected.keys() | header.keys()):
            if header.get(key) != expected.get(key):
                raise ValueError(f"describes {key} as {expected.get(key)}, but {WEIGHTS_FILE} has {header.get(key)}")
            if types[key] not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{key} in {WEIGHTS_FILE} is {types[key]}: weights are floating-point numbers")
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{config_path}: is damaged or incomplete ({error!r}); copy it again") from error
    return model


def _compare_sizes(sizes: dict, header: dict) -> None:
    layers = {key.split(".")[2] for key in header if key.startswith(f"{_PREFIX}blocks.")}
    one = f"{_PREFIX}blocks.0."
    counted = {
        "n_layer": (sizes["n_layer"], len(layers)),
        "vocab_size, d_model": ([sizes["vocab_size"], sizes["d_model"]], header.get(f"{_PREFIX}embedding.weight")),
        "d_ff": ([sizes["d_model"], sizes["d_ff"]], header.get(f"{one}mlp.down_proj.weight")),
        "n_head · d_head": (
            [sizes["d_model"], sizes["n_head"] * sizes["d_head"]],
            header.get(f"{one}attention.out_proj.weight"),
        ),
    }
    for name, (said, there) in counted.items():
        if said != there:
            raise ValueError(f"{name} is not as config.json describes it: {said}, but {there} in {WEIGHTS_FILE}")


def _refuse_nan(model: nn.Module, where) -> None:
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"{where}: {name} in {WEIGHTS_FILE} holds NaN or infinity; take an earlier checkpoint")


def push_to_hub(model: T6, repo_id: str, private: bool | None = None) -> str:
    """Save `model` to the repository "user/name" on the hub, made if need be; returns the commit's address."""
    from huggingface_hub import HfApi  # only those who go to the hub need it

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload T6").commit_url


# ------------------------------------------------------------------------------------- T6 inside transformers


class _CacheLayer:
    """One layer's FactorCache with the methods that transformers' `generate` asks of a layer of its cache.

    padding: (B,), what each row has of it, kept for calls that bring no mask.
    """

    is_compileable, is_croppable = False, True

    def __init__(self, factors: FactorCache, padding: Tensor | None):
        self.factors, self.padding = factors, padding

    def get_seq_length(self) -> int:
        return self.factors.length

    def reset(self) -> None:
        self.factors.truncate(0)

    def crop(self, length: int) -> None:
        """Keep `length` positions, or with 0 or less remove so many."""
        self.factors.truncate(length if length > 0 else self.factors.length + length)

    def make_room(self, T: int) -> None:
        """Grow, by doubling, if T more do not fit."""
        needed = self.factors.length + T
        if needed > self.factors.max_len:
            self._copy(slice(None), max(needed, 2 * self.factors.max_len))

    def reorder_cache(self, rows: Tensor) -> None:
        """Let row i become what row rows[i] was."""
        self._copy(rows.to(self.factors.view(0, 0)[0].device), self.factors.max_len)

    def _copy(self, rows: Tensor | slice, max_len: int) -> None:
        kept = [x[rows] for x in self.factors.view(0, self.factors.length)]
        shapes = [x.shape[2:] for x in kept]
        self.factors = FactorCache(shapes, len(kept[0]), max_len, kept[0].device, kept[0].dtype)
        self.factors.append(*kept)
        self.padding = None if self.padding is None else self.padding[rows]


def _ragged(mask: Tensor | None, batch_size: int, start: int, T: int) -> tuple[Tensor | None, bool]:
    """What a mask (B, start + T), 0 for padding, says: how much is on the left (B,), and if any is on the right.

    Raises ValueError for masks of another shape, with holes, or with a row that has no token.
    """
    if mask is None:
        return None, False
    if mask.shape != (batch_size, start + T):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: needed is {(batch_size, start + T)}, a 1 for each token, "
            "cached ones included, and a 0 for padding"
        )
    seen = mask != 0
    count, left = seen.sum(1), (seen.cumsum(1) == 0).sum(1)
    right = mask.shape[1] - count - left
    if not ((seen.flip(1).cumsum(1) == 0).sum(1) == right).all() or not count.all():
        raise ValueError(
            "attention_mask with a hole, or with a row without tokens: only padding at the ends is honoured"
        )
    return (left if left.any() else None), bool(right.any())


def _same_padding(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two paddings (B,) are equal; None is none."""
    if one is None or other is None:
        return not any(padding.any() for padding in (one, other) if padding is not None)
    return torch.equal(one, other)


def _check_positions(position_ids: Tensor | None, start: int, T: int, padding: Tensor | None, tokens=None) -> None:
    """Raise ValueError unless `position_ids` count the tokens of each row one by one, with its padding or without.

    tokens (B, T): where there are some, for which alone this must hold; by default behind the padding (B,).
    """
    if position_ids is None:
        return
    plain = torch.arange(start, start + T, device=position_ids.device)
    left = 0 if padding is None else padding[:, None].to(position_ids.device)
    ignored = plain < left if tokens is None else ~tokens.to(position_ids.device)
    if position_ids.shape[-1] != T or not any(
        ((position_ids == counted) | ignored).all() for counted in (plain, plain - left)
    ):
        raise ValueError(
            f"position_ids={position_ids.tolist()}: T6 counts tokens one by one from {start}, so packed or stretched "
            "positions are refused; give each text a row of its own, and leave position_ids out"
        )


class _Described:
    """`config.json` of a T6 as transformers' configuration; `describe` says what is in it."""

    model_type = "t6"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    sizes, attention, llama, frozen = asdict(T6Config.preset("tiny")), {"name": "TensorProductAttention"}, None, ()
    use_cache, tie_word_embeddings = True, False  # nothing is tied in the file: the embedding is there once

    hidden_size = property(lambda self: self.sizes["d_model"])
    intermediate_size = property(lambda self: self.sizes["d_ff"])
    num_hidden_layers = property(lambda self: self.sizes["n_layer"])
    num_attention_heads = property(lambda self: self.sizes["n_head"])
    head_dim = property(lambda self: self.sizes["d_head"])
    max_position_embeddings = property(lambda self: self.sizes["max_len"])

    @property
    def vocab_size(self) -> int:
        return self.sizes["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:  # resize_token_embeddings does this
        self.sizes = {**self.sizes, "vocab_size": value}


class _CausalLM:
    """A T6, `model`, as a transformers model: `generate`, Trainer, PEFT and pipelines work on it.

    T6ForCausalLM(config) starts anew, T6ForCausalLM(t6) wraps a T6, and from_pretrained reads what the function of that
    name reads. Padding is honoured on the left, and on the right where no cache is used.
    """

    base_model_prefix = "model"
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]

    def __init__(self, config):
        t6 = config if isinstance(config, T6) else None
        super().__init__(self.config_class(**describe(t6)) if t6 else config)
        self.model = t6 or _built(vars(type(config)) | vars(config))
        self.post_init()

    def _init_weights(self, module) -> None:
        """T6 draws its own."""

    def get_output_embeddings(self):
        return getattr(self.model, "output", None)

    def set_output_embeddings(self, new) -> None:
        self.model.output = new

    @classmethod
    def from_pretrained(cls, name, *args, **options):
        """As PreTrainedModel's, and with the checks and refusals of `huggingface.from_pretrained`."""
        local = _local(name)
        of_the_hub = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        folder = local or _pulled(name, **{key: options[key] for key in of_the_hub if key in options})
        _checked(folder)
        result = super().from_pretrained(local or name, *args, **{"disable_mmap": True, **options})
        model = result[0] if isinstance(result, tuple) else result
        _refuse_nan(model, folder)
        _frozen(model.model, model.config.frozen)
        return result

    def save_pretrained(self, save_directory, **options) -> None:
        """As PreTrainedModel's, each file whole or not at all. Weights are one file, which is what is read again."""
        if other := sorted(options.keys() & {"max_shard_size", "variant"}):
            raise ValueError(f"{', '.join(other)}: a T6 is saved as one {WEIGHTS_FILE}; leave this out")
        for key, value in describe(self.model).items():
            setattr(self.config, key, value)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
            super().save_pretrained(made, **{"repo_id": folder.name, **options})
            for file in sorted(Path(made).iterdir(), reverse=True):  # weights before the config that describes them
                write_whole(folder / file.name, partial(os.replace, file))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = True,
        num_items_in_batch=None,
        cache=None,
        **others,
    ):
        """input_ids (B, T) -> logits (B, T, vocab_size) and, with labels (B, T), the loss of each next token.

        attention_mask: (B, cached + T), 0 for padding. position_ids: only as T6 counts. Raises ValueError for what T6
        cannot honour.
        """
        if ignored := [name for name, value in others.items() if value is not None and value is not False]:
            raise ValueError(f"{', '.join(ignored)}: T6ForCausalLM does not support this; leave it out")
        self._refuse_adapters_that_would_be_passed_by()
        past = cache if past_key_values is None else past_key_values  # its name from transformers 5.24 on
        (B, T), cache, tokens = input_ids.shape, None, None
        start = self._cached(past)
        padding, right = _ragged(attention_mask, B, start, T)
        if attention_mask is not None:  # padding may be any token, even one beyond the vocabulary
            tokens = attention_mask[:, start:] != 0
            input_ids = input_ids.masked_fill(~tokens, 0)
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training or right or labels is not None)
        if past is not None or use_cache:
            if right:
                raise ValueError("attention_mask with padding on the right: pad on the left, or pass use_cache=False")
            past, cache = self._cache(past, B, T, padding)
            given, padding = padding, past.layers[0].padding
            if attention_mask is not None and not _same_padding(given, padding):
                raise ValueError("attention_mask pads other tokens than the calls that filled the cache: repeat theirs")
        _check_positions(position_ids, start, T, padding, tokens)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(self.model.hidden(input_ids, cache, padding)[:, kept])
        loss = None
        if labels is not None:
            if padding is not None:  # nothing is known before the first token, so that it is not predicted
                positions = torch.arange(start, start + T, device=labels.device)
                labels = labels.masked_fill(positions <= padding[:, None], -100)
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        name = "cache" if "cache" in self._output_class.__dataclass_fields__ else "past_key_values"
        output = self._output_class(loss=loss, logits=logits, **{name: past})
        return output.to_tuple() if return_dict is False else output

    def _cached(self, past) -> int:
        """How many positions transformers' cache holds, which must be empty or one that this model returned."""
        if past is None:
            return 0
        if not (past.layers and isinstance(past.layers[0], _CacheLayer)):
            if type(past) is not self._cache_class or past.get_seq_length() or past.offloading:
                raise ValueError(f"{type(past).__name__}: T6 has a cache of its own; leave cache_implementation out")
        return past.get_seq_length()

    def _cache(self, past, batch_size: int, T: int, padding: Tensor | None):
        """transformers' cache with layers of ours in it, and these as T6 wants them, with room for T more tokens."""
        past = self._cache_class() if past is None else past
        if not past.get_seq_length():
            past.layers = [_CacheLayer(cache, padding) for cache in self.model.new_cache(batch_size, 64)]
        for layer in past.layers:
            layer.make_room(T)
        return past, Cache(layer.factors for layer in past.layers)

    def _refuse_adapters_that_would_be_passed_by(self) -> None:
        """Weights that are read, not called, would be read without their adapter."""
        read = {} if isinstance(self.model, LlamaT6) else {"embedding": self.model.embedding}
        for i, block in enumerate(self.model.blocks):
            up = {name: getattr(block.attention, name, None) for name in ("k_up", "v_up")}
            read |= {f"blocks.{i}.attention.{name}": module for name, module in up.items() if module is not None}
        for name, module in read.items():
            if type(module) not in (nn.Linear, nn.Embedding):
                raise ValueError(
                    f"{name} is a {type(module).__name__}: T6 reads this weight itself and would miss what is around "
                    "it; leave it out of the adapter's target_modules"
                )


def _define_config() -> None:
    from transformers import AutoConfig, PreTrainedConfig

    config = type("T6PretrainedConfig", (_Described, PreTrainedConfig), {"__doc__": _Described.__doc__})
    AutoConfig.register("t6", config)
    globals()["T6PretrainedConfig"] = config


def _define_model() -> None:
    from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    CacheLayerMixin.register(_CacheLayer)
    own = {"__doc__": _CausalLM.__doc__, "config_class": globals()["T6PretrainedConfig"]}
    own |= {"_cache_class": DynamicCache, "_output_class": CausalLMOutputWithPast}
    model = type("T6ForCausalLM", (_CausalLM, PreTrainedModel, GenerationMixin), own)
    AutoModelForCausalLM.register(own["config_class"], model)
    globals()["T6ForCausalLM"] = model


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers T6 with transformers when its Auto classes are imported, so that this file need not import them."""

    waiting = {
        "transformers.models.auto.configuration_auto": _define_config,
        "transformers.models.auto.modeling_auto": _define_model,
    }

    def find_spec(self, name, path=None, target=None):
        if (define := self.waiting.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            with contextlib.suppress(ImportError):  # an old transformers: `__getattr__` says so to those who need it
                define()

        spec.loader.exec_module = exec_module
        return spec


for _name in list(_WhenImported.waiting):
    if _name in sys.modules:
        _WhenImported.waiting.pop(_name)()
sys.meta_path.insert(0, _WhenImported())


def __getattr__(name: str):
    """T6ForCausalLM and T6PretrainedConfig, for which transformers is imported at last."""
    if name not in ("T6ForCausalLM", "T6PretrainedConfig"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    _refuse_old(transformers)
    from transformers import AutoModelForCausalLM  # noqa: F401, which defines both

    return globals()[name]
