"""MQAR has its standard form, and cannot be solved without reading the sequence."""

import numpy as np
import pytest
import torch

from tpa_minimal.experiments.recall import IGNORED, POWER, Curriculum, Recall


@pytest.mark.parametrize("vocab_size, pairs, seq_len", [(64, 2, 8), (64, 8, 64), (8192, 4, 64), (32, 15, 60)])
def test_the_standard_form(vocab_size, pairs, seq_len):
    inputs, targets = Recall(vocab_size).sequences(50, pairs, seq_len, 3, 7)
    half = vocab_size // 2
    assert inputs.shape == targets.shape == (50, seq_len)
    assert 0 <= inputs.min() and inputs.max() < vocab_size
    for tokens, answers in zip(inputs.tolist(), targets.tolist()):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and all(0 < key < half for key in keys)
        assert all(half <= value < vocab_size for value in values)
        asked = {t: answer for t, answer in enumerate(answers) if answer != IGNORED}
        # Each key is asked for once, after the pairs, at the first place of a slot of two; its value is the answer.
        assert sorted(tokens[t] for t in asked) == sorted(keys)
        assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)
        assert {tokens[t]: answer for t, answer in asked.items()} == dict(zip(keys, values))


def test_sequences_are_a_function_of_their_key():
    task = Recall()
    one, again, other = (task.sequences(4, 4, 32, 1, step)[0] for step in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(one, task.sequences(4, 4, 32, 1, 5)[0])


def test_slots_follow_the_power_law_without_replacement():
    """The first query's slot has probability i^(a-1) / Σ; all slots are as likely where all are taken."""
    _, targets = Recall().sequences(20_000, 1, 34, 0, 0)
    slots = (targets != IGNORED).float().argmax(1)
    p = np.arange(1.0, 17) ** (POWER - 1)
    found = np.bincount((slots.numpy() - 2) // 2, minlength=16) / 20_000
    assert found == pytest.approx(p / p.sum(), abs=0.012)
    _, full = Recall().sequences(10, 4, 16, 0, 0)
    assert ((full != IGNORED).sum(1) == 4).all() and (full[:, 8::2] != IGNORED).all()


def test_without_the_pairs_nothing_is_known():
    """The value is independent of key and place: the best guess from the query alone is right as often as any."""
    inputs, targets = Recall(16).sequences(30_000, 2, 8, 0, 0)
    keys, values = inputs[:, 0], inputs[:, 1]
    counts = torch.zeros(8, 8).index_put_((keys, values - 8), torch.ones(1), accumulate=True)[1:]
    assert (counts / counts.sum(1, keepdim=True)).max() < 1 / 8 + 0.02


@pytest.mark.parametrize("pairs, seq_len", [(0, 8), (3, 8), (32, 200)])
def test_what_does_not_fit_is_refused(pairs, seq_len):
    with pytest.raises(ValueError, match=f"pairs={pairs}: must be from 1 to"):
        Recall(64).sequences(1, pairs, seq_len, 0)


def test_the_curriculum_has_equal_stages_and_its_own_held_out_sequences():
    plan = Curriculum(steps=8, stages=((2, 8), (4, 16), (8, 32), (8, 64)))
    shapes = [tuple(plan.batch("train", step, 4, 64, 0)[0].shape) for step in range(9)]
    assert shapes == [(32, 8)] * 2 + [(16, 16)] * 2 + [(8, 32)] * 2 + [(4, 64)] * 3
    asked = [(plan.batch("train", step, 4, 64, 0)[1] != IGNORED).sum(1).unique().tolist() for step in (0, 2, 4, 6)]
    assert asked == [[2], [4], [8], [8]]
    held = plan.held_out(quick=False)
    assert {name: tuple(batch[0].shape) for name, [batch] in held.items()} == {
        "4 in 16": (256, 16),
        "8 in 32": (256, 32),
        "8 in 64": (256, 64),
    }
    trained = {tuple(row) for step in range(2, 4) for row in plan.batch("train", step, 4, 64, 0)[0].tolist()}
    assert not trained & {tuple(row) for row in held["4 in 16"][0][0].tolist()}
    assert torch.equal(plan.held_out(True)["8 in 64"][0][0], plan.held_out(True)["8 in 64"][0][0])
