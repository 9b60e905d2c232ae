"""A run's metrics.jsonl, one line a step, and the curve of its losses."""

import json
import sys
from pathlib import Path

from tpa_minimal.experiments.checkpoint import SettingError
from tpa_minimal.files import FileError, read_json_lines, write_whole


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a last line that was cut off by a kill is left out.

    Raises SettingError for any other line that is not about a step.
    """
    path = Path(folder, "metrics.jsonl")
    try:
        rows = read_json_lines(path)
        for number, row in enumerate(rows, start=1):
            numbers = [row.get("step"), row.get("tokens"), row.get("train_loss")]
            numbers += [row.get("val_loss")] if "val_loss" in row or number == 1 else []  # it begins with one
            if not all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers) or type(row["step"]) is not int:
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
