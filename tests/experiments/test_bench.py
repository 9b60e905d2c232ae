"""The benchmark measures what it says, on tiny sizes: the numbers it prints are not tested, its bookkeeping is."""

import errno
import json
import os
import subprocess
import sys

import matplotlib.pyplot
import pytest
import torch

from tpa_minimal import cpu_decode, tpa
from tpa_minimal.experiments import bench
from tpa_minimal.tpa import T6Config, TensorProductAttention

SIZES = dict(d_model=16, n_head=4, d_head=8, repeats=2, device="cpu")


def settings(kind, **changes):
    return bench.settled(kind(**{**SIZES, **changes}))


def test_decode_reads_what_the_formula_says():
    rows = bench.decode(settings(bench.Decode, batch_size=2, lengths=(24,)))
    numbers = {row["mechanism"]: row["bytes"] / (4 * 2 * 24) for row in rows}
    assert numbers == {
        "MHA": 2 * 4 * 8, "MQA": 2 * 8, "GQA-4": 2 * 4 * 8, "MLA": 4 * 8 + 4,
        "TPA (16, 1, 1)": 2 * (4 + 8), "TPA (16, 2, 2)": 4 * (4 + 8),
    }  # fmt: skip
    assert all(0 < row["min_ms"] <= row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows)
    assert all(row["layer_ms"] > 0 for row in rows)


def test_every_way_has_a_name(monkeypatch):
    """Both of our functions are timed, and MLA's absorbed attention is said to be one."""
    calls = []
    for module in (tpa, cpu_decode):
        own = module.factor_attention
        record = lambda *a, own=own, name=module.__name__, **k: calls.append(name) or own(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, "factor_attention", record)
    rows = bench.decode(settings(bench.Decode, lengths=(9,)))
    ways = {(row["mechanism"][:3], row["way"]) for row in rows}
    assert {("TPA", "tpa"), ("TPA", "cpu_decode")} < ways
    assert [way.startswith("absorbed, ") for name, way in ways if name == "MLA"] == [True]
    assert set(calls) == {"tpa_minimal.tpa", "tpa_minimal.cpu_decode"}


@pytest.mark.parametrize("G", [1, 2, 4])
def test_all_ways_of_one_mechanism_give_the_same(G):
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 9, G, 8), torch.randn(2, 9, G, 8)
    results = [way().reshape(2, 4, 8) for way in bench.key_value_ways(q, k, v).values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_decoding_step_attends_to_all_positions():
    layer = TensorProductAttention(T6Config.for_layer(16, 4, 8, max_len=10))
    cache = layer.new_cache(1)
    bench.fill(cache, 10)
    for _ in range(2):
        bench.step(layer, cache, torch.randn(1, 1, 16), 10)
        assert cache.length == 10


def test_one_mechanism_is_in_memory_at_a_time(monkeypatch):
    alive, most = [0], [0]

    class Counted(bench.TensorProductAttention):
        def __init__(self, config):
            super().__init__(config)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    kinds = {f"TPA ({i}, 1, 1)": (Counted, (i, 1, 1)) for i in (1, 2, 3)}
    monkeypatch.setattr(bench, "mechanisms", lambda n_head, ranks=None: kinds)
    bench.decode(settings(bench.Decode, lengths=(9,)))
    bench.prefill(settings(bench.Prefill, lengths=(9,)))
    assert most == [1]


def test_training_steps_train_and_prefill_reads_the_prompt(monkeypatch):
    seen = []
    own = bench.training_step

    def watched(model, loss_of, *others):
        before = model.embedding.weight.detach().clone()
        own(model, loss_of, *others)
        seen.append(not torch.equal(before, model.embedding.weight))

    monkeypatch.setattr(bench, "training_step", watched)
    rows = bench.train(bench.settled(bench.Train(device="cpu", lengths=(8,), repeats=1, batch_size=1)))
    assert [row["mechanism"] for row in rows] == list(bench.mechanisms(16, ranks=((6, 2, 2),)))
    assert seen and all(seen)
    assert len(bench.prefill(settings(bench.Prefill, lengths=(8, 16)))) == 2 * len(rows)


def test_latency_is_a_prompts_pass_or_one_token_against_a_full_cache(monkeypatch):
    calls, own = [], bench.step

    def watched(run, cache, tokens, M):
        chosen = own(run, cache, tokens, M)
        calls.append((tokens.shape[1], cache.length, tuple(chosen.shape)))
        return chosen

    monkeypatch.setattr(bench, "step", watched)
    rows = bench.latency(settings(bench.Latency, lengths=(5, 7), contexts=(9,), batch_size=3))
    assert set(calls) == {(5, 5, (3,)), (7, 7, (3,)), (1, 9, (3,))}
    names = list(bench.mechanisms(4, ranks=((16, 1, 1), (6, 2, 2))))
    expected = [
        (name, way, M) for way, M in (("first token", 5), ("first token", 7), ("next token", 9)) for name in names
    ]
    assert [(row["mechanism"], row["way"], row["context"]) for row in rows] == expected
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows)


def test_a_figure_draws_every_row(monkeypatch):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    chosen = settings(bench.Latency, lengths=(5,), contexts=(9,))
    rows = bench.latency(chosen)
    figure = bench.figure({"kind": "latency", "environment": bench.environment(chosen), "rows": rows})
    matplotlib.pyplot.close(figure)
    assert len(figure.axes[0].lines) == len(rows) == 12


def test_functions_run_in_turns():
    order = []
    bench.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 5


def test_the_defaults_of_training_suit_the_device(monkeypatch):
    """On a GPU a model so small that launching its kernels takes the time would say nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    got = bench.settled(bench.Train())
    assert (got.device, got.dtype, got.preset, got.lengths) == ("cuda", "bfloat16", "small-124M", (1024,))
    got = bench.settled(bench.Train(device="cpu"))
    assert (got.dtype, got.preset, got.lengths) == ("float32", "tiny", (256,))


def test_the_command_prints_a_table_and_writes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    sizes = ["--d-model", "16", "--n-head", "4", "--d-head", "8", "--repeats", "2", "--out", str(tmp_path)]
    assert bench.main(["decode", "--device", "cpu", "--lengths", "16", "32", *sizes]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| TPA (16, 1, 1) (cpu_decode) |") == 2 and "median ms (no graph)" in printed
    result = json.loads((tmp_path / "bench_decode.json").read_text())
    assert result["environment"]["dtype"] == "float32" and {row["context"] for row in result["rows"]} == {16, 32}
    assert (tmp_path / "bench_decode.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_share_of_bandwidth_is_bytes_over_time():
    row = {"mechanism": "TPA", "way": "tpa", "context": 8, "bytes": 10**6, "median_ms": 2.0}
    row |= {"low_ms": 1.0, "high_ms": 3.0, "layer_ms": 4.0}
    result = {"kind": "decode", "environment": {"copy_bandwidth_GB_per_s": 1.0}, "settings": {"device": "cuda"}}
    printed = bench.table({**result, "rows": [row]})
    assert "| 1.0 | 50% | 4.00 |" in printed and printed.count("(CUDA graph)") == 2


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["decode", "--threads", "0"], "--threads 0: must be 1 or more"),
        (["train", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["prefill", "--lengths", "8", "0"], "--lengths 0: must be 1 or more"),
        (["latency", "--contexts", "0"], "--contexts 0: must be 1 or more"),
        (["prefill", "--n-head", "9" * 400], f"--n-head {'9' * 40}: must be 1 or more, and at most 16,777,216"),
        (["decode", "--threads", "1025"], "at most 1,024"),
        (["decode", "--d-head", "7"], "d_head=7"),
        (["train", "--preset", "huge"], "huge"),
        (["decode", "--device", "cuda"], "use --device cpu"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(arguments, word, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and word in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", [["prefill"], ["device"]])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "environment", None)
    monkeypatch.setattr(bench.Check, "run", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        bench.main([*kind, "--out", str(tmp_path / "file/folder")])
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "device.json").write_text("[]")
    with pytest.raises(SystemExit):
        bench.main(["device", "--out", str(tmp_path)])


def test_what_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bench, "write_json", full)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1.0)
    with pytest.raises(OSError, match="No space"):  # which `python -m tpa_minimal` makes one line of
        bench.main(["prefill", "--lengths", "8", "--n-head", "2", "--d-head", "4", "--out", str(tmp_path)])
    assert "|" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def prefill(settings):
        return torch.empty(2**60)

    monkeypatch.setattr(bench, "prefill", prefill)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1.0)
    assert bench.main(["prefill", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "choose smaller sizes" in err and not list(tmp_path.iterdir())


def test_the_device_script_is_rehearsed_and_resumes(tmp_path):
    """Every section runs on tiny sizes, the kernels in the interpreter; a second call does only what is missing."""
    pytest.importorskip("triton", reason="Triton is an extra: pip install triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run `python -m tpa_minimal bench device --out DIR`")

    def run():
        call = f"from tpa_minimal.experiments import bench; bench.main(['device', '--out', {str(tmp_path)!r}])"
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "device.json").read_text())

    printed, result = run()
    sections = ["machine", "correct", "decode", "lessons", "throughput"]
    assert list(result) == sections
    assert [section for section in sections if "error" in result[section]] == [], result
    correct = result["correct"]["rows"]
    assert len(correct) == 2 * 3 * 2 and all(row["right"] for row in correct)
    assert set(result["lessons"]["rows"]["generate_tokens_per_s"]) == {"tpa", "ours", "graph"}
    del result["correct"]
    result["machine"] = {"error": "as if it had failed"}
    (tmp_path / "device.json").write_text(json.dumps(result))
    printed, again = run()
    assert [line.split(":")[0] for line in printed.splitlines() if line.split(":")[0] in sections] == sections[:2]
    assert again["decode"] == result["decode"] and "rows" in again["machine"] and "rows" in again["correct"]
