"""The figures show what the accountant says, and the explorer answers each control at once."""

import re
import subprocess
import sys
import time

import matplotlib
import matplotlib.colors

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tpa_minimal.course import diagrams, explorer, looks
from tpa_minimal.course.explorer import Settings
from tpa_minimal.memory import GB, MODELS, Layer

few = settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
LLAMA = MODELS["Llama 3 70B"]
SHAPE = dict(d_model=8192, n_head=64, d_head=128)
LAYERS = {"MHA": Layer("mha", **SHAPE), "TPA": Layer("tpa", **SHAPE), "MLA": Layer("mla", **SHAPE)}


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    looks.style()
    yield
    assert not plt.get_fignums()


# -------------------------------------------------------------------------------------------------------- figures


def test_lines_of_the_cache_are_the_formula():
    figure = diagrams.cache_against_context(LLAMA, memory=80 * GB, weight_dtype="int4")
    mha, shipped, one, two, level = figure.axes[0].lines
    assert level.get_ydata()[0] == (80 * GB - LLAMA.weight_bytes("int4")) / GB
    for line, model in ((shipped, LLAMA), (one, LLAMA.with_tpa(16, 1, 1)), (two, LLAMA.with_tpa(16, 2, 2))):
        assert list(line.get_ydata()) == [model.cache_bytes(int(x)) / GB for x in line.get_xdata()]
    assert mha.get_ydata()[0] == 16384 * 80 * 2 * 1024 / GB
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["MHA, 64 heads", "GQA, 8 key-value heads (as shipped)", "TPA, ranks (16, 1, 1)",
                     "TPA, ranks (16, 2, 2)", "44.7 GB free\nbeside the shipped\nmodel's int4 weights"]  # fmt: skip


def test_no_level_where_the_weights_do_not_fit():
    assert len(diagrams.cache_against_context(LLAMA, memory=80 * GB).axes[0].lines) == 4  # 141 GB in bfloat16


def test_a_mechanism_looks_the_same_in_every_figure():
    first, second = (Layer("tpa", **SHAPE, rank_q=16, rank_k=rank, rank_v=rank) for rank in (1, 2))
    shipped = {"MHA": LAYERS["MHA"], "GQA": LLAMA.layer, "TPA 1": first, "TPA 2": second}
    contexts, memory = diagrams.cache_against_context(LLAMA), diagrams.largest_context_by_memory(LLAMA)
    costs = diagrams.decode_cost({"MLA": LAYERS["MLA"], **shipped})
    lines, bars = contexts.axes[0].lines, memory.axes[0].containers
    for line, bar, cost in zip(lines, bars, costs.axes[1].lines[1:], strict=True):
        colours = line.get_color(), bar[0].get_facecolor(), cost.get_color()
        assert len({matplotlib.colors.to_hex(colour) for colour in colours}) == 1
        assert line.get_marker() == cost.get_marker()
    assert len({line.get_color() for line in costs.axes[1].lines}) == 5


def test_lines_that_hide_each_other_are_named():
    figure = diagrams.decode_cost({**LAYERS, "GQA": LLAMA.layer})
    assert [text.get_text() for text in figure.axes[0].texts] == ["MHA and GQA coincide"]


def test_bars_per_token():
    axes = diagrams.per_token_bars(LAYERS).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [16384, 768, 4 * 128 + 64]
    assert [text.get_text() for text in axes.texts] == ["16,384", "768", "576"]


def test_largest_context_bars_say_zero_where_the_weights_do_not_fit():
    axes = diagrams.largest_context_by_memory(LLAMA, weight_dtype="int8").axes[0]
    labels = [text.get_text() for text in axes.texts]  # 4 versions, each on 5 GPUs
    assert len(labels) == 20 and labels[5:8] == ["0", "0", looks.tokens_text(28_827)]
    unbounded = diagrams.largest_context_by_memory(MODELS["Mistral 7B v0.1"], [(16, 1, 1)]).axes[0]
    assert "any" in [text.get_text() for text in unbounded.texts]


def test_decode_cost_lines():
    left, right = diagrams.decode_cost(LAYERS).axes
    for i, layer in enumerate(LAYERS.values()):
        x = [int(v) for v in left.lines[i].get_xdata()]
        assert list(left.lines[i].get_ydata()) == [layer.decode_multiply_adds(v) / 1e9 for v in x]
        assert list(right.lines[i].get_ydata()) == [layer.cached_numbers * 2 * v / GB for v in x]


def test_break_even_line_of_the_map():
    """All points of the heavy line satisfy 2 R = 2 G d_h / (h + d_h)."""
    for n_kv_head, rank in ((None, 8), (8, 4)):
        axes = diagrams.ratio_map((rank,), n_kv_head, marks={"here": (64, 128)}).axes[0]
        heavy = max(axes.collections, key=lambda c: max(c.get_linewidths(), default=0))
        points = [point for path in heavy.get_paths() for point in path.vertices]
        assert len(points) > 50
        for h, d_h in points:
            assert h >= (n_kv_head or 4)  # no model has more key-value heads than heads
            assert (h if n_kv_head is None else n_kv_head) * d_h / (h + d_h) == pytest.approx(rank, rel=0.02)


@pytest.mark.parametrize(
    "tokens, said", [(512, "512"), (1024, "1k"), (3072, "3k"), (3000, "2.9k"), (131_072, "128k"), (2**20, "1M")]
)
def test_tokens_as_people_say_them(tokens, said):
    assert looks.tokens_text(tokens) == said


def test_bytes_as_people_say_them():
    assert [looks.bytes_text(n) for n in (999, 43e9, 8.05e9, 344e9, 1.5e6)] == [
        "999 bytes", "43 GB", "8.05 GB", "344 GB", "1.5 MB"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- explorer

every_setting = st.builds(
    Settings,
    model=st.sampled_from(list(MODELS)),
    rank_q=st.integers(1, 32),
    rank_k=st.integers(1, 16),
    rank_v=st.integers(1, 16),
    dtype=st.sampled_from(["float32", "bfloat16", "float8", "int4"]),
    weight_dtype=st.sampled_from(["bfloat16", "int8", "int4"]),
    context=st.sampled_from([2**n for n in range(10, 21)]),
    batch_size=st.sampled_from([1, 2, 64, 256]),
    memory_gb=st.sampled_from([8, 80, 1128]),
    gpus=st.sampled_from([1, 1, 2, 4, 8]),
)


def lengths(account, setting, right):
    """Pixels of a bar's weights and of its cache, read from its middle row; where the memory's line lies, neither."""
    row = explorer.bar_pixels(account, setting, right)[11, 1:-1].astype(int)
    colour = looks.looks_of([account.model.layer])[0].colour
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    striped = (row == 120).all(1) | (row == 215).all(1)
    return striped.sum(), (row == wanted).all(1).sum()


@few
@given(every_setting)
def test_the_answer_is_the_formula(setting):
    shipped = MODELS[setting.model]
    tpa = shipped.with_tpa(setting.rank_q, setting.rank_k, setting.rank_v)
    assume(shipped.layer.n_head % setting.gpus == 0)
    shipped, tpa = shipped.split(setting.gpus), tpa.split(setting.gpus)
    for text in explorer.answer(setting):
        ratio = tpa.layer.cached_numbers / shipped.layer.cached_numbers
        number = float(re.search(r"([\d.]+) times", text)[1])
        near = 0.9 < ratio < 1.1
        assert number == pytest.approx(ratio if near else max(ratio, 1 / ratio), abs=0.0051 if near else 0.051)
        assert ("less cache than" in text) == (ratio < 1 and not near)
        assert ("more cache than" in text) == (ratio > 1 and not near)
        assert ("Not worth it" in text) == (ratio >= 1)
        held = [model.cache_bytes(setting.context, setting.batch_size, setting.dtype) for model in (shipped, tpa)]
        assert re.findall(r"cache ([\d.,]+ \w+) = ", text)[-2:] == [looks.bytes_text(n) for n in held]


@few
@given(every_setting)
def test_the_bars_are_in_proportion(setting):
    assume(MODELS[setting.model].layer.n_head % setting.gpus == 0)
    *_, tpa = explorer.accounts(setting)
    right = 1.1 * max(setting.memory_gb * GB, tpa.total)
    weights, cache = lengths(tpa, setting, right)
    assert weights == pytest.approx(760 * tpa.weights / right, abs=11)  # the memory's line hides 8 pixels, the frame 2
    assert cache == pytest.approx(760 * tpa.cache / right, abs=11)
    assert sum(lengths(tpa, setting, tpa.total / 2)) >= 748  # a bar that is cut fills the picture


def test_near_one_the_headline_says_how_much_of_the_cache():
    number, sentence = explorer.headline(Settings(rank_k=5, rank_v=6))  # 11 · 192 = 2,112 against 2,048
    assert number == "1.03 times" and sentence.startswith("the cache of the model as shipped")


def test_every_control_changes_the_answer_within_a_tenth_of_a_second():
    box = explorer.build()
    controls, below = {control.description: control for control in box.children[0].children}, box.children[1]
    assert set(controls) == {"model", "context", "batch", "memory", "GPUs", "rank R_Q", "rank R_K", "rank R_V",
                             "cache in", "weights in"}  # fmt: skip
    changes = {"model": "DeepSeek-V3", "context": 2048, "batch": 4, "memory": 141, "GPUs": 8, "rank R_Q": 3,
               "rank R_K": 2, "rank R_V": 5, "cache in": "float8", "weights in": "int4"}  # fmt: skip
    seconds = []
    for name, value in changes.items():
        before, start = below.value, time.process_time()
        controls[name].value = value
        seconds.append(time.process_time() - start)
        assert below.value != before, name
    setting = Settings("DeepSeek-V3", 2048, 4, 141, 8, 3, 2, 5, "float8", "int4")
    assert below.value == explorer.answer(setting)[0]
    assert max(seconds) < 0.1


def test_menus_say_their_units_and_the_controls_wrap():
    box = explorer.build()
    spoken = {control.description: control.label for control in box.children[0].children if hasattr(control, "label")}
    assert spoken["context"] == "128k tokens" and spoken["batch"] == "1 sequence" and spoken["memory"] == "80 GB"
    assert spoken["GPUs"] == "1 GPU"
    assert box.children[0].layout.flex_flow == "row wrap"
    assert all(control.layout.max_width == "100%" for control in box.children[0].children)


def test_a_setting_without_a_control_position_is_refused():
    with pytest.raises(ValueError, match="context=1000.*use one of"):
        explorer.build(Settings(context=1000))


def test_warnings_name_what_speaks_against_it():
    said = " ".join(explorer.warnings(Settings(rank_k=6, rank_v=5)))
    assert "Not worth it: at R_K + R_V = 11" in said and "2,112" in said and "Break-even is at R_K + R_V = 10.7" in said
    assert "only 0.5%" in " ".join(explorer.warnings(Settings(context=1024)))
    assert "made for 8,192 tokens" in " ".join(explorer.warnings(Settings("Gemma 2 9B")))
    assert "look back 1,024 tokens" in " ".join(explorer.warnings(Settings("Gemma 3 27B")))


def test_on_several_gpus_all_bytes_and_numbers_are_those_of_one():
    """Llama 3 70B on 8 GPUs: 272 numbers against GQA's 256, so that at ranks 1 TPA caches a little more."""
    setting = Settings(gpus=8)
    as_html, text = explorer.answer(setting)
    assert "heads split over 8 GPUs" in text and "on each of 8 GPUs" in text and "on each of 8 GPUs" in as_html
    assert "1.06 times the cache of the model as shipped" in text and "5.7 GB instead of 5.37 GB" in text
    assert "TPA caches 272 numbers per token and layer on each of 8 GPUs, more than the 256 of GQA" in text
    assert "Break-even is at R_K + R_V = 1.9" in text and "each GPU keeps the whole" in text
    assert "GPUs" not in explorer.answer(Settings())[1]
    whole, part = explorer.details(Settings()), explorer.details(setting)
    assert whole.split(" weights ")[0] == part.split(" weights ")[0]  # of the whole model


def test_heads_that_cannot_be_split_are_one_line_that_says_what_works():
    said = "Qwen2.5 7B: gpus=8: cannot share out whole heads of a layer of GQA, 4 key-value heads with n_head=28; "
    for text in explorer.answer(Settings("Qwen2.5 7B", gpus=8)):
        assert said + "use one of 1, 2, 4, 28" in text


def test_the_static_twin_is_what_the_controls_show_first(monkeypatch):
    shown = []
    monkeypatch.setattr(explorer, "display", lambda thing, raw=False: shown.append(thing))
    monkeypatch.setattr(explorer.looks, "show_live", shown.append)
    explorer.show()
    explorer.explore()
    assert shown[0]["text/html"] == shown[1].children[1].value
    assert "5.3 times less cache than the model as shipped" in shown[0]["text/plain"]
    assert "42.9 GB" in shown[0]["text/plain"] and "8.05 GB" in shown[0]["text/plain"]


def test_without_ipywidgets_one_sentence_appears(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explorer.explore()
    assert "ipywidgets" in capsys.readouterr().out


def test_importing_the_figures_does_not_load_widgets():
    code = "import sys; import tpa_minimal.course.explorer; assert 'ipywidgets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_round_up_into_the_next_unit():
    values = (999.7e9, 999.4e9, 999.7e12, 1e12, 999.7e6, 512)
    texts = ["1 TB", "999 GB", "1,000 TB", "1 TB", "1 GB", "512 bytes"]
    assert [looks.bytes_text(value) for value in values] == texts
