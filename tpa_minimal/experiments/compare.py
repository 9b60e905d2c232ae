"""Which attention learns best? Same trunk, data, batches, steps and layer parameters; several seeds; error bars.

    python -m tpa_minimal.experiments.compare rates          each mechanism at three learning rates
    python -m tpa_minimal.experiments.compare mechanisms     each at its own best rate, on other seeds
    python -m tpa_minimal.experiments.compare ranks          TPA's ranks, at the same parameters per layer
    python -m tpa_minimal.experiments.compare table          what has come out so far

Every run adds one line to the file --out. A run that is in the file is not made again, and one that was interrupted
goes on from its checkpoint, so the same command continues whatever was stopped. Seeds are the outer loop, mechanisms
the inner one: a slow hour strikes them all. Several processes or GPUs share the runs, each run staying on one:

    torchrun --nproc-per-node 8 -m tpa_minimal.experiments.compare mechanisms --preset small-124M --data fineweb-edu

Differences to MHA are taken seed by seed, since a seed gives all mechanisms the same batches, and come with a 95 %
interval. Where it holds zero, no difference was seen.
"""

import argparse
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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from tpa_minimal.experiments import bench, data, generate, train
from tpa_minimal.memory import Layer, match_heads
from tpa_minimal.tpa import T6Config

MEASURED = bench.RESULTS / "compare.jsonl"  # our own rows
RATES = (0.5, 1.0, 2.0)  # of the preset's learning rate
RATE_SEEDS = 100  # the rate is chosen on seeds 100, 101, ..., and the mechanisms are compared on seeds 0, 1, ...
RANKS = tuple((rank_q, rank, rank) for rank in (1, 2, 4) for rank_q in (1, 6, 16))
PROBES = tuple((n_facts, distance) for n_facts in (2, 4) for distance in (0, 32))
# Student's t for a two-sided interval of 95 %, by degrees of freedom.
STUDENT = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=1))


# -------------------------------------------------------------------------------------------------- what to compare


@dataclass(frozen=True)
class Cell:
    """One row of the comparison: a mechanism of `train.ATTENTIONS`, and changes to the preset."""

    attention: str
    changes: Mapping = field(default_factory=dict)


def cells(preset: str) -> dict[str, Cell]:
    """All that can be compared, by name; each mechanism has the head count that gives it TPA's parameters per layer."""
    config = T6Config.preset(preset)
    budget = _layer("tpa", config).parameters
    found = {name: Cell(name) for name in train.ATTENTIONS}
    # Critics ask whether TPA's additional heads do the work; and here are the weights that the authors start from.
    found["tpa-heads-of-mha"] = Cell("tpa", {"n_head": train.equal_parameters("mha", config).n_head})
    found["tpa-init-authors"] = Cell("tpa", {"init": "authors"})
    for ranks in RANKS:
        named = dict(zip(("rank_q", "rank_k", "rank_v"), ranks))
        if replace(config, **named) != config:
            heads = match_heads("tpa", budget, config.d_model, config.d_head, **named)
            found["tpa-" + "-".join(map(str, ranks))] = Cell("tpa", {**named, "n_head": heads})
    return found


def _layer(attention: str, config: T6Config) -> Layer:
    ranks = {name: getattr(config, name) for name in ("rank_q", "rank_k", "rank_v")}
    groups = 2 if attention == "gqa" else None
    return Layer(attention, config.d_model, config.n_head, config.d_head, groups, **ranks)


MAIN = (*train.ATTENTIONS, "tpa-heads-of-mha", "tpa-init-authors")


def experiment(name: str, preset: str) -> list[str]:
    """The names of the cells that an experiment compares."""
    if name == "rates":
        return list(train.ATTENTIONS)
    ranks = ["tpa", *(cell for cell in cells(preset) if cell.startswith("tpa-") and cell[4].isdigit())]
    return {"mechanisms": list(MAIN), "ranks": ranks}[name]


def base(cell: str) -> str:
    """The mechanism whose learning rate a cell takes: its own, and TPA's for all that only changes TPA's sizes."""
    return cell if cell in train.ATTENTIONS else "tpa"


# ------------------------------------------------------------------------------------------------------------ rows

# What a run is: two rows that agree in these are the same run.
IDENTITY = ("data", "sha256", "preset", "cell", "seed", "lr", "steps", "batch_size", "seq_len", "dtype")


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file of results; none if there is no such file. A last line cut off by a kill is left out.

    Raises ValueError for any other line that is not a row.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: is not JSON ({error}); remove that line") from error
    return rows


def append_row(path: Path, row: dict) -> None:
    """Add a row by a single write, so that processes may share the file."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    line = ("" if whole else "\n") + json.dumps(row) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(row: Mapping) -> tuple:
    """What makes a row the run that it is."""
    return tuple(row[name] for name in IDENTITY)


# -------------------------------------------------------------------------------------------------------- one run


def run(cell: str, config: train.TrainConfig, progress: bool) -> dict | None:
    """Train one cell as `config` says, and measure the result: a row, or None if it was interrupted.

    A loss that is not finite makes a row too, whose "failed" says so; it is never left out in silence.
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
        return None
    model, token_data, c = result.model.eval(), result.data, result.model.config
    best = min((line for line in result.metrics if "val_loss" in line), key=lambda line: line["val_loss"])
    layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
    budget = _layer("tpa", T6Config.preset(config.preset)).parameters
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

    Raises ValueError if they share no seed, or more than ten.
    """
    own, other = ({row["seed"]: row[measure] for row in rows if row["cell"] == name} for name in (cell, baseline))
    differences = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    n = len(differences)
    if not 1 <= n <= len(STUDENT) + 1:
        raise ValueError(f"{cell} and {baseline} share {n} seeds: need 1 to {len(STUDENT) + 1}")
    mean = statistics.fmean(differences)
    half = STUDENT[n - 1] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)


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
            difference = "" if cell == "mha" else str(paired_difference(group, cell))
            recalled = statistics.fmean(row["recall"][0]["choice"] for row in own)
            weights = f"{first['layer_parameters']:,} ({first['mismatch']:+.1%})"
            shown = (
                f"{cell} ({len(own)} runs)", first["n_head"], weights,
                f"{first['cache_bytes_per_token']:,}", f"{first['lr']:g}", f"{statistics.fmean(losses):.3f}{spread}",
                f"{statistics.fmean(row['bits_per_byte'] for row in own):.3f}", difference, f"{recalled:.0%}",
            )  # fmt: skip
            yield "| " + " | ".join(map(str, shown)) + " |"
        yield ""
    for row in rows:
        if row["failed"]:
            yield f"failed: {row['cell']}, seed {row['seed']}, learning rate {row['lr']:g}: {row['failed']}"


# ---------------------------------------------------------------------------------------------------- command line


def source_name(source: str) -> str:
    """What rows call their data: a known source by its name, files by their last name alone."""
    if source == "auto":
        raise train.SettingError("--data auto: rows must say what they are about; name the data")
    return source if source in ("fineweb-edu", "lessons") else Path(source).name


def plan(options: argparse.Namespace, rows: list[dict]) -> list[tuple[str, int, float]]:
    """The runs of an experiment: (cell, seed, learning rate), with the seeds outermost."""
    peak = options.lr or train.DEFAULTS[options.preset]["lr"]
    known = cells(options.preset)
    names = options.cells or experiment(options.experiment, options.preset)
    for name in names:
        if name not in known:
            raise train.SettingError(f"--cells {name}: does not exist; choose from {', '.join(known)}")
    if options.experiment == "rates":
        seeds = range(RATE_SEEDS, RATE_SEEDS + options.seeds)
        return [(name, seed, factor * peak) for seed in seeds for factor in RATES for name in names]
    rates = {} if options.lr else best_rates(rows, source_name(options.data))
    missing = sorted({base(name) for name in names} - rates.keys()) if not options.lr else []
    if missing:
        raise train.SettingError(
            f"--out {options.out}: holds no learning rate for {', '.join(missing)}; run the experiment `rates` into "
            f"the same file first, or choose one rate for all with --lr"
        )
    return [(name, seed, rates.get(base(name), peak)) for seed in range(options.seeds) for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tpa_minimal.experiments.compare", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("experiment", choices=["rates", "mechanisms", "ranks", "table"])
    parser.add_argument("--out", type=Path, default=Path("compare.jsonl"), metavar="FILE", help="the rows")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each kind (3)")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="only these of the experiment's")
    parser.add_argument("--lr", type=float, metavar="X", help="one learning rate for all; of `rates`, the middle one")
    parser.add_argument("--preset", default="tiny", choices=train.DEFAULTS, metavar="NAME")
    parser.add_argument("--data", default="lessons", metavar="SOURCE", help="as for train")
    parser.add_argument("--tokenizer", choices=data.TOKENIZERS, help="as for train")
    for name in ("tokens", "steps", "batch_size", "seq_len"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="as for train")
    parser.add_argument("--device", default="auto", metavar="NAME", help="as for train")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as for `train`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # Under torchrun each process takes its share of the runs, and each run is trained by one process alone.
    rank, count = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
    try:
        if options.experiment == "table":
            print("\n".join(table(read_rows(options.out))))
            return 0
        return _work(options, rank, count)
    except (train.SettingError, data.DataError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except (train.TrainError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _work(options: argparse.Namespace, rank: int, count: int) -> int:
    """Make this process's share of the runs that are not in the file yet."""
    if options.seeds < 1:
        raise train.SettingError(f"--seeds {options.seeds}: must be 1 or more")
    runs = plan(options, read_rows(options.out))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings, _ = train.settle(
        train.TrainConfig(
            out=f"{options.out}.runs", data=options.data, tokenizer=options.tokenizer, preset=options.preset,
            lr=options.lr, tokens=options.tokens, steps=options.steps, batch_size=options.batch_size,
            seq_len=options.seq_len, device=options.device,
        )
    )  # fmt: skip
    token_data = _prepare(settings, rank, count)
    common = {
        "data": source_name(options.data),
        "sha256": token_data.meta["sha256"]["train"][:16],
        "tokenizer": token_data.tokenizer.name,
        "vocab_size": token_data.vocab_size,
        **{name: getattr(settings, name) for name in ("preset", "tokens", "steps", "batch_size", "seq_len", "dtype")},
    }
    device = torch.cuda.get_device_name() if settings.device.startswith("cuda") else bench.cpu_name()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    started, made, mine = time.monotonic(), 0, runs[rank::count]
    for number, (cell, seed, lr) in enumerate(mine, start=1):
        what = {**common, "experiment": options.experiment, "cell": cell, "seed": seed, "lr": lr}
        if identity(what) in map(identity, read_rows(options.out)):
            continue
        left = (time.monotonic() - started) / made * (len(mine) - number + 1) if made else 0
        print(
            f"run {number} of {len(mine)}: {cell}, seed {seed}, learning rate {lr:g}"
            + (f"; about {train.duration(left)} left" if made else ""),
            flush=True,
        )
        key = hashlib.sha256(json.dumps(identity(what)).encode()).hexdigest()[:16]
        config = replace(
            settings, out=Path(settings.out, key), seed=seed, lr=lr, eval_every=max(1, settings.steps // 6)
        )
        row = run(cell, config, progress=sys.stderr.isatty() and count == 1)
        if row is None:
            print(f"stopped; the same command goes on from here, with {len(mine) - number + 1} runs left")
            return 130
        append_row(options.out, {**what, **row, **about})
        shutil.rmtree(config.out, ignore_errors=True)
        made += 1
    with contextlib.suppress(OSError):
        Path(settings.out).rmdir()  # if no other process has anything in it
    return 0


def _prepare(settings: train.TrainConfig, rank: int, count: int) -> data.TokenData:
    """The data, prepared by the first process while the others wait."""

    def prepare():
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(None):
            return data.prepare(settings.data, settings.tokens, tokenizer=settings.tokenizer, progress=rank == 0)

    if count == 1:
        return prepare()
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        if rank == 0:
            prepared = prepare()
        dist.barrier()
        return prepared if rank == 0 else prepare()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
