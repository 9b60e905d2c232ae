"""Which attention learns best, and at what cache? Same backbone, batches and weights; tuned rates; error bars.

    python -m tpa_minimal compare run --data recall      multi-query associative recall (see recall.py)
    python -m tpa_minimal compare run --data lessons     language: the built-in lessons, fineweb-edu, or your files
    python -m tpa_minimal compare run --data mixed       lessons and recall in turns
    python -m tpa_minimal compare table                  what has come out so far

Each cell (a mechanism at certain sizes) first gets a learning rate of its own: the best of a grid of factors √2, tried
on seeds 100, 101, ... and extended until the best is not at its edge. Then it is trained on fresh seeds 0, 1, ... at
that rate, and scored on all held-out data. A seed gives every cell the same backbone and the same batches.

Every run adds one line to the file --out. The same command goes on after any interruption: what is in the file is not
made again, and a run that was stopped goes on from its checkpoint. Any number of processes may work on one file; each
takes the next run that nobody has, and waits for the others where its next run depends on theirs:

    torchrun --nproc-per-node 8 -m tpa_minimal compare run --data lessons

With the default sizes, all cells of a task take about eight hours of one CPU core.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import filelock
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.experiments import bench, data, generate, recall, train
from tpa_minimal.experiments.checkpoint import (
    SettingError,
    latest_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
)
from tpa_minimal.experiments.contrasts import FIXED, SHARED, TUNING, Point, table
from tpa_minimal.experiments.models import new_model
from tpa_minimal.experiments.options import finish, parse, say
from tpa_minimal.experiments.processes import SIGNALS, Processes, StopRequest, locked
from tpa_minimal.experiments.report import duration
from tpa_minimal.experiments.settings import DEFAULTS, TrainConfig, check_values, find_device, natural_dtype
from tpa_minimal.experiments.sources import Interrupted
from tpa_minimal.files import FileError, check_folder, read_json_lines
from tpa_minimal.memory import Layer, match_heads
from tpa_minimal.tpa import T6Config, TensorProductAttention

MEASURED = bench.RESULTS / "compare.jsonl"  # our own rows
CHECKPOINT_SECONDS = 60.0


# -------------------------------------------------------------------------------------------------- what to compare

# Small enough for a CPU, in the proportions of the paper's small model: about 4 d_model² weights in an attention layer,
# 2.5 times as many heads as MHA (the paper: 2.8), R_Q : R_K : R_V = 3 : 1 : 1.
MINI = dict(n_layer=2, d_model=96, n_head=15, d_head=16, rank_q=3, rank_k=1, rank_v=1, max_len=512)


def preset(name: str, vocab_size: int = 64) -> T6Config:
    """The configuration of the TPA cell: "mini", or one of T6Config's presets."""
    return T6Config(vocab_size, **MINI) if name == "mini" else T6Config.preset(name, vocab_size=vocab_size)


@dataclass(frozen=True)
class Cell:
    """One row of the comparison: a mechanism, changes to the preset, and sizes that the configuration does not have."""

    mechanism: str
    changes: Mapping = field(default_factory=dict)
    sizes: Mapping = field(default_factory=dict)

    def config(self, base: T6Config) -> T6Config:
        """The configuration of the cell's model."""
        return replace(base, **self.changes)

    def layer(self, base: T6Config) -> Layer:
        """The accountant's layer of the cell's sizes."""
        c = self.config(base)
        ranks = {name: getattr(c, name) for name in ("rank_q", "rank_k", "rank_v")}
        return Layer(self.mechanism, c.d_model, c.n_head, c.d_head, **{**ranks, **self.sizes})

    def make(self, config: T6Config) -> nn.Module:
        """An attention layer."""
        kinds = {"tpa": TensorProductAttention, "mla": MultiHeadLatentAttention}
        return kinds.get(self.mechanism, MultiHeadAttention)(config, **self.sizes)


def cells(base: T6Config) -> dict[str, Cell]:
    """All that is compared, by name. Weights are TPA's, and so is the cache of `gqa`, `mla` and what ends in -bytes."""
    tpa, ranks = Cell("tpa").layer(base), {name: getattr(base, name) for name in ("rank_q", "rank_k", "rank_v")}
    numbers, d_h = tpa.cached_numbers, base.d_head

    def matched(mechanism: str, changes: Mapping = {}, **sizes: int) -> Cell:
        known = {name: changes.get(name, rank) for name, rank in ranks.items()} if mechanism == "tpa" else sizes
        heads = match_heads(mechanism, tpa.parameters, base.d_model, changes.get("d_head", d_h), **known)
        return Cell(mechanism, {**changes, "n_head": heads}, sizes)

    groups = max(1, round(numbers / (2 * d_h)))  # whose cache comes nearest to TPA's
    d_rope = max(2, d_h // 4 * 2)
    mha, doubled = matched("mha"), {name: 2 * ranks[name] for name in ("rank_k", "rank_v")}
    return {
        "tpa": Cell("tpa"),
        "tpa-init-authors": Cell("tpa", {"init": "authors"}),
        "mha": mha,
        "gqa": matched("gqa", n_kv_head=groups),
        "mqa": matched("gqa", n_kv_head=1),
        "mla": matched("mla", d_c=numbers - d_rope, d_c_q=base.d_model // 2, d_rope=d_rope),
        # Critics ask whether TPA's additional heads do the work.
        "tpa-heads-of-mha": Cell("tpa", {"n_head": mha.changes["n_head"]}),
        # Twice the rank of keys and values, paid with heads.
        "tpa-init-authors-double": matched("tpa", {"init": "authors", **doubled}),
        # MHA with so few heads has fewer weights; MQA makes up for its one key with a wider one.
        "mha-bytes": Cell("mha", {"n_head": groups}),
        "mqa-bytes": matched("gqa", {"d_head": 2 * max(1, round(numbers / 4))}, n_kv_head=1),
    }


# ------------------------------------------------------------------------------------------------------------ tasks


class Text(NamedTuple):
    """Language modelling on what `data.prepare` made."""

    tokens: data.TokenData
    seq_len: int

    @property
    def vocab_size(self) -> int:
        """The tokenizer's, padded."""
        return self.tokens.vocab_size

    def batch(self, *arguments) -> tuple[Tensor, Tensor]:
        """`TokenData.batch`."""
        return self.tokens.batch(*arguments)

    def held_out(self, quick: bool) -> dict[str, Iterable[tuple[Tensor, Tensor]]]:
        """All of the held-out split, or its first 2,048 tokens."""
        batch_size = max(1, 2048 // self.seq_len)
        return {"text": self.tokens.validation_batches(batch_size, self.seq_len, 1 if quick else 2**40)}


class Mixed(NamedTuple):
    """Text in even steps, recall in odd ones. The tokens of recall come after those of the text."""

    text: Text
    recall: recall.Curriculum

    @property
    def vocab_size(self) -> int:
        """Both together."""
        return self.text.vocab_size + self.recall.vocab_size

    def _moved(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs + self.text.vocab_size, torch.where(targets < 0, targets, targets + self.text.vocab_size)

    def batch(self, split: str, step: int, *sizes) -> tuple[Tensor, Tensor]:
        """Batch `step` of the one or the other."""
        return self._moved(self.recall.batch(split, step, *sizes)) if step % 2 else self.text.batch(split, step, *sizes)

    def held_out(self, quick: bool) -> dict[str, Iterable[tuple[Tensor, Tensor]]]:
        """What both hold out."""
        asked = {name: map(self._moved, batches) for name, batches in self.recall.held_out(quick).items()}
        return {**self.text.held_out(quick), **asked}


def find_task(options: "Options"):
    """What --data names: something with vocab_size, batch and held_out."""
    curriculum = recall.Curriculum(options.steps)
    if options.data == "recall":
        return curriculum
    source = "lessons" if options.data == "mixed" else options.data
    text = Text(data.prepare(source, options.tokens, tokenizer=options.tokenizer, progress=False), options.seq_len)
    return Mixed(text, curriculum) if options.data == "mixed" else text


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share of first choices that are right, over all targets asked for."""
    device, total = next(model.parameters()).device, torch.zeros(3, dtype=torch.float64)
    for inputs, targets in batches:
        targets = targets.to(device)
        asked = targets != recall.IGNORED
        logits, targets = model(inputs.to(device))[asked].float(), targets[asked]
        right = (logits.argmax(-1) == targets).sum()
        total += torch.stack([F.cross_entropy(logits, targets, reduction="sum").double(), right, asked.sum()]).cpu()
    return (total[0] / total[2]).item(), (total[1] / total[2]).item()


def evaluate(model: nn.Module, task, quick: bool) -> dict[str, float]:
    """The measures of a row: loss and accuracy of recall (means over its sizes), loss of text; `val_loss` sums both."""
    found = {name: score(model, batches) for name, batches in task.held_out(quick).items()}
    measures = {"text_loss": found.pop("text")[0]} if "text" in found else {}
    if found:
        measures["recall_loss"], measures["recall_accuracy"] = (statistics.fmean(x) for x in zip(*found.values()))
        measures |= {f"accuracy, {name}": accuracy for name, (_, accuracy) in found.items()}
    return {"val_loss": sum(value for name, value in measures.items() if name.endswith("loss")), **measures}


# ------------------------------------------------------------------------------------------------------------- rows

# What a run is: two rows that agree in these are the same run.
IDENTITY = (*SHARED, "cell", "seed", "lr")
_ALWAYS = dict.fromkeys(("data", "sha256", "preset", "cell"), str)
_ALWAYS |= {**dict.fromkeys(("seed", "steps", "batch_size", "seq_len"), int), "lr": float, "wall_seconds": float}
_RESULT = dict.fromkeys(("n_head", "layer_parameters", "cache_bytes_per_token"), int)
_RESULT |= {"seconds": float, "val_loss": float, "tokens_per_second": float, "history": list}


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file of results; none if there is no such file. A last line cut off by a kill is left out.

    Raises FileError for any other line that is not a row, and for a run that stands there twice.
    """
    try:
        rows, seen = read_json_lines(path), {}
    except FileError as error:
        raise FileError(f"{error}; remove that line") from error
    for number, row in enumerate(rows, start=1):
        problem = _problem(row)
        if not problem and seen.setdefault(identity(row), number) != number:
            problem = f"is the run of row {seen[identity(row)]} again"
        if problem:
            raise FileError(f"{path}, row {number}: {problem}; remove that line")
    return rows


def _problem(row: dict) -> str | None:
    """What keeps an object from being a row."""
    failed = row.get("failed", "")
    if failed is not None and not (failed and isinstance(failed, str)):
        return "does not say whether the run failed"

    def fits(value, kind) -> bool:
        if kind is list:  # a history: points of four numbers
            points = isinstance(value, list) and all(isinstance(p, list) and len(p) == 4 for p in value)
            return points and value != [] and all(fits(x, float) for point in value for x in point)
        if kind is str:
            return isinstance(value, str)
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < 1e300

    kinds = _ALWAYS if failed else _ALWAYS | _RESULT
    wrong = (name for name, kind in kinds.items() if not fits(row.get(name), kind))
    return next((f"{name} is {str(row.get(name))[:40]!r}" for name in wrong), None)


def append_row(path: Path, row: dict) -> None:
    """Add a row as one whole line, after whatever a kill has left of the one before; processes take turns."""
    with filelock.FileLock(f"{path}.lock"), open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**20))
        tail = file.read().rpartition(b"\n")[2]
        try:
            lost = bool(tail) and not json.loads(tail)
        except (ValueError, RecursionError):
            lost = True
        if lost:
            file.truncate(file.seek(0, os.SEEK_END) - len(tail))
        file.write(b"\n" * bool(tail and not lost) + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def identity(row: Mapping) -> tuple:
    """What makes a row the run that it is."""
    return tuple(row[name] for name in IDENTITY)


# -------------------------------------------------------------------------------------------------------- what to run


def rate(k: int) -> float:
    """Learning rate number k of the grid, 0.001 · 2^(k/2) to three digits."""
    return float(f"{0.001 * 2 ** (k / 2):.3g}")


def tuned(rows: list[dict], cell: str, seeds: range, first: Iterable[float]) -> tuple[float | None, list[float]]:
    """The best rate of a cell and the rates to try next: the best is None until it is known, then nothing is next.

    The best has the lowest mean val_loss over the tuning `seeds`, a failed run counting as infinite. The grid starts
    with the rates `first` and grows by one while its lowest or highest is the best.
    """
    losses: dict[float, dict[int, float]] = {lr: {} for lr in first}
    for row in rows:
        if row["cell"] == cell and row["seed"] in seeds:
            losses.setdefault(row["lr"], {})[row["seed"]] = math.inf if row["failed"] else row["val_loss"]
    missing = sorted(lr for lr, found in losses.items() if len(found) < len(seeds))
    if missing:
        return None, missing
    best = min(losses, key=lambda lr: (statistics.fmean(losses[lr].values()), lr))  # where all have failed, the lowest
    k = round(2 * math.log2(best / 0.001))
    if best in (min(losses), max(losses)):
        return None, [rate(k - 1 if best == min(losses) else k + 1)]
    return best, []


def plan(options: "Options", rows: list[dict], names: Iterable[str]) -> tuple[list[tuple[str, int, float]], int]:
    """The runs (cell, seed, learning rate) that can be made now, and how many will be left at least.

    The search for the rates comes first, and seeds are the outer loop: a slow hour affects all cells equally.
    """
    tuning = range(TUNING, TUNING + options.tuning_seeds)
    done = {(row["cell"], row["seed"], row["lr"]) for row in rows}
    search, fresh, later = [], [], 0
    for name in names:
        main = options.data in ("recall", "mixed") or any(name in pair for pair in FIXED.values())
        seeds = range(options.main_seeds if main else options.seeds)
        best, following = tuned(rows, name, tuning, options.rates)
        search += [(name, seed, lr) for seed in tuning for lr in following]
        later += len(seeds) if best is None else 0
        fresh += [] if best is None else [(name, seed, best) for seed in seeds]
    runs = [run for run in (*sorted(search, key=lambda r: r[1]), *sorted(fresh, key=lambda r: r[1])) if run not in done]
    return runs, len(runs) + later


# -------------------------------------------------------------------------------------------------------- one run


class Stopped(Exception):  # noqa: N818, no error
    """A signal has ended a run, whose checkpoint is saved."""


def run(cell: Cell, options: "Options", task, seed: int, lr: float, folder: Path) -> dict:
    """Train one cell and score it on all held-out data: what its row holds beside its identity.

    A loss that is not finite makes a row too, whose "failed" says so. A run that stopped before goes on from the
    checkpoint in `folder`. Raises Stopped.
    """
    device = find_device(options.device)
    settings = TrainConfig(
        lr=lr, seed=seed, steps=options.steps, batch_size=options.batch_size, seq_len=options.seq_len,
        device=str(device), dtype=natural_dtype(device),
    )  # fmt: skip
    base = preset(options.preset, task.vocab_size)
    base = replace(base, max_len=max(base.max_len, options.seq_len))
    build = functools.partial(new_model, cell.config(base), cell.make, seed)
    checkpoint = latest_checkpoint(folder)
    state = read_state(checkpoint) if checkpoint else {"step": 0, "seconds": 0.0, "settings": {"history": []}}
    model = load_weights(build, base.n_layer, checkpoint) if checkpoint else build()
    trainer = train.Trainer(settings, Processes(device), task, model.to(device))
    if checkpoint:
        trainer.restore(checkpoint, state)
    try:
        train_on(trainer, state, folder)
    except train.DivergedError as error:
        return {"failed": error.what, "seconds": state["seconds"]}
    layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
    return {
        "failed": None,
        "seconds": state["seconds"],
        "n_head": model.config.n_head,
        "parameters": model.num_parameters(),
        "layer_parameters": layer,
        "cache_bytes_per_token": generate.measure_caches(model, 64)[0] // 64,
        "tokens_per_second": options.steps * options.batch_size * options.seq_len / state["seconds"],
        **evaluate(model, task, quick=False),
        "history": state["settings"]["history"],
    }


def train_on(trainer: train.Trainer, state: dict, folder: Path) -> None:
    """Take the steps that are left, keeping `state`: step, seconds of training, and the history of quick evaluations.

    On a CPU the seconds are those of the processor, so that other work on the machine does not count. Raises Stopped,
    and DivergedError for a loss that is not finite.
    """
    steps, history = trainer.settings.steps, state["settings"]["history"]
    clock = time.process_time if trainer.processes.device.type == "cpu" else time.monotonic
    saved_at = time.monotonic()
    with StopRequest(SIGNALS) as stop:
        while state["step"] < steps:
            started = clock()
            loss = trainer.train_step(state["step"], steps)
            state["seconds"] += clock() - started
            state["step"] += 1
            if not math.isfinite(loss):
                raise train.DivergedError(f"loss is {loss} at step {state['step'] - 1}", trainer.settings.lr)
            if state["step"] % max(1, steps // 20) == 0:
                quick = evaluate(trainer.model, trainer.data, quick=True)
                point = Point(state["step"], state["seconds"], quick["val_loss"], quick.get("recall_accuracy", 0.0))
                history.append([round(value, 4) for value in point])
            if stop.signal or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                known = {**_EMPTY, **state, "scaler": trainer.scaler.state_dict()}
                save_checkpoint(folder, trainer.model, trainer.optimizer, known)
                saved_at = time.monotonic()
            if stop.signal:
                raise Stopped(stop.signal)


_EMPTY = {"vocab_size": 0, "tokenizer": "none", "sha256": {}}  # of a checkpoint, for us without use


# ---------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Options:
    """Tune and train the cells, each with several seeds, into a file of rows; `table` shows what is there."""

    command: Annotated[Literal["run", "table"], tyro.conf.Positional]
    out: Path = Path("compare.jsonl")  # the rows
    data: str = "recall"  # recall, lessons, mixed, fineweb-edu, or a file or folder of text
    cells: tuple[str, ...] | None = None  # only these
    preset: Literal[("mini", *DEFAULTS)] = "mini"  # size of the models
    steps: int = 900  # updates of the weights in a run
    batch_size: int = 16  # sequences per update
    seq_len: int = 128  # tokens per sequence; recall's are shorter and more
    tokens: int = 2_000_000  # of text to prepare
    tokenizer: str | None = None  # gpt2 or lessons
    rates: tuple[float, ...] = (0.001, 0.00141)  # where each grid of learning rates begins
    tuning_seeds: int = 3  # with which the rates are chosen
    main_seeds: int = 10  # fresh ones for the cells of the fixed contrasts, and for all where recall is asked for
    seeds: int = 5  # fresh ones for the other cells
    device: str = "auto"


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as for `train`."""
    prog = "python -m tpa_minimal compare"
    options = parse(Options, arguments, prog)
    try:
        if options.command == "table":
            if not (rows := read_rows(options.out)):
                raise SettingError(f"--out {options.out}: holds no rows; `compare run` makes them")
            print("\n".join(table(rows)))
            return 0
        return work(options)
    except (SettingError, data.DataError, ValueError, train.TrainError, OSError) as error:
        return finish(prog, 1 if isinstance(error, (train.TrainError, Interrupted, OSError)) else 2, str(error))
    except KeyboardInterrupt:
        return 130


def checked(options: Options) -> dict[str, Cell]:
    """The cells to run. Raises SettingError for a value that cannot work."""
    check_values({**asdict(options), "lr": 1.0, "seed": 0})
    for name in ("tuning_seeds", "main_seeds", "seeds"):
        if not 1 <= getattr(options, name) <= TUNING:
            flag = name.replace("_", "-")
            raise SettingError(f"--{flag} {getattr(options, name)}: must be from 1 to {TUNING}")
    for lr in options.rates:
        if not 0 < lr < 1e6 or lr != rate(round(2 * math.log2(lr / 0.001))):
            raise SettingError(f"--rates {lr}: must be of the grid 0.001, 0.00141, 0.002, ... of factors √2")
    if options.data == "auto":
        raise SettingError("--data auto: rows must say what they are about; name the data")
    known = cells(preset(options.preset))
    for name in options.cells or ():
        if name not in known:
            raise SettingError(f"--cells {name}: does not exist; choose from {', '.join(known)}")
    return {name: known[name] for name in options.cells or known}


def work(options: Options) -> int:
    """Make the runs that are left, each being taken by one process; returns the exit status."""
    chosen, folder = checked(options), Path(f"{options.out}.runs")
    read_rows(options.out)
    check_folder(options.out.parent)  # before any long work
    # Each process of a torchrun works for itself: the file and its locks are all that they share.
    os.environ.pop("RANK", 0)
    workers = int(os.environ.pop("WORLD_SIZE", 1))
    task = find_task(options)
    common = {
        "data": options.data if options.data in ("recall", "lessons", "mixed") else Path(options.data).name,
        "sha256": digest(task),
        **{name: getattr(options, name) for name in ("preset", "steps", "batch_size", "seq_len")},
    }
    device = torch.cuda.get_device_name() if find_device(options.device).type == "cuda" else bench.cpu_name()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    while True:
        rows = [row for row in read_rows(options.out) if all(row[name] == common[name] for name in common)]
        runs, left = plan(options, rows, chosen)
        if not runs:
            with contextlib.suppress(OSError):
                folder.rmdir()
            return 0
        spent = statistics.fmean(row["wall_seconds"] for row in rows) * left / workers if rows else 0.0
        for name, seed, lr in runs:
            what = {**common, "cell": name, "seed": seed, "lr": lr}
            own = folder / hashlib.sha256(json.dumps(identity(what)).encode()).hexdigest()[:16]
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(own))
                except SettingError:
                    continue  # another process has this run
                if identity(what) not in map(identity, read_rows(options.out)):
                    ready = f"{len(rows)} runs done, {left} or more left"
                    ready += f", about {duration(spent)}" if rows else ""
                    say(f"{name}, seed {seed}, learning rate {lr:g}; {ready}")
                    started = time.monotonic()
                    try:
                        row = run(chosen[name], options, task, seed, lr, own)
                    except Stopped as stopped:
                        say("stopped; the same command goes on from here")
                        return 128 + stopped.args[0]
                    row |= {"wall_seconds": time.monotonic() - started, **about}
                    append_row(options.out, {**what, **row})
                shutil.rmtree(own, ignore_errors=True)
            break
        else:
            time.sleep(1)  # all that can be made now is being made


def digest(task) -> str:
    """What a task's first batch and held-out data hash to: rows of other data have another."""
    batches = [task.batch("train", 0, 8, 64, 0), *(batch for part in task.held_out(False).values() for batch in part)]
    return hashlib.sha256(b"".join(half.numpy().tobytes() for batch in batches for half in batch)).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
