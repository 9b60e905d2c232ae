"""Train a T6 on real text: `python -m tpa_minimal train`, or `train(TrainConfig(...))` from Python.

The recipe is the paper's (App. H): AdamW (0.9, 0.95) with decay 0.1 on matrices, the embedding among them since it
is the output layer too; linear warm-up, then a cosine; gradients clipped to norm 1. A run lives in one folder:

    metrics.jsonl        one line per step: step, tokens, train_loss, and val_loss where evaluated
    loss.png             the curve of these losses
    checkpoint-00000300/ the model as `from_pretrained` reads it, and what resuming needs (see checkpoint.py)

Line `step` of the metrics is about the weights after that many updates, so line 0 is the untrained model and
a run of N steps has N + 1 lines. A step depends on the weights, the moments and its own number alone: a run that was
interrupted or killed continues from its last checkpoint to the very losses it would have had (on a CPU bit by bit,
with as many threads and processes).

On several GPUs: `torchrun --nproc-per-node 8 -m tpa_minimal train ...`. Each process takes its share of every batch,
so `--batch-size` means the same whatever their number. TensorBoard or W&B get each row of the metrics by `callback`:

    writer = SummaryWriter("runs/tensorboard")
    train(config, callback=lambda row: writer.add_scalar("loss", row["train_loss"], row["step"]))
    train(config, callback=wandb.log)

Exit status: 0 finished; 2 a wrong value; 1 the run failed (a full disk, a loss that is not finite);
130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, with a checkpoint saved.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from tpa_minimal import huggingface
from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.experiments import data
from tpa_minimal.experiments.checkpoint import (
    REMEDY,
    SettingError,
    checkpoint_names,
    latest_checkpoint,
    load_training,
    load_weights,
    locked,
    read_state,
    save_checkpoint,
)
from tpa_minimal.experiments.generate import GenerateConfig, generate_text, report
from tpa_minimal.experiments.options import parse
from tpa_minimal.files import FileError, read_json_lines, write_json, write_whole
from tpa_minimal.memory import Layer, match_heads
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention
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
MAX_LEN = 2**24  # positions of a model
MIN_CHECKPOINT_SECONDS = 5.0  # between checkpoints; more where writing one takes long, see `train`
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TrainError(RuntimeError):
    """A run that cannot go on; its last checkpoint is intact."""


class DivergedError(TrainError):
    """A loss that is not finite."""


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
_FREE = ("out", "device", "compile", "accumulation", "resume", "set")
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
    if wrong or state["step"] > settings["steps"]:
        reason = f"settings: {', '.join(wrong) or 'fewer steps than were done'}"
        raise SettingError(f"{checkpoint}: state.json cannot be read ({reason}); {REMEDY}")
    return settings


def settle(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """Fill in every None, and find the checkpoint to resume from, if any; writes nothing.

    Raises SettingError for a value that cannot work, for a folder in use, and for settings other than the run's own.
    """
    preset = config.preset or "tiny"
    if preset not in DEFAULTS:
        raise SettingError(f"--preset {preset}: does not exist; choose one of {', '.join(DEFAULTS)}")
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
        if name in own and name not in _FREE and value != own[name]:
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
    if not 0 < chosen["lr"] < math.inf:
        rate = DEFAULTS[chosen["preset"]]["lr"]
        raise SettingError(f"--lr {chosen['lr']}: must be a positive number; {rate} is the preset's")


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


# ----------------------------------------------------------------------------------------------------- metrics


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a last line that was cut off by a kill is left out.

    Raises SettingError for any other line that is not about a step.
    """
    path = Path(folder, "metrics.jsonl")
    try:
        rows = read_json_lines(path)
        for number, row in enumerate(rows, start=1):
            numbers = [row.get("step"), row.get("tokens"), row.get("train_loss")]
            if not all(isinstance(x, (int, float)) for x in numbers) or not isinstance(row["step"], int):
                raise FileError(f"{path}, line {number}: is not about a step")
    except FileError as error:
        raise SettingError(f"{error}; put the line back as it was, or start again with another --out") from error
    return rows


def rewind_metrics(out: Path, step: int) -> list[dict]:
    """Cut the metrics back to the lines before `step`, which the run is about to write.

    Raises SettingError, with the file as it was, unless there is one for each of these steps.
    """
    rows = [row for row in read_metrics(out) if row["step"] < step]
    if [row["step"] for row in rows] != list(range(step)):
        raise SettingError(
            f"{out / 'metrics.jsonl'}: does not hold one line for each step before {step}, where the checkpoint is; "
            f"put it back as it was, or start again with another --out"
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(out / "metrics.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    return rows


def plot_losses(axes, metrics: list[dict], label: str = "") -> None:
    """Draw training (thin) and validation loss (marked) against tokens into matplotlib axes."""
    tokens, losses = zip(*((row["tokens"], row["train_loss"]) for row in metrics))
    (line,) = axes.plot(tokens, losses, linewidth=0.8, alpha=0.6, label=f"{label} training".strip())
    evaluated = [(row["tokens"], row["val_loss"]) for row in metrics if "val_loss" in row]
    label = f"{label} validation".strip()
    axes.plot(*zip(*evaluated), marker="o", markersize=4, color=line.get_color(), label=label)
    axes.set(xlabel="tokens seen in training", ylabel="loss (nats per token)")


def write_curve(out: Path, metrics: list[dict], title: str) -> None:
    """Draw the run's losses into out/loss.png."""
    try:  # here, so that importing this module stays light
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # a broken MPLBACKEND is a ValueError
        print(f"no loss curve: matplotlib cannot be imported ({error})", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, metrics)
    axes.set_title(title.replace("$", r"\$"), loc="left")  # a name may hold what matplotlib takes for mathematics
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(out / "loss.png", lambda path: figure.savefig(path, format="png"))


# ------------------------------------------------------------------------------------------------ the training


class Processes:
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
        total = torch.tensor(values, device=self.device, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def close(self) -> None:
        """Part from the others."""
        if self.count > 1:
            dist.destroy_process_group()


class StopRequest:
    """Within its `with` block, a signal sets `.signal` instead of ending the process; a second Ctrl-C ends it."""

    def __init__(self):
        self.signal = 0
        self.previous = {}

    def note(self, number, frame):
        """Remember the signal."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.previous = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Trainer:
    """One model, its optimizer and its data: `train_step` and `validation`, each process taking its share."""

    def __init__(self, settings: TrainConfig, processes: Processes, token_data, model: T6):
        self.settings, self.processes, self.data, self.model = settings, processes, token_data, model
        device = processes.device
        self.optimizer = new_optimizer(model, settings.lr)
        dtype = getattr(torch, settings.dtype)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.parts = accumulation(settings, processes.count, token_data.vocab_size)
        loss = LossSum(model)
        if processes.count > 1:
            loss = nn.parallel.DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
        self.loss = compiled(loss, device) if settings.compile else loss

    def shares(self, batch: tuple[Tensor, Tensor]):
        """The parts of a batch that this process computes, one after the other."""
        rank, count = self.processes.rank, self.processes.count
        for inputs, targets in zip(*(half.chunk(self.parts) for half in batch)):
            share = slice(rank * len(inputs) // count, (rank + 1) * len(inputs) // count)
            yield inputs[share].to(self.processes.device), targets[share].to(self.processes.device)

    def losses(self, step: int, backward: bool) -> Tensor:
        """The summed loss of this process's share of training batch `step`; with `backward`, its gradients too."""
        s = self.settings
        batch = self.data.batch("train", step, s.batch_size, s.seq_len, s.seed)
        total, count = torch.zeros((), device=self.processes.device), batch[0].numel()
        with torch.set_grad_enabled(backward):
            for i, (inputs, targets) in enumerate(self.shares(batch)):
                last = i == self.parts - 1
                wait = contextlib.nullcontext() if last or self.processes.count == 1 else self.loss.no_sync()
                with wait, self.autocast:  # gradients are exchanged once per step
                    loss = self.loss(inputs, targets)
                    if backward:  # DDP averages over the processes, hence their number
                        self.scaler.scale(loss * (self.processes.count / count)).backward()
                total += loss.detach()
        return total

    def fitting(self, compute: Callable):
        """What `compute` returns, after doubling the parts of a batch as often as the GPU runs out of memory."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                share = self.settings.batch_size // self.processes.count
                if self.processes.count > 1 or self.settings.accumulation is not None or self.parts >= share:
                    raise
            # After the except block, whose traceback keeps the failed tensors alive.
            self.parts = next(n for n in range(2 * self.parts, 2 * share + 1) if share % n == 0 or n >= share)
            self.parts = min(self.parts, share)
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def train_step(self, step: int, steps: int) -> float:
        """Update the weights by batch `step`, unless it is beyond the last; returns the mean loss before."""
        s, updating = self.settings, step < steps
        total = self.fitting(lambda: self.losses(step, backward=updating))
        mean = self.processes.sum([total.item()])[0] / (s.batch_size * s.seq_len)
        if updating and math.isfinite(mean):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, s.lr)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return mean

    @torch.no_grad()
    def validation(self) -> float:
        """The mean loss of the first EVAL_TOKENS tokens or so of the held-out documents."""
        s = self.settings
        batches = math.ceil(EVAL_TOKENS / (s.batch_size * s.seq_len))
        total, count = torch.zeros((), device=self.processes.device), 0
        for batch in self.data.validation_batches(s.batch_size, s.seq_len, batches):
            for inputs, targets in self.shares(batch):
                if len(inputs):
                    with self.autocast:
                        total += self.loss(inputs, targets)
                count += inputs.numel()
        total, count = self.processes.sum([total.item(), count])
        return total / count

    def expected_seconds(self, steps: int) -> float:
        """How long `steps` steps will take, from one part of a batch that is computed and thrown away."""
        s = self.settings

        def one_part() -> float:
            inputs, targets = next(self.shares(self.data.batch("train", 0, s.batch_size, s.seq_len, s.seed)))
            started = time.monotonic()
            with self.autocast:
                self.loss(inputs, targets).backward()
            if self.processes.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.monotonic() - started) * self.parts

        for _ in range(2):  # the first also sets up kernels and buffers
            seconds = self.fitting(one_part)
            self.optimizer.zero_grad()
        held_out = min(len(self.data.val), max(EVAL_TOKENS, s.batch_size * s.seq_len))
        evaluated = held_out / (s.batch_size * s.seq_len) / s.eval_every / 3  # a forward pass is a third of a step
        return seconds * steps * (1.05 + evaluated)


class LossSum(nn.Module):
    """A model and its summed loss as one module, so that torch.compile sees both."""

    def __init__(self, model: T6):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets (B, T) -> a scalar."""
        return loss_sum(self.model, inputs, targets)


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


def compiled(loss: nn.Module, device: torch.device) -> nn.Module:
    """`loss` under torch.compile. Raises SettingError where that does not work."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's own errors have no common base
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"--compile: does not work here ({reason}); leave it out, or install a compiler") from error
    return torch.compile(loss)


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


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    log: Callable[[str], None] = print,
    callback: Callable[[dict], None] = lambda row: None,
) -> TrainResult:
    """Train as `config` says, or continue a run that was started before; a finished run is returned as it is.

    Shows a progress bar on stderr if `progress`, hands each line of information to `log` and each row of the metrics
    to `callback`. Ctrl-C, SIGTERM and SIGHUP save a checkpoint and return, with `stopped_by` set. Raises SettingError
    or data.DataError for wrong values, before anything is written, and TrainError for a full disk or a loss that is
    not finite.
    """
    settings, _ = settle(config)
    processes = Processes(torch.device(settings.device))
    first = processes.rank == 0
    if not first:
        progress, log, callback = False, lambda line: None, lambda row: None
    devices = [processes.device] if processes.device.type == "cuda" else []
    precision = torch.get_float32_matmul_precision()
    made = not Path(settings.out).exists()
    try:
        if devices:
            torch.set_float32_matmul_precision("high")
        with torch.random.fork_rng(devices), locked(Path(settings.out)) if first else contextlib.nullcontext():
            settings, checkpoint = settle(config)  # once more: another run may have ended meanwhile
            return _train(settings, checkpoint, processes, progress, log, callback)
    finally:
        torch.set_float32_matmul_precision(precision)
        processes.close()
        if first and made:
            remove_if_empty(Path(settings.out))


def remove_if_empty(out: Path) -> None:
    """Remove a folder that holds nothing but the lock."""
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] in ([], [".lock"]):
            (out / ".lock").unlink(missing_ok=True)
            out.rmdir()


def prepare_data(settings: TrainConfig, processes: Processes, progress: bool):
    """The tokens of a run. The first process prepares them; the others find them ready."""
    for turn in (True, False):
        if (processes.rank == 0) == turn:
            with contextlib.nullcontext() if turn else contextlib.redirect_stdout(None):
                found = data.prepare(settings.data, settings.tokens, tokenizer=settings.tokenizer, progress=progress)
        processes.sum([0.0])
    for split in ("train", "val"):
        if len(getattr(found, split)) <= settings.seq_len:
            raise SettingError(
                f"--seq-len: sequences of {settings.seq_len} tokens do not fit into the {split} split of --data "
                f"{settings.data}, which has {len(getattr(found, split)):,}; choose shorter ones, or more --tokens"
            )
    return found


def _train(settings: TrainConfig, checkpoint: Path | None, processes: Processes, progress, log, callback):
    out, device = Path(settings.out), processes.device
    state = read_state(checkpoint) if checkpoint else {"step": 0, "seconds": 0.0, "updates": 0, "scaler": {}}
    if settings.resume and not checkpoint:
        log(f"{out} holds no checkpoint yet: starting from the beginning.")
    # 1. Data.
    token_data = prepare_data(settings, processes, progress)
    source = token_data.source if settings.data == "auto" else settings.data
    settings = replace(settings, data=source, tokenizer=token_data.tokenizer.name)
    if state.get("sha256", token_data.meta["sha256"]) != token_data.meta["sha256"]:
        raise SettingError(
            f"--data {settings.data}: gives other tokens than the run in {settings.out} was trained on (checksums "
            f"differ); bring back the same documents and tokenizer, or choose another --out"
        )
    # 2. Model and optimizer.
    torch.manual_seed(settings.seed)
    if checkpoint:
        model = load_run_model(settings, state, checkpoint).to(device)
    else:
        model = initial_model(settings, token_data.vocab_size).to(device)
    trainer = Trainer(settings, processes, token_data, model)
    if checkpoint:
        load_training(model, trainer.optimizer, checkpoint, state["updates"])
        trainer.scaler.load_state_dict(state["scaler"]) if state["scaler"] else None
    describe_run(settings, trainer, state["step"], log)
    state.update(
        settings={f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _FREE},
        vocab_size=token_data.vocab_size,
        tokenizer=token_data.tokenizer.name,
        sha256=token_data.meta["sha256"],
    )
    # 3. The steps that are left.
    try:
        if processes.rank == 0 and not (out / "config.json").exists():
            with contextlib.suppress(ValueError):  # a layer of the user's own
                write_json(out / "config.json", {**huggingface.describe(model), "tokenizer": settings.tokenizer})
        metrics, stopped_by = run_steps(trainer, state, progress, callback)
        if processes.rank == 0:
            write_curve(out, metrics, f"{settings.preset} with {settings.attention} on {token_data.source}")
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"cannot write the run in {out}: {error}; what checkpoint there is ({latest_checkpoint(out)}) is intact: "
            f"make room, or mend the permissions, then continue with --resume"
        ) from error
    step = state["step"]
    speed = step * settings.batch_size * settings.seq_len / state["seconds"] if step else 0.0
    return TrainResult(out, model, token_data, settings, step, metrics, speed, stopped_by)


def describe_run(settings: TrainConfig, trainer: Trainer, step: int, log) -> None:
    """Say what is about to run, where, and for how long."""
    model, device, count = trainer.model, trainer.processes.device, trainer.processes.count
    layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
    log(
        f"Model: {settings.preset} with {settings.attention}, {model.num_parameters():,} parameters, "
        f"{layer:,} of them in each attention layer of {model.config.n_head} heads."
    )
    remaining = settings.steps - step
    if not remaining:
        done = f"all {settings.steps:,} steps are done. To train again, choose another --out."
        return log(f"{settings.out} is finished: {done}")
    seconds = trainer.expected_seconds(remaining)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    where = f"{device}{threads}" + (f", {count} processes" if count > 1 else "")
    log(
        f"Running on {where} in {settings.dtype}: about {duration(seconds)} for {remaining:,} steps of "
        f"{settings.batch_size * settings.seq_len:,} tokens"
        + (f", each in {trainer.parts} parts" if trainer.parts > 1 else "")
        + "."
    )


def run_steps(trainer: Trainer, state: dict, progress: bool, callback) -> tuple[list[dict], int]:
    """Take the steps that are left, keep metrics and checkpoints; `state["step"]` is where they end.

    Returns the metrics, and the signal that ended the steps early, or 0.
    """
    s, processes, first = trainer.settings, trainer.processes, trainer.processes.rank == 0
    out, steps, tokens = Path(s.out), s.steps, s.batch_size * s.seq_len

    def save():
        if not all(p.isfinite().all() for p in trainer.model.parameters()):
            raise DivergedError(
                f"weights are not finite after step {state['step']}: --lr {s.lr} is probably too high; "
                f"start again with a lower one and another --out"
            )
        if first:
            scaler = trainer.scaler.state_dict()
            save_checkpoint(out, trainer.model, trainer.optimizer, {**state, "scaler": scaler})

    metrics = rewind_metrics(out, state["step"]) if first else []
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not progress, mininterval=0.5)
    target = out / "metrics.jsonl" if first else os.devnull
    with StopRequest() as stop, bar, open(target, "a", encoding="utf-8") as file:
        save()
        saved_at, pause = time.monotonic(), MIN_CHECKPOINT_SECONDS
        while True:
            step = state["step"]
            row = {"step": step, "tokens": step * tokens}
            evaluated = trainer.validation() if step % s.eval_every == 0 or step == steps else None
            timed = time.monotonic()
            row["train_loss"] = trainer.train_step(step, steps)  # the last line is about weights no update follows
            row |= {} if evaluated is None else {"val_loss": evaluated}
            for name in ("train_loss", "val_loss"):
                if not math.isfinite(row.get(name, 0.0)):
                    raise DivergedError(
                        f"{name} is {row[name]} at step {step}: --lr {s.lr} is probably too high; "
                        f"start again with a lower one and another --out"
                    )
            metrics.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            callback(row)
            if first and not (out / "metrics.jsonl").exists():
                raise FileNotFoundError(f"{out} was removed or renamed while the run was writing there")
            if step == steps:
                return metrics, 0
            state["seconds"] += time.monotonic() - timed
            state["step"] = step + 1
            speed = state["step"] * tokens / state["seconds"]
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            # All processes must leave the loop after the same step, whichever was told to stop.
            asked = int(max(processes.sum([float(stop.signal)])[0], 0))
            if step + 1 < steps and asked:
                os.fsync(file.fileno())
                save()
                return metrics, stop.signal or signal.SIGTERM
            if first and (time.monotonic() - saved_at > pause or step + 1 == steps):
                os.fsync(file.fileno())
                saving = time.monotonic()
                save()
                saved_at = time.monotonic()
                pause = max(MIN_CHECKPOINT_SECONDS, 50 * (saved_at - saving))  # one part in fifty of the time


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


def duration(seconds: float) -> str:
    """Seconds in words, in the largest unit of which there are two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status that the module's docstring lists."""
    prog = "python -m tpa_minimal train"
    config = parse(TrainConfig, arguments, prog)
    first = int(os.environ.get("RANK", 0)) == 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sample may hold letters that the terminal lacks

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # whoever read the output has seen enough, or closed it
            print(line, flush=True)

    def end(status: int, line: str) -> int:
        if first:
            with contextlib.suppress(OSError, ValueError):
                print(f"{prog}: {line}", file=sys.stderr)
        return status

    def terminated(number, frame):  # outside the steps, where there is nothing new to save
        sys.exit(end(128 + number, "terminated; whatever checkpoint there is stays: continue with --resume"))

    in_main_thread = threading.current_thread() is threading.main_thread()
    watched = SIGNALS[1:] if in_main_thread else []
    previous = {number: signal.signal(number, terminated) for number in watched}
    try:
        result = train(config, log=say)
        if not result.stopped_by and first:
            for line in report(result):
                say(line)
    except (SettingError, data.DataError) as error:
        return end(2, str(error))
    except (TrainError, OSError) as error:
        return end(1, str(error))
    except KeyboardInterrupt:
        return end(130, "interrupted; whatever checkpoint there is stays: continue with --resume")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if result.stopped_by:
        resume = f"python -m tpa_minimal train --out {result.out} --resume"
        return end(128 + result.stopped_by, f"stopped and saved at step {result.step:,}; continue with: {resume}")
    return 0


def generate_command(arguments: list[str] | None = None) -> int:
    """`generate RUN`: prints the prompt and its continuation. Status 2 for a wrong value."""
    prog = "python -m tpa_minimal generate"
    c = parse(GenerateConfig, arguments, prog)
    try:
        loaded = load_checkpoint(c.run)
        options = dict(temperature=c.temperature, top_k=c.top_k, seed=c.seed)
        print(c.prompt + generate_text(loaded.model, loaded.tokenizer, c.prompt, c.max_new_tokens, **options))
    except (SettingError, data.DataError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0
