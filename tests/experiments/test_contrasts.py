"""The statistics hold what they promise, on simulated data with a known effect."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from tpa_minimal.experiments import contrasts


def rows_of(measure="text_loss", **values):
    """cell=[measure of seed 0, of seed 1, ...]"""
    common = dict(data="lessons", preset="mini", steps=10, failed=None, lr=0.004, n_head=2, layer_parameters=5)
    common |= dict(cache_bytes_per_token=8, tokens_per_second=100.0, sha256="", batch_size=1, seq_len=1)
    return [
        {**common, "cell": cell, "seed": seed, measure: value, "val_loss": value,
         "history": [[1, 0.5, 2 * value, value], [2, 1.0, value, value]]}
        for cell, found in values.items() for seed, value in enumerate(found)
    ]  # fmt: skip


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
    found = contrasts.difference(own, other, n)
    coverage = (np.abs(found.mean - 0.3) <= found.half).mean()
    assert 0.94 <= coverage <= 0.995  # above 0.95 where seeds agree, yet not visibly enough to pair them
    if correlation == 0:
        assert coverage == pytest.approx(0.95, abs=0.01) and found.paired.mean() == pytest.approx(0.01, abs=0.003)
    # p is below 0.05 exactly where the interval leaves out zero.
    assert ((found.p < 0.05) == (np.abs(found.mean) > found.half)).all()


def test_pairs_are_made_where_they_help_and_narrow_the_interval():
    own, other = simulated(0.99, 5)
    found, apart = contrasts.difference(own, other, 5), contrasts.difference(own, other, 0)
    assert found.paired.mean() > 0.95 and not apart.paired.any()
    assert np.median(found.half) < 0.25 * np.median(apart.half)
    for i in range(5):  # the textbook's tests, one by one
        assert found.p[i] == pytest.approx(stats.ttest_rel(own[i], other[i]).pvalue)
        assert apart.p[i] == pytest.approx(stats.ttest_ind(own[i], other[i], equal_var=False).pvalue)
    # Welch's way covers unequal spreads and numbers of runs.
    own, other = simulated(0.0, 10, spread=(1.0, 5.0))
    found = contrasts.difference(own, other[:, :5], 0)
    assert (np.abs(found.mean - 0.3) <= found.half).mean() == pytest.approx(0.95, abs=0.01)
    equal = contrasts.difference(np.full(4, 2.0), np.full(4, 1.0), 4)
    assert (equal.mean, equal.half, equal.p) == (1, 0, 0)
    assert contrasts.difference(np.ones(4), np.ones(4), 4).p == 1


def test_holm_s_correction():
    assert contrasts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert contrasts.holm([0.6, 0.9]) == [1, 1] and contrasts.holm([]) == []
    # Of twelve contrasts without effect one or more is called a difference in 5 of 100 experiments.
    own, other = simulated(0.0, 5, effect=0.0, experiments=12 * 4000)
    p = contrasts.difference(own, other, 5).p.reshape(4000, 12)
    assert np.mean([min(contrasts.holm(row)) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.012)
    assert (p.min(1) < 0.05).mean() > 0.4  # which they would be in nearly half of them uncorrected


def test_two_contrasts_are_fixed_beforehand_and_the_others_corrected():
    assert contrasts.FIXED == {"at equal weights": ("tpa", "mha"), "at equal bytes": ("tpa", "gqa")}
    values = dict(mha=[1.0, 1.1, 1.2], mqa=[1.0, 1.5, 1.2], gqa=[3.2, 3.0, 3.1], mla=[1.0])
    rows = rows_of(**{"tpa": [1.1, 1.2, 1.3], "tpa-init-authors": [1.0, 1.1, 1.15], **values})
    found = {(c.cell, c.other): c for c in contrasts.contrasts(rows, "text_loss")}
    assert list(found) == [
        ("tpa", "mha"), ("tpa", "gqa"), ("tpa-init-authors", "tpa"), ("mqa", "mha"), ("gqa", "mha")
    ]  # fmt: skip
    raw = {cell: stats.ttest_ind(values[cell], values["mha"], equal_var=False).pvalue for cell in ("mqa", "gqa")}
    assert found["gqa", "mha"].p == pytest.approx(3 * raw["gqa"])
    assert found["tpa", "gqa"].p == pytest.approx(float(found["tpa", "gqa"].found.p))  # not corrected
    assert found["tpa", "mha"].fixed == "at equal weights" and found["tpa", "gqa"].fixed == "at equal bytes"
    assert "at equal bytes, fixed beforehand" in str(found["tpa", "gqa"])
    assert "corrected; no difference seen" in str(found["mqa", "mha"]) and "no diff" not in str(found["gqa", "mha"])


def test_pairs_are_made_by_seed_whatever_the_order():
    rows = rows_of(tpa=[1.0, 1.3, 0.9], mha=[0.9, 1.2, 0.8, 7.0])
    own, other, n = contrasts.samples(rows[::-1], "tpa", "mha", "text_loss")
    assert n == 3 and own.tolist() == [1.0, 1.3, 0.9] and other.tolist() == [0.9, 1.2, 0.8, 7.0]


def test_an_interval_is_student_s():
    mean, half = contrasts.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.302653 * statistics.stdev([1, 2, 4]) / math.sqrt(3))
    assert contrasts.interval([1.0]) == (1.0, math.inf)


def test_the_summary_counts_what_is_solved_and_when():
    rows = rows_of("recall_accuracy", mha=[0.95, 0.92, 0.1], tpa=[0.2, 0.3, 0.99])
    tuning = {**rows[0], "seed": 100, "lr": 0.002, "recall_accuracy": 1.0}
    mha, tpa = contrasts.summary([*rows, tuning, {**tuning, "seed": 0, "failed": "diverged"}])
    assert (mha["cell"], mha["n"], mha["solved"], tpa["solved"]) == ("mha", 3, 2, 1)
    assert mha["grid"] == [0.002] and tpa["grid"] == []
    assert mha["recall_accuracy"] == contrasts.interval([0.95, 0.92, 0.1])
    assert mha["steps"] == 1 and tpa["steps"] == math.inf
    # The loss to reach is the highest at the end of any run; a run whose loss is twice that at half time is not there.
    assert mha["target"] == tpa["target"] == 0.99
    assert tpa["seconds"] == 0.5 and mha["seconds"] == 1.0


def test_the_table_is_made_of_the_rows():
    rows = rows_of(tpa=[1.0, 1.3, 0.9], mha=[0.9, 1.2, 0.8])
    text = "\n".join(contrasts.table([*rows, {**rows[0], "failed": "loss is nan", "seed": 9}]))
    mean, half = contrasts.interval([1.0, 1.3, 0.9])
    assert f"| tpa (3 runs) | 2 | 5 | 8 | 0.004 | {mean:.3f} ± {half:.3f} | 100 |" in text
    assert "- loss: tpa - mha: +0.100 [" in text and "recall" not in text
    assert "failed: lessons, tpa, seed 9, rate 0.004: loss is nan" in text
    # It does not wait for its reference, or for fresh seeds.
    assert "| tpa (" in "\n".join(contrasts.table(rows[:3])) and " - mha" not in "\n".join(contrasts.table(rows[:3]))
    assert "no fresh seeds yet" in "\n".join(contrasts.table([{**rows[0], "seed": 100}]))
