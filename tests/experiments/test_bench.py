"""The benchmark measures what it says, on tiny sizes: the numbers it prints are not tested, its bookkeeping is."""

import json

import pytest
import torch

from tpa_minimal.experiments import bench
from tpa_minimal.tpa import T6Config, TensorProductAttention

SIZES = dict(d_model=16, n_head=4, d_head=8, repeats=2)


def test_decode_reads_what_the_formula_says():
    rows = bench.decode([24], batch_size=2, **SIZES)
    numbers = {row["mechanism"]: row["bytes"] / (4 * 2 * 24) for row in rows}
    assert numbers == {
        "MHA": 2 * 4 * 8, "MQA": 2 * 8, "GQA-4": 2 * 4 * 8, "MLA": 4 * 8 + 4,
        "TPA (16, 1, 1)": 2 * (4 + 8), "TPA (16, 2, 2)": 4 * (4 + 8),
    }  # fmt: skip
    assert all(0 < row["min_ms"] <= row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows)
    assert all(row["layer_ms"] > 0 for row in rows)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_all_ways_of_one_mechanism_give_the_same(G):
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 9, G, 8), torch.randn(2, 9, G, 8)
    results = [way().reshape(2, 4, 8) for way in bench.key_value_ways(None, q, k, v).values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_decoding_step_attends_to_all_positions():
    layer = TensorProductAttention(T6Config(1, 1, 16, 4, 8, max_len=10))
    cache = layer.new_cache(1)
    bench.fill(layer, cache, 10)
    for _ in range(2):
        bench.step(layer, cache, torch.randn(1, 1, 16), 10)
        assert cache.length == 10


def test_six_projections_are_the_same_function():
    config = T6Config(31, 1, 16, 4, 8, max_len=10)
    ours, theirs = TensorProductAttention(config), bench.SixProjections(config)
    torch.nn.init.normal_(ours.out_proj.weight)
    theirs.out_proj.weight.data.copy_(ours.out_proj.weight)
    for proj, weight in zip(theirs.projections, ours.factor_proj.weight.split(ours.sizes)):
        proj.weight.data.copy_(weight)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(theirs(x), ours(x))
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_training_steps_train_and_prefill_reads_the_prompt():
    config = T6Config(31, 1, 16, 4, 8, max_len=10)
    rows = bench.train(config, [8], batch_size=2, repeats=1)
    assert [row["mechanism"] for row in rows] == list(bench.trained(config))
    model = bench.T6(config)
    before = model.embedding.weight.detach().clone()
    tokens = torch.randint(31, (2, 9))
    bench.training_step(model, torch.optim.AdamW(model.parameters()), tokens, "cpu", torch.float32)
    assert not torch.equal(before, model.embedding.weight)
    assert len(bench.prefill([8, 16], **SIZES)) == 2 * len(rows)


def test_functions_run_in_turns():
    order = []
    bench.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 5


def test_the_command_prints_a_table_and_writes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    sizes = ["--d-model", "16", "--n-head", "4", "--d-head", "8", "--repeats", "2"]
    result = bench.main(["decode", "--device", "cpu", "--lengths", "16", "32", "--out", str(tmp_path), *sizes])
    printed = capsys.readouterr().out
    assert printed.count("| TPA (16, 1, 1) (pytorch) |") == 2 and "threads" in printed and "float32" in printed
    assert json.loads((tmp_path / "bench_decode.json").read_text()) == result
    assert (tmp_path / "bench_decode.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_share_of_bandwidth_is_bytes_over_time():
    row = {"mechanism": "TPA", "way": "pytorch", "context": 8, "bytes": 10**6, "median_ms": 2.0}
    row |= {"low_ms": 1.0, "high_ms": 3.0, "layer_ms": 4.0}
    result = {"kind": "decode", "environment": {"copy_bandwidth_GB_per_s": 1.0}, "settings": {}, "rows": [row]}
    assert "| 1.0 | 50% | 4.00 |" in bench.table(result)


def test_a_missing_gpu_is_said_plainly(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main(["decode", "--device", "cuda"])
    assert "use --device cpu" in capsys.readouterr().err
