"""What the rows of a comparison say: differences with intervals, summaries, and the table that is made from them."""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# The two questions, put before any run; all other contrasts are corrected for their number.
FIXED = {"at equal weights": ("tpa", "mha"), "at equal bytes": ("tpa", "gqa")}
SHARED = ("data", "sha256", "preset", "steps", "batch_size", "seq_len")  # in which rows agree that may be compared
TUNING = 100  # seeds from here on chose the rates, those below are compared
SOLVED = 0.9  # the accuracy from which on recall counts as solved


class Point(NamedTuple):
    """One quick evaluation: after so many steps and seconds of training; accuracy of recall, 0 where none is asked."""

    step: int
    seconds: float
    val_loss: float
    recall_accuracy: float


# ---------------------------------------------------------------------------------------------------- differences


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


def samples(rows: list[dict], cell: str, other: str, measure: str) -> tuple[NDArray, NDArray, int]:
    """A measure in the runs of two cells, those of the n seeds that both have first and in the same order; and n."""
    both = [{row["seed"]: row[measure] for row in rows if row["cell"] == name} for name in (cell, other)]
    shared = sorted(both[0].keys() & both[1].keys())
    own, others = (np.array([found[seed] for seed in dict.fromkeys([*shared, *found])]) for found in both)
    return own, others, len(shared)


class Contrast(NamedTuple):
    """A difference between two cells, with p after Holm's correction unless it was fixed beforehand."""

    cell: str
    other: str
    found: Difference
    p: float
    fixed: str

    def __str__(self):
        mean, half = self.found.mean, self.found.half
        how = f"{'paired' if self.found.paired else 'Welch'}, p = {self.p:.2g}, "
        how += f"{self.fixed}, fixed beforehand" if self.fixed else "corrected"
        seen = "" if self.p < 0.05 else "; no difference seen"
        return f"{self.cell} - {self.other}: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] ({how}{seen})"


def baseline(cell: str) -> str:
    """What a cell is compared with beside the fixed contrasts: MHA, or the TPA of which it is a version."""
    if cell.endswith("-double"):
        return cell.removesuffix("-double")
    return "tpa" if cell.startswith("tpa-") else "mha"


def contrasts(rows: list[dict], measure: str) -> list[Contrast]:
    """The two contrasts fixed beforehand; then each other cell against its baseline, with Holm's correction."""
    fixed, present = {pair: what for what, pair in FIXED.items()}, dict.fromkeys(row["cell"] for row in rows)
    pairs = dict.fromkeys([*fixed, *((cell, baseline(cell)) for cell in present)])
    found = {pair: samples(rows, *pair, measure) for pair in pairs if pair[0] != pair[1] and {*pair} <= {*present}}
    found = {pair: difference(*s) for pair, s in found.items() if min(map(len, s[:2])) > 1}
    rest = [pair for pair in found if pair not in fixed]
    p = dict(zip(rest, holm([float(found[pair].p) for pair in rest])))
    return [Contrast(*pair, d, p.get(pair, float(d.p)), fixed.get(pair, "")) for pair, d in found.items()]


# -------------------------------------------------------------------------------------------------------- summaries


def interval(values: list[float]) -> tuple[float, float]:
    """A mean, and half of its 95 % interval by Student's t; infinite for one value."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return statistics.fmean(values), half


def groups(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """The rows that may be compared, of one task, preset and length of training each, and what they are about."""
    held: dict[tuple, list[dict]] = {}
    for row in rows:
        held.setdefault(tuple(row[name] for name in SHARED), []).append(row)
    for own in held.values():
        yield "{data}, {preset}, {steps:,} steps".format(**own[0]), own


def fresh(rows: list[dict]) -> list[dict]:
    """The rows to compare: those whose seeds had no part in choosing the rates."""
    return [row for row in rows if row["seed"] < TUNING and not row["failed"]]


def first(row: dict, what: str, reached: Callable[[Point], bool]) -> float:
    """`what` of a point ("step", "seconds") at the first quick evaluation where it was `reached`; infinite if never."""
    points = (Point(*point) for point in row["history"])
    return next((getattr(point, what) for point in points if reached(point)), math.inf)


def summary(rows: list[dict]) -> list[dict]:
    """One entry for each cell of a group: sizes, the rate, its grid, and (mean, half of the interval) of the measures.

    "steps" to a recall of SOLVED and "seconds" to a loss are medians over the seeds, infinite where most never come
    there. The loss to reach, "target", is the highest with which any run ends, so that all of them come there.
    """
    own = {cell: [row for row in fresh(rows) if row["cell"] == cell] for cell in dict.fromkeys(r["cell"] for r in rows)}
    own = {cell: found for cell, found in own.items() if found}
    target = max((Point(*row["history"][-1]).val_loss for found in own.values() for row in found), default=0.0)
    entries = []
    for cell, found in own.items():
        names = ("cell", "n_head", "layer_parameters", "cache_bytes_per_token", "lr")
        entry = {name: found[0][name] for name in names} | {"n": len(found), "target": target}
        entry["grid"] = sorted({row["lr"] for row in rows if row["cell"] == cell and row["seed"] >= TUNING})
        for name in ("text_loss", "recall_accuracy", "tokens_per_second"):
            entry |= {name: interval([row[name] for row in found])} if name in found[0] else {}
        entry["seconds"] = statistics.median(
            first(row, "seconds", lambda point: point.val_loss <= target) for row in found
        )
        if "recall_accuracy" in entry:
            entry["solved"] = sum(row["recall_accuracy"] >= SOLVED for row in found)
            entry["steps"] = statistics.median(
                first(row, "step", lambda point: point.recall_accuracy >= SOLVED) for row in found
            )
        entries.append(entry)
    return entries


def _pair(entry: dict, name: str, form: str) -> str:
    return "{:{form}} ± {:{form}}".format(*entry[name], form=form) if name in entry else ""


def _median(value: float, form: str) -> str:
    return f"{value:{form}}" if value < math.inf else "not by most"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "attention": lambda e: f"{e['cell']} ({e['n']} runs)",
    "heads": lambda e: str(e["n_head"]),
    "weights in a layer": lambda e: f"{e['layer_parameters']:,}",
    "cache, bytes per token": lambda e: f"{e['cache_bytes_per_token']:,}",
    "rate (tried)": lambda e: f"{e['lr']:g}" + (f" ({e['grid'][0]:g} to {e['grid'][-1]:g})" if e["grid"] else ""),
    "held-out loss": lambda e: _pair(e, "text_loss", ".3f"),
    "recall": lambda e: _pair(e, "recall_accuracy", ".3f"),
    "solved": lambda e: f"{e['solved']} of {e['n']}" if "solved" in e else "",
    "steps to 90 %": lambda e: _median(e["steps"], ".0f") if "steps" in e else "",
    "tokens per second": lambda e: f"{e['tokens_per_second'][0]:,.0f}",
    "seconds to the loss": lambda e: _median(e["seconds"], ".1f") if "text_loss" in e else "",
}


def table(rows: list[dict]) -> Iterator[str]:
    """The results as Markdown, a table and the contrasts for each task; failed runs are listed below."""
    for what, own in groups(rows):
        entries = summary(own)
        if not entries:
            yield from (f"{what}: no fresh seeds yet", "")
            continue
        columns = {name: [form(entry) for entry in entries] for name, form in COLUMNS.items()}
        columns = {name: column for name, column in columns.items() if any(column)}
        yield from (f"{what}; the loss to reach is {entries[0]['target']:.3f}", "")
        yield "| " + " | ".join(columns) + " |"
        yield "|" + "---|" * len(columns)
        yield from ("| " + " | ".join(line) + " |" for line in zip(*columns.values()))
        yield ""
        for measure, name in (("text_loss", "loss"), ("recall_accuracy", "recall")):
            if measure in entries[0]:
                yield from (f"- {name}: {contrast}" for contrast in contrasts(fresh(own), measure))
        yield ""
    for row in rows:
        if row["failed"]:
            yield f"failed: {row['data']}, {row['cell']}, seed {row['seed']}, rate {row['lr']:g}: {row['failed']}"
