"""The comparison of mechanisms: what is compared is equal where it should be, and no run is lost or counted twice."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from tpa_minimal.experiments import compare, generate, train
from tpa_minimal.experiments.models import equal_parameters
from tpa_minimal.experiments.settings import ATTENTIONS
from tpa_minimal.files import FileError
from tpa_minimal.tpa import T6, T6Config

MICRO = "--steps 3 --batch-size 2 --seq-len 16 --tokens 5000 --lr 3e-3 --seeds 1".split()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TPA_CACHE", str(tmp_path_factory.getbasetemp() / "compare-cache"))
    monkeypatch.setattr(compare, "PROBES", ((2, 0),))
    monkeypatch.setattr(compare, "decode_speed", lambda model: 1.0)


def rows_of(**losses):
    """cell=[loss of seed 0, loss of seed 1, ...]"""
    return [
        {"cell": cell, "seed": seed, "val_loss": loss, "experiment": "mechanisms", "failed": None, "lr": 0.1}
        for cell, values in losses.items()
        for seed, loss in enumerate(values)
    ]


@pytest.mark.parametrize("preset", ["tiny", "small-124M"])
def test_cells_have_the_parameters_asked_for(preset):
    config = T6Config.preset(preset)
    budget = compare.layer_of("tpa", config).parameters
    cells = compare.cells(preset)
    assert len(cells) == 6 + 2 + 8
    for name, cell in cells.items():
        own = equal_parameters(cell.attention, T6Config.preset(preset, **cell.changes))
        layer = ATTENTIONS[cell.attention](own)
        found = sum(p.numel() for p in layer.parameters())
        assert found == compare.layer_of(cell.attention, own).parameters
        if name == "tpa-heads-of-mha":
            assert own.n_head == equal_parameters("mha", config).n_head and found < budget
        else:
            sizes = ({**cell.changes, "n_head": n} for n in (own.n_head - 2, own.n_head + 2))
            others = (compare.layer_of(cell.attention, T6Config.preset(preset, **changes)) for changes in sizes)
            fewer, more = (abs(layer.parameters - budget) for layer in others)
            assert name == "tpa-init-authors" or abs(found - budget) <= min(fewer, more), name


def test_ranks_are_the_issue_s_nine_and_each_is_there_once():
    names = compare.experiment("ranks", "tiny")
    changes = [compare.cells("tiny")[name].changes for name in names]
    found = {tuple(change.get(f"rank_{x}", default) for x, default in zip("qkv", (6, 2, 2))) for change in changes}
    assert len(names) == 9 and found == {(q, r, r) for q in (1, 6, 16) for r in (1, 2, 4)}


def test_the_paired_interval_is_student_s():
    tpa, mha = [1.0, 1.3, 0.9, 1.1], [1.1, 1.2, 1.2, 1.2]
    found = compare.paired_difference(rows_of(tpa=tpa, mha=mha), "tpa")
    d = [a - b for a, b in zip(tpa, mha)]
    half = 3.182446 * statistics.stdev(d) / 2
    assert found == pytest.approx((statistics.fmean(d), statistics.fmean(d) - half, statistics.fmean(d) + half, 4))
    assert "no difference seen" in str(found)
    assert "no difference seen" not in str(compare.Interval(-0.2, -0.3, -0.1, 4))
    assert "no difference seen" not in str(compare.Interval(0.2, 0.1, 0.3, 4))
    # The pairs are made by seed, whatever the order of the rows, and seeds of one alone do not count.
    rows = rows_of(tpa=[*tpa, 9.0], mha=mha)
    assert compare.paired_difference(rows[::-1], "tpa") == pytest.approx(found)
    with pytest.raises(ValueError, match="share 0 seeds"):
        compare.paired_difference(rows_of(tpa=[1.0]), "tpa")
    assert str(compare.paired_difference(rows_of(tpa=[1.0], mha=[2.0]), "tpa")) == "-1.000 (one seed)"


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 11, 30])
def test_student_s_table(freedom):
    """The integral of Student's density over the interval is 0.95 for any number of seeds, ten and more among them."""
    losses = [float(i) for i in range(freedom + 1)]
    found = compare.paired_difference(rows_of(tpa=losses, mha=[0.0] * len(losses)), "tpa")
    t = (found.high - found.mean) / (statistics.stdev(losses) / math.sqrt(freedom + 1))
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    xs = [-t + 2 * t * (i + 0.5) / 20000 for i in range(20000)]
    inside = sum(constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in xs) * 2 * t / 20000
    assert inside == pytest.approx(0.95, abs=5e-5)


def simulated(correlation, n, effect=0.3, experiments=20_000, spread=(1.0, 1.0)):
    """Losses (experiments, n) of a cell and its baseline: `effect` apart, correlated from seed to seed."""
    random = np.random.default_rng(0)
    seed, *own = random.standard_normal((3, experiments, n))
    mix = (np.sqrt(correlation) * seed + np.sqrt(1 - correlation) * x for x in own)
    a, b = (s * x for s, x in zip(spread, mix))
    return a + effect, b


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_holds_the_known_effect_in_95_of_100_experiments(correlation, n):
    own, other = simulated(correlation, n)
    found = compare.difference(own, other, n)
    coverage = (np.abs(found.mean - 0.3) <= found.half).mean()
    assert 0.94 <= coverage <= 0.995  # above 0.95 where seeds agree, yet not visibly enough to pair them
    if correlation == 0:
        assert coverage == pytest.approx(0.95, abs=0.01) and found.paired.mean() == pytest.approx(0.01, abs=0.003)
    # p is below 0.05 exactly where the interval leaves out zero.
    assert ((found.p < 0.05) == (np.abs(found.mean) > found.half)).all()


def test_pairs_are_made_where_they_help_and_narrow_the_interval():
    own, other = simulated(0.99, 5)
    found, apart = compare.difference(own, other, 5), compare.difference(own, other, 0)
    assert found.paired.mean() > 0.95 and not apart.paired.any()
    assert np.median(found.half) < 0.25 * np.median(apart.half)
    for i in range(5):  # the textbook's tests, one by one
        assert found.p[i] == pytest.approx(stats.ttest_rel(own[i], other[i]).pvalue)
        assert apart.p[i] == pytest.approx(stats.ttest_ind(own[i], other[i], equal_var=False).pvalue)
    # Welch's way covers unequal spreads and numbers of runs.
    own, other = simulated(0.0, 10, spread=(1.0, 5.0))
    found = compare.difference(own, other[:, :5], 0)
    assert (np.abs(found.mean - 0.3) <= found.half).mean() == pytest.approx(0.95, abs=0.01)
    equal = compare.difference(np.full(4, 2.0), np.full(4, 1.0), 4)
    assert (equal.mean, equal.half, equal.p) == (1, 0, 0)
    assert compare.difference(np.ones(4), np.ones(4), 4).p == 1


def test_holm_s_correction():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.6, 0.9]) == [1, 1] and compare.holm([]) == []
    # Of twelve contrasts without effect one or more is called a difference in 5 of 100 experiments.
    own, other = simulated(0.0, 5, effect=0.0, experiments=12 * 4000)
    p = compare.difference(own, other, 5).p.reshape(4000, 12)
    assert np.mean([min(compare.holm(row)) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.012)
    assert (p.min(1) < 0.05).mean() > 0.4  # which they would be in nearly half of them uncorrected


def test_contrasts_are_fixed_beforehand_and_the_others_corrected():
    assert compare.fixed_contrasts("tiny")["at equal weights"] == ("tpa", "mha")
    cell, baseline = compare.fixed_contrasts("tiny")["at equal bytes"]
    assert {cell, baseline} <= set(compare.experiment("mechanisms", "tiny"))
    rows = rows_of(tpa=[1.1, 1.2, 1.3], mha=[1.0, 1.1, 1.2], mqa=[1.0, 1.5, 1.2], mla=[1.0], gqa=[3.2, 3.0, 3.1])
    lines = list(compare.contrasts(rows, "tiny"))
    assert [line.split(":")[0] for line in lines] == ["- tpa - mha", "- mqa - mha", "- gqa - mha"]
    assert "at equal weights, fixed beforehand" in lines[0] and "no difference seen" in lines[1]
    p = [stats.ttest_ind([1.0, 1.5, 1.2], [1.0, 1.1, 1.2], equal_var=False).pvalue]
    p += [stats.ttest_ind([3.2, 3.0, 3.1], [1.0, 1.1, 1.2], equal_var=False).pvalue]
    assert f"Welch, p = {2 * p[1]:.2g}" in lines[2] and "no difference" not in lines[2]


def test_the_best_rate_is_the_one_with_the_lowest_mean_loss():
    def row(cell, lr, loss, **other):
        common = {"experiment": "rates", "data": "lessons", "failed": None}
        return {**common, "cell": cell, "lr": lr, "val_loss": loss, **other}

    rows = [row("tpa", 1, 2.0), row("tpa", 2, 1.0), row("tpa", 1, 1.4), row("tpa", 2, 2.6), row("mha", 2, 1.0)]
    rows += [row("mha", 1, None, failed="nan"), row("mha", 1, 0.5, experiment="mechanisms")]
    assert compare.best_rates(rows, "lessons") == {"tpa": 1, "mha": 2}
    # What was sought on the data itself counts there, and there alone.
    rows += [row("mha", 3, 9.0, data="fineweb-edu")]
    assert compare.best_rates(rows, "lessons") == {"tpa": 1, "mha": 2}
    assert compare.best_rates(rows, "fineweb-edu") == {"tpa": 1, "mha": 3}
    rows += [row("mha", lr, 1.0, data="fineweb-edu", experiment="mechanisms") for lr in (2, 3)]
    rows += [row("tpa-1-1-1", lr, 1.0, data="fineweb-edu", experiment="ranks") for lr in (1, 2)]
    assert [(r["cell"], r["lr"]) for r in compare.compared(rows, "fineweb-edu")] == [("mha", 3), ("tpa-1-1-1", 1)]


def published():
    return compare.MEASURED.read_text(encoding="utf-8").splitlines(keepends=True)


def test_a_cut_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [json.loads(line) for line in published()[:3]]
    assert compare.read_rows(path) == []
    compare.append_row(path, rows[0])
    with open(path, "a") as file:
        file.write('{"a": 2, "b')
    assert compare.read_rows(path) == rows[:1]
    compare.end_last_line(path)
    compare.append_row(path, rows[1])
    assert compare.read_rows(path) == rows[:2]
    with open(path, "a") as file:  # a row whose end alone is missing is not lost
        file.write(json.dumps(rows[2]))
    compare.end_last_line(path)
    compare.end_last_line(path)
    assert compare.read_rows(path) == rows
    path.write_text(published()[0] + '{"a": 2, "b\n' + published()[1])
    with pytest.raises(ValueError, match="line 2: is not JSON.*remove that line"):
        compare.read_rows(path)


JUNK = {
    "{}": "does not say whether",
    "5": "is not an object",
    "[" * 100_000: "is not JSON",
    '{"failed": ' + "[" * 100_000: "is not JSON",
    "\x00": "is not JSON",
    "SAME": "is the run of row 1 again",
    "recall=[]": "recall's first choice is 'None'",
    "recall=5": "recall's first choice is 'None'",
    'recall=[{"choice": []}]': "recall's first choice is '",
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
    for experiment in ("table", "mechanisms"):
        assert compare.main([experiment, "--out", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "remove that line" in error and len(error) < 400
    with pytest.raises(FileError):
        compare.read_rows(path)


def test_a_second_command_on_the_same_file_is_refused_until_the_first_is_killed(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    hold = (
        "import pathlib, sys, time; from tpa_minimal.experiments import processes\n"
        "with processes.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", hold, f"{out}.runs"], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        command = ["mechanisms", "--out", str(out), "--cells", "mha", *MICRO]
        assert compare.main(command) == 2
        error = capsys.readouterr().err
        assert "another run is writing there" in error and error.count("\n") == 1 and not out.exists()
    finally:
        first.kill()
        first.communicate()
    assert compare.main(command) == 0
    assert len(compare.read_rows(out)) == 1 and not (tmp_path / "rows.jsonl.runs").exists()


def test_the_table_does_not_wait_for_its_reference():
    rows = [json.loads(line) for line in published()]
    early = "\n".join(compare.table([row for row in rows if row["cell"] != "mha"]))
    assert re.search(r"\| tpa \(\d+ runs\)", early) and " - mha" not in early
    # More seeds than the ten that a typed table of quantiles once held.
    more = [{**row, "seed": seed} for row in rows if row["experiment"] == "mechanisms" for seed in range(20)]
    assert "| tpa (" in "\n".join(compare.table(more))


def test_runs_are_made_once_resumed_and_reproduced(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["mechanisms", "--out", str(out), "--cells", "mha", "tpa-1-1-1", *MICRO]
    schedule = train.learning_rate

    def press_ctrl_c(step, *rest):
        if step == 1 and len(compare.read_rows(out)) == 1:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, *rest)

    monkeypatch.setattr(train, "learning_rate", press_ctrl_c)
    assert compare.main(command) == 130
    assert "goes on from here, with 1 runs left" in capsys.readouterr().out
    monkeypatch.setattr(train, "learning_rate", schedule)
    assert [row["cell"] for row in compare.read_rows(out)] == ["mha"]
    assert compare.main(command) == 0
    rows = compare.read_rows(out)
    assert [row["cell"] for row in rows] == ["mha", "tpa-1-1-1"]
    assert not (tmp_path / "rows.jsonl.runs").exists()
    assert compare.main(command) == 0 and compare.read_rows(out) == rows  # nothing left to do

    # A row of another file, from the same command and from `train`, has the same losses.
    again = tmp_path / "again.jsonl"
    assert compare.main([*command[:2], str(again), *command[3:]]) == 0
    timed = ("train_tokens_per_second",)
    for one, other in zip(rows, compare.read_rows(again)):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    single = train.TrainConfig(
        out=tmp_path / "single", data="lessons", tokens=5000, attention="mha", steps=3, batch_size=2, seq_len=16,
        lr=3e-3, eval_every=1,
    )  # fmt: skip
    metrics = train.train(single, progress=False, log=lambda line: None).metrics
    assert rows[0]["val_loss"] == min(row["val_loss"] for row in metrics)

    row = rows[1]
    model = T6(T6Config.preset("tiny", vocab_size=row["vocab_size"], **row["changes"]))
    assert row["parameters"] == model.num_parameters()
    assert row["cache_bytes_per_token"] == 4 * 4 * 2 * (row["n_head"] + 32)
    capsys.readouterr()
    assert compare.main(["table", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "lessons, tiny, 3 steps" in text and re.search(r"tpa-1-1-1 \(1 runs\).*[+-]0\.\d{3} \(one seed\)", text)


def test_a_run_that_diverges_is_a_row_and_is_shown(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["mechanisms", "--out", str(out), "--cells", "tpa", *MICRO, "--lr", "1e30"]
    assert compare.main(command) == 0
    [row] = compare.read_rows(out)
    assert "_loss is " in row["failed"] and "val_loss" not in row
    compare.main(["table", "--out", str(out)])
    assert "failed: tpa, seed 0, learning rate 1e+30" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("mechanisms", "holds no learning rate for gqa, mha, mla, mqa, tpa, tpa-kv-only; run the experiment `rates`"),
        ("mechanisms --lr 1e-3 --cells tpa nonsense", "--cells nonsense: does not exist; choose from tpa"),
        ("mechanisms --data auto", "--data auto: rows must say what they are about"),
        ("rates --seeds 0", "--seeds 0: must be 1 or more"),
        ("rates --steps 0", "--steps 0: must be a whole number"),
    ],
)
def test_wrong_values_are_refused_in_one_line(tmp_path, arguments, message, capsys):
    assert compare.main([*arguments.split(), "--out", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bits_per_byte_of_knowing_nothing(tmp_path):
    """A uniform guess over V tokens costs log2(V) bits per token; the held-out text says how many bytes that is."""
    from tpa_minimal.experiments import data

    prepared = data.prepare("lessons", 5000, progress=False)
    texts = prepared.tokenizer.decode(prepared.val.tolist()).split(data.END_OF_TEXT)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert compare.tokens_per_byte(prepared) == len(prepared.val) / n_bytes


@pytest.mark.parametrize("name", ["compare.jsonl", "compare_longer.jsonl"])
def test_published_rows(name):
    """The rows in the package: nothing failed, nothing twice, and parameters and caches as the layers really have."""
    rows = compare.read_rows(compare.MEASURED.with_name(name))
    assert len({compare.identity(row) for row in rows}) == len(rows) > 0
    models = {}
    for row in rows:
        assert row["failed"] is None and math.isfinite(row["val_loss"]), json.dumps(row)
        key = (row["cell"], row["preset"], row["vocab_size"])
        if key not in models:
            cell = compare.cells(row["preset"])[row["cell"]]
            config = T6Config.preset(row["preset"], vocab_size=row["vocab_size"], **cell.changes)
            model = T6(equal_parameters(cell.attention, config), ATTENTIONS[cell.attention])
            models[key] = (
                model.config.n_head,
                model.num_parameters(),
                sum(p.numel() for p in model.blocks[0].attention.parameters()),
                generate.measure_caches(model, 8)[0] // 8,
            )
        recorded = ("n_head", "parameters", "layer_parameters", "cache_bytes_per_token")
        assert models[key] == tuple(row[name] for name in recorded), row["cell"]


@pytest.mark.skipif(not compare.MEASURED.exists(), reason="no rows have been published")
def test_notebook_08_shows_what_the_rows_say():
    """The table there is made from the rows, and no row of it is typed anywhere else."""
    lines = set(compare.table(compare.read_rows(compare.MEASURED)))
    root = compare.MEASURED.parents[3]
    notebook = json.loads((root / "notebooks" / "08_train_on_fineweb_edu.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    shown = {line for line in text.splitlines() if re.match(r"\| \S+ \(\d+ runs\)", line)}
    assert shown and shown <= lines
    assert "runs) |" not in (root / "README.md").read_text(encoding="utf-8")
