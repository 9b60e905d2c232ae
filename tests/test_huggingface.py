"""Weights carried over compute the same: attention layers, LLaMA models, the authors' checkpoints, files and a hub."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tpa_minimal import huggingface as convert
from tpa_minimal import variants
from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention, assemble


def config(**changes) -> T6Config:
    sizes = dict(vocab_size=31, n_layer=2, d_model=24, n_head=6, d_head=8, rank_q=3, rank_k=2, rank_v=2, max_len=64)
    return T6Config(**{**sizes, **changes})


def wake(model):
    """Fill what starts at zero, so that every weight matters."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


# ------------------------------------------------------------------------------------ MHA, MQA and GQA as TPA


@pytest.mark.parametrize("n_head,n_kv_head", [(6, 6), (6, 3), (6, 2), (6, 1), (1, 1), (4, 2)])
def test_mha_mqa_and_gqa_are_fixed_a_tpa(n_head, n_kv_head):
    mha = wake(MultiHeadAttention(config(n_head=n_head), n_kv_head=n_kv_head)).double()
    tpa = convert.mha_to_tpa(mha)
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = tpa(ours), mha(theirs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    weights = torch.cat([getattr(mha, f"{name}_proj").weight.grad for name in "qkv"])
    torch.testing.assert_close(tpa.factor_proj.weight.grad, weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tpa.out_proj.weight.grad, mha.out_proj.weight.grad, rtol=1e-12, atol=1e-12)
    assert tpa.a_q.grad is tpa.a_k.grad is tpa.a_v.grad is None  # constants: training goes on as MHA's would
    cache, mha_cache = tpa.new_cache(2), mha.new_cache(2)
    with torch.no_grad():
        for chunk in x.split([5, 1, 1, 14], dim=1):
            torch.testing.assert_close(tpa(chunk, cache), mha(chunk, mha_cache), rtol=0, atol=1e-12)
    assert cache.nbytes == mha_cache.nbytes == 2 * 21 * 2 * n_kv_head * 8 * 8


def test_conversion_copies_and_keeps_dtype_and_mode():
    mha = wake(MultiHeadAttention(config(), n_kv_head=2)).to(torch.bfloat16).eval()
    tpa = convert.mha_to_tpa(mha)
    before = tpa.factor_proj.weight.clone()
    mha.q_proj.weight.data.zero_()
    assert torch.equal(tpa.factor_proj.weight, before)
    assert tpa.a_k.dtype == tpa.factor_proj.weight.dtype == torch.bfloat16 and not tpa.training


def test_a_whole_model_converts_block_by_block():
    model = wake(T6(config(), attention=partial(MultiHeadAttention, n_kv_head=2)))
    tokens = torch.randint(31, (2, 9))
    logits, text = model(tokens), model.generate(tokens, 20, temperature=0)
    for block in model.blocks:
        block.attention = convert.mha_to_tpa(block.attention)
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(tokens, 20, temperature=0), text)


def test_fixed_a_tpa_of_any_ranks_is_mha():
    tpa = wake(variants.FixedHeadFactors(config(rank_q=4, rank_k=3, rank_v=1))).double()
    mha = convert.tpa_to_mha(tpa)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    torch.testing.assert_close(mha(x), tpa(x), rtol=0, atol=1e-12)
    back = convert.mha_to_tpa(mha)
    torch.testing.assert_close(back(x), tpa(x), rtol=0, atol=1e-12)


def test_groups_must_divide_the_heads():
    with pytest.raises(ValueError, match="n_kv_head=4: must divide n_head=6"):
        convert.group_factors(6, 4)


def test_layers_of_another_kind_are_refused_by_name():
    layer = TensorProductAttention(config())
    with pytest.raises(TypeError, match="TensorProductAttention: only a MultiHeadAttention"):
        convert.mha_to_tpa(layer)
    with pytest.raises(TypeError, match="TensorProductAttention: only FixedHeadFactors"):
        convert.tpa_to_mha(layer)


# ------------------------------------------------------------------------------------------------------- LLaMA

SHAPES = [
    dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=32, head_dim=8),
    dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48, head_dim=16, rms_norm_eps=1e-5),
    dict(num_attention_heads=8, num_key_value_heads=1, hidden_size=32, head_dim=6, tie_word_embeddings=True),
    dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=24, head_dim=8, rms_norm_eps=0.1),
    dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        head_dim=8,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_size=32,
        head_dim=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
]


def llama(**changes):
    """A LLaMA of transformers with random weights, gains included, of a scale that matters."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=67, intermediate_size=40, num_hidden_layers=3, max_position_embeddings=512)
    sizes |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **SHAPES[1], **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.3, 2)
        elif "embed" not in name and "lm_head" not in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_a_llama_gives_the_same_logits(shape, dtype, tolerance):
    theirs = llama(**shape).to(dtype)
    ours = convert.llama_to_t6(theirs)
    tokens = torch.randint(67, (2, 300))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.05
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=tolerance)
        cache = ours.new_cache(2)
        parts = [ours(chunk, cache) for chunk in tokens.split([200, 1, 1, 70, 28], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=tolerance)
    c = theirs.config
    assert cache.nbytes == 2 * 300 * 3 * 2 * c.num_key_value_heads * c.head_dim * dtype.itemsize


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_llama_generates_the_same_text(shape):
    theirs = llama(**shape)
    ours = convert.llama_to_t6(theirs)
    prompt = torch.randint(1, 67, (2, 40))  # generate() takes token 0, its padding, out of a prompt
    expected = theirs.generate(prompt, max_new_tokens=60, do_sample=False)
    assert torch.equal(ours.generate(prompt, 60, temperature=0), expected)


def test_a_float32_conversion_goes_on_in_float64_and_copies():
    theirs = llama()
    ours = convert.llama_to_t6(theirs).double()
    tokens = torch.randint(67, (1, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.double()(tokens).logits, rtol=0, atol=1e-5)
        before = ours(tokens)
        for parameter in theirs.parameters():
            parameter.zero_()
        assert torch.equal(ours(tokens), before)
    assert ours.config.max_len == 512 and convert.llama_to_t6(theirs, max_len=64).config.max_len == 64


def test_a_llama_that_is_exact_in_float64_is_matched_exactly(monkeypatch):
    """transformers rounds to float32 in norms and rotary tables; without that, the conversion must not either."""
    theirs = llama().double()
    rounded = convert.llama_to_t6(theirs)

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        angles = position_ids[..., None] * self.inv_freq
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    monkeypatch.setattr(type(theirs.model.norm), "forward", norm)
    monkeypatch.setattr(type(theirs.model.rotary_emb), "forward", rotary)
    tokens = torch.randint(67, (1, 300))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(convert.llama_to_t6(theirs)(tokens), expected, rtol=0, atol=1e-9)
        assert (rounded(tokens) - expected).abs().max() > 1e-9  # so the switch matters


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(attention_bias=True), "q_proj has a bias.*no biases"),
        (dict(mlp_bias=True), "mlp.gate_proj has a bias.*no biases"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'.*SwiGLU"),
        (
            dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            "rope_type='dynamic'.*length",
        ),
    ],
)
def test_a_llama_that_cannot_be_carried_over_is_refused(changes, message):
    for function in (convert.llama_to_t6, convert.use_tpa):
        with pytest.raises(ValueError, match=message):
            function(llama(**changes))


def test_another_architecture_is_refused():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(num_key_value_heads=1, head_dim=4, **sizes))
    with pytest.raises(ValueError, match="model_type='gemma': only llama, mistral, qwen2"):
        convert.llama_to_t6(gemma)
    for other in (T6(config()), llama().model, nn.Linear(2, 2)):
        for function in (convert.llama_to_t6, convert.use_tpa):
            with pytest.raises(TypeError, match=f"{type(other).__name__}: needed is a transformers.LlamaForCausalLM"):
                function(other)
    with pytest.raises(ValueError, match="max_len=0"):
        convert.llama_to_t6(llama(), max_len=0)


def family(name, **changes):
    """A Mistral or a Qwen2 with random weights, biases of zero where it has some."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=67, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or "norm" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(
    "name,changes", [("Mistral", dict(sliding_window=None)), ("Mistral", dict(sliding_window=64)), ("Qwen2", dict())]
)
def test_mistral_and_qwen2_convert_where_that_is_exact(name, changes):
    theirs, tokens = family(name, **changes), torch.randint(67, (2, 60))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(convert.llama_to_t6(theirs)(tokens), logits, rtol=0, atol=1e-4)
        options = dict(max_new_tokens=20, do_sample=False, pad_token_id=66)
        text = theirs.generate(tokens[:, :30], **options)
        assert torch.equal(convert.use_tpa(theirs).generate(tokens[:, :30], **options), text)


def test_windows_and_biases_are_refused_by_name():
    mistral, tokens = family("Mistral", sliding_window=16), torch.randint(67, (2, 16))
    for function in (convert.llama_to_t6, convert.use_tpa):
        with pytest.raises(ValueError, match=r"sliding_window=16: .* llama_to_t6\(model, max_len=16\)"):
            function(mistral)
    short = convert.llama_to_t6(mistral, max_len=16)
    torch.testing.assert_close(short(tokens), mistral(tokens).logits, rtol=0, atol=1e-4)
    qwen = family("Qwen2")
    nn.init.normal_(qwen.model.layers[1].self_attn.k_proj.bias)
    for function in (convert.llama_to_t6, convert.use_tpa):
        with pytest.raises(ValueError, match="model.layers.1.self_attn.k_proj has a bias"):
            function(qwen)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("place", ["q_proj", "lm_head", "bias", "norm", "embedding", "subclass"])
def test_parts_of_ones_own_are_refused(place):
    model = llama()
    if place == "q_proj":
        model.model.layers[1].self_attn.q_proj = Doubled(48, 96, bias=False)
    elif place == "lm_head":
        model.lm_head = nn.Sequential(model.lm_head)
    elif place == "bias":
        model.lm_head.bias = nn.Parameter(torch.ones(67))
    elif place == "norm":
        model.model.norm = nn.LayerNorm(48)
    elif place == "embedding":
        model.model.embed_tokens = type("Scaled", (nn.Embedding,), {})(67, 48)
    else:
        model.__class__ = type("OwnLlama", (type(model),), {})
    for function in (convert.llama_to_t6, convert.use_tpa):
        with pytest.raises(ValueError, match="has a bias" if place == "bias" else "replace other classes by plain"):
            function(model)


def change(name, model):
    """Alter a LLaMA from outside, its classes and weights aside."""
    layers = model.model.layers
    if name == "hook":
        layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    elif name == "pre-hook":
        layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif name == "pruned":
        prune.random_unstructured(layers[1].self_attn.k_proj, "weight", 0.5)
    elif name == "forward":
        layers[0].mlp.forward = lambda x, forward=layers[0].mlp.forward: 2 * forward(x)
    elif name == "eps":
        layers[2].post_attention_layernorm.variance_epsilon = 1.0
    elif name == "scaling":
        layers[1].self_attn.scaling = 1.0
    elif name == "causal":
        layers[1].self_attn.is_causal = False
    elif name == "fewer":
        model.model.layers = layers[:2]
    elif name == "more":
        model.config.num_hidden_layers = 2
    elif name == "twice":
        model.model.layers = nn.ModuleList([layers[0], layers[1], layers[0]])
    elif name == "vocabulary":
        model.lm_head = nn.Linear(48, 100, bias=False)
    elif name == "config":
        model.config.rms_norm_eps = 0.3
    elif name == "both ways":
        model.config.is_causal = False
    elif name == "float8":
        layers[0].mlp.up_proj.weight.data = layers[0].mlp.up_proj.weight.data.to(torch.float8_e4m3fn)
    else:
        layers[1].self_attn.attention_dropout = 0.1


@pytest.mark.parametrize(
    "name,message",
    [
        ("hook", "model.layers.1.mlp has a hook, .*remove it"),
        ("pre-hook", "q_proj has a hook"),
        ("pruned", "k_proj has a hook, RandomUnstructured"),
        ("forward", "model.layers.0.mlp has a forward of its own"),
        ("eps", r"layers.2.post_attention_layernorm has variance_epsilon=1.0, and by its config 1e-05"),
        ("scaling", "layers.1.self_attn has scaling=1.0, and by its config 0.25"),
        ("causal", "is_causal=False"),
        ("fewer", "model.layers.2 is missing, which the config describes"),
        ("more", "model.layers.2 is a part that the config does not describe"),
        ("twice", "model.layers.2.*is model.layers.0.* again: give it a copy"),
        ("vocabulary", "lm_head has out_features=100, and by its config 67"),
        ("config", "variance_epsilon=1e-05, and by its config 0.3"),
        ("both ways", "is_causal=False: .*only causal models"),
        ("float8", "up_proj.weight is a Tensor of torch.float8_e4m3fn: dequantize"),
        ("dropout", "attention_dropout=0.1: TPA has none"),
    ],
)
def test_what_acts_besides_classes_and_weights_is_refused(name, message):
    for function in (convert.llama_to_t6, convert.use_tpa):
        model = llama()
        change(name, model)
        with pytest.raises(ValueError, match=message):
            function(model)


def test_gains_that_overflow_a_narrow_type_are_named():
    model = llama().half()
    model.model.layers[1].input_layernorm.weight.data *= 30_000
    model.model.layers[1].self_attn.q_proj.weight.data *= 30
    with pytest.raises(ValueError, match=r"blocks.1.attention.factor_proj.weight .* torch.float16 is too narrow"):
        convert.llama_to_t6(model)
    assert all(weight.isfinite().all() for weight in convert.llama_to_t6(model.float()).parameters())


def test_hooks_of_transformers_own_only_look():
    model, tokens = llama(attn_implementation="eager"), torch.randint(67, (1, 9))
    logits = model(tokens, output_attentions=True, output_hidden_states=True).logits
    model.enable_input_require_grads()
    torch.testing.assert_close(convert.llama_to_t6(model)(tokens), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind,back", [(MultiHeadAttention, "mha_to_tpa"), (variants.FixedHeadFactors, "tpa_to_mha")])
def test_layers_with_parts_of_ones_own_are_refused(kind, back):
    function = getattr(convert, back)
    first = dict(kind(config()).named_children()).popitem()[0]
    sizes = getattr(kind(config()), first).weight.shape[::-1]
    for other, message in (
        (Doubled(*sizes, bias=False), "is a Doubled"),
        (nn.Linear(*sizes), "has a bias"),
        (nn.Sequential(nn.Linear(*sizes, bias=False)), "is a Sequential"),
    ):
        layer = kind(config())
        setattr(layer, first, other)
        with pytest.raises(ValueError, match=f"{first} {message}"):
            function(layer)
    layer = kind(config())
    layer.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="out_proj has a hook"):
        function(layer)
    with pytest.raises(TypeError, match="Own: only"):
        function(type("Own", (kind,), {"forward": lambda self, x: x})(config()))


def test_adapters_are_refused_until_they_are_merged():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    adapted, tokens = peft.get_peft_model(llama(), lora), torch.randint(67, (2, 30))
    for function in (convert.llama_to_t6, convert.use_tpa):
        for model in (adapted, adapted.base_model.model):
            with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
                function(model)
    with torch.no_grad():
        logits = adapted(tokens).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(convert.llama_to_t6(merged)(tokens), logits, rtol=0, atol=1e-4)


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """As on MPS: no float64 on the device, for which "meta" stands."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not (isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64), function
        return out


def test_no_float64_reaches_the_device():
    model = llama()
    rotary = model.model.rotary_emb
    model = model.to("meta")
    model.model.rotary_emb = rotary.to_empty(device="cpu")
    rotary.inv_freq = torch.rand(8)
    with NoFloat64():
        ours = convert.llama_to_t6(model)
        ours(torch.zeros(1, 5, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6], SHAPES[7]])
def test_a_converted_layer_keeps_its_rotation_on_the_way_to_mha_and_back(shape):
    ours = convert.llama_to_t6(llama(**shape).double())
    tokens = torch.randint(67, (2, 40))
    with torch.no_grad():
        logits = ours(tokens)
        for convert_layer in (convert.tpa_to_mha, convert.mha_to_tpa):
            for block in ours.blocks:
                block.attention = convert_layer(block.attention)
            torch.testing.assert_close(ours(tokens), logits, rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------- TPA inside transformers


def test_a_fine_tuned_drop_in_is_saved_as_a_llama_and_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = convert.use_tpa(llama()).train(), torch.randint(67, (2, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(tokens, labels=tokens).loss.backward()
    before = model.model.layers[0].self_attn.attention.factor_proj.weight.clone()
    optimizer.step()
    assert not torch.equal(model.model.layers[0].self_attn.attention.factor_proj.weight, before)
    logits = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(plain(tokens).logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(convert.use_tpa(plain)(tokens).logits, logits)
    other = convert.use_tpa(llama())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, logits)
    model.model.layers[1].self_attn.attention.a_k.data[0, 0] += 1
    with pytest.raises(ValueError, match="a_k was trained"):
        model.save_pretrained(tmp_path)


POSITIONS = [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], list(range(0, 24, 2)), [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("position_ids", POSITIONS)
def test_positions_of_ones_own_are_refused_by_the_drop_in(position_ids):
    model, tokens = convert.use_tpa(llama()), torch.randint(1, 67, (2, 12))
    with pytest.raises(ValueError, match="packed or stretched"):
        model(tokens, position_ids=torch.tensor([position_ids] * 2), attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="packed|holes"):
        model(tokens, position_ids=torch.tensor([position_ids] * 2))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_are_honoured_or_refused_by_the_drop_in(implementation):
    model, tokens = llama(), torch.randint(1, 67, (3, 12))
    model.set_attn_implementation(implementation)
    masks = torch.ones(3, 12, dtype=torch.long)
    masks[1, :5] = 0
    right = torch.ones(3, 12, dtype=torch.long)
    right[2, 8:] = 0
    with torch.no_grad():
        expected = [model(tokens, attention_mask=mask).logits[mask > 0] for mask in (masks, right)]
        convert.use_tpa(model)
        for mask, logits in zip((masks, right), expected):
            torch.testing.assert_close(model(tokens, attention_mask=mask).logits[mask > 0], logits, rtol=0, atol=1e-4)
    masks[0, 4] = 0
    with pytest.raises(ValueError, match="holes between tokens"):
        model(tokens, attention_mask=masks)
    with pytest.raises(ValueError, match="holes|packed"):
        model.generate(tokens, attention_mask=masks, max_new_tokens=2, do_sample=False)
    packed = torch.ones(12, 12, dtype=torch.bool).tril()
    packed[6:, :6] = False
    with pytest.raises(ValueError, match="holes between tokens"):
        model(tokens, attention_mask=packed.expand(3, 1, -1, -1))


def test_a_text_beyond_the_window_is_refused_by_the_drop_in():
    model, tokens = family("Mistral", sliding_window=64), torch.randint(66, (2, 60))
    options = dict(do_sample=False, pad_token_id=66)
    text = model.generate(tokens, max_new_tokens=4, **options)
    convert.use_tpa(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, **options), text)
    for mask in (None, torch.ones_like(tokens)):
        with pytest.raises(ValueError, match="64 of 65 tokens, as with sliding_window"):
            model.generate(tokens, max_new_tokens=10, attention_mask=mask, **options)


def test_a_single_drop_in_looks_at_positions_and_masks_too():
    model, tokens = llama(num_hidden_layers=2), torch.randint(1, 67, (1, 12))
    attention = convert.use_tpa(llama(num_hidden_layers=2)).model.layers[1].self_attn.attention
    model.model.layers[1].self_attn = convert.LlamaSelfAttention(attention, 1)
    hole = torch.ones_like(tokens)
    hole[0, 4] = 0
    for given in (dict(attention_mask=hole), dict(position_ids=torch.tensor([POSITIONS[0]]))):
        with pytest.raises(ValueError, match="holes|packed"):
            model(tokens, **given)


def test_masks_that_differ_by_head_or_add_to_the_scores_are_refused_by_the_drop_in():
    model, tokens = convert.use_tpa(llama()), torch.randint(1, 67, (1, 9))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"axes \(1, 6, 9, 9\)"):
        model(tokens, attention_mask=causal.expand(1, 6, -1, -1))
    distances = (torch.arange(9) - torch.arange(9)[:, None]).float()
    with pytest.raises(ValueError, match="adds to the scores"):
        model(tokens, attention_mask=distances.masked_fill(~causal, -torch.inf)[None, None] - 0.5)
    plain = torch.zeros(9, 9).masked_fill(~causal, -1e4)[None, None]
    torch.testing.assert_close(model(tokens, attention_mask=plain).logits, model(tokens).logits, rtol=0, atol=1e-4)


def test_a_state_without_one_of_a_layers_weights_is_named():
    model = convert.use_tpa(llama())
    state = {key: value for key, value in model.state_dict().items() if "1.self_attn.o_proj" not in key}
    with pytest.raises(RuntimeError, match="layers.1.self_attn"):
        model.load_state_dict(state)


def test_attention_weights_are_refused_by_the_drop_in():
    with pytest.raises(ValueError, match="output_attentions: TPA never forms"):
        convert.use_tpa(llama())(torch.ones(1, 4, dtype=torch.long), output_attentions=True)


def test_a_mask_that_is_no_tensor_is_refused_in_one_line():
    layer = convert.use_tpa(llama()).model.layers[0].self_attn
    with pytest.raises(ValueError, match="attention_mask with blocks: .*sdpa"):  # flex_attention's BlockMask
        layer(torch.randn(2, 12, 48), attention_mask=object())


def test_a_static_cache_takes_one_rank_of_keys_and_values():
    transformers = pytest.importorskip("transformers")
    model, tokens = llama(num_hidden_layers=1), torch.randint(1, 67, (2, 12))
    options = dict(max_new_tokens=3, do_sample=False)
    for rank_v in (2, 1):
        sizes = config(d_model=48, n_head=6, d_head=16, rank_k=2, rank_v=rank_v)
        model.model.layers[0].self_attn = convert.LlamaSelfAttention(wake(TensorProductAttention(sizes)), 0)
        text = model.generate(tokens, **options)
        if rank_v == 2:
            assert torch.equal(model.generate(tokens, cache_implementation="static", **options), text)
        else:
            with pytest.raises(ValueError, match="StaticCache has no room for factors of R_K=2 and R_V=1"):
                model.generate(tokens, cache_implementation="static", **options)
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))  # for LLaMA's keys and values
    with pytest.raises(ValueError, match="no room for factors"):
        model(tokens, past_key_values=cache)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_tpa_as_self_attn_generates_as_before(shape):
    model = llama(**shape)
    prompt = torch.randint(1, 67, (2, 30))
    options = dict(max_new_tokens=25, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(prompt).logits
        greedy = model.generate(prompt, **options)
        beams = model.generate(prompt, num_beams=3, **options).sequences
        convert.use_tpa(model)
        torch.testing.assert_close(model(prompt).logits, logits, rtol=0, atol=1e-4)
        result = model.generate(prompt, **options)
        assert torch.equal(result.sequences, greedy.sequences)
        assert torch.equal(model.generate(prompt, num_beams=3, **options).sequences, beams)
    c = model.config
    for layer in result.past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (2, c.num_key_value_heads, 54, c.head_dim)


def test_tpa_as_self_attn_in_a_padded_batch():
    model = llama()
    tokens = torch.randint(1, 67, (1, 12))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), 1)
    mask = (padded > 0).long()
    expected = model.generate(tokens, max_new_tokens=20, do_sample=False)[:, 12:]
    convert.use_tpa(model)
    got = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 17:]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "attention", [TensorProductAttention, variants.KeyValueOnly, variants.SharedFeatureFactors, variants.PartialRoPE]
)
def test_any_tpa_as_self_attn_caches_factors_in_transformers_cache(attention):
    model = llama(num_hidden_layers=2)
    sizes = config(d_model=48, n_head=6, d_head=16)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = convert.LlamaSelfAttention(wake(attention(sizes)), i)
    model.double()
    tokens = torch.randint(1, 67, (2, 30))
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :20], use_cache=True)
        rest = [model(t, past_key_values=first.past_key_values).logits for t in tokens[:, 20:].split([1, 9], 1)]
    torch.testing.assert_close(torch.cat((first.logits, *rest), 1), whole, rtol=0, atol=1e-6)
    held = sum(x.numel() for layer in first.past_key_values.layers for x in (layer.keys, layer.values))
    assert held == 2 * 30 * 2 * sum(w * r for w, r in zip(model.model.layers[0].self_attn.attention.sizes[2:], [1] * 4))


def test_a_cache_is_taken_by_both_of_its_names():
    """past_key_values, and cache, as transformers 5.24 calls it."""
    transformers = pytest.importorskip("transformers")
    tokens, model = torch.randint(30, (1, 6)), wrapped()
    hidden, layer = torch.randn(1, 6, 48), convert.use_tpa(llama(num_hidden_layers=1)).model.layers[0].self_attn
    got = []
    for name in ("past_key_values", "cache"):
        mine, theirs = {name: model(tokens[:, :5]).to_tuple()[1]}, {name: transformers.DynamicCache()}
        with torch.no_grad():
            layer(hidden[:, :5], **theirs)
            got.append((model(tokens[:, 5:], **mine).logits, layer(hidden[:, 5:], **theirs)[0]))
    for whole, old, new in zip((model(tokens).logits[:, 5:], layer(hidden)[0][:, 5:]), *got):
        torch.testing.assert_close(old, whole)
        assert torch.equal(old, new)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_tpa_as_self_attn_generates_with_a_static_cache(shape):
    model = llama(**shape)
    prompt = torch.randint(1, 67, (2, 20))
    options = dict(max_new_tokens=12, do_sample=False, cache_implementation="static")
    expected = model.generate(prompt, **options)
    assert torch.equal(convert.use_tpa(model).generate(prompt, **options), expected)
    for function in (convert.llama_to_t6, convert.use_tpa):
        with pytest.raises(ValueError, match="already"):
            function(model)


def test_a_static_cache_that_counts_in_place_does_not_move_the_start():
    transformers = pytest.importorskip("transformers")
    model = convert.use_tpa(llama(num_hidden_layers=1))
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 12, 48)
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        parts = [layer(chunk, past_key_values=cache)[0] for chunk in x.split([5, 6, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x)[0], rtol=0, atol=1e-5)


def test_attention_that_takes_no_mask_is_refused():
    with pytest.raises(ValueError, match="MultiHeadAttention attends in a way of its own"):
        convert.LlamaSelfAttention(MultiHeadAttention(config()), 0)
    layer = convert.LlamaSelfAttention(variants.FixedHeadFactors(config()), 0)
    with pytest.raises(ValueError, match=r"axes \(1, 3\).*sdpa"):
        layer(torch.randn(1, 3, 24), attention_mask=torch.ones(1, 3))


# ------------------------------------------------------------------------------------------------ down in rank


def converted(**changes):
    model = wake(T6(config(**changes), attention=partial(MultiHeadAttention, n_kv_head=3))).double()
    for block in model.blocks:
        block.attention = convert.mha_to_tpa(block.attention)
    return model


def test_full_rank_is_exact_and_the_error_falls_with_rank():
    model, tokens = converted(), torch.randint(31, (4, 32))
    with torch.no_grad():
        logits = model(tokens)
        errors = []
        for rank in (1, 2, 3):
            small = convert.reduce_rank(model, tokens, rank, rank)
            errors.append((small(tokens) - logits).norm().item())
            cache = small.new_cache(4)
            parts = [small(chunk, cache) for chunk in tokens.split([20, 1, 11], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), small(tokens), rtol=0, atol=1e-10)
            assert cache.nbytes == 4 * 32 * 2 * 2 * rank * 8 * 8
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-10


def test_fixed_fit_is_the_best_of_its_rank():
    """Its squared error is the sum of the eigenvalues left out, which no fixed A can undercut (Eckart and Young)."""
    y = torch.randn(50, 6, 4, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.2]).view(6, 1).double()
    singular = torch.linalg.svdvals(y.transpose(0, 1).flatten(1))
    for rank in (1, 2, 5):
        a = convert.fit_fixed(y, rank)
        error = y - assemble(a.expand(50, 1, -1, -1), (a @ y / rank).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(error.square().sum(), singular[rank:].square().sum())


def test_contextual_fit_finds_contextual_factors():
    x = torch.randn(800, 12, dtype=torch.float64)
    W_a, W_b = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()

    def values(W_a, W_b):
        return torch.einsum("rhm,rdl,nm,nl->nhd", W_a, W_b, x, x) / 2

    y = values(W_a, W_b)
    error = (values(*convert.fit_contextual(x, y, 2, iterations=40)) - y).norm() / y.norm()
    assert error < 1e-3


def test_contextual_factors_cannot_follow_a_linear_map_of_centred_inputs():
    """A product of two linear maps is even in x and a key is odd: at rank h the fixed fit is exact, this one is not."""
    x = torch.randn(2000, 12, dtype=torch.float64)
    y = (x @ torch.randn(12, 12).double()).unflatten(-1, (3, 4))
    W_a, W_b = convert.fit_contextual(x, y, 3)
    fitted = torch.einsum("rhm,rdl,nm,nl->nhd", W_a, W_b, x, x) / 3
    assert (fitted - y).norm() / y.norm() > 0.8
    x = torch.cat((x[:, :-1], torch.ones(2000, 1)), 1)  # a constant coordinate is all that they lack
    y = (x @ torch.randn(12, 12).double()).unflatten(-1, (3, 4))
    W_a, W_b = convert.fit_contextual(x, y, 3)
    fitted = torch.einsum("rhm,rdl,nm,nl->nhd", W_a, W_b, x, x) / 3
    assert (fitted - y).norm() / y.norm() < 1e-4


def test_contextual_reduction_is_a_working_model():
    model, tokens = converted(), torch.randint(31, (4, 32))
    small = convert.reduce_rank(model, tokens, 2, 1, contextual=True)
    assert isinstance(small.blocks[0].attention, variants.KeyValueOnly) and small.config.rank_v == 1
    cache = small.new_cache(4)
    with torch.no_grad():
        parts = [small(chunk, cache) for chunk in tokens.split([20, 1, 11], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), small(tokens), rtol=0, atol=1e-10)
    assert cache.nbytes == 4 * 32 * 2 * 3 * (6 + 8) * 8


def test_a_converted_llama_goes_down_in_rank_with_its_own_rope():
    ours = convert.llama_to_t6(llama(**SHAPES[5]).double())
    tokens = torch.randint(67, (2, 40))
    with torch.no_grad():
        same = convert.reduce_rank(ours, tokens, 2, 2)
        torch.testing.assert_close(same(tokens), ours(tokens), rtol=0, atol=1e-10)


def test_a_bfloat16_model_goes_down_in_rank_too():
    model, tokens = converted(), torch.randint(31, (2, 40))
    wanted = convert.reduce_rank(model, tokens, 2, 2).blocks[0].attention.a_k
    small = convert.reduce_rank(model.bfloat16(), tokens, 2, 2)
    assert small.blocks[0].attention.a_k.dtype == torch.bfloat16
    overlap = torch.linalg.qr(small.blocks[0].attention.a_k.double().mT)[0].mT @ torch.linalg.qr(wanted.mT)[0]
    assert torch.linalg.svdvals(overlap).min() > 0.9  # the same fit, but for rounding
    with pytest.raises(ValueError, match="rank_k=7, rank_v=2: ranks 1 to n_head=6"):
        convert.reduce_rank(model, tokens, 7, 2)


def test_only_fixed_heads_go_down_in_rank():
    with pytest.raises(ValueError, match="TensorProductAttention: only FixedHeadFactors"):
        convert.reduce_rank(T6(config()), torch.zeros(1, 2, dtype=torch.long), 1, 1)
    mixed = converted()
    mixed.blocks[1].attention = TensorProductAttention(config())
    with pytest.raises(ValueError, match="TensorProductAttention: only FixedHeadFactors"):
        convert.reduce_rank(mixed, torch.zeros(1, 2, dtype=torch.long), 1, 1)
    assert not mixed.blocks[0].attention._forward_pre_hooks


# ------------------------------------------------------------------------------------ the authors' checkpoints


def authors_shapes(c: T6Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the authors' GPT, written down from their model/T6.py."""
    shapes = {"transformer.wte.weight": (c.vocab_size, c.d_model), "lm_head.weight": (c.vocab_size, c.d_model)}
    for i in range(c.n_layer):
        attn, mlp = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp."
        for letter, rank in (("q", c.rank_q), ("k", c.rank_k), ("v", c.rank_v)):
            shapes[f"{attn}c_qkv.W_A_{letter}.weight"] = (c.n_head * rank, c.d_model)
            shapes[f"{attn}c_qkv.W_B_{letter}.weight"] = (rank * c.d_head, c.d_model)
        shapes[f"{attn}c_proj.weight"] = (c.d_model, c.n_head * c.d_head)
        shapes[f"{mlp}c_fc1.weight"] = shapes[f"{mlp}c_fc2.weight"] = (8 * c.d_model // 3, c.d_model)
        shapes[f"{mlp}c_proj.weight"] = (c.d_model, 8 * c.d_model // 3)
    return shapes


def authors_checkpoint(c: T6Config) -> dict[str, torch.Tensor]:
    state = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in authors_shapes(c).items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def authors_attention(state, x, c: T6Config, i: int):
    """Their attention, from the paper's formulas and their layout: head factors (h, R), feature factors (R, d_h)."""
    (B, T, _), d = x.shape, c.d_head
    theta = 10000.0 ** (-torch.arange(0, d, 2) / d)
    angles = torch.outer(torch.arange(T), theta)[:, None]  # (T, 1, d/2)
    made = []
    for letter, rank in (("q", c.rank_q), ("k", c.rank_k), ("v", c.rank_v)):
        a = (x @ state[f"transformer.h.{i}.attn.c_qkv.W_A_{letter}.weight"].T).view(B, T, c.n_head, rank)
        b = (x @ state[f"transformer.h.{i}.attn.c_qkv.W_B_{letter}.weight"].T).view(B, T, rank, d)
        if letter != "v":
            b1, b2 = b[..., : d // 2], b[..., d // 2 :]
            b = torch.cat((b1 * angles.cos() + b2 * angles.sin(), b2 * angles.cos() - b1 * angles.sin()), -1)
        made.append((a @ b / rank).transpose(1, 2))
    q, k, v = made  # (B, h, T, d)
    weights = (q @ k.mT / d**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ state[f"transformer.h.{i}.attn.c_proj.weight"].T


def authors_logits(state, tokens, c: T6Config):
    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()

    x = state["transformer.wte.weight"][tokens]
    for i in range(c.n_layer):
        x = x + authors_attention(state, norm(x), c, i)
        mlp = [state[f"transformer.h.{i}.mlp.{name}.weight"].T for name in ("c_fc1", "c_fc2", "c_proj")]
        x = x + (nn.functional.silu(norm(x) @ mlp[0]) * (norm(x) @ mlp[1])) @ mlp[2]
    return norm(x) @ state["lm_head.weight"].T


AUTHORS = [dict(), dict(n_head=5, d_head=12, d_model=32, rank_k=3, rank_v=1), dict(n_layer=1, rank_q=1, d_model=17)]


@pytest.mark.parametrize("changes", AUTHORS)
def test_the_authors_checkpoint_gives_the_same_logits(changes):
    c = config(**changes)
    state = authors_checkpoint(c)
    model = T6(c)
    model.load_state_dict(convert.authors_t6_state_dict(state, c))
    tokens = torch.randint(31, (2, 40))
    expected = authors_logits(state, tokens, c)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens).detach(), expected, rtol=0, atol=1e-5)


def test_both_ways_and_with_the_prefixes_of_training():
    c = config()
    state = authors_checkpoint(c)
    ours = convert.authors_t6_state_dict({f"module._orig_mod.{name}": value for name, value in state.items()}, c)
    back = convert.t6_to_authors_state_dict(ours, c)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    model = T6(c)
    again = convert.authors_t6_state_dict(convert.t6_to_authors_state_dict(model.state_dict(), c), c)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    c = config()
    state = authors_checkpoint(c)

    def refuse(state, c, message):
        with pytest.raises(ValueError, match=message):
            convert.authors_t6_state_dict(state, c)

    refuse(state, replace(c, n_layer=3), r"transformer\.h\.2\.attn\.c_qkv\.W_A_q\.weight is missing")
    refuse(state, replace(c, n_layer=1), r"transformer\.h\.1\..*no place")
    refuse(state, replace(c, rank_q=2), r"W_A_q\.weight is \(18, 24\).*\(12, 24\)")
    refuse(state, replace(c, vocab_size=30), r"wte\.weight is \(31, 24\)")
    ours = T6(c).state_dict()
    with pytest.raises(ValueError, match="rank_k=1, rank_v=2: the authors' model has one rank"):
        convert.t6_to_authors_state_dict(ours, replace(c, rank_k=1, rank_v=2))
    with pytest.raises(ValueError, match=r"blocks\.2\..* has shape None where"):
        convert.t6_to_authors_state_dict(ours, replace(c, n_layer=3))
    refuse({**state, "transformer.h.0.attn.subln.weight": torch.ones(8)}, c, "subln.weight.*no place")
    refuse({**state, "lm_head.weight": torch.ones(31, 24)}, c, "one tensor for both")
    refuse({}, c, "not a T6 checkpoint")
    with pytest.raises(ValueError, match="d_ff=50"):
        convert.t6_to_authors_state_dict({}, replace(c, d_ff=50))


# --------------------------------------------------------------------------------------------- files and hubs

KINDS = [
    TensorProductAttention,
    variants.KeyValueOnly,
    variants.FixedHeadFactors,
    variants.FixedFeatureFactors,
    variants.SharedFeatureFactors,
    variants.SigmoidHeadFactors,
    variants.SoftmaxHeadFactors,
    partial(variants.ThirdOrderFactors, d_b=2),
    variants.RotateAssembled,
    partial(variants.PartialRoPE, rotary_dim=4),
    partial(MultiHeadAttention, n_kv_head=2),
    partial(MultiHeadLatentAttention, d_c=10, d_rope=4),
]


@pytest.mark.parametrize("attention", KINDS)
def test_saved_and_loaded_is_the_same_model(attention, tmp_path):
    model = wake(T6(config(), attention=attention)).bfloat16()
    convert.save_pretrained(model, tmp_path / "made" / "here")
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == ["config.json", "model.safetensors"]
    again = convert.from_pretrained(tmp_path / "made" / "here")
    assert again.config == model.config and type(again.blocks[0].attention) is type(model.blocks[0].attention)
    tokens = torch.randint(31, (1, 12))
    assert torch.equal(again(tokens), model(tokens)) and again(tokens).dtype == torch.bfloat16


def test_converted_and_reduced_llamas_are_saved_and_loaded(tmp_path):
    ours = convert.llama_to_t6(llama(**SHAPES[5]))
    tokens = torch.randint(67, (1, 30))
    for model in (ours, convert.reduce_rank(ours, tokens, 1, 2), convert.reduce_rank(ours, tokens, 1, 1, True)):
        convert.save_pretrained(model, tmp_path)
        again = convert.from_pretrained(str(tmp_path))
        assert torch.equal(again(tokens), model(tokens))
        assert torch.equal(again.generate(tokens, 5, temperature=0), model.generate(tokens, 5, temperature=0))
        frozen = [name for name, p in again.named_parameters() if not p.requires_grad]
        assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]


def test_a_llama_with_a_norm_or_rope_of_ones_own_is_refused(tmp_path):
    for change in ("rope", "norm", "block's norm"):
        ours = convert.llama_to_t6(llama())
        if change == "rope":
            ours.blocks[1].attention.rope = ours.blocks[1].attention.rope._replace(rope_scale=2.0)
        elif change == "norm":
            ours.norm = convert.LlamaNorm(0.5, True)
        else:
            ours.blocks[1].norm = convert.LlamaNorm(0.5, True)
        with pytest.raises(ValueError, match="of its own"):
            convert.save_pretrained(ours, tmp_path)


def test_a_model_converted_block_by_block_is_saved_with_its_layers_ranks(tmp_path):
    model, tokens = converted(), torch.randint(31, (1, 12))
    model.blocks[1].attention.factor_proj.weight.data *= 1.5
    for some in (model, convert.reduce_rank(model, tokens, 2, 1)):
        convert.save_pretrained(some, tmp_path)
        again = convert.from_pretrained(tmp_path)
        assert torch.equal(again(tokens), some(tokens)) and again.config.rank_q == 6
    model.blocks[0].attention = some.blocks[0].attention
    with pytest.raises(ValueError, match="layer 1 has .* of its own"):
        convert.save_pretrained(model, tmp_path)


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = T6(config())
    convert.save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(state, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(convert, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.save_pretrained(T6(config(d_model=32)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_described_or_read_is_refused(tmp_path):
    class Own(TensorProductAttention):
        pass

    with pytest.raises(ValueError, match="attention Own cannot be saved"):
        convert.save_pretrained(T6(config(), attention=Own), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    mixed = T6(config())
    mixed.blocks[0].attention = variants.KeyValueOnly(config())
    with pytest.raises(ValueError, match="layer 1 has .* of its own"):
        convert.save_pretrained(mixed, tmp_path)
    outer = T6(config())
    outer.norm = torch.tanh
    turned = T6(config())
    turned.blocks[1].attention.rope = torch.tanh
    normed = T6(config())
    normed.blocks[1].norm = torch.tanh
    for model in (outer, turned, normed, type("OwnT6", (T6,), {})(config())):
        with pytest.raises(ValueError, match="of its own"):
            convert.save_pretrained(model, tmp_path)
    for name in (tmp_path / "nowhere", "./nowhere", "runs/some/where"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            convert.from_pretrained(name)
    convert.save_pretrained(T6(config()), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b"", weights[:100], b"x" * 100):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors: is damaged"):
            convert.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    good = json.loads((tmp_path / "config.json").read_text())

    def refuse(message, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=message):
            convert.from_pretrained(tmp_path)

    refuse("model_type='llama'.*llama_to_t6", model_type="llama")
    refuse("does not know", attention={"name": "os.system"})
    refuse("does not know", attention={"name": "KeyValueOnly", "d_b": 2})
    refuse("colour.*does not know", sizes={**good["sizes"], "colour": 1})
    refuse("n_head · d_head is not as config.json describes", sizes={**good["sizes"], "n_head": 3})
    refuse("config.json: .*rank_q=0", sizes={**good["sizes"], "rank_q": 0})
    refuse("config.json: is damaged", sizes={name: good["sizes"][name] for name in ("vocab_size", "n_layer")})
    for damaged in ("{}", "", json.dumps(good)[:-20]):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="config.json|model_type"):
            convert.from_pretrained(tmp_path)


def test_parts_of_ones_own_are_not_saved_as_if_they_were_ours(tmp_path):
    def own_block(model):
        model.blocks[1].__class__ = type("OwnBlock", (type(model.blocks[1]),), {"forward": lambda self, x, *_, **__: x})

    for alter, message in (
        (lambda m: setattr(m.blocks[0].mlp, "up_proj", Doubled(24, m.config.d_ff, bias=False)), "up_proj is a Doubled"),
        (lambda m: m.blocks[0].attention.out_proj.register_forward_hook(lambda *a: 2 * a[2]), "out_proj has a hook"),
        (lambda m: setattr(m.blocks[0], "forward", lambda x, *_, **__: x), "blocks.0 has a forward of its own"),
        (lambda m: setattr(m.blocks[0].attention, "attend", lambda *_: None), "attend of its own"),
        (lambda m: setattr(m, "logits", lambda x: x), "a logits of its own"),
        (own_block, "blocks.1 is a OwnBlock"),
        (lambda m: setattr(m.embedding, "max_norm", 0.1), "embedding has max_norm=0.1"),
        (lambda m: m.blocks.__setitem__(1, m.blocks[0]), "blocks.1.* is blocks.0.* again"),
        (lambda m: setattr(m.blocks[0].mlp.up_proj, "weight", m.blocks[0].mlp.gate_proj.weight), "another weight too"),
    ):
        model = wake(T6(config()))
        alter(model)
        with pytest.raises(ValueError, match=message):
            convert.save_pretrained(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_weights_of_two_types_are_opened_in_the_wider(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = wake(T6(config()))
    model.embedding.bfloat16()
    convert.save_pretrained(model, tmp_path)
    for again in (convert.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model):
        for name, weight in again.state_dict().items():
            assert torch.equal(weight.float(), model.state_dict()[name].float())


# ------------------------------------------------------------------------------------- T6 inside transformers

WRAPPED = [
    TensorProductAttention,
    variants.SharedFeatureFactors,
    MultiHeadAttention,
    partial(MultiHeadAttention, n_kv_head=2),
    partial(MultiHeadLatentAttention, d_c=10, d_rope=4),
]
GREEDY = dict(do_sample=False, max_new_tokens=20, pad_token_id=30)


def wrapped(attention=TensorProductAttention, **changes):
    pytest.importorskip("transformers")
    from tpa_minimal.huggingface import T6ForCausalLM

    return T6ForCausalLM(wake(T6(config(**changes), attention=attention))).eval()


def ragged(lengths=(3, 11, 7)):
    """Prompts of these lengths, the same left-padded by token 30, and the mask."""
    prompts = [torch.randint(30, (1, n)) for n in lengths]
    padded, mask = (
        torch.full((len(prompts), max(lengths)), 30),
        torch.zeros(len(prompts), max(lengths), dtype=torch.long),
    )
    for i, prompt in enumerate(prompts):
        padded[i, -prompt.shape[1] :] = prompt
        mask[i, -prompt.shape[1] :] = 1
    return prompts, padded, mask


@pytest.mark.parametrize("attention", WRAPPED)
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(attention):
    model = wrapped(attention)
    prompts, padded, mask = ragged()
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    for prompt, row in zip(prompts, together):
        assert torch.equal(row[-20:], model.model.generate(prompt, 20, temperature=0)[0, -20:])
    beams = model.generate(padded, attention_mask=mask, num_beams=3, **GREEDY)
    for prompt, row in zip(prompts, beams):
        alone = model.generate(prompt, num_beams=3, use_cache=False, **GREEDY)
        assert torch.equal(row[-20:], alone[0, -20:])


def test_the_wrapper_is_the_model_logits_loss_and_gradient():
    model = wrapped().double()
    tokens = torch.randint(31, (2, 12))
    plain = model.model(tokens)
    output = model(tokens, labels=tokens)
    assert torch.equal(output.logits, plain)
    expected = nn.functional.cross_entropy(plain[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected.to(output.loss.dtype))
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    first = model(tokens[:, :5])
    rest = model(tokens[:, 5:], past_key_values=first.past_key_values, logits_to_keep=2).logits
    torch.testing.assert_close(rest, plain[:, -2:], rtol=0, atol=1e-10)


def test_padding_changes_neither_logits_nor_loss():
    model = wrapped().double()
    tokens = torch.randint(31, (1, 8))
    alone = model(tokens, labels=tokens)
    for left, right in ((4, 0), (0, 4), (3, 2)):
        padded = nn.functional.pad(tokens, (left, right), value=50257)  # beyond the vocabulary, as added tokens are
        mask = nn.functional.pad(torch.ones_like(tokens), (left, right))
        labels = nn.functional.pad(tokens, (left, right), value=-100)
        output = model(padded, attention_mask=mask, labels=labels)
        torch.testing.assert_close(output.logits[:, left : left + 8], alone.logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.loss, alone.loss)
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        for position_ids in (counted, torch.arange(8 + left + right)[None]):
            again = model(padded, attention_mask=mask, position_ids=position_ids)
            assert torch.equal(again.logits, output.logits)


def test_padding_is_remembered_where_a_later_call_brings_no_mask():
    model = wrapped().double()
    prompts, padded, mask = ragged()
    past = model(padded, attention_mask=mask).past_key_values
    new = torch.randint(30, (3, 4))
    logits = model(new, past_key_values=past).logits
    for i, prompt in enumerate(prompts):
        alone = model.model(torch.cat((prompt, new[i : i + 1]), 1))[:, -4:]
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=0, atol=1e-10)


def test_a_mask_that_contradicts_the_cache_is_refused():
    model = wrapped().double()
    tokens = torch.randint(30, (2, 7))
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    whole = model(tokens, attention_mask=left).logits[:, -1:]
    last = dict(input_ids=tokens[:, 6:])
    past = model(tokens[:, :6], attention_mask=left[:, :6]).past_key_values
    with pytest.raises(ValueError, match="pads other tokens than the calls that filled the cache"):
        model(**last, past_key_values=past, attention_mask=torch.ones_like(left))
    past.crop(6)
    logits = model(**last, past_key_values=past, attention_mask=left).logits
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-10)
    past = model(tokens[:, :6]).past_key_values
    with pytest.raises(ValueError, match="pads other tokens"):
        model(**last, past_key_values=past, attention_mask=left)


@pytest.mark.parametrize(
    "given,message",
    [
        (dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]])), "with a hole"),
        (dict(attention_mask=torch.tensor([[0, 1, 0, 1, 1, 1]])), "with a hole"),
        (dict(attention_mask=torch.zeros(1, 6)), "row without tokens"),
        (dict(attention_mask=torch.ones(1, 1, 6, 6)), r"attention_mask of shape \(1, 1, 6, 6\): needed is \(1, 6\)"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), use_cache=True), "padding on the right"),
        (dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])), "packed or stretched"),
        (dict(position_ids=torch.tensor([[0, 2, 4, 6, 8, 10]])), "packed or stretched"),
        (dict(position_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])), "packed or stretched"),
        (dict(inputs_embeds=torch.zeros(1, 6, 24)), "inputs_embeds: T6ForCausalLM does not support"),
        (dict(output_attentions=True), "output_attentions: T6ForCausalLM does not support"),
    ],
)
def test_what_t6_cannot_honour_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        wrapped()(torch.randint(31, (1, 6)), **given)


def test_another_cache_is_refused():
    with pytest.raises(ValueError, match="StaticCache: T6 has a cache of its own"):
        wrapped().generate(torch.randint(30, (1, 6)), cache_implementation="static", **GREEDY)


def test_sampling_end_of_text_and_assistants():
    model = wrapped()
    prompt = torch.randint(30, (1, 6))
    plain = model.model.generate(prompt, 20, temperature=0)
    drafting = wrapped(n_layer=1)
    assert torch.equal(model.generate(prompt, assistant_model=drafting, **GREEDY), plain)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), plain)
    assert torch.equal(model.generate(prompt, do_sample=True, top_p=1e-6, max_new_tokens=20, pad_token_id=30), plain)
    end = plain[0, 9].item()
    stop = 6 + plain[0, 6:].tolist().index(end)
    assert torch.equal(model.generate(prompt, eos_token_id=end, **GREEDY), plain[:, : stop + 1])
    torch.manual_seed(0)
    drawn = model.generate(prompt, do_sample=True, top_k=5, temperature=0.7, max_new_tokens=20, pad_token_id=30)
    assert torch.equal(
        drawn, model.model.generate(prompt, 20, top_k=5, temperature=0.7, generator=torch.manual_seed(0))
    )
    long = model.generate(prompt, num_return_sequences=2, do_sample=True, max_new_tokens=90, pad_token_id=30)
    assert long.shape == (2, 96)  # the cache grew


@pytest.mark.parametrize("attention", KINDS)
def test_automodel_opens_what_we_saved_and_we_what_it_saves(attention, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = wake(T6(config(), attention=attention)).bfloat16()
    convert.save_pretrained(model, tmp_path, tokenizer="gpt2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(31, (2, 9))
    assert torch.equal(theirs(tokens).logits, model(tokens)) and theirs.dtype == torch.bfloat16
    assert theirs.config.tokenizer == "gpt2" and theirs.config.vocab_size == 31
    theirs.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob(".*"))
    assert torch.equal(convert.from_pretrained(tmp_path / "again")(tokens), model(tokens))
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert wide.dtype == torch.float32 and wide.config.tokenizer == "gpt2"


def test_a_runs_folder_and_a_converted_llama_open_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(1, 31, (1, 9))
    models = {step: wake(T6(config())) for step in (20, 100, 3)}
    for step, model in models.items():
        convert.save_pretrained(model, tmp_path / f"checkpoint-{step:08d}")
    (tmp_path / "checkpoint-00000900").mkdir()  # killed before anything was in it
    (tmp_path / "checkpoint-notes").mkdir()
    assert torch.equal(convert.from_pretrained(tmp_path)(tokens), models[100](tokens))
    (tmp_path / "config.json").write_text((tmp_path / "checkpoint-00000100" / "config.json").read_text())
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, models[100](tokens))
    ours = convert.llama_to_t6(llama(**SHAPES[5]))
    convert.save_pretrained(ours, tmp_path / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(theirs(tokens).logits, ours(tokens))
    assert [p.requires_grad for p in theirs.model.parameters()] == [p.requires_grad for p in ours.parameters()]
    run = dict(max_new_tokens=9, do_sample=False)
    assert torch.equal(theirs.generate(tokens, **run), ours.generate(tokens, 9, temperature=0))


def test_an_interrupted_save_by_transformers_leaves_the_earlier_one(tmp_path, monkeypatch):
    wrapped().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    import transformers.modeling_utils

    def fail(state, path, **_):
        open(path, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        wrapped(d_model=32).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options", [dict(max_shard_size="5KB"), dict(variant="fp16")])
def test_weights_in_other_files_than_are_read_are_not_written(options, tmp_path):
    model, tokens = wrapped(), torch.randint(31, (1, 9))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a T6 is saved as one model.safetensors"):
        wrapped().save_pretrained(tmp_path, **options)
    assert torch.equal(convert.from_pretrained(tmp_path)(tokens), model(tokens).logits)


def test_loaded_weights_are_not_the_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = wake(T6(config())), torch.randint(31, (1, 9))
    convert.save_pretrained(model, tmp_path)
    again, theirs = convert.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\0" * 4000)
        file.flush()
        assert torch.equal(again(tokens), model(tokens)) and torch.equal(theirs(tokens).logits, model(tokens))
    os.truncate(tmp_path / "model.safetensors", 100)
    assert torch.equal(again(tokens), model(tokens)) and torch.equal(theirs(tokens).logits, model(tokens))


CRAFTED = [
    (dict(n_layer=10**9), "n_layer is not as config.json describes it: 1000000000, but 2"),
    (dict(d_ff=10**7), "d_ff is not as config.json"),
    (dict(vocab_size=10**12), "vocab_size, d_model is not as config.json"),
    (dict(rank_k=10**15), "describes model.blocks.0.attention.factor_proj.weight|damaged"),
    (dict(n_layer="2"), "n_layer is not as"),
    (dict(rope_base="x"), "config.json: is damaged"),
    (dict(max_len=-1), "max_len=-1"),
]


@pytest.mark.parametrize("changes,message", CRAFTED)
def test_a_crafted_config_is_refused_before_anything_is_built(changes, message, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert.save_pretrained(T6(config()), tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    found["sizes"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(found))
    for read in (convert.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(norm_eps=float("nan")), "norm_eps=nan"),
        (dict(norm_eps=-0.5), "norm_eps=-0.5"),
        (dict(rope_scale=float("inf")), "rope_scale=inf"),
        (dict(inv_freq=[float("nan")] * 8), "inv_freq: finite numbers"),
        (dict(inv_freq=["1"] * 8), "is damaged"),
    ],
)
def test_crafted_extras_of_a_llama_are_refused(changes, message, tmp_path):
    convert.save_pretrained(convert.llama_to_t6(llama()), tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    found["llama"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        convert.from_pretrained(tmp_path)


def test_numbers_of_numpy_are_saved(tmp_path):
    model, tokens = wake(T6(config(rope_base=np.float32(500)))), torch.randint(31, (1, 9))
    convert.save_pretrained(model, tmp_path)
    assert torch.equal(convert.from_pretrained(tmp_path)(tokens), model(tokens))


def test_weights_of_another_kind_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    convert.save_pretrained(T6(config()), tmp_path)
    good = {name: weight.clone() for name, weight in load_file(tmp_path / "model.safetensors").items()}
    name = "model.blocks.1.mlp.up_proj.weight"
    nan = good[name].clone()
    nan[3, 5] = torch.nan
    for weight, message in ((good[name].long(), "is I64"), (good[name][:5].clone(), "describes"), (nan, "holds NaN")):
        save_file({**good, name: weight}, tmp_path / "model.safetensors")
        for read in (convert.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=message):
                read(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json: is not JSON"):
        convert.from_pretrained(tmp_path)


def test_trainer_trains_saves_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"input_ids": t, "labels": t} for t in torch.randint(31, (16, 12))]
    options = dict(output_dir=tmp_path, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    options |= dict(save_steps=2, learning_rate=1e-2, logging_strategy="no", save_only_model=False)
    model = wrapped()
    before = model(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss
    arguments = transformers.TrainingArguments(max_steps=4, **options)
    transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data).train()
    after = model.eval()(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss
    assert after < before
    last = convert.from_pretrained(tmp_path)
    assert torch.equal(last(data[0]["input_ids"][None]), model(data[0]["input_ids"][None]).logits)
    other = wrapped()
    trainer = transformers.Trainer(other, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(other.eval()(data[0]["input_ids"][None]).logits, model(data[0]["input_ids"][None]).logits)


def test_an_adapter_is_trained_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    model = wrapped(partial(MultiHeadLatentAttention, d_c=10, d_rope=4))
    tokens, base = torch.randint(31, (2, 9)), convert.copy.deepcopy(model)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_up", "out_proj"], r=2)
    adapted = peft.get_peft_model(model, lora)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=10.0)
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    logits = adapted.eval()(input_ids=tokens).logits
    assert not torch.allclose(logits, base(tokens).logits, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(convert.copy.deepcopy(base), tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, logits)
    text = again.generate(input_ids=tokens, **GREEDY)
    merged = again.merge_and_unload()
    assert torch.equal(merged.generate(tokens, **GREEDY), text)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_up"], r=2)
    with pytest.raises(ValueError, match="k_up is a Linear: .* target_modules"):
        peft.get_peft_model(base, lora)(input_ids=tokens)
    with pytest.raises(ValueError, match="merge or remove adapters|which config.json cannot|does not describe"):
        base.save_pretrained(tmp_path / "whole")


def test_more_tokens_are_added():
    model = wrapped()
    model.resize_token_embeddings(40, mean_resizing=False)
    assert (
        model(torch.tensor([[39, 1]])).logits.shape[-1] == 40
        and convert.describe(model.model)["sizes"]["vocab_size"] == 40
    )


def test_importing_imports_no_transformers_and_registers_all_the_same(tmp_path):
    pytest.importorskip("transformers")
    convert.save_pretrained(wake(T6(config())), tmp_path)
    program = """
import sys, tpa_minimal.huggingface as convert
convert.from_pretrained(sys.argv[1])
assert not {"transformers", "peft", "huggingface_hub"} & sys.modules.keys()
from transformers import AutoConfig
assert AutoConfig.from_pretrained(sys.argv[1]).hidden_size == 24
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])) is convert.T6ForCausalLM
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300)


@pytest.mark.parametrize("version", ["4.57.1", "5.9.0"])
def test_an_old_transformers_is_refused_by_name(version, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", version)
    for function in (lambda: convert.T6ForCausalLM, lambda: convert.llama_to_t6(llama())):
        monkeypatch.delitem(vars(convert), "T6ForCausalLM", raising=False)
        with pytest.raises(ImportError, match=f"transformers {version}: needed is 5.20 or newer"):
            function()


class LoopbackHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as pushing and pulling one small repository takes; files are kept in memory."""

    protocol_version = "HTTP/1.1"
    repository, files, commit, fails = "someone/tiny-t6", {}, "0" * 40, False

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            found = {"url": f"http://{self.headers['Host']}/{self.repository}"}
        elif self.path == f"/api/models/{self.repository}/preupload/main":
            files = json.loads(body)["files"]
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        else:
            assert self.path == f"/api/models/{self.repository}/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {
                "commitUrl": f"http://{self.headers['Host']}/{self.repository}/commit/{self.commit}",
                "commitOid": self.commit,
            }
        self.answer(json.dumps(found).encode(), Content_Type="application/json")

    def do_GET(self):
        name = self.path.removeprefix(f"/{self.repository}/resolve/main/")
        if name not in self.files:
            return self.answer(status=404, X_Error_Code="EntryNotFound")
        if self.fails and self.command == "GET" and name == "model.safetensors":  # in the middle of the file
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.files[name])))
            self.end_headers()
            self.wfile.write(self.files[name][:1000])
            self.close_connection = True
            return
        self.answer(self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"')

    do_HEAD = do_GET


@contextlib.contextmanager
def loopback_hub(folder, **changes):
    """The environment of a process that takes a loopback server for the hub and `folder` for its cache."""
    hub = type("Hub", (LoopbackHub,), {"files": {}, **changes})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(folder), HF_TOKEN="hf_loopback")
    own |= dict(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1")
    try:
        yield hub, dict(os.environ, **own)
    finally:
        server.shutdown()
        server.server_close()


def test_pushed_to_a_hub_and_pulled_from_it(tmp_path):
    """The calls that users make, huggingface_hub's client included."""
    pytest.importorskip("transformers")
    program = """
import torch
from tpa_minimal import variants, huggingface as convert
from tpa_minimal.tpa import T6, T6Config
config = T6Config(vocab_size=31, n_layer=2, d_model=24, n_head=6, d_head=8, max_len=64)
model = T6(config, attention=variants.SharedFeatureFactors)
print(convert.push_to_hub(model, "someone/tiny-t6"))
again = convert.from_pretrained("someone/tiny-t6")
tokens = torch.arange(20)[None]
assert torch.equal(again(tokens), model(tokens)) and again.config == config
from transformers import AutoModelForCausalLM
theirs = AutoModelForCausalLM.from_pretrained("someone/tiny-t6")
assert torch.equal(theirs(tokens).logits, model(tokens)) and theirs.name_or_path == "someone/tiny-t6"
"""
    with loopback_hub(tmp_path) as (hub, environment):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"/someone/tiny-t6/commit/{'0' * 40}")
    assert sorted(hub.files) == ["config.json", "model.safetensors"]


def test_a_hub_that_fails_in_the_middle_of_a_pull_is_one_line_and_leaves_nothing_half(tmp_path):
    pytest.importorskip("huggingface_hub")
    convert.save_pretrained(T6(config()), tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    program = """
from tpa_minimal import huggingface as convert
try:
    print(convert.from_pretrained("someone/tiny-t6").num_parameters())
except OSError as error:
    print(type(error).__name__, error)
"""
    printed = []
    with loopback_hub(tmp_path / "cache", files=files, fails=True) as (hub, environment):
        for hub.fails in (True, False):
            done = subprocess.run(
                [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
    assert printed[0].startswith("OSError someone/tiny-t6: no folder here, and could not be pulled from the hub (")
    assert printed[0].count("\n") == 1 and printed[1] == f"{T6(config()).num_parameters()}\n"


def test_layers_with_one_rope_base_of_their_own_are_saved_exactly(tmp_path):
    tokens = torch.arange(30)[None]
    model = wake(T6(config(), attention=lambda c: TensorProductAttention(replace(c, rope_base=77.0))))
    convert.save_pretrained(model, tmp_path)
    assert torch.equal(convert.from_pretrained(tmp_path)(tokens), model(tokens))
    model.blocks[1].attention.rope = model.blocks[1].attention.rope._replace(base=78.0)
    with pytest.raises(ValueError, match="layer 1 has rope of its own"):
        convert.save_pretrained(model, tmp_path)
