"""Training: the recipe, what a run writes, and that nothing but a wrong value can stop it from being continued."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.experiments import checkpoint, data, generate, metrics, models, processes, settings, train
from tpa_minimal.experiments.train import SettingError, TrainConfig, TrainError
from tpa_minimal.tpa import T6, T6Config

MICRO = TrainConfig(
    data="lessons",
    tokens=20_000,
    changes=dict(n_layer=1, d_model=16, n_head=2, d_head=4, rank_q=2, rank_k=1, rank_v=1),
    steps=8,
    batch_size=4,
    seq_len=16,
    lr=1e-2,
    eval_every=3,
    device="cpu",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_own_cache(tmp_path_factory):
    """Sums are taken in one order, and the corpus is made once for this file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(train, "MIN_CHECKPOINT_SECONDS", 0.0)
        yield
    torch.set_num_threads(threads)


def run(out, **changes):
    return train.train(replace(MICRO, out=out, **changes), progress=False, log=lambda line: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to, and its metrics as text."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(out)
    return out, (out / "metrics.jsonl").read_text()


# A child process for each run that is killed, forked from a server that has imported the slow modules once.
children = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    children.set_forkserver_preload(["pytest", "tiktoken", "torch._dynamo", "tpa_minimal.experiments.train"])


def in_child(target, *arguments, **environment):
    """Start target(*arguments) in a process that may die; returns the process."""
    process = children.Process(target=_child, args=(dict(os.environ, **environment), target, arguments))
    process.start()
    return process


def _child(environment, target, arguments):
    os.environ.update(environment)
    torch.set_num_threads(1)
    train.MIN_CHECKPOINT_SECONDS = 0.0
    target(*arguments)


# ---------------------------------------------------------------------------------------------------- the recipe


def test_learning_rate_warms_up_then_follows_a_cosine_to_a_twentieth():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0
    assert rates[54] == pytest.approx(2 * (0.05 + 0.95 / 2 * (1 + math.cos(math.pi * 44 / 90))))
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0.1 < rates[99] < 0.11
    assert train.learning_rate(1999, 10**6, 1.0) == 1.0  # the warm-up is never longer than 2,000 steps
    assert train.learning_rate(0, 1, 1.0) == 1.0


def test_decay_is_for_matrices_the_tied_embedding_included():
    class WithGain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(config.d_model))
            self.matrix = nn.Parameter(torch.ones(config.d_model, 2))

    model = T6(T6Config(32, 1, 8, 2, 4), attention=WithGain)
    optimizer = train.new_optimizer(model, 1e-3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "embedding.weight": 0.1,
        "blocks.0.attention.gain": 0.0,
        "blocks.0.attention.matrix": 0.1,
        "blocks.0.mlp.gate_proj.weight": 0.1,
        "blocks.0.mlp.up_proj.weight": 0.1,
        "blocks.0.mlp.down_proj.weight": 0.1,
    }
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path):
    """The oracle: twenty lines that do the same without processes, parts, checkpoints or autocast."""
    result = run(tmp_path / "run")
    token_data = result.data
    changes = {"vocab_size": token_data.vocab_size, **MICRO.changes}
    model = T6(T6Config.preset("tiny", **changes))
    model.load_state_dict(models.build_model(result.settings, token_data.vocab_size).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(9):
        if step in (0, 3, 6, 8):
            batches = token_data.validation_batches(4, 16, settings.EVAL_TOKENS // 64)
            pairs = [(x, y) for inputs, targets in batches for x, y in zip(inputs, targets)]
            losses = [F.cross_entropy(model(x[None])[0], y).item() for x, y in pairs]
            assert result.metrics[step]["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        inputs, targets = token_data.batch("train", step, 4, 16, 0)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        assert result.metrics[step]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
        if step < 8:
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for p in model.parameters():
                p.grad *= min(1.0, 1.0 / norm)
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, 8, 1e-2)
            optimizer.step()
            optimizer.zero_grad()
    for (name, trained), expected in zip(result.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(trained, expected, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_metrics_have_a_line_per_step_and_the_losses_fall(undisturbed):
    out, text = undisturbed
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["tokens"] for row in rows] == [64 * step for step in range(9)]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6, 8]
    assert rows[8]["val_loss"] < rows[0]["val_loss"] - 0.1
    seen = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert seen == {"metrics.jsonl", "loss.png", "config.json", "checkpoint-00000008"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path / "run", steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_accumulation_changes_nothing_but_rounding(undisturbed, tmp_path):
    parts = run(tmp_path / "parts", accumulation=4)
    for row, expected in zip(parts.metrics, metrics.read_metrics(undisturbed[0]), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_computed_in_as_many_parts_as_memory_needs():
    big = replace(MICRO, batch_size=480, seq_len=1024)
    assert settings.accumulation(big, 1, 50304) == 48  # 10 sequences of 1,024 tokens make 2^29 logits
    assert settings.accumulation(big, 8, 50304) == 6
    assert settings.accumulation(MICRO, 1, 1024) == 1
    assert settings.accumulation(replace(MICRO, batch_size=3, seq_len=8192), 1, 2**17) == 3


def _one_of_two(rank, config):
    os.environ["RANK"] = str(rank)
    train.train(config, progress=False)


def two_processes(target, *each):
    """Start target(rank, *each[rank]) in two processes, as torchrun would; returns them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    return [in_child(target, rank, *what, **torchrun) for rank, what in enumerate(each)]


def test_two_processes_give_the_losses_of_one(undisturbed, tmp_path):
    config = replace(MICRO, out=tmp_path / "two", accumulation=2)
    for process in two_processes(_one_of_two, (config,), (config,)):
        process.join(120)
        assert process.exitcode == 0
    for row, expected in zip(metrics.read_metrics(tmp_path / "two"), metrics.read_metrics(undisturbed[0]), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def _one_of_two_with_a_small_card(rank, config, said):
    """Rank 1 has no memory for more than one sequence, from the fourth step on."""
    plain, steps = train.loss_sum, 0

    def small(model, inputs, targets):
        if model.training and torch.is_grad_enabled() and rank == 1 and len(inputs) > 1 and steps > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, inputs, targets)

    def batch(*arguments):
        nonlocal steps
        steps = arguments[2]
        return of(*arguments)

    of, data.TokenData.batch, train.loss_sum = data.TokenData.batch, batch, small
    try:
        _one_of_two(rank, config)
    except TrainError as error:
        said.put(str(error))


@pytest.mark.parametrize("accumulation", [None, 1])
def test_all_processes_divide_a_batch_that_does_not_fit_into_one(accumulation, undisturbed, tmp_path):
    said, config = children.SimpleQueue(), replace(MICRO, out=tmp_path / "two", accumulation=accumulation)
    for process in two_processes(_one_of_two_with_a_small_card, (config, said), (config, said)):
        process.join(60)
        assert process.exitcode == 0
    rows, expected = metrics.read_metrics(tmp_path / "two"), metrics.read_metrics(undisturbed[0])
    if accumulation:
        assert all("memory does not suffice for a batch in 1 parts" in said.get() for _ in range(2)) and len(rows) == 4
    else:
        assert said.empty() and len(rows) == len(expected)
    for row, of_one in zip(rows, expected):
        assert row == pytest.approx(of_one, rel=1e-5)


def _one_of_two_by_command(rank, options):
    os.environ["RANK"] = str(rank)
    sys.exit(train.main(options))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_two_processes_that_are_terminated_save_and_end_with_the_same_status(tmp_path):
    options = "--data lessons --tokens 20000 --steps 100000 --batch-size 2 --seq-len 8 --device cpu".split()
    options += ["--out", str(tmp_path / "run"), "--set", "n_layer=1", "--set", "d_model=16"]
    both = two_processes(_one_of_two_by_command, (options,), (options,))
    for _ in range(600):
        if (tmp_path / "run/metrics.jsonl").exists() and len(metrics.read_metrics(tmp_path / "run")) > 3:
            break
        time.sleep(0.1)
    for process in both:
        process.terminate()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [128 + signal.SIGTERM] * 2
    step = int(checkpoint.latest_checkpoint(tmp_path / "run").name[11:])
    assert len(metrics.read_metrics(tmp_path / "run")) == step > 3


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("killed", [0, 1])
def test_the_end_of_one_process_is_one_line_of_the_other(killed, tmp_path):
    options = "--data lessons --tokens 20000 --steps 100000 --batch-size 2 --seq-len 8 --device cpu".split()
    options += ["--out", str(tmp_path / "run"), "--set", "n_layer=1", "--set", "d_model=16"]
    each = [(options, str(tmp_path / f"{rank}.txt")) for rank in range(2)]
    both = two_processes(_with_its_errors_in_a_file, *each)
    for _ in range(600):
        if (tmp_path / "run/metrics.jsonl").exists() and len(metrics.read_metrics(tmp_path / "run")) > 3:
            break
        time.sleep(0.1)
    both[killed].kill()
    both[1 - killed].join(60)
    assert both[1 - killed].exitcode == 1
    said = (tmp_path / f"{1 - killed}.txt").read_text()
    assert "Traceback" not in said
    assert re.search(r"train: one of the 2 processes has ended \(.*\); continue with --resume\n\Z", said)


def _with_its_errors_in_a_file(rank, options, file):
    with open(file, "w") as errors, contextlib.redirect_stderr(errors):
        _one_of_two_by_command(rank, options)


def _refused(rank, config, said):
    os.environ["RANK"] = str(rank)
    try:
        train.train(config, progress=False)
    except SettingError as error:
        said.put(str(error))


def test_processes_that_do_not_see_the_same_checkpoint_are_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "first")
    said = children.SimpleQueue()
    configs = [replace(MICRO, out=tmp_path / name, resume=True) for name in ("first", "second")]
    for process in two_processes(_refused, *((config, said) for config in configs)):
        process.join(60)
        assert process.exitcode == 0
    for _ in range(2):
        assert "not all processes find the same checkpoint there; put it on a disk that all" in said.get()
    assert (tmp_path / "first/metrics.jsonl").read_text() == undisturbed[1]


# --------------------------------------------------------------------------------------- interrupted and killed

SHORT = dict(steps=2, eval_every=2, resume=True)


def _train_and_die(config, fatal, counted):
    """Train, and die without any clean-up right before the `fatal`th change to the disk; report their number."""
    changes = 0

    def deadly(function):
        def call(*arguments, **keywords):
            nonlocal changes
            changes += 1
            if changes == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    checkpoint.save_file = deadly(checkpoint.save_file)
    checkpoint.huggingface.save_pretrained = deadly(checkpoint.huggingface.save_pretrained)
    train.Path.mkdir = deadly(train.Path.mkdir)
    train.Path.write_text = deadly(train.Path.write_text)
    shutil.rmtree = deadly(shutil.rmtree)
    train.os.replace = deadly(os.replace)
    train.os.fsync = deadly(os.fsync)
    train.write_curve = lambda *arguments: None
    train.train(config, progress=False, log=lambda line: None)
    counted.put(changes)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_before_any_change_to_the_disk_a_run_resumes_to_the_same_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_curve", lambda *arguments: None)
    run(tmp_path / "undisturbed", **SHORT)
    expected = (tmp_path / "undisturbed/metrics.jsonl").read_text()
    counted = children.SimpleQueue()
    for fatal in range(1, 100):
        out = tmp_path / str(fatal)
        process = in_child(_train_and_die, replace(MICRO, out=out, **SHORT), fatal, counted)
        process.join(30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, fatal
        run(out, **SHORT)
        assert (out / "metrics.jsonl").read_text() == expected, f"killed before change {fatal}"
        assert not list(out.glob("*.tmp"))
    assert counted.get() == fatal - 1 > 20


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_again_and_again_at_random_moments_a_run_ends_with_the_same_lines(undisturbed, tmp_path):
    random.seed(0)
    for _ in range(20):
        process = in_child(train.train, replace(MICRO, out=tmp_path / "run", resume=True))
        process.join(random.uniform(0.05, 0.6))
        process.kill()
        process.join()
    run(tmp_path / "run", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_text() == undisturbed[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_continues_to_the_same_lines(number, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MIN_CHECKPOINT_SECONDS", 1e9)  # the signal's checkpoint is the only one
    plain = data.TokenData.batch

    def batch(self, split, step, *rest):
        if step == 5:
            os.kill(os.getpid(), number)
        return plain(self, split, step, *rest)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(data.TokenData, "batch", batch)
        result = run(tmp_path / "run")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert (result.stopped_by, result.step) == (number, 6)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-00000006"]
    continued = run(tmp_path / "run", resume=True)
    assert (continued.stopped_by, continued.step) == (0, 8)
    assert (tmp_path / "run/metrics.jsonl").read_text() == undisturbed[1]
    assert continued.metrics == metrics.read_metrics(undisturbed[0])


def test_a_line_that_was_cut_off_and_lines_after_the_checkpoint_are_written_anew(undisturbed, tmp_path, monkeypatch):
    out = stopped_after(3, tmp_path / "run", monkeypatch)
    lines = undisturbed[1].splitlines(keepends=True)
    assert (out / "metrics.jsonl").read_text() == "".join(lines[:3])
    (out / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:9])
    run(out, resume=True)
    assert (out / "metrics.jsonl").read_text() == undisturbed[1]


def stopped_after(step, out, monkeypatch, **changes):
    """The folder of a run that Ctrl-C stopped after `step` updates."""
    clip = nn.utils.clip_grad_norm_
    calls = []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", interrupting)
        assert run(out, **changes).stopped_by == signal.SIGINT
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_returned_as_it_is(undisturbed):
    out, text = undisturbed
    before = contents(out / "checkpoint-00000008")
    lines = []
    result = train.train(TrainConfig(out=out, resume=True, device="cpu"), progress=False, log=lines.append)
    assert any("is finished" in line for line in lines)
    assert (out / "metrics.jsonl").read_text() == text and contents(out / "checkpoint-00000008") == before
    assert result.step == 8 and result.tokens_per_second > 0


def test_a_full_disk_leaves_the_last_checkpoint(undisturbed, tmp_path, monkeypatch):
    plain, calls = checkpoint.save_file, []

    def save_file(tensors, path):
        calls.append(path)
        if len(calls) == 3:  # the moments of the third checkpoint
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(TrainError, match=r"No space left on device.*checkpoint-00000001.* is intact.*--resume"):
            run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tmp"))
    run(tmp_path / "run", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_text() == undisturbed[1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        TrainError, match=r"(loss is (nan|inf) at|not finite after) step \d: --lr 1e\+30 is probably too"
    ):
        run(tmp_path / "run", lr=1e30)
    for checkpoint_folder in (tmp_path / "run").glob("checkpoint-*"):  # what is there is intact
        for weight in safetensors.torch.load_file(checkpoint_folder / "model.safetensors").values():
            assert weight.isfinite().all()


# ------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=0.02), r"--lr 0.02: the run in .* was started with 0.01; leave --lr out"),
        (dict(preset="small-124M"), "--preset small-124M: the run in .* was started with tiny"),
        (dict(attention="mha"), "--attention mha: .* started with tpa"),
        (dict(steps=9), "--steps 9: .* started with 8"),
        (dict(seed=1), "--seed 1: .* started with 0"),
        (dict(data="fineweb-edu"), "--data fineweb-edu: .* started with lessons"),
        (dict(dtype="bfloat16"), "--dtype bfloat16: .* started with float32"),
        (dict(tokenizer="gpt2"), "--tokenizer gpt2: .* started with lessons"),
        (dict(changes={"n_layer": 2}), "--set .* started with"),
    ],
)
def test_resuming_with_other_settings_is_refused(changes, message, undisturbed):
    before = contents(undisturbed[0])
    with pytest.raises(SettingError, match=message):
        run(undisturbed[0], resume=True, **changes)
    assert contents(undisturbed[0]) == before


def test_resuming_with_other_documents_is_refused(tmp_path, monkeypatch):
    texts = tmp_path / "texts.txt"
    texts.write_text("<|endoftext|>".join(f"{n} is a number, and so is {n + 1}." * 20 for n in range(40)))
    out = stopped_after(2, tmp_path / "run", monkeypatch, data=str(texts))
    texts.write_text(texts.read_text().replace("number", "figure"))
    with pytest.raises(SettingError, match="gives other tokens than the run .* bring back the same documents"):
        run(out, resume=True, data=str(texts))


def test_a_folder_in_use_is_left_alone(undisturbed):
    before = contents(undisturbed[0])
    with pytest.raises(SettingError, match="already holds a run; add --resume to continue it, or choose another"):
        run(undisturbed[0])
    assert contents(undisturbed[0]) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(preset="huge"), "--preset huge: does not exist; choose one of tiny, small-124M"),
        (dict(attention="linear"), "--attention linear: does not exist; choose one of tpa, tpa-kv-only, mha"),
        (dict(tokenizer="gpt3"), "--tokenizer gpt3: choose one of gpt2, lessons"),
        (dict(steps=0), "--steps 0: must be a whole number, 1 or more"),
        (dict(batch_size=-4), "--batch-size -4: must be"),
        (dict(accumulation=3), "--accumulation 3: must divide the 4 sequences"),
        (dict(eval_every=0), "--eval-every 0"),
        (dict(lr=-1.0), "--lr -1.0: must be a positive number; 0.003 is the preset's"),
        (dict(lr=math.nan), "--lr nan"),
        (dict(seed=-1), "--seed -1"),
        (dict(device="tpu"), "--device tpu: choose auto, cpu, cuda or mps"),
        (dict(device="mps"), "--device mps: PyTorch finds none here"),
        (dict(dtype="float16"), "--dtype float16: choose"),
        (dict(changes={"d_head": 5}), "d_head=5: must be even"),
        (dict(changes={"rank": 5}), "unexpected keyword argument 'rank'"),
        (dict(attention="mla"), "a layer of MLA with d_model=16.* has .* already"),
        (dict(tokens=10), "tokens=10: must be"),
        (dict(seq_len=10**6), "sequences of 1000000 tokens do not fit"),
        (dict(data="no/such/file.txt"), "no/such/file.txt. is no file or folder"),
    ],
)
def test_wrong_values_are_named_before_anything_is_written(changes, message, tmp_path):
    if changes == dict(device="mps") and torch.backends.mps.is_available():
        pytest.skip("this machine has what the test expects to be missing")
    with pytest.raises((SettingError, data.DataError), match=message) as error:
        run(tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="is a file; choose a folder"):
        run(tmp_path / "file")


def test_compile_says_in_one_line_that_there_is_no_compiler(tmp_path, monkeypatch):
    def compile(function):
        raise RuntimeError("Failed to find C++ compiler.\nPlease specify via CXX environment variable.")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(SettingError, match=r"--compile: does not work here \(Failed to find C\+\+ compiler.\); leave"):
        run(tmp_path / "run", compile=True)


# ----------------------------------------------------------------------------- what is left when training is over


def test_a_checkpoint_gives_back_the_model_and_executes_nothing(undisturbed):
    out, _ = undisturbed
    assert {path.suffix for path in (out / "checkpoint-00000008").iterdir()} == {".safetensors", ".json"}
    loaded = models.load_checkpoint(out)
    assert loaded.step == 8 and loaded.settings.preset == "tiny" and loaded.tokenizer.name == "lessons"
    again = run(out, resume=True)
    tokens = torch.arange(12).view(1, -1)
    assert torch.equal(loaded.model(tokens), again.model(tokens))
    same = models.load_checkpoint(out / "checkpoint-00000008")
    assert torch.equal(same.model(tokens), loaded.model(tokens))


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(name, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run/checkpoint-00000008" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SettingError, match=rf"{name}.*cannot be read.*delete this checkpoint's folder"):
        run(tmp_path / "run", resume=True)


STATES = {
    "no object": lambda state: [],
    "no settings": lambda state: {},
    "no step": lambda state: {name: value for name, value in state.items() if name != "step"},
    "a step as text": lambda state: {**state, "step": "3"},
    "a step below 0": lambda state: {**state, "step": -1},
    "a step beyond the last": lambda state: {**state, "step": 999},
    "no seconds": lambda state: {name: value for name, value in state.items() if name != "seconds"},
    "an unknown setting": lambda state: {**state, "settings": {**state["settings"], "colour": "red"}},
    "a huge rate": lambda state: {**state, "settings": {**state["settings"], "lr": 10**400}},
    "endless seconds": lambda state: {**state, "seconds": 10**400},
    "no preset": lambda state: {**state, "settings": {**state["settings"], "preset": "x"}},
    "no steps": lambda state: {**state, "step": 8, "settings": {**state["settings"], "batch_size": -1}},
    "fewer updates than steps": lambda state: {**state, "updates": 3},
    "a loss scale without float16": lambda state: {**state, "updates": 3, "scaler": {"scale": 1.0}},
    "a sum of another file": lambda state: {**state, "sums": {**state["sums"], "../../metrics.jsonl": "0"}},
    "a sum of no file's name": lambda state: {**state, "sums": {**state["sums"], "\0\ud800": "0"}},
    "a rate as text": lambda state: {**state, "settings": {**state["settings"], "lr": "fast"}},
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_cannot_be_is_named(change, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run/checkpoint-00000008/state.json"
    file.write_text(json.dumps(STATES[change](json.loads(file.read_text()))))
    for read in (lambda: run(tmp_path / "run", resume=True), lambda: models.load_checkpoint(tmp_path / "run")):
        with pytest.raises(SettingError, match=r"state\.json: cannot be read .*delete this checkpoint's folder"):
            read()


@pytest.mark.parametrize("line", ["oops", "[1, 2]", '{"tokens": 3}', "\xff", ""])
def test_metrics_with_a_bad_line_are_left_as_they_are(line, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_bytes("\n".join([lines[0], line, *lines[2:]]).encode("latin-1"))
    before = file.read_bytes()
    with pytest.raises(SettingError, match=r"metrics\.jsonl.*put (the line|it) back as it was"):
        run(tmp_path / "run", resume=True)
    assert file.read_bytes() == before
    file.unlink()
    with pytest.raises(SettingError, match="does not hold one line for each step before 8"):
        run(tmp_path / "run", resume=True)


def test_other_folders_are_no_checkpoints(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    for name in ("checkpoint-²", "checkpoint-", "checkpoint-9x"):
        (tmp_path / "run" / name).mkdir()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "checkpoint-00000008"


@pytest.mark.parametrize("value", ["low", None, True, math.nan, 10**400, []])
@pytest.mark.parametrize("name", ["tokens", "train_loss", "val_loss"])
def test_metrics_with_what_is_no_number_are_refused(name, value, tmp_path):
    row = {"step": 0, "tokens": 0, "train_loss": 1.0, "val_loss": 1.0}
    for rows in ([{**row, name: value}], [row, {**row, "step": 1, name: value}]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SettingError, match=f"line {len(rows)}: is not about a step"):
            metrics.read_metrics(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup has it, so that a run goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.StopRequest(processes.SIGNALS) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == 0
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "training.safetensors", "../metrics.jsonl"])
def test_a_pipe_in_place_of_a_file_is_named(name, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run/checkpoint-00000008" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises((SettingError, TrainError), match=f"{Path(name).name}.* is no regular file"):
        run(tmp_path / "run", resume=True)


def test_the_checkpoint_of_another_configuration_is_named(undisturbed, tmp_path):
    run(tmp_path / "other", steps=1, changes={**MICRO.changes, "d_model": 8})
    shutil.copytree(undisturbed[0], tmp_path / "run")
    foreign = tmp_path / "other/checkpoint-00000001/model.safetensors"
    folder = tmp_path / "run/checkpoint-00000008"
    shutil.copy(foreign, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sums"]["model.safetensors"] = hashlib.sha256(foreign.read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(SettingError, match=r"has shape \(.*8\) where this model needs .* another configuration"):
        run(tmp_path / "run", resume=True)


def test_there_must_be_a_checkpoint_to_load(tmp_path):
    with pytest.raises(SettingError, match="holds no checkpoint; train with --out"):
        models.load_checkpoint(tmp_path)


def test_text_is_generated_from_any_prompt_and_any_weights(undisturbed):
    model, tokenizer, *_ = models.load_checkpoint(undisturbed[0])
    text = generate.generate_text(model, tokenizer, "The lamp is red.", 30, seed=1)
    assert text == generate.generate_text(model, tokenizer, "The lamp is red.", 30, seed=1) != ""
    assert text != generate.generate_text(model, tokenizer, "The lamp is red.", 30, seed=2)
    padded = T6(T6Config(tokenizer.n_vocab + 5000, 1, 8, 2, 4))  # draws ids that the tokenizer does not know
    generate.generate_text(padded, tokenizer, "", 50, top_k=None)


@pytest.mark.parametrize("attention", settings.ATTENTIONS)
def test_every_attention_trains_with_the_parameters_and_the_cache_of_its_formula(attention, tmp_path):
    changes = dict(n_layer=2, d_model=32, n_head=16, d_head=8)
    result = run(tmp_path / "run", attention=attention, steps=2, changes=changes)
    layer = sum(p.numel() for p in result.model.blocks[0].attention.parameters())
    tpa = 32 * 10 * (16 + 8) + 32 * 16 * 8
    smallest_step = {
        "tpa": 0, "tpa-kv-only": 32 * (4 + 2 * 8), "mha": 4 * 32 * 8, "mqa": 2 * 32 * 8, "gqa": 4 * 32 * 8,
        "mla": 2 * 4 * 8 * 32,
    }[attention]  # fmt: skip
    assert abs(layer - tpa) <= smallest_step
    h = result.model.config.n_head
    per_token = {
        "tpa": 4 * (16 + 8), "tpa-kv-only": 4 * (h + 8), "mha": 2 * h * 8, "mqa": 2 * 8, "gqa": 2 * 2 * 8,
        "mla": 4 * 8 + 4,
    }[attention]  # fmt: skip
    assert generate.measure_caches(result.model, 50) == (50 * 2 * 4 * per_token, 50 * 2 * 4 * 2 * h * 8)


# ------------------------------------------------------------------------------------------------- command line


def command(out, *options):
    return train.main(f"--data lessons --tokens 20000 --device cpu --out {out}".split() + list(options))


def test_the_command_trains_and_reports(tmp_path, capsys):
    options = "--steps 3 --batch-size 2 --seq-len 16 --lr 0.01 --eval-every 2".split()
    assert command(tmp_path / "run", *options) == 0
    out = capsys.readouterr().out
    for expected in (
        r"Running on cpu \(1 threads\) in float32: about \d+ seconds for 3 steps of 32 tokens",
        r"Validation loss: \d+\.\d+ before training, \d+\.\d+ after 3 steps",
        r"Speed: 96 tokens at [\d,]+ tokens per second",
        r"Samples, continuing the first words of long held-out documents.*:\n    \[.+\]",
        r"Cache of one sequence of 512 tokens, measured: 1,572,864 bytes with tpa;",
        r"8,388,608 bytes with MHA of the same 16 heads of width 32: 5.3 times as many",
    ):
        assert re.search(expected, out), expected
    assert (tmp_path / "run/loss.png").exists()
    assert train.main(["--out", str(tmp_path / "run"), "--resume", "--device", "cpu"]) == 0
    assert "is finished: all 3 steps are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    ["--lr fast", "--steps 1.5", "--lr -1", "--preset huge", "--seed -1", "--colour red", "--data no/such", "--ou x"],
)
def test_a_wrong_option_is_one_line_and_status_2(options, tmp_path, capsys):
    try:
        status = command(tmp_path / "run", *options.split())
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("python -m tpa_minimal train: ") and options.split()[-1] in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["data.prepare", "report.generate_text"])
def test_a_signal_outside_the_steps_is_one_line_and_a_status_too(number, status, where, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(number)

    monkeypatch.setattr(f"tpa_minimal.experiments.{where}", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ended = command(tmp_path / "run", *"--steps 1 --batch-size 2 --seq-len 8".split())
    except SystemExit as error:
        ended = error.code
    assert ended == status and signal.getsignal(signal.SIGTERM) == before
    assert "continue with --resume" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_ends_the_command_with_130_and_how_to_continue(tmp_path, capsys, monkeypatch):
    plain = data.TokenData.batch

    def batch(self, split, step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(self, split, step, *rest)

    monkeypatch.setattr(data.TokenData, "batch", batch)
    options = "--steps 5 --batch-size 2 --seq-len 8".split()
    assert command(tmp_path / "run", *options) == 130
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert "stopped and saved at step 3; continue with: python -m tpa_minimal train --out" in line
    monkeypatch.undo()


def test_the_backbones_weights_are_the_same_for_every_attention():
    """So that a difference between two mechanisms is the mechanism's: runs of a seed are paired."""
    settled, _ = settings.settle(replace(MICRO, out="runs/none"))
    drawn = {
        name: models.build_model(replace(settled, attention=name), 300) for name in ("tpa", "tpa-kv-only", "mha", "gqa")
    }
    backbones = [
        {key: value for key, value in model.state_dict().items() if ".attention." not in key}
        for model in drawn.values()
    ]
    for backbone in backbones[1:]:
        assert all(torch.equal(backbone[key], backbones[0][key]) for key in backbones[0])
    other = models.build_model(replace(settled, seed=1), 300)
    assert not torch.equal(other.embedding.weight, drawn["tpa"].embedding.weight)
    layers = [block.attention.factor_proj.weight for block in models.build_model(
        replace(settled, changes={**MICRO.changes, "n_layer": 2}), 300).blocks]  # fmt: skip
    assert not torch.equal(*layers)


def test_fields_of_the_configuration_can_be_set(tmp_path):
    options = "--data lessons --tokens 20000 --steps 1 --batch-size 2 --seq-len 8 --device cpu"
    changes = "--set n_layer=1 --set rank_k=1 --set init=authors"
    assert train.main(["--out", str(tmp_path / "run"), *options.split(), *changes.split()]) == 0
    config = models.load_checkpoint(tmp_path / "run").model.config
    assert (config.n_layer, config.rank_k, config.rank_v, config.init) == (1, 1, 2, "authors")


@pytest.mark.parametrize("text", ["rank_k", "colour=3", "rank_k=two"])
def test_a_field_that_cannot_be_set_is_named(text, tmp_path):
    with pytest.raises(SettingError, match=f"--set {text}"):
        settings.settle(replace(MICRO, out=tmp_path / "run", set=(text,)))


def test_a_run_starts_from_another_models_weights_and_resumes(undisturbed, tmp_path):
    source = str(undisturbed[0])
    changes = dict(init_from=source, steps=4, lr=1e-4)
    result = run(tmp_path / "run", **changes)
    assert result.metrics[0]["train_loss"] < json.loads(undisturbed[1].splitlines()[0])["train_loss"] - 0.1
    loaded = models.load_checkpoint(tmp_path / "run")
    assert torch.equal(loaded.model.embedding.weight, result.model.embedding.weight)
    assert run(tmp_path / "run", resume=True, **changes).metrics == result.metrics
    with pytest.raises(SettingError, match="--init-from .*no/such"):
        run(tmp_path / "other", init_from="./no/such")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("of", ["", "checkpoint-00000008"], ids=["run", "checkpoint"])
def test_a_run_does_not_start_from_a_damaged_checkpoint(of, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run/checkpoint-00000008/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 2  # finite still
    file.write_bytes(content)
    start = functools.partial(run, tmp_path / "other", init_from=str(tmp_path / "run" / of))
    with pytest.raises(SettingError, match=r"--init-from .*model\.safetensors: its SHA-256 sum is another.*damaged"):
        start()
    if os.name != "nt":
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(SettingError, match=r"--init-from .*model\.safetensors is no regular file"):
            start()
        (file.parent / "state.json").unlink()
        with pytest.raises(SettingError, match=r"--init-from .*model\.safetensors is no regular file"):
            start()


def test_a_loss_that_is_infinite_from_the_start_is_not_blamed_on_the_rate_alone(undisturbed, tmp_path):
    model = models.load_checkpoint(undisturbed[0]).model
    with torch.no_grad():
        model.embedding.weight.fill_(3e38)
    models.huggingface.save_pretrained(model, tmp_path / "saved")
    with pytest.raises(TrainError, match=": --lr 0.01 is .*, or --init-from has weights that are too large"):
        run(tmp_path / "run", init_from=str(tmp_path / "saved"))


def test_a_full_disk_while_data_are_prepared_is_status_1(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.shards, "_collect", full)
    monkeypatch.setenv("TPA_CACHE", str(tmp_path / "cache"))
    assert train.main(["--out", str(tmp_path / "run"), "--data", "lessons", "--tokens", "20000"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device; make room" in error


def test_rows_of_the_metrics_go_to_a_callback(tmp_path):
    rows = []
    config = replace(MICRO, out=tmp_path / "run", steps=2)
    result = train.train(config, progress=False, log=lambda line: None, callback=rows.append)
    assert rows == result.metrics and len(rows) == 3


class OwnAttention(MultiHeadAttention):
    """A layer of somebody's own."""


def test_a_layer_of_ones_own_trains_and_resumes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name = f"{__name__}:OwnAttention"
    whole = run(tmp_path / "whole", attention=name, steps=3)
    assert type(whole.model.blocks[0].attention).__name__ == "OwnAttention"
    loaded = models.load_checkpoint(tmp_path / "whole", attention=name)
    assert type(loaded.model.blocks[0].attention).__name__ == "OwnAttention"
    with pytest.raises(SettingError, match="was trained with .*OwnAttention"):  # no file chooses what is imported
        models.load_checkpoint(tmp_path / "whole")
    with pytest.raises(SettingError, match="add --attention .*OwnAttention"):
        train.train(TrainConfig(out=tmp_path / "whole", resume=True, device="cpu"), progress=False)
    assert run(tmp_path / "whole", attention=name, steps=3, resume=True).metrics == whole.metrics
    for wrong in ("no.such:Layer", "math:Layer", "tpa2"):
        with pytest.raises(SettingError, match=f"--attention {wrong}"):
            run(tmp_path / "other", attention=wrong)


def test_a_second_run_into_a_folder_is_refused_while_the_first_goes_on(tmp_path):
    def intrude(row):
        if row["step"] == 1:
            with pytest.raises(SettingError, match="another run is writing there"):
                run(tmp_path / "run", resume=True, steps=2)

    config = replace(MICRO, out=tmp_path / "run", steps=2)
    train.train(config, progress=False, log=lambda line: None, callback=intrude)
    assert run(tmp_path / "run", resume=True, steps=2).step == 2


def test_a_folder_that_vanishes_is_an_error(tmp_path):
    def remove(row):
        if row["step"] == 2:
            shutil.move(tmp_path / "run", tmp_path / "elsewhere")

    with pytest.raises(TrainError, match="removed or renamed"):
        config = replace(MICRO, out=tmp_path / "run")
        train.train(config, progress=False, log=lambda line: None, callback=remove)


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "run/checkpoint-notes.tmp").mkdir(parents=True)
    (tmp_path / "run/checkpoint-notes.tmp/mine").touch()
    run(tmp_path / "run", steps=2)
    assert (tmp_path / "run/checkpoint-notes.tmp/mine").exists()


CRAFTED = {
    "moments of one number": ("training.safetensors", lambda name, x: x.new_zeros(1) if "exp_avg" in name else x),
    "moments below 0": ("training.safetensors", lambda name, x: -x if "exp_avg_sq" in name else x),
    "whole numbers": ("model.safetensors", lambda name, x: x.long()),
    "not numbers": ("model.safetensors", lambda name, x: x * float("nan")),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_checkpoint_is_refused(case, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    folder, (name, craft) = tmp_path / "run/checkpoint-00000008", CRAFTED[case]
    tensors = safetensors.torch.load_file(folder / name)
    safetensors.torch.save_file({key: craft(key, value).contiguous() for key, value in tensors.items()}, folder / name)
    with pytest.raises(SettingError, match=rf"{name}.*SHA-256"):
        run(tmp_path / "run", resume=True)
    state = json.loads((folder / "state.json").read_text())
    state["sums"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(SettingError, match=name):
        run(tmp_path / "run", resume=True)


def test_a_huge_model_in_a_state_is_refused_before_it_is_built(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    file = tmp_path / "run/checkpoint-00000008/state.json"
    for change in (dict(n_layer=10**9), dict(d_ff=10**7), dict(max_len=10**9, d_model=10**6)):
        state = json.loads(file.read_text())
        state["settings"]["changes"] = {**MICRO.changes, **change}
        file.write_text(json.dumps(state))
        with pytest.raises(SettingError, match="model.safetensors|max_len=1000000000"):
            models.load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "bf16, expected", [(True, "bfloat16"), (False, "float16")], ids=["an A100", "a T4, which emulates bfloat16"]
)
def test_the_dtype_is_what_the_card_computes_in(bf16, expected, monkeypatch):
    def supported(including_emulation=True):
        return bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert settings.natural_dtype(torch.device("cuda:0")) == expected
    assert settings.natural_dtype(torch.device("cpu")) == "float32"


def test_mps_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SettingError, match="--device mps"):
        settings.find_device("mps")


def test_the_command_writes_text(undisturbed, capsys):
    assert generate.main([str(undisturbed[0]), "--prompt", "The lamp", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The lamp")
    for options in (["no/such"], [str(undisturbed[0]), "--temperature", "nan"]):
        assert generate.main(options) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_weights_whose_logits_are_not_finite_write_nothing(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    folder = tmp_path / "run/checkpoint-00000008"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    next(value for name, value in tensors.items() if "attention" in name).fill_(1e30)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sums"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    assert generate.main([str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "its logits are not finite" in err


def test_transformers_opens_a_run(undisturbed):
    transformers = pytest.importorskip("transformers")
    import tpa_minimal.huggingface  # noqa: F401, registers T6

    model = transformers.AutoModelForCausalLM.from_pretrained(undisturbed[0] / "checkpoint-00000008")
    tokens = torch.arange(12).view(1, -1)
    expected = models.load_checkpoint(undisturbed[0]).model(tokens)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6)
    again = transformers.AutoModelForCausalLM.from_pretrained(undisturbed[0])
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_out_may_not_lie_inside_data(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(SettingError, match="lies inside --data"):
        settings.settle(replace(MICRO, data=str(tmp_path), out=tmp_path / "run"))


def test_a_batch_that_does_not_fit_is_computed_in_more_parts(undisturbed, tmp_path, monkeypatch):
    """A card on which no more than one sequence fits, simulated."""
    plain, largest = train.loss_sum, []

    def small(model, inputs, targets):
        if model.training and torch.is_grad_enabled():
            if len(inputs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            largest.append(len(inputs))
        return plain(model, inputs, targets)

    monkeypatch.setattr(train, "loss_sum", small)
    result = run(tmp_path / "run")
    losses = [row["train_loss"] for row in result.metrics]
    expected = [json.loads(line)["train_loss"] for line in undisturbed[1].splitlines()]
    assert losses == pytest.approx(expected, rel=1e-4) and set(largest) == {1}
    with pytest.raises(TrainError, match="memory does not suffice for a batch in 2 parts: choose a smaller --batch-si"):
        run(tmp_path / "other", accumulation=2)


def test_a_broken_backend_stops_no_run(tmp_path):
    code = "from tpa_minimal.__main__ import main; raise SystemExit(main())"
    options = f"train --out {tmp_path / 'run'} --data lessons --tokens 20000 --steps 1 --batch-size 2 --seq-len 8"
    environment = dict(os.environ, MPLBACKEND="nonsense", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code, *options.split(), "--set", "n_layer=1"], capture_output=True,
                          text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/loss.png").exists() or "no loss curve" in done.stderr


class Card:
    """The CPU, taken for a GPU that computes in float16 (as for autocast and the loss scaler the CPU can)."""

    type = "cuda"

    def __str__(self):
        return "cpu"


def test_float16s_loss_scale_survives_an_interruption(tmp_path, monkeypatch):
    """It starts so high that the first steps overflow: resumed without it, these updates would be left out again."""
    monkeypatch.setattr(settings, "find_device", lambda name: Card())
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole = run(tmp_path / "whole", dtype="float16", steps=60)
    out = stopped_after(40, tmp_path / "run", monkeypatch, dtype="float16", steps=60)
    state = json.loads((checkpoint.latest_checkpoint(out) / "state.json").read_text())
    assert 0 < state["updates"] < state["step"] == 40 and state["scaler"]["scale"] < 2.0**40
    for wrong in ({}, {"scale": "1"}, {**state["scaler"], "scale": 0.0}, {**state["scaler"], "_growth_tracker": -1}):
        path = checkpoint.latest_checkpoint(out) / "state.json"
        text = path.read_text()
        path.write_text(json.dumps({**state, "scaler": wrong}))
        named = "scaler is" if wrong else "updates"  # without a scale no update may have been left out
        with pytest.raises(SettingError, match=rf"state\.json: cannot be read \({named}"):
            run(out, resume=True, dtype="float16", steps=60)
        path.write_text(text)
    again = run(out, resume=True, dtype="float16", steps=60)
    assert again.metrics == whole.metrics
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
