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
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from tpa_minimal import huggingface
from tpa_minimal.experiments import data
from tpa_minimal.experiments.checkpoint import (
    STATE,
    SettingError,
    latest_checkpoint,
    load_training,
    read_state,
    save_checkpoint,
    unreadable,
)
from tpa_minimal.experiments.metrics import rewind_metrics, write_curve
from tpa_minimal.experiments.models import initial_model, load_run_model
from tpa_minimal.experiments.options import finish, parse, say
from tpa_minimal.experiments.processes import SIGNALS, LostError, Processes, StopRequest, locked, remove_if_empty
from tpa_minimal.experiments.report import describe_run, report
from tpa_minimal.experiments.settings import EVAL_TOKENS, FREE, TrainConfig, accumulation, settle
from tpa_minimal.files import write_json
from tpa_minimal.tpa import T6

MIN_CHECKPOINT_SECONDS = 5.0  # between checkpoints; more where writing one takes long, see `train`


class TrainError(RuntimeError):
    """A run that cannot go on; its last checkpoint is intact."""


class DivergedError(TrainError):
    """A loss, or a weight, that is not finite."""

    def __init__(self, what: str, lr: float):
        self.what = what
        reason = f"--lr {lr} is probably too high, or --init-from has weights that are too large"
        super().__init__(f"{what}: {reason}; start again with others and another --out")


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


def fit(model: T6, tokens, steps: int, lr: float, seed: int = 0) -> T6:
    """Give a model `steps` updates by the recipe, on batches of 8 × 64 of `tokens`, a data.TokenData; returns it.

    The loop alone, for experiments of seconds; `train` keeps metrics and checkpoints besides.
    """
    optimizer = new_optimizer(model, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        inputs, targets = tokens.batch("train", step, 8, 64, seed)
        (loss_sum(model, inputs, targets) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# ------------------------------------------------------------------------------------------------ the training


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
        processes.copy_first(model.state_dict().values())
        self.loss = compiled(LossSum(model), device) if settings.compile else LossSum(model)

    def restore(self, checkpoint: Path, state: dict) -> None:
        """Go on from a checkpoint: moments, random states, and float16's loss scale. Raises SettingError."""
        load_training(self.model, self.optimizer, checkpoint, state["updates"])
        if self.scaler.is_enabled():
            usual, found = self.scaler.state_dict(), state["scaler"]
            scale, steady = found.get("scale"), found.get("_growth_tracker")  # steps since it last changed
            if type(scale) is not float or not 0 < scale < 1e38 or steady not in range(usual["growth_interval"]):
                raise unreadable(checkpoint / STATE, f"scaler is {found}")
            self.scaler.load_state_dict({**usual, "scale": scale, "_growth_tracker": int(steady)})

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
            for inputs, targets in self.shares(batch):
                with self.autocast:
                    loss = self.loss(inputs, targets)
                if backward:
                    self.scaler.scale(loss * (1 / count)).backward()
                total += loss.detach()
        return total

    def fitting(self, compute: Callable):
        """What `compute` returns, after doubling the parts of a batch as often as any process runs out of memory.

        `compute` must not wait for other processes. Raises TrainError where smaller parts are impossible.
        """
        share = self.settings.batch_size // self.processes.count
        while True:
            result = None
            with contextlib.suppress(torch.OutOfMemoryError):
                result = compute()
            if not self.processes.sum([float(result is None)])[0]:
                return result
            if self.settings.accumulation is not None or self.parts >= share:
                remedy = "choose a smaller --batch-size or --seq-len, or a larger --accumulation"
                raise TrainError(f"memory does not suffice for a batch in {self.parts} parts: {remedy}")
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
            self.processes.add(p.grad for p in self.model.parameters() if p.grad is not None)
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


class LossSum(nn.Module):
    """A model and its summed loss as one module, so that torch.compile sees both."""

    def __init__(self, model: T6):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets (B, T) -> a scalar."""
        return loss_sum(self.model, inputs, targets)


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


def prepare_data(settings: TrainConfig, processes: Processes, progress: bool):
    """The tokens of a run. The first process prepares them; the others find them ready."""
    quietly = contextlib.nullcontext() if processes.rank == 0 else contextlib.redirect_stdout(None)
    with processes.first_alone(), quietly:
        found = data.prepare(settings.data, settings.tokens, tokenizer=settings.tokenizer, progress=progress)
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
    if len(set(processes.each(state["step"]))) > 1:
        raise SettingError(
            f"--out {out}: not all processes find the same checkpoint there; "
            f"put it on a disk that all machines share, or copy the run's folder to each of them"
        )
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
    vocab_size = token_data.vocab_size
    model = load_run_model(settings, state, checkpoint) if checkpoint else initial_model(settings, vocab_size)
    trainer = Trainer(settings, processes, token_data, model.to(device))
    if checkpoint:
        trainer.restore(checkpoint, state)
    describe_run(settings, trainer, state["step"], log)
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FREE}
    state.update(settings=own, vocab_size=vocab_size, tokenizer=settings.tokenizer, sha256=token_data.meta["sha256"])
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
    speed = step * settings.batch_size * settings.seq_len / state["seconds"] if state["seconds"] else 0.0
    return TrainResult(out, model, token_data, settings, step, metrics, speed, stopped_by)


def run_steps(trainer: Trainer, state: dict, progress: bool, callback) -> tuple[list[dict], int]:
    """Take the steps that are left, keep metrics and checkpoints; `state["step"]` is where they end.

    Returns the metrics, and the signal that ended the steps early, or 0.
    """
    s, processes, first = trainer.settings, trainer.processes, trainer.processes.rank == 0
    out, steps, tokens = Path(s.out), s.steps, s.batch_size * s.seq_len

    def save():
        if not all(p.isfinite().all() for p in trainer.model.parameters()):
            raise DivergedError(f"weights are not finite after step {state['step']}", s.lr)
        if first:
            os.fsync(file.fileno())  # the metrics reach the disk before the checkpoint that follows them
            save_checkpoint(out, trainer.model, trainer.optimizer, {**state, "scaler": trainer.scaler.state_dict()})

    metrics = rewind_metrics(out, state["step"]) if first else []
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not progress, mininterval=0.5)
    target = out / "metrics.jsonl" if first else os.devnull
    with StopRequest(SIGNALS) as stop, bar, open(target, "a", encoding="utf-8") as file:
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
                    raise DivergedError(f"{name} is {row[name]} at step {step}", s.lr)
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
                save()
                return metrics, stop.signal or signal.SIGTERM
            if first and (time.monotonic() - saved_at > pause or step + 1 == steps):
                saving = time.monotonic()
                save()
                saved_at = time.monotonic()
                pause = max(MIN_CHECKPOINT_SECONDS, 50 * (saved_at - saving))  # one part in fifty of the time


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status that the module's docstring lists."""
    prog = "python -m tpa_minimal train"
    config = parse(TrainConfig, arguments, prog)
    first = int(os.environ.get("RANK", 0)) == 0
    end = functools.partial(finish, prog if first else None)

    def terminated(number, frame):  # outside the steps, where there is nothing new to save
        sys.exit(end(128 + number, "terminated; whatever checkpoint there is stays: continue with --resume"))

    try:
        with StopRequest(SIGNALS[1:], terminated):
            result = train(config, log=say)
            for line in report(result) if first and not result.stopped_by else ():
                say(line)
    except (SettingError, data.DataError) as error:
        return end(1 if isinstance(error, data.sources.Interrupted) else 2, str(error))
    except LostError as error:  # each process says so, as the first may be the lost one
        return finish(prog, 1, str(error))
    except (TrainError, OSError) as error:
        return end(1, str(error))
    except KeyboardInterrupt:
        return end(130, "interrupted; whatever checkpoint there is stays: continue with --resume")
    if result.stopped_by:
        resume = f"python -m tpa_minimal train --out {result.out} --resume"
        return end(128 + result.stopped_by, f"stopped and saved at step {result.step:,}; continue with: {resume}")
    return 0
