"""Train a T6 on real text: `python -m tpa_minimal.experiments.train`, or `train(TrainConfig(...))` from Python.

The recipe is the paper's (App. H): AdamW (0.9, 0.95) with decay 0.1 on matrices, the embedding among them since it
is the output matrix too; linear warm-up, then a cosine; gradients clipped to norm 1. A run lives in one folder:

    metrics.jsonl        one line per step: step, tokens, train_loss, and val_loss where evaluated
    loss.png             the curve of these losses
    checkpoint-00000300/ model.safetensors, training.safetensors (AdamW's moments, random states), state.json

Line `step` of the metrics is about the weights after that many updates, so line 0 is the untrained model and
a run of N steps has N + 1 lines. A step depends on the weights, the moments and its own number alone: a run that was
interrupted or killed continues from its last checkpoint to the very losses it would have had (on a CPU bit by bit,
with as many threads and processes). A checkpoint appears under its name by one rename, when all of it is on disk.

On several GPUs: `torchrun --nproc-per-node 8 -m tpa_minimal.experiments.train ...`. Each process takes its share of
every batch, so `--batch-size` means the same whatever their number.

Exit status: 0 finished; 2 a wrong value; 1 the run failed (a full disk, a loss that is not finite);
130 after Ctrl-C and 143 after SIGTERM, with a checkpoint saved.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.experiments import data
from tpa_minimal.memory import Layer, match_heads
from tpa_minimal.tpa import T6, Cache, T6Config, TensorProductAttention
from tpa_minimal.variants import KeyValueOnly

# ------------------------------------------------------------------------------------------------- what to train

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
MAX_LOGITS = 2**29  # a process computes at most this many logits at a time (2 GiB in float32), by accumulation
MIN_CHECKPOINT_SECONDS = 5.0  # between checkpoints; more where writing one takes long, see `train`


class SettingError(ValueError):
    """A setting that cannot work: the message names the value, the rule and the remedy."""


class TrainError(RuntimeError):
    """A run that cannot go on; its last checkpoint is intact."""


class DivergedError(TrainError):
    """A loss that is not finite."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. None stands for the run's own value on resuming, else for the preset's (see DEFAULTS).

    `batch_size` is the global batch in sequences, over all processes and accumulation steps. `accumulation` is the
    number of parts in which a process computes a batch: as many as memory needs, by default. `changes` are applied to
    the preset: TrainConfig(changes={"rank_k": 1, "rank_v": 1}). The corpus does not depend on `seed`; the initial
    weights and the order of the batches do.
    """

    out: str | Path | None = None  # runs/PRESET-ATTENTION
    data: str | None = None  # "auto", "fineweb-edu", "lessons" or the path of files
    tokens: int | None = None
    tokenizer: str | None = None  # "gpt2" or "lessons"; what `data.prepare` takes for the source
    preset: str | None = None  # "tiny"
    attention: str | None = None  # "tpa"
    steps: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    lr: float | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str | None = None  # "auto", "float32" or "bfloat16" (autocast)
    compile: bool = False
    eval_every: int | None = None  # a tenth of the steps
    accumulation: int | None = None
    resume: bool = False
    changes: Mapping = field(default_factory=dict)


# These say how and where a run goes on, not what it computes: they may differ when it is resumed.
_FREE = ("out", "device", "compile", "accumulation", "resume")


def settle(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """Fill in every None, and find the checkpoint to resume from, if any; writes nothing.

    Raises SettingError for a value that cannot work, for a folder in use, and for settings other than the run's own.
    """
    preset, attention = config.preset or "tiny", config.attention or "tpa"
    if preset not in DEFAULTS:
        raise SettingError(f"--preset {preset}: does not exist; choose one of {', '.join(DEFAULTS)}")
    if attention not in ATTENTIONS:
        raise SettingError(f"--attention {attention}: does not exist; choose one of {', '.join(ATTENTIONS)}")
    for name in ("out", "data"):
        if getattr(config, name) is not None and not str(getattr(config, name)):
            raise SettingError(f"--{name} '': is empty; name one, or leave --{name} out")
    out = Path(config.out) if config.out is not None else Path("runs", f"{preset}-{attention}")
    try:  # before any long work
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise SettingError(f"--out {out}: {there} is a file; choose a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{there} cannot be written to")
    except OSError as error:
        raise SettingError(f"--out {out}: {error}; choose another folder, or change its permissions") from error
    if not config.resume and any((out / name).exists() for name in ("metrics.jsonl", *_checkpoint_names(out))):
        raise SettingError(f"--out {out}: already holds a run; add --resume to continue it, or choose another folder")

    checkpoint = latest_checkpoint(out) if config.resume else None
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    given = {name: value for name, value in given.items() if value not in (None, "auto", {})} | {"out": out}
    if given.get("data") not in (None, "fineweb-edu", "lessons"):
        given["data"] = os.path.realpath(os.path.expanduser(given["data"]))
    own = _read_state(checkpoint)["settings"] if checkpoint else {}
    for name, value in given.items():
        if name in own and name not in _FREE and value != own[name]:
            flag = "--" + name.replace("_", "-")
            raise SettingError(
                f"{flag} {value}: the run in {out} was started with {own[name]}; "
                f"leave {flag} out to continue that run, or choose another --out"
            )
    chosen = {"data": "auto", "preset": preset, "attention": attention, "seed": 0, **DEFAULTS[preset], **own, **given}
    chosen.setdefault("eval_every", max(1, chosen["steps"] // 10))

    for name in ("tokens", "steps", "batch_size", "seq_len", "eval_every", "accumulation"):
        value = chosen.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise SettingError(f"--{name.replace('_', '-')} {value}: must be a whole number, 1 or more")
    if chosen.get("tokenizer") not in (None, *data.TOKENIZERS):
        raise SettingError(f"--tokenizer {chosen['tokenizer']}: choose one of {', '.join(data.TOKENIZERS)}")
    if not 0 <= chosen["seed"] < 2**63:
        raise SettingError(f"--seed {chosen['seed']}: must be 0 or more, and below 2^63")
    if not 0 < chosen["lr"] < math.inf:
        raise SettingError(f"--lr {chosen['lr']}: must be a positive number; {DEFAULTS[preset]['lr']} is the preset's")
    device = _find_device(chosen.get("device", "auto"))
    if "dtype" not in chosen:
        chosen["dtype"] = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if chosen["dtype"] not in ("float32", "bfloat16"):
        raise SettingError(f"--dtype {chosen['dtype']}: choose auto, float32 or bfloat16")
    return TrainConfig(**{**chosen, "device": str(device)}), checkpoint


def _find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is a GPU, else the CPU. One GPU per process."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    kind = name.partition(":")[0]
    if kind not in available:
        raise SettingError(f"--device {name}: choose auto, cpu, cuda or mps")
    if not available[kind]:
        raise SettingError(f"--device {name}: PyTorch finds none here; use cpu, or install a PyTorch that supports it")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def equal_parameters(attention: str, config: T6Config) -> T6Config:
    """`config` with the head count that brings the named attention's layer nearest to its TPA layer's parameters.

    Raises ValueError where even the smallest such layer has more.
    """
    if attention == "tpa":
        return config
    ranks = {name: getattr(config, name) for name in ("rank_q", "rank_k", "rank_v")}
    parameters = Layer("tpa", config.d_model, config.n_head, config.d_head, **ranks).parameters
    sizes = {"gqa": {"n_kv_head": 2}, "tpa-kv-only": ranks}.get(attention, {})
    return replace(config, n_head=match_heads(attention, parameters, config.d_model, config.d_head, **sizes))


def build_model(settings: TrainConfig, vocab_size: int) -> T6:
    """The model that settled `settings` describe, with weights drawn from torch's global random generator.

    Raises SettingError where the configuration cannot work.
    """
    try:
        config = T6Config.preset(settings.preset, **{"vocab_size": vocab_size, **settings.changes})
        config = replace(config, max_len=max(config.max_len, settings.seq_len))
        return T6(equal_parameters(settings.attention, config), ATTENTIONS[settings.attention])
    except (TypeError, ValueError) as error:
        raise SettingError(f"--preset {settings.preset} --attention {settings.attention}: {error}") from error


# --------------------------------------------------------------------------------------------------- the recipe


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps (2,000 at most), then a cosine down to peak / 20 (App. H)."""
    warmup = min(2000, math.ceil(steps / 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with decay 0.1 on matrices, the tied embedding included, and none on vectors (App. H)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=fused)


def loss_sum(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of the targets in nats, summed: inputs, targets (B, T) -> a scalar."""
    logits = model(inputs).float()  # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


# ------------------------------------------------------------------------------------------------- checkpoints


def _checkpoint_names(out: Path) -> list[str]:
    """The complete checkpoints in a run's folder, oldest first; unfinished ones end in .tmp."""
    names = (path.name for path in out.glob("checkpoint-*"))
    return sorted((name for name in names if re.fullmatch(r"checkpoint-[0-9]+", name)), key=lambda name: int(name[11:]))


def latest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder, or None."""
    names = _checkpoint_names(Path(out))
    return Path(out, names[-1]) if names else None


def save_checkpoint(out: Path, model: T6, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write out/checkpoint-STEP, whole or not at all, then delete older ones; `state["step"]` names it.

    Raises OSError or SafetensorError where it cannot be written, with earlier checkpoints as they were.
    """
    target = out / f"checkpoint-{state['step']:08d}"
    for leftover in out.glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    if not target.exists():
        _write_checkpoint(target, model, optimizer, state)
    for name in _checkpoint_names(out)[:-1]:
        # Renamed first, so that a half-deleted folder is never taken for a checkpoint.
        os.replace(out / name, out / f"{name}.tmp")
        shutil.rmtree(out / f"{name}.tmp")
    return target


def _write_checkpoint(target: Path, model: T6, optimizer: torch.optim.Optimizer, state: dict) -> None:
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.mkdir(parents=True)
    training = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        training["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                training[f"{moment}.{name}"] = optimizer.state[parameter][moment].contiguous()
    try:
        save_file(model.state_dict(), temporary / "model.safetensors")
        save_file(training, temporary / "training.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_KINDS = {  # of what a checkpoint's state.json holds, and its settings in it
    **dict.fromkeys(("step", "vocab_size", "tokens", "steps", "batch_size", "seq_len", "seed", "eval_every"), int),
    **dict.fromkeys(("seconds", "lr"), (int, float)),
    **dict.fromkeys(("data", "tokenizer", "preset", "attention", "dtype"), str),
    **dict.fromkeys(("changes", "sha256"), dict),
}


def _read_state(checkpoint: Path) -> dict:
    """A checkpoint's state.json. Raises SettingError unless it is complete and of a run that can go on."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        settings = state["settings"]
        names = {f.name for f in fields(TrainConfig)} - {*_FREE}
        if settings.keys() != names:
            raise ValueError(f"settings: {', '.join(sorted(settings.keys() ^ names))}")
        held = {name: state[name] for name in ("step", "seconds", "vocab_size", "tokenizer", "sha256")}
        for name, value in (*held.items(), *settings.items()):
            if not isinstance(value, _KINDS[name]):
                raise ValueError(f"{name} is {value!r}")
        if not 0 <= state["step"] <= settings["steps"]:
            raise ValueError(f"step {state['step']} of {settings['steps']}")
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingError(f"{checkpoint}: state.json cannot be read ({error}); {_REMEDY}") from error


_REMEDY = "delete this checkpoint's folder to continue from an earlier one or from the beginning"


def _load_weights(model: T6, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise SettingError(
                    f"{path}: {name} has shape {found.get(name)} where this model needs {expected.get(name)}; "
                    f"it is the checkpoint of another configuration"
                )
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise SettingError(f"{path}: cannot be read ({error}); {_REMEDY}") from error


def _load_training(model: T6, optimizer: torch.optim.Optimizer, checkpoint: Path, step: int) -> None:
    """AdamW's moments and torch's random states, as they were after `step` updates."""
    path = checkpoint / "training.safetensors"
    try:
        saved = load_file(path)
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        moments = {
            i: {"step": torch.tensor(float(step)), **{m: saved[f"{m}.{name}"] for m in ("exp_avg", "exp_avg_sq")}}
            for i, name in enumerate(order)
            if step > 0
        }
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(saved["random.cpu"])
        if "random.cuda" in saved and next(model.parameters()).device.type == "cuda":
            torch.cuda.set_rng_state(saved["random.cuda"])
    except (OSError, SafetensorError, KeyError) as error:
        raise SettingError(f"{path}: cannot be read ({error}); {_REMEDY}") from error


class Loaded(NamedTuple):
    """A trained model with what belongs to it."""

    model: T6
    tokenizer: "tiktoken.Encoding"  # noqa: F821, imported by data.py only where it is used
    settings: TrainConfig
    step: int


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The model, tokenizer, settings and step of a run's last checkpoint, or of the checkpoint folder given.

    Reads safetensors and JSON alone, so nothing in it is executed. Raises SettingError where there is none, or where
    it is damaged.
    """
    folder = Path(folder)
    checkpoint = folder if (folder / "state.json").exists() else latest_checkpoint(folder)
    if checkpoint is None:
        raise SettingError(f"{folder}: holds no checkpoint; train with --out {folder} first")
    state = _read_state(checkpoint)
    settings = TrainConfig(**state["settings"], out=checkpoint.parent)
    with torch.random.fork_rng(devices=[]):
        model = build_model(settings, state["vocab_size"])
    _load_weights(model, checkpoint)
    return Loaded(model.to(device), data.load_tokenizer(state["tokenizer"]), settings, state["step"])


# ----------------------------------------------------------------------------------------------------- metrics


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a last line that was cut off by a kill is left out.

    Raises SettingError for any other line that is not about a step.
    """
    rows = []
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError(row["step"])
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number < len(lines):
                remedy = "put the line back as it was, or start again with another --out"
                raise SettingError(f"{path}, line {number}: is not about a step; {remedy}") from error
    return rows


def _rewind_metrics(out: Path, step: int) -> list[dict]:
    """Cut the metrics back to the lines before `step`, which the run is about to write.

    Raises SettingError, with the file as it was, unless there is one for each of these steps.
    """
    rows = [row for row in read_metrics(out) if row["step"] < step]
    if [row["step"] for row in rows] != list(range(step)):
        raise SettingError(
            f"{out / 'metrics.jsonl'}: does not hold one line for each step before {step}, where the checkpoint is; "
            f"put it back as it was, or start again with another --out"
        )
    temporary = out / "metrics.jsonl.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, out / "metrics.jsonl")
    return rows


def plot_losses(axes, metrics: list[dict], label: str = "") -> None:
    """Draw training (thin) and validation loss (marked) against tokens into matplotlib axes."""
    tokens, losses = zip(*((row["tokens"], row["train_loss"]) for row in metrics))
    (line,) = axes.plot(tokens, losses, linewidth=0.8, alpha=0.6, label=f"{label} training".strip())
    evaluated = [(row["tokens"], row["val_loss"]) for row in metrics if "val_loss" in row]
    label = f"{label} validation".strip()
    axes.plot(*zip(*evaluated), marker="o", markersize=4, color=line.get_color(), label=label)
    axes.set(xlabel="tokens seen in training", ylabel="loss (nats per token)")


def _write_curve(out: Path, metrics: list[dict], title: str) -> Path:
    from matplotlib.figure import Figure  # here, so that importing this module stays light

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, metrics)
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.3)
    axes.legend()
    path = out / "loss.png"
    figure.savefig(out / "loss.tmp.png")
    os.replace(out / "loss.tmp.png", path)
    return path


# ------------------------------------------------------------------------------------- what a trained model does


def generate_text(
    model: T6, tokenizer, prompt: str, max_new_tokens: int = 100, *, temperature=0.8, top_k=50, seed=0
) -> str:
    """Continue `prompt` through the factor cache, up to the end of the document; returns the continuation alone.

    An empty prompt starts a new document. Raises ValueError if prompt and continuation exceed the model's max_len.
    """
    device = next(model.parameters()).device
    end = tokenizer.eot_token
    tokens = torch.tensor([[end, *tokenizer.encode_ordinary(prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    out = model.generate(tokens, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator)
    new = out[0, tokens.shape[1] :].tolist()
    new = new[: new.index(end)] if end in new else new
    return tokenizer.decode([t for t in new if t < tokenizer.n_vocab])  # the vocabulary is padded beyond n_vocab


@torch.no_grad()
def measure_caches(model: T6, length: int) -> tuple[int, int]:
    """Bytes of the model's own cache and of an MHA cache of equal n_head and d_head, each filled with `length` tokens.

    Both are real caches that went through their layers' forward pass, in the model's dtype, for one sequence.
    """
    c, weight = model.config, model.embedding.weight
    own = model.new_cache(1, length)
    model.hidden(torch.zeros(1, length, dtype=torch.long, device=weight.device), own)
    mha = MultiHeadAttention(c).to(weight.device, weight.dtype)
    cache = Cache(mha.new_cache(1, length) for _ in range(c.n_layer))
    for layer in cache:
        mha(torch.zeros(1, length, c.d_model, device=weight.device, dtype=weight.dtype), layer)
    return own.nbytes, cache.nbytes


# ------------------------------------------------------------------------------------------------ the training


class _Processes:
    """The processes that train one model together: one, or those that torchrun started."""

    def __init__(self, device: torch.device):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.count > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # The others wait for the first while it prepares the data, which can take hours.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))

    def sum(self, values: list[float]) -> list[float]:
        """Each value's sum over the processes."""
        if self.count == 1:
            return values
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, device=self.device, dtype=exact)
        dist.all_reduce(total)
        return total.tolist()

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


class _StopRequest:
    """Within its `with` block, Ctrl-C and SIGTERM set `.signal` instead of ending the process; Ctrl-C twice ends it."""

    def __init__(self):
        self.signal = 0
        self.previous = {}

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class _Losses:
    """Losses of one model on training and validation batches, each process computing its share of every batch."""

    def __init__(self, settings: TrainConfig, processes: _Processes, token_data, model: nn.Module, parts: int):
        self.settings, self.processes, self.data, self.model, self.parts = settings, processes, token_data, model, parts
        device = processes.device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")

    def _shares(self, batch: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of a batch that this process computes, one after the other."""
        rank, count = self.processes.rank, self.processes.count
        for inputs, targets in zip(*(half.chunk(self.parts) for half in batch)):
            share = slice(rank * len(inputs) // count, (rank + 1) * len(inputs) // count)
            yield inputs[share].to(self.processes.device), targets[share].to(self.processes.device)

    def training(self, step: int, backward: bool) -> float:
        """The mean loss of training batch `step`; with `backward`, its gradients too."""
        s = self.settings
        batch = self.data.batch("train", step, s.batch_size, s.seq_len, s.seed)
        total, count = 0.0, batch[0].numel()
        with torch.set_grad_enabled(backward):
            for i, (inputs, targets) in enumerate(self._shares(batch)):
                if isinstance(self.model, nn.parallel.DistributedDataParallel):
                    self.model.require_backward_grad_sync = i == self.parts - 1  # exchange gradients once per step
                with self.autocast:
                    loss = loss_sum(self.model, inputs, targets)
                if backward:
                    # DDP averages over the processes, hence their number.
                    (loss * (self.processes.count / count)).backward()
                total += loss.item()
        return self.processes.sum([total])[0] / count

    @torch.no_grad()
    def validation(self) -> float:
        """The mean loss of the first EVAL_TOKENS tokens or so of the held-out documents."""
        s = self.settings
        batches = math.ceil(EVAL_TOKENS / (s.batch_size * s.seq_len))
        total = count = 0
        for batch in self.data.validation_batches(s.batch_size, s.seq_len, batches):
            for inputs, targets in self._shares(batch):
                if len(inputs):
                    with self.autocast:
                        total += loss_sum(self.model, inputs, targets).item()
                count += inputs.numel()
        total, count = self.processes.sum([total, count])
        return total / count


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its folder, the trained model, and the data it was trained on."""

    out: Path
    model: T6
    data: "data.TokenData"
    settings: TrainConfig
    step: int
    metrics: list[dict]
    tokens_per_second: float
    stopped_by: int = 0  # the signal that stopped it early, 0 if it finished


def train(config: TrainConfig, *, progress: bool = True, log: Callable[[str], None] = print) -> TrainResult:
    """Train as `config` says, or continue a run that was started before; a finished run is returned as it is.

    Shows a progress bar on stderr if `progress`, and hands each line of information to `log`. Ctrl-C and SIGTERM save
    a checkpoint and return, with `stopped_by` set. Raises SettingError or data.DataError for wrong values, before
    anything is written, and TrainError for a full disk or a loss that is not finite.
    """
    settings, checkpoint = settle(config)
    processes = _Processes(torch.device(settings.device))
    try:
        if processes.rank > 0:
            progress, log = False, lambda line: None
        devices = [processes.device] if processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return _train(settings, checkpoint, processes, progress, log)
    finally:
        processes.close()


def _train(settings: TrainConfig, checkpoint: Path | None, processes: _Processes, progress: bool, log) -> TrainResult:
    out, device, first = settings.out, processes.device, processes.rank == 0
    tokens_per_step = settings.batch_size * settings.seq_len
    state = _read_state(checkpoint) if checkpoint else {"step": 0, "seconds": 0.0}
    if settings.resume and not checkpoint:
        log(f"{out} holds no checkpoint yet: starting from the beginning.")

    # 1. Data. The first process prepares it; the others find it ready.
    for turn in (True, False):
        if first == turn:
            with contextlib.nullcontext() if first else contextlib.redirect_stdout(None):
                token_data = data.prepare(
                    settings.data, settings.tokens, tokenizer=settings.tokenizer, progress=progress
                )
        processes.sum([0.0])
    source = token_data.source if settings.data == "auto" else settings.data
    settings = replace(settings, data=source, tokenizer=token_data.tokenizer.name)
    _check_data(token_data, state, settings)

    # 2. Model and optimizer.
    torch.manual_seed(settings.seed)
    model = build_model(settings, token_data.vocab_size).to(device)
    optimizer = new_optimizer(model, settings.lr)
    if checkpoint:
        _load_weights(model, checkpoint)
        _load_training(model, optimizer, checkpoint, state["step"])
    layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
    log(
        f"Model: {settings.preset} with {settings.attention}, {model.num_parameters():,} parameters, "
        f"{layer:,} of them in each attention layer of {model.config.n_head} heads."
    )
    forward = _compiled(model) if settings.compile else model
    if processes.count > 1:
        forward = nn.parallel.DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)
    parts = _accumulation(settings, processes.count, token_data.vocab_size)
    losses = _Losses(settings, processes, token_data, forward, parts)

    # 3. The steps that are left.
    step, steps = state["step"], settings.steps
    remaining = steps - step
    state.update(
        settings={f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _FREE},
        vocab_size=token_data.vocab_size,
        tokenizer=token_data.tokenizer.name,
        sha256=token_data.meta["sha256"],
    )
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    where = f"{device}{threads}" + (f", {processes.count} processes" if processes.count > 1 else "")
    if remaining:
        seconds = _expected_seconds(losses, optimizer, remaining)
        log(
            f"Running on {where} in {settings.dtype}: about {duration(seconds)} for {remaining:,} steps of "
            f"{tokens_per_step:,} tokens" + (f", each in {parts} parts" if parts > 1 else "") + "."
        )
    else:
        log(f"{out} is finished: all {steps:,} steps are done. To train again, choose another --out.")

    def save():
        if first:
            save_checkpoint(out, model, optimizer, {**state, "step": step})

    try:
        if first:
            out.mkdir(parents=True, exist_ok=True)
            metrics = _rewind_metrics(out, step)
        else:
            metrics = []
        with (
            _StopRequest() as stop,
            open(out / "metrics.jsonl" if first else os.devnull, "a", encoding="utf-8") as file,
            tqdm(total=steps, initial=step, unit="step", disable=not progress or not remaining, mininterval=0.5) as bar,
        ):
            save()
            saved_at, pause = time.monotonic(), MIN_CHECKPOINT_SECONDS
            while True:
                row = {"step": step, "tokens": step * tokens_per_step}
                validation = losses.validation() if step % settings.eval_every == 0 or step == steps else None
                # The last line is about weights that no update follows.
                started = time.monotonic()
                row["train_loss"] = losses.training(step, backward=step < steps)
                if validation is not None:
                    row["val_loss"] = validation
                for name in ("train_loss", "val_loss"):
                    if not math.isfinite(row.get(name, 0.0)):
                        raise DivergedError(
                            f"{name} is {row[name]} at step {step}: --lr {settings.lr} is probably too high; "
                            f"start again with a lower one and another --out"
                        )
                if step < steps:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(step, steps, settings.lr)
                    optimizer.step()
                    optimizer.zero_grad()
                    state["seconds"] += time.monotonic() - started
                metrics.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if step == steps:
                    break
                step += 1
                speed = step * tokens_per_step / state["seconds"]
                bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
                # All processes must leave the loop after the same step, whichever was told to stop.
                if step < steps and processes.sum([stop.signal > 0])[0]:
                    os.fsync(file.fileno())
                    save()
                    break
                if first and (time.monotonic() - saved_at > pause or step == steps):
                    os.fsync(file.fileno())
                    saving = time.monotonic()
                    save()
                    saved_at = time.monotonic()
                    # Writing may take one part in fifty of the time.
                    pause = max(MIN_CHECKPOINT_SECONDS, 50 * (saved_at - saving))
        if first:
            _write_curve(out, metrics, f"{settings.preset} with {settings.attention} on {token_data.source}")
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"cannot write the run in {out}: {error}; what checkpoint there is ({latest_checkpoint(out)}) is intact: "
            f"make room, or mend the permissions, then continue with --resume"
        ) from error
    speed = step * tokens_per_step / state["seconds"] if step else 0.0
    return TrainResult(out, model, token_data, settings, step, metrics, speed, stop.signal if step < steps else 0)


def _check_data(token_data, state: dict, settings: TrainConfig) -> None:
    """The checkpoint's data must be the data at hand, or the losses would not continue it."""
    if state.get("sha256", token_data.meta["sha256"]) != token_data.meta["sha256"]:
        raise SettingError(
            f"--data {settings.data}: gives other tokens than the run in {settings.out} was trained on (checksums "
            f"differ); bring back the same documents and tokenizer, or choose another --out"
        )


def _accumulation(settings: TrainConfig, processes: int, vocab_size: int) -> int:
    """In how many parts each process computes its share of a batch."""
    share, rest = divmod(settings.batch_size, processes)
    if rest:
        raise SettingError(f"--batch-size {settings.batch_size}: must be a multiple of the {processes} processes")
    if settings.accumulation is None:
        fitting = max(1, MAX_LOGITS // (settings.seq_len * vocab_size))
        return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fitting)
    if share % settings.accumulation:
        raise SettingError(
            f"--accumulation {settings.accumulation}: must divide the {share} sequences of a process in each step"
        )
    return settings.accumulation


def _compiled(model: T6) -> nn.Module:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=next(model.parameters()).device))
    except Exception as error:  # the compiler's own errors have no common base
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"--compile: does not work here ({reason}); leave it out, or install a compiler") from error
    return torch.compile(model)


def _expected_seconds(losses: _Losses, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """How long `steps` steps will take, from one that is computed and thrown away."""
    for _ in range(2):  # the first also sets up kernels and buffers
        started = time.monotonic()
        losses.training(0, backward=True)
        seconds = time.monotonic() - started
        optimizer.zero_grad()
    s = losses.settings
    held_out = min(len(losses.data.val), max(EVAL_TOKENS, s.batch_size * s.seq_len))
    evaluated = held_out / (s.batch_size * s.seq_len) / s.eval_every / 3  # a forward pass is a third of a step
    return seconds * steps * (1.05 + evaluated)


def duration(seconds: float) -> str:
    """Seconds in words, in the largest unit of which there are two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def report(result: TrainResult) -> Iterator[str]:
    """The lines that end a run: losses, curve, speed, a sample, and the bytes of the caches."""
    evaluated = [row["val_loss"] for row in result.metrics if "val_loss" in row]
    yield (
        f"Validation loss: {evaluated[0]:.3f} before training, {evaluated[-1]:.3f} after {result.step:,} steps "
        f"(nats per token)."
    )
    yield f"Loss curve: {result.out / 'loss.png'}"
    trained = result.step * result.settings.batch_size * result.settings.seq_len
    yield f"Speed: {trained:,} tokens at {result.tokens_per_second:,.0f} tokens per second."

    model, tokenizer = result.model, result.data.tokenizer
    held_out = result.data.val[:20_000]
    ends = np.append(np.flatnonzero(held_out == tokenizer.eot_token), len(held_out))
    starts = np.append(0, ends[:-1] + 1)
    longest = np.argsort(starts - ends, kind="stable")[:3]
    yield "Samples, continuing the first words of long held-out documents (which are in brackets):"
    for start in starts[longest]:
        prompt = tokenizer.decode(held_out[start : start + 16].tolist()).split(data.END_OF_TEXT)[0]
        yield f"    [{prompt}]{generate_text(model, tokenizer, prompt)}".replace("\n", "\n    ")

    length, c = model.config.max_len, model.config
    own, mha = measure_caches(model, length)
    yield f"Cache of one sequence of {length:,} tokens, measured: {own:,} bytes with {result.settings.attention};"
    yield f"    {mha:,} bytes with MHA of the same {c.n_head} heads of width {c.d_head}: {mha / own:.1f} times as many."


# ------------------------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m tpa_minimal.experiments.train",
        description="Train a T6 model; write checkpoints, metrics.jsonl and a loss curve to a folder.",
        epilog="--resume needs no other option than --out: the rest is taken from the checkpoint.",
        allow_abbrev=False,
    )
    tiny = DEFAULTS["tiny"]

    def option(name, kind, text, metavar="N"):
        parser.add_argument(name, type=kind, help=text, metavar=metavar)

    option("--data", str, "auto, fineweb-edu, lessons, or a file or folder of parquet, JSON lines or text", "SOURCE")
    option("--tokens", int, f"tokens of text to prepare ({tiny['tokens']:,} for tiny)")
    option("--tokenizer", str, f"{', '.join(data.TOKENIZERS)} (gpt2 for real text, lessons for the lessons)", "NAME")
    option("--preset", str, f"size of the model and its training: {', '.join(DEFAULTS)} (tiny)", "NAME")
    option("--attention", str, f"{', '.join(ATTENTIONS)} (tpa); all have TPA's number of parameters per layer", "NAME")
    option("--steps", int, f"updates of the weights ({tiny['steps']} for tiny)")
    option("--batch-size", int, f"sequences per update, over all processes ({tiny['batch_size']} for tiny)")
    option("--seq-len", int, f"tokens per sequence ({tiny['seq_len']} for tiny)")
    option("--lr", float, f"highest learning rate ({tiny['lr']} for tiny)", "X")
    option("--seed", int, "of the initial weights and the order of the batches (0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (auto)")
    option("--dtype", str, "auto, float32 or bfloat16; auto is bfloat16 autocast on GPUs that have it", "NAME")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    option("--accumulation", int, "compute each batch in this many parts (as many as memory needs)")
    option("--eval-every", int, "steps between evaluations on held-out documents (a tenth of the steps)")
    option("--out", str, "folder of the run (runs/PRESET-ATTENTION)", "DIR")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status that the module's docstring lists."""
    parser = _parser()
    config = TrainConfig(**vars(parser.parse_args(arguments)))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a sample may hold letters that the terminal lacks
    first = int(os.environ.get("RANK", 0)) == 0

    def end(status: int, line: str) -> int:
        if first:
            print(f"{parser.prog}: {line}", file=sys.stderr)
        return status

    def terminated(*_):  # outside the steps, where there is nothing new to save
        sys.exit(end(143, "terminated; whatever checkpoint there is stays: continue with --resume"))

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminated) if in_main_thread else None
    try:
        result = train(config, log=lambda line: print(line, flush=True))
        if not result.stopped_by and first:
            for line in report(result):
                print(line, flush=True)
    except (SettingError, data.DataError) as error:
        return end(2, str(error))
    except (TrainError, OSError) as error:
        return end(1, str(error))
    except KeyboardInterrupt:
        return end(130, "interrupted; whatever checkpoint there is stays: continue with --resume")
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    if result.stopped_by:
        resume = f"python -m tpa_minimal.experiments.train --out {result.out} --resume"
        return end(128 + result.stopped_by, f"stopped and saved at step {result.step:,}; continue with: {resume}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
