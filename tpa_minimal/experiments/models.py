"""The model of a training run: new, from another one's weights, or from a checkpoint."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tpa_minimal import huggingface
from tpa_minimal.experiments import data
from tpa_minimal.experiments.checkpoint import SettingError, latest_checkpoint, load_weights, read_state
from tpa_minimal.experiments.settings import ATTENTIONS, MAX_LEN, TrainConfig, find_attention, own_settings
from tpa_minimal.memory import Layer, match_heads
from tpa_minimal.tpa import T6, T6Config


def equal_parameters(attention: str, config: T6Config) -> T6Config:
    """`config` with the head count that brings the named attention's layer nearest to its TPA layer's parameters.

    Raises ValueError where even the smallest such layer has more.
    """
    if attention not in ATTENTIONS or attention == "tpa":
        return config
    ranks = {name: getattr(config, name) for name in ("rank_q", "rank_k", "rank_v")}
    parameters = Layer("tpa", config.d_model, config.n_head, config.d_head, **ranks).parameters
    sizes = {"gqa": {"n_kv_head": 2}, "tpa-kv-only": ranks}.get(attention, {})
    return replace(config, n_head=match_heads(attention, parameters, config.d_model, config.d_head, **sizes))


def new_model(config: T6Config, make: Callable[[T6Config], nn.Module], seed: int) -> T6:
    """A T6 with the attention layers that `make` makes, its weights drawn from `seed`.

    The backbone's weights are the same for every attention of equal n_layer and d_model: each attention layer draws
    from a generator of its own.
    """
    layers = iter(range(2**31))

    def attention(config: T6Config) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {next(layers)}".encode()).digest()[:7], "big"))
            return make(config)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        return T6(config, attention)


def build_model(settings: TrainConfig, vocab_size: int) -> T6:
    """The model that settled `settings` describe, as `new_model` draws it from `settings.seed`.

    Raises SettingError where the configuration cannot work.
    """
    make = find_attention(settings.attention)
    try:
        config = T6Config.preset(settings.preset, **{"vocab_size": vocab_size, **settings.changes})
        config = replace(config, max_len=max(config.max_len, settings.seq_len))
        if config.max_len > MAX_LEN:
            raise ValueError(f"max_len={config.max_len}: at most {MAX_LEN:,} makes sense")
        return new_model(equal_parameters(settings.attention, config), make, settings.seed)
    except (TypeError, ValueError, AttributeError) as error:
        raise SettingError(f"--preset {settings.preset} --attention {settings.attention}: {error}") from error


def initial_model(settings: TrainConfig, vocab_size: int) -> T6:
    """A new model, or the one that `settings.init_from` names. Raises SettingError if that does not fit."""
    if settings.init_from is None:
        return build_model(settings, vocab_size)
    try:
        model = huggingface.from_pretrained(settings.init_from)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError(f"--init-from {settings.init_from}: {str(error)[:300]}") from error
    c = model.config
    if c.vocab_size < vocab_size or c.max_len < settings.seq_len:
        raise SettingError(
            f"--init-from {settings.init_from}: has vocab_size={c.vocab_size} and max_len={c.max_len} where the data "
            f"needs {vocab_size} and --seq-len {settings.seq_len}; choose its own --tokenizer, or a shorter --seq-len"
        )
    return model.float().train()


class Loaded(NamedTuple):
    """A trained model with what belongs to it."""

    model: T6
    tokenizer: "tiktoken.Encoding"  # noqa: F821, imported by data.py only where it is used
    settings: TrainConfig
    step: int


def load_run_model(settings: TrainConfig, state: dict, checkpoint: Path) -> T6:
    """The model of a checkpoint, with its weights."""
    if settings.init_from is not None:  # the shapes are those of the model it started from
        return huggingface.from_pretrained(checkpoint).train()
    n_layer = settings.changes.get("n_layer", T6Config.preset(settings.preset).n_layer)
    return load_weights(functools.partial(build_model, settings, state["vocab_size"]), n_layer, checkpoint)


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu", attention: str | None = None) -> Loaded:
    """The model, tokenizer, settings and step of a run's last checkpoint, or of the checkpoint folder given.

    attention: the "module:Class" of a run with a layer of its own, which no file may choose. Reads safetensors and
    JSON alone, so nothing in it is executed. Raises SettingError where there is none, or where it is damaged.
    """
    folder = Path(folder)
    checkpoint = folder if (folder / "state.json").exists() else latest_checkpoint(folder)
    if checkpoint is None:
        raise SettingError(f"{folder}: holds no checkpoint; train with --out {folder} first")
    state = read_state(checkpoint)
    settings = TrainConfig(**own_settings(checkpoint, state), out=checkpoint.parent)
    if ":" in settings.attention and attention != settings.attention:
        raise SettingError(f"{folder}: was trained with {settings.attention}; pass attention={settings.attention!r}")
    model = load_run_model(settings, state, checkpoint)
    return Loaded(model.to(device), data.load_tokenizer(state["tokenizer"]), settings, state["step"])
