"""Which attention learns best? Same backbone, data, batches, steps and layer parameters; several seeds; error bars.

    python -m tpa_minimal compare rates          each mechanism at three learning rates
    python -m tpa_minimal compare mechanisms     each at its own best rate, on other seeds
    python -m tpa_minimal compare ranks          TPA's ranks, at the same parameters per layer
    python -m tpa_minimal compare table          what has come out so far

Every run adds one line to the file --out. A run that is in the file is not made again, and one that was interrupted
goes on from its checkpoint, so the same command continues whatever was stopped. One command at a time may write a file.
Seeds are the outer loop, mechanisms the inner one: a slow hour affects all equally. Several processes or GPUs share the
runs, each run staying on one:

    torchrun --nproc-per-node 8 -m tpa_minimal compare mechanisms --preset small-124M --data fineweb-edu

The table's differences to MHA are taken seed by seed, since a seed gives all mechanisms the same batches, and come with
a 95 % interval. Below it stand the two contrasts that were fixed beforehand, and all others with Holm's correction.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from numpy.typing import NDArray
from scipy import stats

from tpa_minimal.experiments import bench, data, generate, train
from tpa_minimal.experiments.checkpoint import SettingError
from tpa_minimal.experiments.models import equal_parameters
from tpa_minimal.experiments.options import parse
from tpa_minimal.experiments.processes import locked, remove_if_empty
from tpa_minimal.experiments.report import duration
from tpa_minimal.experiments.settings import ATTENTIONS, DEFAULTS, settle
from tpa_minimal.files import FileError, read_json_lines
from tpa_minimal.memory import Layer, match_heads
from tpa_minimal.tpa import T6Config

MEASURED = bench.RESULTS / "compare.jsonl"  # our own rows
RATES = (0.5, 1.0, 2.0)  # of the preset's learning rate
RATE_SEEDS = 100  # the rate is chosen on seeds 100, 101, ..., and the mechanisms are compared on seeds 0, 1, ...
RANKS = tuple((rank_q, rank, rank) for rank in (1, 2, 4) for rank_q in (1, 6, 16))
PROBES = tuple((n_facts, distance) for n_facts in (2, 4) for distance in (0, 32))
LONGEST_WAIT = timedelta(days=14)  # of one process of a torchrun for another


# -------------------------------------------------------------------------------------------------- what to compare


@dataclass(frozen=True)
class Cell:
    """One row of the comparison: a mechanism of `ATTENTIONS`, and changes to the preset."""

    attention: str
    changes: Mapping = field(default_factory=dict)


def cells(preset: str) -> dict[str, Cell]:
    """All that can be compared, by name; each mechanism has the head count that gives it TPA's parameters per layer."""
    config = T6Config.preset(preset)
    budget = layer_of("tpa", config).parameters
    found = {name: Cell(name) for name in ATTENTIONS}
    # Critics ask whether TPA's additional heads do the work; and here are the weights that the authors start from.
    found["tpa-heads-of-mha"] = Cell("tpa", {"n_head": equal_parameters("mha", config).n_head})
    found["tpa-init-authors"] = Cell("tpa", {"init": "authors"})
    for ranks in RANKS:
        named = dict(zip(("rank_q", "rank_k", "rank_v"), ranks))
        if replace(config, **named) != config:
            heads = match_heads("tpa", budget, config.d_model, config.d_head, **named)
            found["tpa-" + "-".join(map(str, ranks))] = Cell("tpa", {**named, "n_head": heads})
    return found


def layer_of(attention: str, config: T6Config) -> Layer:
    """The accountant's layer of the sizes that `config` has."""
    ranks = {name: getattr(config, name) for name in ("rank_q", "rank_k", "rank_v")}
    groups = 2 if attention == "gqa" else None
    return Layer(attention, config.d_model, config.n_head, config.d_head, groups, **ranks)


MAIN = (*ATTENTIONS, "tpa-heads-of-mha", "tpa-init-authors")


def rank_cells(preset: str) -> list[str]:
    """TPA and its other ranks, at the same parameters per layer."""
    return ["tpa", *(name for name in cells(preset) if name.startswith("tpa-") and name[4].isdigit())]


def fixed_contrasts(preset: str) -> dict[str, tuple[str, str]]:
    """The two questions that were put before any run: what each asks -> (cell, baseline).

    All have equal weights; at equal bytes, GQA meets the TPA of those ranks whose cache is nearest to its own.
    """

    def cached(name: str) -> int:
        own = equal_parameters(known[name].attention, T6Config.preset(preset, **known[name].changes))
        return layer_of(known[name].attention, own).cached_numbers

    known = cells(preset)
    nearest = min(rank_cells(preset), key=lambda name: abs(math.log(cached(name) / cached("gqa"))))
    return {"at equal weights": ("tpa", "mha"), "at equal bytes": (nearest, "gqa")}


def experiment(name: str, preset: str) -> list[str]:
    """The names of the cells that an experiment compares."""
    mechanisms = list(dict.fromkeys([*MAIN, *(cell for pair in fixed_contrasts(preset).values() for cell in pair)]))
    return {"rates": list(ATTENTIONS), "mechanisms": mechanisms, "ranks": rank_cells(preset)}[name]


def base(cell: str) -> str:
    """The mechanism whose learning rate a cell takes: its own, and TPA's for all that only changes TPA's sizes."""
    return cell if cell in ATTENTIONS else "tpa"


# ------------------------------------------------------------------------------------------------------------ rows

# What a run is: two rows that agree in these are the same run.
IDENTITY = ("data", "sha256", "preset", "cell", "seed", "lr", "steps", "batch_size", "seq_len", "dtype")


# What the functions below read in a row, and in that of a run that did not fail.
_ALWAYS = dict.fromkeys(("data", "sha256", "preset", "cell", "dtype", "experiment"), str)
_ALWAYS |= {"seed": int, "steps": int, "batch_size": int, "seq_len": int, "lr": float}
_RESULT = dict.fromkeys(("n_head", "layer_parameters", "cache_bytes_per_token"), int)
_RESULT |= dict.fromkeys(("mismatch", "val_loss", "bits_per_byte", "recall's first choice"), float)


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
    failed, scores = row.get("failed", ""), row.get("recall")
    if failed is not None and not (failed and isinstance(failed, str)):
        return "does not say whether the run failed"
    if isinstance(scores, list) and scores and isinstance(scores[0], dict):
        row = {**row, "recall's first choice": scores[0].get("choice")}
    for name, kind in (_ALWAYS if failed else _ALWAYS | _RESULT).items():
        value = row.get(name)
        number = isinstance(value, (int, kind)) and not isinstance(value, (bool, str)) and abs(value) < 1e300
        if not (isinstance(value, str) if kind is str else number):
            return f"{name} is {str(value)[:40]!r}"
    return None


def append_row(path: Path, row: dict) -> None:
    """Add a row by a single write, so that processes may share the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(row) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def end_last_line(path: Path) -> None:
    """Give a last line that lacks its end one if it is JSON; if a kill cut it off, remove it."""
    tail = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    if tail:
        os.truncate(path, path.stat().st_size - len(tail))
        with contextlib.suppress(ValueError, RecursionError):
            append_row(path, json.loads(tail))


def identity(row: Mapping) -> tuple:
    """What makes a row the run that it is."""
    return tuple(row[name] for name in IDENTITY)


# -------------------------------------------------------------------------------------------------------- one run


def run(cell: str, config: train.TrainConfig, progress: bool) -> dict | int:
    """Train one cell as `config` says, and measure the result: a row, or the signal that stopped it.

    A loss that is not finite makes a row too, whose "failed" says so; it is never left out silently.
    """
    chosen = cells(config.preset)[cell]
    config = replace(config, attention=chosen.attention, changes=chosen.changes, resume=True)
    row = {"cell": cell, "attention": chosen.attention, "changes": dict(chosen.changes)}
    try:
        with contextlib.redirect_stdout(None):  # the data's line, which was shown once already
            result = train.train(config, progress=progress, log=lambda line: None)
    except train.DivergedError as error:
        return {**row, "failed": str(error)}
    if result.stopped_by:
        return result.stopped_by
    model, token_data, c = result.model.eval(), result.data, result.model.config
    best = min((line for line in result.metrics if "val_loss" in line), key=lambda line: line["val_loss"])
    layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
    budget = layer_of("tpa", T6Config.preset(config.preset)).parameters
    return {
        **row,
        "failed": None,
        "n_head": c.n_head,
        "parameters": model.num_parameters(),
        "layer_parameters": layer,
        "mismatch": layer / budget - 1,  # of a layer's parameters, against the TPA layer of the preset
        "cache_bytes_per_token": generate.measure_caches(model, 64)[0] // 64,
        # Of the evaluations during training the lowest: where data is scarce, training should have stopped there.
        "val_loss": best["val_loss"],
        "val_step": best["step"],
        "epochs": best["tokens"] / len(token_data.train),
        "final_val_loss": result.metrics[-1]["val_loss"],
        "final_train_loss": statistics.fmean(line["train_loss"] for line in result.metrics[-20:]),
        "bits_per_byte": best["val_loss"] / math.log(2) * tokens_per_byte(token_data),
        "recall": [recall(model, token_data.tokenizer, *probe) for probe in PROBES],
        "train_tokens_per_second": result.tokens_per_second,
        "decode_tokens_per_second": decode_speed(model),
    }


def tokens_per_byte(token_data: data.TokenData) -> float:
    """Tokens, ends of documents included, per byte of the held-out text."""
    tokenizer = token_data.tokenizer
    text = tokenizer.decode_bytes([t for t in token_data.val.tolist() if t != tokenizer.eot_token])
    return len(token_data.val) / len(text)


def recall(model: train.T6, tokenizer, n_facts: int, distance: int) -> dict:
    """`data.score_recall` on the one probe of these sizes, the same for all models."""
    score = data.score_recall(model, data.recall_probe(tokenizer, 64, n_facts=n_facts, distance=distance))
    return {"n_facts": n_facts, "distance": distance, **score._asdict()}


def decode_speed(model: train.T6, new_tokens: int = 64) -> float:
    """Tokens per second in decoding one sequence through the cache, the median of three times."""
    prompt = torch.zeros(1, 32, dtype=torch.long, device=model.embedding.weight.device)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        model.generate(prompt, new_tokens, temperature=0)[0, -1].item()
        seconds.append(time.perf_counter() - started)
    return new_tokens / statistics.median(seconds)


# ---------------------------------------------------------------------------------------------------- what came out


class Interval(NamedTuple):
    """A mean difference with its 95 % interval, from n pairs."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self):
        if self.n < 2:
            return f"{self.mean:+.3f} (one seed)"
        seen = "" if self.low > 0 or self.high < 0 else ", no difference seen"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{seen}"


def paired_difference(rows: list[dict], cell: str, baseline: str = "mha", measure: str = "val_loss") -> Interval:
    """cell - baseline over the seeds that both have in `rows`: mean ± t · s / √n of the differences.

    Raises ValueError if they share no seed.
    """
    own, other, n = _samples(rows, cell, baseline, measure)
    if not n:
        raise ValueError(f"{cell} and {baseline} share 0 seeds: need 1 or more")
    found = own[:n] - other[:n]
    mean = float(found.mean())
    half = float(stats.t.ppf(0.975, n - 1) * found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)


def _samples(rows: list[dict], cell: str, baseline: str, measure: str) -> tuple[NDArray, NDArray, int]:
    """A measure in the runs of two cells, those of the n seeds that both have first and in the same order; and n."""
    both = [{row["seed"]: row[measure] for row in rows if row["cell"] == name} for name in (cell, baseline)]
    shared = sorted(both[0].keys() & both[1].keys())
    own, other = (np.array([d[seed] for seed in dict.fromkeys([*shared, *d])]) for d in both)
    return own, other, len(shared)


class Difference(NamedTuple):
    """A mean difference, half of its 95 % interval, p (of so much or more if there is none), and whether paired."""

    mean: NDArray
    half: NDArray
    p: NDArray
    paired: NDArray


def difference(own: NDArray, other: NDArray, n: int) -> Difference:
    """own (..., N) - other (..., M): by pairs of the first n of each where pairing is shown to help, else Welch's.

    It is shown where sums of pairs vary more than their differences (F test at 1 %), which they do if the seed affects
    both alike. N and M are 2 or more; leading dimensions are other experiments.
    """

    def t_test(mean, variance, freedom):
        freedom = np.nan_to_num(freedom, nan=1.0)
        p = np.nan_to_num(2 * stats.t.sf(np.abs(mean) / np.sqrt(variance), freedom), nan=1.0)
        return np.array([mean, np.nan_to_num(stats.t.ppf(0.975, freedom) * np.sqrt(variance)), p])

    with np.errstate(divide="ignore", invalid="ignore"):  # where all runs are equal
        parts = [(x.var(-1, ddof=1) / x.shape[-1], x.shape[-1] - 1) for x in (own, other)]
        variance = sum(v for v, _ in parts)
        welch = t_test(own.mean(-1) - other.mean(-1), variance, variance**2 / sum(v**2 / f for v, f in parts))
        if n < 3:
            return Difference(*welch, np.zeros(variance.shape, dtype=bool))
        pairs = own[..., :n] - other[..., :n]
        spread, sums = pairs.var(-1, ddof=1), (own[..., :n] + other[..., :n]).var(-1, ddof=1)
        helps = stats.f.sf(sums / spread, n - 1, n - 1) < 0.01
        return Difference(*np.where(helps, t_test(pairs.mean(-1), spread / n, n - 1), welch), helps)


def holm(p: list[float]) -> list[float]:
    """p values after Holm's correction: by chance alone, any of them is below 0.05 in at most one of twenty cases."""
    order = np.argsort(p)
    corrected = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def contrasts(rows: list[dict], preset: str) -> Iterator[str]:
    """The contrasts fixed beforehand; then all others against MHA, or TPA if it is one, with Holm's correction."""
    fixed = {pair: f"{what}, fixed beforehand" for what, pair in fixed_contrasts(preset).items()}
    others = ((cell, "mha" if base(cell) == cell else "tpa") for cell in dict.fromkeys(row["cell"] for row in rows))
    samples = {pair: _samples(rows, *pair, "val_loss") for pair in [*fixed, *others] if pair != ("mha", "mha")}
    found = {pair: difference(*s) for pair, s in samples.items() if min(map(len, s[:2])) > 1}
    rest = [pair for pair in found if pair not in fixed]
    corrected = dict(zip(rest, holm([found[pair].p for pair in rest])))
    for pair, d in found.items():
        p = corrected.get(pair, d.p)
        how = f"{fixed.get(pair, 'corrected')}; {'paired' if d.paired else 'Welch'}, p = {p:.2g}"
        shown = f"{d.mean:+.3f} [{d.mean - d.half:+.3f}, {d.mean + d.half:+.3f}]"
        yield f"- {' - '.join(pair)}: {shown} ({how}{'' if p < 0.05 else ', no difference seen'})"


def best_rates(rows: list[dict], source: str) -> dict[str, float]:
    """For each cell of the experiment "rates" the learning rate with the lowest mean loss on held-out documents.

    A rate that was sought on the data `source` counts there; otherwise one that was sought on other data.
    """
    rated = [row for row in rows if row["experiment"] == "rates" and not row["failed"]]
    found = {}
    for cell in dict.fromkeys(row["cell"] for row in rated):
        own = [row for row in rated if row["cell"] == cell]
        losses: dict[float, list[float]] = {}
        for row in [row for row in own if row["data"] == source] or own:
            losses.setdefault(row["lr"], []).append(row["val_loss"])
        found[cell] = min(losses, key=lambda lr: statistics.fmean(losses[lr]))
    return found


def compared(rows: list[dict], source: str) -> list[dict]:
    """The rows to compare: those of the data `source`, each cell at its own best rate, the search for it left out."""
    rates = best_rates(rows, source)
    chosen = [row for row in rows if row["data"] == source and row["experiment"] != "rates" and not row["failed"]]
    return [row for row in chosen if row["lr"] == rates.get(base(row["cell"]), row["lr"])]


def table(rows: list[dict]) -> Iterator[str]:
    """The results as Markdown, one table for each data set and length of training; failed runs are listed below."""
    for key in sorted({(row["data"], row["preset"], row["steps"]) for row in rows if row["experiment"] != "rates"}):
        group = [row for row in compared(rows, key[0]) if (row["preset"], row["steps"]) == key[1:]]
        yield "{}, {}, {:,} steps".format(*key)
        yield ""
        head = "attention|heads|weights in a layer|cache, bytes per token|learning rate|held-out loss|bits per byte"
        head += "|difference to MHA [95 %]|recall of 2 facts"
        yield "| " + head.replace("|", " | ") + " |"
        yield "|" + "---|" * (head.count("|") + 1)
        for cell in dict.fromkeys(row["cell"] for row in group):
            own = [row for row in group if row["cell"] == cell]
            first, losses = own[0], [row["val_loss"] for row in own]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(own) > 1 else ""
            comparable = cell != "mha" and _samples(group, cell, "mha", "val_loss")[2]
            against_mha = str(paired_difference(group, cell)) if comparable else ""
            recalled = statistics.fmean(row["recall"][0]["choice"] for row in own)
            weights = f"{first['layer_parameters']:,} ({first['mismatch']:+.1%})"
            shown = (
                f"{cell} ({len(own)} runs)", first["n_head"], weights,
                f"{first['cache_bytes_per_token']:,}", f"{first['lr']:g}", f"{statistics.fmean(losses):.3f}{spread}",
                f"{statistics.fmean(row['bits_per_byte'] for row in own):.3f}", against_mha, f"{recalled:.0%}",
            )  # fmt: skip
            yield "| " + " | ".join(map(str, shown)) + " |"
        yield ""
        yield from contrasts(group, key[1])
        yield ""
    for row in rows:
        if row["failed"]:
            yield f"failed: {row['cell']}, seed {row['seed']}, learning rate {row['lr']:g}: {row['failed']}"


# ---------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Options:
    """Train the cells of an experiment, each with several seeds, into a file of rows; `table` shows what is there."""

    experiment: Annotated[Literal["rates", "mechanisms", "ranks", "table"], tyro.conf.Positional]
    out: Path = Path("compare.jsonl")  # the rows
    seeds: int = 3  # runs of each kind
    cells: tuple[str, ...] | None = None  # only these of the experiment's
    lr: float | None = None  # one learning rate for all; of `rates`, the middle one
    preset: Literal[tuple(DEFAULTS)] = "tiny"  # this and what follows: as for train
    data: str = "lessons"
    tokenizer: str | None = None
    tokens: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    device: str = "auto"


def source_name(source: str) -> str:
    """What rows call their data: a known source by its name, files by their last name alone."""
    if source == "auto":
        raise SettingError("--data auto: rows must say what they are about; name the data")
    return source if source in ("fineweb-edu", "lessons") else Path(source).name


def plan(options: Options, rows: list[dict]) -> list[tuple[str, int, float]]:
    """The runs of an experiment: (cell, seed, learning rate), with the seeds outermost."""
    peak = options.lr or DEFAULTS[options.preset]["lr"]
    known = cells(options.preset)
    names = options.cells or experiment(options.experiment, options.preset)
    for name in names:
        if name not in known:
            raise SettingError(f"--cells {name}: does not exist; choose from {', '.join(known)}")
    if options.experiment == "rates":
        seeds = range(RATE_SEEDS, RATE_SEEDS + options.seeds)
        return [(name, seed, factor * peak) for seed in seeds for factor in RATES for name in names]
    rates = {} if options.lr else best_rates(rows, source_name(options.data))
    missing = sorted({base(name) for name in names} - rates.keys()) if not options.lr else []
    if missing:
        raise SettingError(
            f"--out {options.out}: holds no learning rate for {', '.join(missing)}; run the experiment `rates` into "
            f"the same file first, or choose one rate for all with --lr"
        )
    return [(name, seed, rates.get(base(name), peak)) for seed in range(options.seeds) for name in names]


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as for `train`."""
    prog = "python -m tpa_minimal compare"
    options = parse(Options, arguments, prog)
    try:
        if options.experiment == "table":
            print("\n".join(table(read_rows(options.out))))
            return 0
        # Under torchrun each process takes its share of the runs, and each run is trained by one process alone.
        return _work(options, int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1)))
    except (SettingError, data.DataError, ValueError, train.TrainError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1 if isinstance(error, (train.TrainError, OSError)) else 2
    except KeyboardInterrupt:
        return 130


def _work(options: Options, rank: int, count: int) -> int:
    """Make this process's share of the runs that are not in the file yet, no other command writing there."""

    def meet():
        if count > 1:
            dist.init_process_group("gloo", rank=rank, world_size=count, timeout=LONGEST_WAIT)

    with contextlib.ExitStack() as stack:
        if rank > 0:
            meet()  # once the first has found all in order and prepared the data
        if options.seeds < 1:
            raise SettingError(f"--seeds {options.seeds}: must be 1 or more")
        runs, folder = plan(options, read_rows(options.out)), Path(f"{options.out}.runs")
        shared = {name: value for name, value in vars(options).items() if name not in ("experiment", "seeds", "cells")}
        settings, _ = settle(train.TrainConfig(**{**shared, "out": folder}))
        if rank == 0:
            stack.enter_context(locked(folder))
            stack.callback(remove_if_empty, folder)
            end_last_line(options.out)
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(None):
            token_data = data.prepare(settings.data, settings.tokens, tokenizer=settings.tokenizer, progress=rank == 0)
        if rank == 0:
            meet()
        status = _make(options, runs[rank::count], settings, token_data, progress=sys.stderr.isatty() and count == 1)
        if count > 1:
            with contextlib.suppress(RuntimeError):  # one that was stopped has left
                dist.barrier()  # for the first holds the lock
    return status


def _make(options: Options, runs: list, settings: train.TrainConfig, token_data: data.TokenData, progress: bool) -> int:
    """Those of `runs` that are not in the file yet; returns the exit status."""
    common = {
        "data": source_name(options.data),
        "sha256": token_data.meta["sha256"]["train"][:16],
        "tokenizer": token_data.tokenizer.name,
        "vocab_size": token_data.vocab_size,
        **{name: getattr(settings, name) for name in ("preset", "tokens", "steps", "batch_size", "seq_len", "dtype")},
    }
    device = torch.cuda.get_device_name() if settings.device.startswith("cuda") else bench.cpu_name()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    started, made = time.monotonic(), 0
    for number, (cell, seed, lr) in enumerate(runs, start=1):
        what = {**common, "experiment": options.experiment, "cell": cell, "seed": seed, "lr": lr}
        if identity(what) in map(identity, read_rows(options.out)):
            continue
        left = (time.monotonic() - started) / made * (len(runs) - number + 1) if made else 0
        print(
            f"run {number} of {len(runs)}: {cell}, seed {seed}, learning rate {lr:g}"
            + (f"; about {duration(left)} left" if made else ""),
            flush=True,
        )
        key = hashlib.sha256(json.dumps(identity(what)).encode()).hexdigest()[:16]
        config = replace(
            settings, out=Path(settings.out, key), seed=seed, lr=lr, eval_every=max(1, settings.steps // 6)
        )
        row = run(cell, config, progress)
        if isinstance(row, int):
            print(f"stopped; the same command goes on from here, with {len(runs) - number + 1} runs left")
            return 128 + row
        append_row(options.out, {**what, **row, **about})
        shutil.rmtree(config.out, ignore_errors=True)
        made += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
