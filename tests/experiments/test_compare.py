"""The comparison of mechanisms: what is compared is equal where it should be, and no run is lost or counted twice."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tpa_minimal.experiments import compare, contrasts, generate, models, recall, train
from tpa_minimal.files import FileError
from tpa_minimal.tpa import T6

MICRO = "--steps 4 --batch-size 2 --seq-len 64 --tuning-seeds 1 --main-seeds 1 --seeds 1 --rates 0.001 0.00141".split()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TPA_CACHE", str(tmp_path_factory.getbasetemp() / "compare-cache"))


# ----------------------------------------------------------------------------------------------------- what is equal


def test_mini_has_the_paper_s_proportions():
    base = compare.preset("mini")
    layers = {name: cell.layer(base) for name, cell in compare.cells(base).items()}
    heads = {name: layer.n_head for name, layer in layers.items()}
    assert 2 <= heads["tpa"] / heads["mha"] <= 3
    assert layers["mla"].d_c < base.d_model and heads["mla"] == heads["mha"]
    for name in ("tpa", "tpa-init-authors", "mha", "gqa", "mqa", "mla", "tpa-init-authors-double", "mqa-bytes"):
        assert layers[name].parameters == pytest.approx(4 * base.d_model**2, rel=0.035), name
    for name in ("gqa", "mla", "mha-bytes", "mqa-bytes", "tpa-init-authors"):
        assert layers[name].cached_numbers == pytest.approx(layers["tpa"].cached_numbers, rel=0.035), name
    assert layers["mha"].cached_numbers > 3 * layers["tpa"].cached_numbers
    assert heads["tpa-heads-of-mha"] == heads["mha"]


@pytest.mark.parametrize("preset", ["mini", "tiny", "small-124M"])
def test_every_cell_is_the_layer_that_the_accountant_says(preset):
    base = compare.preset(preset, 64)
    for name, cell in compare.cells(base).items():
        layer, said = cell.make(cell.config(base)), cell.layer(base)
        assert sum(p.numel() for p in layer.parameters()) == said.parameters, name
        x, cache = torch.zeros(1, 3, base.d_model), layer.new_cache(1, 3)
        with torch.no_grad():
            layer(x, cache)
        assert cache.nbytes == 3 * 4 * said.cached_numbers, name


def test_weights_are_paired():
    """A seed gives all cells the same backbone, bit by bit, and another seed another; attention has its own draw."""
    base = compare.preset("mini")

    def backbone(cell, seed):
        model = models.new_model(cell.config(base), cell.make, seed)
        return {name: p for name, p in model.named_parameters() if ".attention." not in name}

    cells = compare.cells(base)
    reference, other = backbone(cells["tpa"], 0), backbone(cells["tpa"], 1)
    assert len(reference) == 1 + 3 * base.n_layer
    for name, cell in cells.items():
        own = backbone(cell, 0)
        assert own.keys() == reference.keys()
        assert all(torch.equal(own[key], reference[key]) for key in own), name
    assert not torch.equal(reference["embedding.weight"], other["embedding.weight"])
    torch.manual_seed(5)
    again = backbone(cells["mha"], 1)
    assert torch.equal(again["embedding.weight"], other["embedding.weight"])
    layers = [models.new_model(cells["tpa"].config(base), cells["tpa"].make, seed).blocks[0] for seed in (0, 1)]
    assert not torch.equal(*(block.attention.factor_proj.weight for block in layers))


def test_mixed_takes_turns_and_keeps_the_vocabularies_apart():
    options = compare.Options("run", data="mixed", steps=4, batch_size=2, seq_len=64, tokens=5000)
    task = compare.find_task(options)
    text, asked = (task.batch("train", step, 2, 64, 0) for step in (0, 1))
    assert text[0].max() < 1024 + 64 <= task.vocab_size == task.text.vocab_size + 64
    assert torch.equal(text[0], task.text.batch("train", 0, 2, 64, 0)[0])
    plain = task.recall.batch("train", 1, 2, 64, 0)
    assert torch.equal(asked[0], plain[0] + task.text.vocab_size)
    said = plain[1] != recall.IGNORED
    assert torch.equal(asked[1] != recall.IGNORED, said)
    assert torch.equal(asked[1][said], plain[1][said] + task.text.vocab_size)
    assert set(task.held_out(True)) == {"text", "4 in 16", "8 in 32", "8 in 64"}


def test_all_of_the_held_out_split_is_read():
    options = compare.Options("run", data="lessons", steps=4, seq_len=64, tokens=20_000)
    task = compare.find_task(options)
    targets = torch.cat([t.flatten() for _, t in task.held_out(False)["text"]])
    n = (len(task.tokens.val) - 1) // 64 * 64  # whole windows
    assert targets.tolist() == task.tokens.val[1 : n + 1].tolist()
    assert sum(t.numel() for _, t in task.held_out(True)["text"]) <= 2048


def test_the_score_is_the_mean_over_what_is_asked():
    logits = torch.randn(2, 5, 7)

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            return logits[: len(tokens)]

    targets = torch.tensor([[1, -100, 2, -100, 3], [-100, -100, 4, -100, -100]])
    loss, accuracy = compare.score(Fixed(), [(torch.zeros(2, 5, dtype=torch.long), targets)])
    places = [(0, 0, 1), (0, 2, 2), (0, 4, 3), (1, 2, 4)]
    assert loss == pytest.approx(-np.mean([logits[b, t].log_softmax(-1)[v].item() for b, t, v in places]), rel=1e-6)
    assert accuracy == np.mean([logits[b, t].argmax().item() == v for b, t, v in places])


# ------------------------------------------------------------------------------------------------ rates and their plan


def tried(cell, **losses_by_rate):
    return [
        {"cell": cell, "seed": 100 + i, "lr": float(lr.replace("_", ".")), "val_loss": loss, "failed": failed}
        for lr, found in losses_by_rate.items()
        for i, (loss, failed) in enumerate(found)
    ]


def losses(*values):
    return [(value, None if value is not None else "diverged") for value in values]


SEEDS = range(100, 102)


@pytest.mark.parametrize(
    "rows, expected",
    [
        ({}, (None, [0.001, 0.00141])),
        ({"0_001": losses(2.0, 2.0)}, (None, [0.00141])),
        ({"0_001": losses(2.0, 2.0), "0_00141": losses(1.0)}, (None, [0.00141])),
        ({"0_001": losses(2.0, 2.0), "0_00141": losses(1.0, 1.0)}, (None, [0.002])),
        ({"0_001": losses(2.0, 2.0), "0_00141": losses(2.5, 1.7)}, (None, [0.000707])),
        ({"0_001": losses(2.0, 2.0), "0_00141": losses(1.0, 1.0), "0_002": losses(0.5, 0.5)}, (None, [0.00283])),
        ({"0_001": losses(2.0, 2.0), "0_00141": losses(1.0, 1.0), "0_002": losses(0.5, 2.0)}, (0.00141, [])),
        ({"0_001": losses(2.0, 2.0), "0_00141": losses(1.0, 1.0), "0_002": losses(0.5, None)}, (0.00141, [])),
        ({"0_001": losses(None, 2.0), "0_00141": losses(None, 1.0)}, (None, [0.000707])),
    ],
)
def test_the_grid_grows_until_the_best_is_inside(rows, expected):
    rows = tried("tpa", **rows) + tried("mha", **{"0_016": losses(0.0, 0.0)})
    rows += [{"cell": "tpa", "seed": 0, "lr": 0.5, "val_loss": 0.0, "failed": None}]  # a fresh seed chooses nothing
    assert compare.tuned(rows, "tpa", SEEDS, (0.001, 0.00141)) == expected


@pytest.mark.parametrize("optimum", [-9, 0, 4, 13])
def test_the_search_ends_at_the_optimum_wherever_it_is(optimum):
    options = compare.Options("run", rates=(0.001, 0.00141), tuning_seeds=2, main_seeds=3, data="recall")
    rows = []
    for _ in range(100):
        runs, left = compare.plan(options, rows, ["tpa"])
        assert left >= len(runs)
        if not runs:
            break
        cell, seed, lr = runs[0]
        k = 2 * math.log2(lr / 0.001)
        rows.append({"cell": cell, "seed": seed, "lr": lr, "val_loss": abs(k - optimum), "failed": None})
    fresh = [row for row in rows if row["seed"] < 100]
    assert [row["seed"] for row in fresh] == [0, 1, 2] and {row["lr"] for row in fresh} == {compare.rate(optimum)}
    grid = sorted({row["lr"] for row in rows if row["seed"] >= 100})
    assert grid[0] < compare.rate(optimum) < grid[-1]
    assert grid == [compare.rate(round(2 * math.log2(lr / 0.001))) for lr in grid]
    assert {row["seed"] for row in rows if row["seed"] >= 100} == {100, 101}


def test_the_cells_of_the_fixed_contrasts_get_more_seeds_and_recall_gives_them_to_all():
    rows = [
        row for cell in ("tpa", "mha", "gqa", "mqa")
        for row in tried(cell, **{"0_001": losses(2.0), "0_00141": losses(1.0), "0_002": losses(3.0)})
    ]  # fmt: skip
    options = compare.Options("run", rates=(0.001, 0.00141), tuning_seeds=1, main_seeds=4, seeds=2, data="lessons")
    runs, left = compare.plan(options, rows, ["tpa", "mha", "gqa", "mqa"])
    counts = {cell: sum(run[0] == cell for run in runs) for cell in ("tpa", "mha", "gqa", "mqa")}
    assert counts == {"tpa": 4, "mha": 4, "gqa": 4, "mqa": 2} and left == 14
    assert [run[1] for run in runs] == sorted(run[1] for run in runs)  # seeds outermost
    runs, _ = compare.plan(compare.replace(options, data="recall"), rows, ["mqa"])
    assert len(runs) == 4


# ------------------------------------------------------------------------------------------------------------- rows


def published():
    return compare.MEASURED.read_text(encoding="utf-8").splitlines(keepends=True)


def test_runs_on_other_data_or_with_other_batches_are_not_compared():
    rows = [json.loads(line) for line in published()[:2]]
    for name, other in dict(data="x", sha256="x", preset="tiny", steps=1, batch_size=5, seq_len=9).items():
        changed = [{**rows[0], name: other}]
        assert [own for _, own in contrasts.groups([rows[0], *changed])] == [[rows[0]], changed], name
    assert len(list(contrasts.groups([rows[0], {**rows[0], "cell": "mha", "seed": 3, "lr": 0.1}]))) == 1


def test_a_cut_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [json.loads(line) for line in published()[:3]]
    assert compare.read_rows(path) == []
    compare.append_row(path, rows[0])
    with open(path, "a") as file:
        file.write('{"a": 2, "b')
    assert compare.read_rows(path) == rows[:1]
    compare.append_row(path, rows[1])
    assert compare.read_rows(path) == rows[:2]
    path.write_text(path.read_text() + json.dumps(rows[2]))  # a row whose end alone is missing is not lost
    compare.append_row(path, {**rows[2], "seed": 77})
    assert compare.read_rows(path) == [*rows, {**rows[2], "seed": 77}]
    path.write_text(published()[0] + '{"a": 2, "b\n' + published()[1])
    with pytest.raises(ValueError, match="line 2: is not JSON.*remove that line"):
        compare.read_rows(path)


JUNK = {
    "{}": "does not say whether",
    "5": "is not an object",
    "[" * 100_000: "is not JSON",
    "\x00": "is not JSON",
    "SAME": "is the run of row 1 again",
    "history=[]": "history is '[]'",
    "history=[[1, 2, 3]]": "history is '[[1, 2, 3]]'",
    "history=[[1, 2, NaN, 4]]": "history is '[[1, 2, nan, 4]]'",
    "val_loss=NaN": "val_loss is 'nan'",
    "val_loss=null": "val_loss is 'None'",
    "val_loss=true": "val_loss is 'True'",
    f"val_loss=1{'0' * 400}": "val_loss is '1000",
    'seed="0"': "seed is '0'",
    "seed=0.5": "seed is '0.5'",
    "cell={}": "cell is '{}'",
    "data=[]": "data is '[]'",
    "lr=[]": "lr is '[]'",
    "failed=0": "does not say whether",
}


@pytest.mark.parametrize("junk, message", JUNK.items(), ids=[key[:20] for key in JUNK])
def test_what_is_no_row_is_refused_in_one_line(tmp_path, junk, message, capsys):
    path, name = tmp_path / "rows.jsonl", junk.partition("=")[0]
    if name in (row := json.loads(published()[1])):
        junk = json.dumps({**row, name: "HERE"}).replace('"HERE"', junk.partition("=")[2])
    path.write_text(published()[0] + (published()[0] if junk == "SAME" else junk + "\n"))
    for command in ("table", "run"):
        assert compare.main([command, "--out", str(path), *MICRO]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "remove that line" in error and len(error) < 400
    with pytest.raises(FileError):
        compare.read_rows(path)


# ---------------------------------------------------------------------------------------------------------- the runs

TIMED = ("seconds", "wall_seconds", "tokens_per_second", "history")


def untimed(row):
    points = [(step, loss, accuracy) for step, _, loss, accuracy in row["history"]]
    return {k: v for k, v in row.items() if k not in TIMED} | {"points": points}


def test_runs_are_made_once_stopped_resumed_and_reproduced(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["run", "--out", str(out), "--cells", "mha", "tpa", *MICRO]
    schedule = train.learning_rate

    def press_ctrl_c(step, *rest):
        if step == 2 and len(compare.read_rows(out)) == 1:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, *rest)

    monkeypatch.setattr(train, "learning_rate", press_ctrl_c)
    assert compare.main(command) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().out
    monkeypatch.setattr(train, "learning_rate", schedule)
    [stopped] = Path(f"{out}.runs").glob("*/checkpoint-*")
    assert stopped.name == "checkpoint-00000003" and len(compare.read_rows(out)) == 1
    assert compare.main(command) == 0
    rows = compare.read_rows(out)
    assert "runs done" in capsys.readouterr().out and not Path(f"{out}.runs").exists()
    assert compare.main(command) == 0 and compare.read_rows(out) == rows  # nothing left to do

    # The same command into another file, undisturbed, gives the same rows, digit by digit.
    again = tmp_path / "again.jsonl"
    assert compare.main([*command[:2], str(again), *command[3:]]) == 0
    assert sorted(map(json.dumps, map(untimed, rows))) == sorted(
        map(json.dumps, map(untimed, compare.read_rows(again)))
    )
    assert all(row["threads"] == torch.get_num_threads() and row["seconds"] > 0 for row in rows)
    assert compare.main(["table", "--out", str(out)]) == 0
    assert "recall, mini, 4 steps" in capsys.readouterr().out


def test_where_nothing_can_be_written_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(compare, "find_task", lambda options: pytest.fail("the data are being made"))
    monkeypatch.setattr(compare, "read_rows", lambda path: [])
    assert compare.main(["run", "--out", str(tmp_path / "file/rows.jsonl"), *MICRO]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "file") in error


def test_a_mixed_run_measures_both(tmp_path):
    options = compare.Options("run", data="mixed", steps=4, batch_size=2, seq_len=64, tokens=5000)
    task = compare.find_task(options)
    row = compare.run(compare.cells(compare.preset("mini"))["mla"], options, task, 0, 0.001, tmp_path / "run")
    assert row["val_loss"] == row["text_loss"] + row["recall_loss"] and 0 <= row["recall_accuracy"] < 0.2
    assert row["text_loss"] < math.log(task.vocab_size) + 1
    assert [point[0] for point in row["history"]] == [1, 2, 3, 4]


def launch(out, *more):
    command = [
        sys.executable,
        "-m",
        "tpa_minimal",
        "compare",
        "run",
        "--out",
        str(out),
        "--cells",
        "mha",
        "gqa",
        *MICRO,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_processes_share_the_runs_and_one_that_is_killed_costs_nothing(tmp_path):
    out = tmp_path / "rows.jsonl"
    first, second = launch(out), launch(out)
    try:
        deadline = time.monotonic() + 120
        while len(compare.read_rows(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        first.kill()  # SIGKILL: nothing can be tidied up
        first.communicate(timeout=60)
        said, _ = second.communicate(timeout=200)
        assert second.returncode == 0, said
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    rows = compare.read_rows(out)
    for cell in ("mha", "gqa"):
        grid = sorted(row["lr"] for row in rows if row["cell"] == cell and row["seed"] == 100)
        [fresh] = [row for row in rows if row["cell"] == cell and row["seed"] == 0]
        assert len(grid) >= 3 and len(set(grid)) == len(grid) and grid[0] < fresh["lr"] < grid[-1]
    assert not list(Path(f"{out}.runs").glob("*"))


def test_a_run_that_diverges_is_a_row_and_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Trainer, "train_step", lambda self, step, steps: math.nan)
    options = compare.Options("run", steps=4, batch_size=2, seq_len=64)
    task = compare.find_task(options)
    row = compare.run(compare.cells(compare.preset("mini"))["tpa"], options, task, 0, 0.001, tmp_path / "run")
    assert row["failed"] == "loss is nan at step 0" and "val_loss" not in row
    what = {**json.loads(published()[0]), **row, "cell": "tpa", "seed": 0, "lr": 0.001}
    compare.append_row(tmp_path / "rows.jsonl", what)
    compare.main(["table", "--out", str(tmp_path / "rows.jsonl")])
    assert "tpa, seed 0, rate 0.001: loss is nan at step 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--cells tpa nonsense", "--cells nonsense: does not exist; choose from tpa"),
        ("--data auto", "--data auto: rows must say what they are about"),
        ("--seeds 0", "--seeds 0: must be from 1 to 100"),
        ("--main-seeds 101", "--main-seeds 101: must be from 1 to 100"),
        ("--steps 0", "--steps 0: must be a whole number"),
        ("--rates 0.0035", "--rates 0.0035: must be of the grid 0.001, 0.00141, 0.002"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_wrong_values_are_refused_in_one_line(tmp_path, arguments, message, capsys):
    assert compare.main(["run", *arguments.split(), "--out", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- published rows


LONGER = compare.MEASURED.with_name("compare_longer.jsonl")


def test_published_rows_are_whole_and_their_sizes_are_those_of_the_layers():
    rows = compare.read_rows(compare.MEASURED)
    assert {row["data"] for row in rows} == {"recall", "lessons", "fineweb-edu", "mixed"}
    rows += compare.read_rows(LONGER)
    models = {}
    for row in rows:
        if row["failed"]:
            continue
        base = compare.preset(row["preset"])
        cell = compare.cells(base)[row["cell"]]
        if row["cell"] not in models:
            model = T6(cell.config(base), cell.make)
            layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
            models[row["cell"]] = (model.config.n_head, layer, generate.measure_caches(model, 8)[0] // 8)
        assert models[row["cell"]] == (row["n_head"], row["layer_parameters"], row["cache_bytes_per_token"])


def test_published_rates_lie_inside_their_grids_and_fresh_seeds_are_enough():
    published = [(rows, 3, 10, 5) for _, rows in contrasts.groups(compare.read_rows(compare.MEASURED))]
    published += [(rows, 1, 3, 3) for _, rows in contrasts.groups(compare.read_rows(LONGER))]
    assert len(published) == 6
    for rows, tuning_seeds, main_seeds, seeds in published:
        for entry in contrasts.summary(rows):
            what = rows[0]["data"], rows[0]["steps"]
            assert entry["grid"][0] < entry["lr"] < entry["grid"][-1], (what, entry["cell"])
            tuning = [row for row in rows if row["cell"] == entry["cell"] and row["seed"] >= contrasts.TUNING]
            best, following = compare.tuned(tuning, entry["cell"], range(100, 100 + tuning_seeds), entry["grid"])
            assert (best, following) == (entry["lr"], []), (what, entry["cell"])
            main = rows[0]["data"] in ("recall", "mixed") or any(
                entry["cell"] in pair for pair in contrasts.FIXED.values()
            )
            assert entry["n"] >= (main_seeds if main else seeds), (what, entry["cell"])


ROOT = compare.MEASURED.parents[3]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?: of \d+)?")


def numbers(text):
    """All numbers of a text, thousands without their comma, and such as "7 of 10" as one."""
    return {found.replace(",", "") for found in NUMBER.findall(text)}


def test_notebook_08_shows_the_table_and_says_no_other_number():
    lines = [line for path in (compare.MEASURED, LONGER) for line in contrasts.table(compare.read_rows(path))]
    notebook = json.loads((ROOT / "notebooks" / "08_train_on_fineweb_edu.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    shown = {line for line in text.splitlines() if re.match(r"\| \S+ \(\d+ runs\)|- (loss|recall): ", line)}
    assert shown == {line for line in lines if re.match(r"\| \S+ \(\d+ runs\)|- (loss|recall): ", line)}
    assert "runs) |" not in (ROOT / "README.md").read_text(encoding="utf-8")

    source = (ROOT / "notebooks" / "src" / "08_train_on_fineweb_edu.py").read_text(encoding="utf-8")
    said = source[source.index("# ### What this supports") : source.index("# ### Beside the paper")]
    said = re.sub(r"```.*?```", "", said, flags=re.DOTALL)  # commands
    assert len(numbers(said)) > 10 and numbers(said) <= numbers("\n".join(lines)) | {"95"}


def test_what_notebook_08_and_the_readme_conclude_follows_from_the_rows():
    tasks = {rows[0]["data"]: rows for _, rows in contrasts.groups(compare.read_rows(compare.MEASURED))}
    found = {
        (task, measure): {(c.cell, c.other): c for c in contrasts.contrasts(contrasts.fresh(rows), measure)}
        for task, rows in tasks.items()
        for measure in ("text_loss", "recall_accuracy")
        if measure in rows[0]
    }
    assert len(found) == 5
    for (_, measure), own in found.items():  # TPA with the paper's start is behind everywhere
        for pair in contrasts.FIXED.values():
            assert own[pair].p < 0.05 and (own[pair].found.mean > 0) == (measure == "text_loss")
    assert not any(c.found.paired for own in found.values() for c in own.values())  # sharing seeds helped nowhere
    entries = {task: {entry["cell"]: entry for entry in contrasts.summary(rows)} for task, rows in tasks.items()}
    # The authors' start closes most of the gap to GQA, not all: hence the recommendation.
    for task in ("lessons", "fineweb-edu"):
        means = {cell: entry["text_loss"][0] for cell, entry in entries[task].items()}
        assert found[task, "text_loss"]["tpa-init-authors", "tpa"].p < 0.05
        assert 0 < means["tpa-init-authors"] - means["gqa"] < (means["tpa"] - means["gqa"]) / 2
    solved = {task: {cell: entry["solved"] for cell, entry in entries[task].items()} for task in ("recall", "mixed")}
    assert not any(solved["recall"][cell] for cell in entries["recall"] if cell.startswith("tpa") or cell == "mqa")
    assert solved["mixed"]["tpa-init-authors"] == 10 and solved["mixed"]["tpa"] == 0
    # At half the rates that were chosen, MHA and GQA solved recall amid lessons in all tuning runs.
    for row in tasks["mixed"]:
        if row["cell"] in ("mha", "gqa") and row["lr"] == 0.00141:
            assert entries["mixed"][row["cell"]]["lr"] == 0.00283 and row["recall_accuracy"] > contrasts.SOLVED
    # Per byte: MQA with a wider key is best on the lessons, and as good as MHA; no difference by heads or by rank.
    at_bytes = [e for e in entries["lessons"].values() if 496 <= e["cache_bytes_per_token"] <= 512]
    assert min(at_bytes, key=lambda entry: entry["text_loss"])["cell"] == "mqa-bytes" and len(at_bytes) == 6
    loss = found["lessons", "text_loss"]
    unseen = [("mqa-bytes", "mha"), ("tpa-heads-of-mha", "tpa"), ("tpa-init-authors-double", "tpa-init-authors")]
    assert all(loss[pair].p > 0.05 for pair in unseen)
    assert (
        3 * entries["lessons"]["mqa-bytes"]["cache_bytes_per_token"]
        == entries["lessons"]["mha"]["cache_bytes_per_token"]
    )
    longer = {rows[0]["data"]: rows for _, rows in contrasts.groups(compare.read_rows(LONGER))}
    for entry in contrasts.summary(longer["recall"]):  # with four times the steps it is a delay
        assert entry["solved"] == entry["n"] and entry["steps"] > 400
    later = {(c.cell, c.other): c for c in contrasts.contrasts(contrasts.fresh(longer["lessons"]), "text_loss")}
    assert all(c.p > 0.05 for c in later.values())
    assert all(abs(c.found.mean) < abs(loss[pair].found.mean) / 1.5 for pair, c in later.items())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"In our own small runs(.*?)\[notebook 08\]", readme, re.DOTALL).group(1)
    lines = "\n".join(contrasts.table(compare.read_rows(compare.MEASURED)))
    assert numbers(said) and numbers(said) <= numbers(lines)
