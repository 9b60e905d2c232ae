"""What a training run is to do: its settings, where they come from, and every check that needs no data.

Nothing is written here. A value that cannot work is a SettingError, whose one line names it, the rule and the remedy.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.experiments import data
from tpa_minimal.experiments.checkpoint import (
    STATE,
    SettingError,
    checkpoint_names,
    latest_checkpoint,
    read_state,
    unreadable,
)
from tpa_minimal.tpa import T6Config, TensorProductAttention
from tpa_minimal.variants import KeyValueOnly

# The layers to choose from, by `memory.py`'s names for them.
ATTENTIONS: dict[str, Callable[[T6Config], nn.Module]] = {
    "tpa": TensorProductAttention,
    "tpa-kv-only": KeyValueOnly,
    "mha": MultiHeadAttention,
    "mqa": functools.partial(MultiHeadAttention, n_kv_head=1),
    "gqa": functools.partial(MultiHeadAttention, n_kv_head=2),
    "mla": MultiHeadLatentAttention,
}

# What a preset trains with where nothing else is asked for. The paper's sizes take App. H's batch and learning rate,
# for one pass over the 10 billion tokens of FineWeb-Edu's sample.
_PAPER = dict(tokens=10_000_000_000, steps=20_000, batch_size=480, seq_len=1024)
DEFAULTS = {
    "tiny": dict(tokens=2_000_000, steps=300, batch_size=16, seq_len=128, lr=3e-3),
    "small-124M": dict(_PAPER, lr=6e-4),
    "medium-353M": dict(_PAPER, lr=3e-4),
    "large-773M": dict(_PAPER, lr=2e-4),
    "xl-1.5B": dict(_PAPER, lr=1e-4),
}

EVAL_TOKENS = 16_384  # validation tokens per evaluation, or one batch if that is more
MAX_LEN = 2**24  # positions of a model
MAX_LOGITS = 2**29  # a process computes at most this many logits at a time (2 GiB in float32), by accumulation


@dataclass(frozen=True)
class TrainConfig:
    """Train a T6 model; write checkpoints, metrics.jsonl and a loss curve to a folder.

    None stands for the run's own value on resuming, else for the preset's (see DEFAULTS); --resume needs no other
    option than --out. The corpus does not depend on `seed`; the initial weights and the order of the batches do.
    """

    out: str | Path | None = None
    """folder of the run (runs/PRESET-ATTENTION)"""
    data: str | None = None
    """auto, fineweb-edu, lessons, or a file or folder of parquet, JSON lines or text"""
    tokens: int | None = None
    """tokens of text to prepare (2,000,000 for tiny)"""
    tokenizer: str | None = None
    """gpt2 or lessons (gpt2 for real text, lessons for the lessons)"""
    preset: str | None = None
    """size of the model and its training (tiny)"""
    attention: str | None = None
    """tpa, tpa-kv-only, mha, mqa, gqa or mla, with TPA's number of parameters per layer; or module:Class of your own"""
    steps: int | None = None
    """updates of the weights (300 for tiny)"""
    batch_size: int | None = None
    """sequences per update, over all processes (16 for tiny)"""
    seq_len: int | None = None
    """tokens per sequence (128 for tiny)"""
    lr: float | None = None
    """highest learning rate (0.003 for tiny)"""
    seed: int | None = None
    """of the initial weights and the order of the batches (0)"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: str | None = None
    """auto, float32, bfloat16 or float16; auto is autocast in what the GPU has, float32 on a CPU"""
    compile: bool = False
    """use torch.compile"""
    eval_every: int | None = None
    """steps between evaluations on held-out documents (a tenth of the steps)"""
    accumulation: int | None = None
    """compute each batch in this many parts (as many as memory needs)"""
    init_from: str | None = None
    """start from the weights of a run, a saved model or a hub's "user/name" """
    resume: bool = False
    """continue the run in --out from its last checkpoint"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """change a field of the model's configuration: --set rank_k=1 --set init=authors"""
    changes: tyro.conf.Suppress[Mapping] = field(default_factory=dict)  # the same from Python, and what `set` becomes


# These say how and where a run goes on, not what it computes: they may differ when it is resumed.
FREE = ("out", "device", "compile", "accumulation", "resume", "set")
_KINDS = {
    **dict.fromkeys(("tokens", "steps", "batch_size", "seq_len", "seed", "eval_every"), int),
    **dict.fromkeys(("data", "tokenizer", "preset", "attention", "dtype"), str),
    "lr": (int, float),
    "changes": dict,
    "init_from": (str, type(None)),
}


def own_settings(checkpoint: Path, state: dict) -> dict:
    """The settings that a checkpoint's state holds. Raises SettingError unless they are those of a run."""
    settings = state["settings"]
    wrong = sorted(settings.keys() ^ _KINDS.keys()) or [
        name for name, kind in _KINDS.items() if not isinstance(settings[name], kind) or settings[name] is True
    ]
    if not wrong and (settings["dtype"] == "float16") != bool(state["scaler"]):
        wrong = ["float16 has a loss scale, and nothing else has"]
    if wrong or state["step"] > settings["steps"]:
        raise unreadable(checkpoint / STATE, f"settings: {', '.join(wrong) or 'fewer steps than were done'}")
    try:
        check_preset(settings["preset"])
        check_values(settings)
    except SettingError as error:
        raise unreadable(checkpoint / STATE, error) from error
    return settings


def settle(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """Fill in every None, and find the checkpoint to resume from, if any; writes nothing.

    Raises SettingError for a value that cannot work, for a folder in use, and for settings other than the run's own.
    """
    preset = config.preset or "tiny"
    check_preset(preset)
    find_attention(config.attention or "tpa")
    out = free_folder(config, Path("runs", f"{preset}-{(config.attention or 'tpa').replace(':', '.')}"))
    checkpoint = latest_checkpoint(out) if config.resume else None
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    given["changes"] = {**config.changes, **parsed_changes(config.set)}
    given = {name: value for name, value in given.items() if value not in (None, "auto", {}, ())} | {"out": out}
    if given.get("data") not in (None, "fineweb-edu", "lessons"):
        given["data"] = os.path.realpath(os.path.expanduser(given["data"]))
        if out.resolve().is_relative_to(given["data"]) and Path(given["data"]).is_dir():
            remedy = "the run's own files would become data; choose an --out elsewhere"
            raise SettingError(f"--out {out}: lies inside --data {given['data']}, so {remedy}")
    own = own_settings(checkpoint, read_state(checkpoint, check_sums=False)) if checkpoint else {}
    if ":" in own.get("attention", "") and config.attention is None:  # a file does not choose what is imported
        raise SettingError(f"--attention: the run in {out} has a layer of its own; add --attention {own['attention']}")
    for name, value in given.items():
        if name in own and name not in FREE and value != own[name]:
            flag = "--set" if name == "changes" else "--" + name.replace("_", "-")
            raise SettingError(
                f"{flag} {value}: the run in {out} was started with {own[name]}; "
                f"leave {flag} out to continue that run, or choose another --out"
            )
    chosen = {"data": "auto", "preset": preset, "attention": "tpa", "seed": 0, **DEFAULTS[preset], **own, **given}
    chosen.setdefault("eval_every", max(1, chosen["steps"] // 10))
    check_values(chosen)
    device = find_device(chosen.get("device", "auto"))
    chosen.setdefault("dtype", natural_dtype(device))
    dtypes = ("float32", "bfloat16") + (("float16",) if device.type == "cuda" else ())
    if chosen["dtype"] not in dtypes:
        raise SettingError(f"--dtype {chosen['dtype']}: choose auto, float32, bfloat16 or, on a GPU, float16")
    return TrainConfig(**{**chosen, "device": str(device), "set": ()}), checkpoint


def free_folder(config: TrainConfig, default: Path) -> Path:
    """The run's folder. Raises SettingError if it cannot be written to, or holds a run that is not to be resumed."""
    for name in ("out", "data"):
        if getattr(config, name) is not None and not str(getattr(config, name)):
            raise SettingError(f"--{name} '': is empty; name one, or leave --{name} out")
    out = Path(config.out) if config.out is not None else default
    try:  # before any long work
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise SettingError(f"--out {out}: {there} is a file; choose a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{there} cannot be written to")
    except OSError as error:
        raise SettingError(f"--out {out}: {error}; choose another folder, or change its permissions") from error
    if not config.resume and any((out / name).exists() for name in ("metrics.jsonl", *checkpoint_names(out))):
        raise SettingError(f"--out {out}: already holds a run; add --resume to continue it, or choose another folder")
    return out


def parsed_changes(assignments: tuple[str, ...]) -> dict:
    """`set`'s texts as values by field: ("rank_k=1", "init=authors") -> {"rank_k": 1, "init": "authors"}."""
    changes, names = {}, {f.name: f.type for f in fields(T6Config)}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise SettingError(f"--set {text}: write FIELD=VALUE with one of the fields {', '.join(names)}")
        try:
            changes[name] = value if name == "init" else float(value) if name == "rope_base" else int(value)
        except ValueError as error:
            raise SettingError(f"--set {text}: {value!r} is not a number") from error
    return changes


def check_preset(name: str) -> None:
    """Raise SettingError for a preset that does not exist."""
    if name not in DEFAULTS:
        raise SettingError(f"--preset {name}: does not exist; choose one of {', '.join(DEFAULTS)}")


def check_values(chosen: dict) -> None:
    """Raise SettingError for the first value that cannot work."""
    for name in ("tokens", "steps", "batch_size", "seq_len", "eval_every", "accumulation"):
        value = chosen.get(name, 1)
        if not isinstance(value, int) or not 1 <= value < 2**63:
            text = str(value)[:40]
            raise SettingError(f"--{name.replace('_', '-')} {text}: must be a whole number, 1 or more, and below 2^63")
    if chosen["batch_size"] > chosen["tokens"]:
        raise SettingError(f"--batch-size {chosen['batch_size']}: has more sequences than --tokens {chosen['tokens']}")
    if chosen.get("tokenizer") not in (None, *data.TOKENIZERS):
        raise SettingError(f"--tokenizer {chosen['tokenizer']}: choose one of {', '.join(data.TOKENIZERS)}")
    if not 0 <= chosen["seed"] < 2**63:
        raise SettingError(f"--seed {chosen['seed']}: must be 0 or more, and below 2^63")
    if not 0 < chosen["lr"] < 1e300:  # a file may hold whole numbers beyond every float
        rate = DEFAULTS[chosen["preset"]]["lr"]
        raise SettingError(f"--lr {chosen['lr']}: must be a positive number; {rate} is the preset's")


def accumulation(settings: TrainConfig, processes: int, vocab_size: int) -> int:
    """In how many parts each process computes its share of a batch. Raises SettingError if it cannot be divided so."""
    share, rest = divmod(settings.batch_size, processes)
    if rest:
        raise SettingError(f"--batch-size {settings.batch_size}: must be a multiple of the {processes} processes")
    if settings.accumulation is None:
        fitting = max(1, MAX_LOGITS // (settings.seq_len * vocab_size))
        return next(parts for parts in range(math.ceil(share / fitting), share + 1) if share % parts == 0)
    if share % settings.accumulation:
        raise SettingError(
            f"--accumulation {settings.accumulation}: must divide the {share} sequences of a process in each step"
        )
    return settings.accumulation


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is a GPU, else the CPU. One GPU per process."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    kind = name.partition(":")[0]
    if kind not in available:
        raise SettingError(f"--device {name}: choose auto, cpu, cuda or mps")
    if not available[kind]:
        raise SettingError(f"--device {name}: PyTorch finds none here; use cpu, or install a PyTorch that supports it")
    if kind == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingError("--device mps: cannot be shared by the processes of torchrun; start one process")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def natural_dtype(device: torch.device) -> str:
    """bfloat16 on GPUs that compute in it, float16 on older ones (a T4 merely emulates bfloat16), else float32."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def find_attention(name: str) -> Callable[[T6Config], nn.Module]:
    """The layer called `name`, or the class "module:Class". Raises SettingError if there is none."""
    if name in ATTENTIONS:
        return ATTENTIONS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        listed = ", ".join(ATTENTIONS)
        raise SettingError(f"--attention {name}: does not exist; choose one of {listed}, or module:Class of your own")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"--attention {name}: cannot be imported ({error}); is it on PYTHONPATH?") from error
