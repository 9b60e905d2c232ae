"""One look for each mechanism that survives grey, and figures, controls and tables that carry their own words."""

import base64
import io
import itertools
import re

import matplotlib
import matplotlib.colors

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from PIL import Image

from tpa_minimal.course import looks
from tpa_minimal.memory import MECHANISMS, Layer

EVERY = [*looks.LOOKS.values(), *looks.TPA_LOOKS[1:]]
MAIN = ("mha", "mqa", "gqa", "mla", "tpa", "tpa-kv-only")


@pytest.fixture
def shown(monkeypatch):
    """What a cell displays, in order."""
    plt.close("all")  # what another file's tests left open
    found = []
    monkeypatch.setattr(looks, "display", lambda thing, raw=False: found.append(thing))
    yield found
    assert not plt.get_fignums()


def luminance(colour):
    """Relative luminance as the WCAG defines it, 0 to 1."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels))


def figure(width=3.0, height=2.0):
    fig, ax = plt.subplots(figsize=(width, height))
    ax.plot([1, 2, 3], **looks.of("tpa").line_style())
    return fig


def picture_in(output):
    source, alt, width = re.fullmatch(
        r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)" width="(\d+)" .+>', output
    ).groups()
    image = Image.open(io.BytesIO(base64.b64decode(source)))
    assert image.size[0] == int(width)
    return image, alt


# ---------------------------------------------------------------------------------------------------------- looks


def test_every_colour_stands_out_against_white():
    for colour in [look.colour for look in EVERY] + looks.COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour


def test_the_main_mechanisms_differ_in_grey():
    lightness = sorted(116 * luminance(looks.of(name).colour) ** (1 / 3) - 16 for name in MAIN)
    assert min(after - before for before, after in itertools.pairwise(lightness)) >= 5


@pytest.mark.parametrize("part", ["colour", "marker", "line", "hatch"])
def test_no_two_mechanisms_share_a_look(part):
    values = [getattr(look, part) for look in looks.LOOKS.values()]
    assert len(set(values)) == len(values)


def test_every_mechanism_of_the_formulas_has_a_look_and_others_are_refused():
    assert set(MECHANISMS) <= set(looks.LOOKS)
    with pytest.raises(ValueError, match="mechanism='rope'.*choose one of mha, mqa"):
        looks.of("rope")


def test_several_ranks_of_tpa_in_one_figure_differ():
    layers = [Layer(name, 64, 4, 16) for name in ("tpa", "mha", "tpa", "tpa-kv-only", "tpa")]
    found = looks.looks_of(layers)
    assert found[0] == looks.of("tpa") and found[1] == looks.of("mha") and found[3] == looks.of("tpa-kv-only")
    assert len({look.colour for look in found}) == len({look.marker for look in found}) == 5


# ------------------------------------------------------------------------------------------ figures with their words


def test_a_figure_is_shown_with_its_alt_text(shown):
    looks.show(figure(), alt='It rises from "1" to 3 & stops')
    image, alt = picture_in(shown[0]["text/html"])
    assert alt == "It rises from &quot;1&quot; to 3 &amp; stops" and image.getcolors(128) is not None
    assert shown[0]["text/plain"] == 'It rises from "1" to 3 & stops'


@pytest.mark.parametrize("alt, width, complaint", [(" ", 3.0, "needs alt text"), ("A line", 10.0, "at most 800 fit")])
def test_a_figure_without_words_or_too_wide_is_refused(shown, alt, width, complaint):
    looks.style()
    with pytest.raises(ValueError, match=complaint):
        looks.show(figure(width), alt=alt)
    assert not shown


def test_an_animation_begins_and_ends_with_its_still(shown):
    def frames():
        for width in (1, 2, 3):
            fig = figure()
            fig.axes[0].bar([1], [width])
            yield fig

    looks.animate(frames(), alt="Bars grow", milliseconds=50)
    image, _ = picture_in(shown[0]["text/html"])
    pictures = []
    for n in range(image.n_frames):
        image.seek(n)
        pictures.append(image.convert("RGB").tobytes())
    assert len(pictures) == 4 and pictures[0] == pictures[-1] and len(set(pictures)) == 3
    assert image.info["loop"] == 2


# -------------------------------------------------------------------------------------------------------- controls


def test_a_control_redraws_from_its_settings_and_its_twin_is_the_same_picture(shown, monkeypatch):
    monkeypatch.setattr(looks, "show_live", shown.append)
    drawn = []

    def draw(rank, kind):
        drawn.append((rank, kind))
        fig = figure()
        fig.axes[0].set_title(f"{kind} {rank}")
        return fig, f"{kind} of rank {rank}"

    looks.control(draw, rank=(1, 4, 2), kind=["keys", "values"])
    slider, choice, answer = shown[0].children
    assert (slider.min, slider.max, slider.value, slider.description) == (1, 4, 2, "rank")
    assert choice.options == ("keys", "values")
    looks.show(*draw(rank=2, kind="keys"))
    assert answer.value == shown[1]["text/html"]
    slider.value = 4
    assert picture_in(answer.value)[1] == "keys of rank 4"
    choice.value = "values"
    assert picture_in(answer.value)[1] == "values of rank 4"
    choice.value = "keys"
    assert drawn.count((4, "keys")) == 1  # seen before, so not drawn again


@pytest.mark.parametrize("last, expected", [(12, 12), (13, 1)])
def test_a_control_of_few_states_draws_them_before_it_is_shown(shown, last, expected):
    drawn = []
    looks.control(lambda rank: (drawn.append(rank), (figure(), f"rank {rank}"))[1], rank=(1, last, 2))
    assert len(drawn) == expected and len(shown) == 1


def test_where_no_kernel_runs_a_sentence_stands_for_the_controls(shown):
    looks.control(lambda rank: (figure(), f"rank {rank}"), rank=(1, 4, 2))
    assert len(shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"]) == 32
    assert "the picture above" in shown[0]["text/plain"]


def test_without_ipywidgets_a_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    looks.control(lambda rank: 1 / 0, rank=(1, 4, 2))
    assert "needs ipywidgets" in capsys.readouterr().out


def test_a_table_is_html_with_headings_and_a_caption(shown):
    looks.table(["", "numbers"], [["MHA", 1536], ["<TPA>", "3.9 ×"]], caption="cached")
    page = shown[0]["text/html"]
    assert '<caption style="text-align:left">cached</caption>' in page and page.count('scope="col"') == 2
    assert "&lt;TPA&gt;</th>" in page and ">1,536</td>" in page and ">3.9 ×</td>" in page
    assert shown[0]["text/plain"] == "cached\n       numbers\n  MHA    1,536\n<TPA>    3.9 ×"


def test_a_column_of_words_stands_left_and_one_of_numbers_right(shown):
    looks.table(["", "bytes", "note"], [["MHA", 8, "fits"], ["MQA", "any", "–"], ["TPA", 2, "fits"]], caption="c")
    page = shown[0]["text/html"]
    assert 'left">note</th>' in page and page.count('<td style="text-align:left">') == 3
    assert 'right">bytes</th>' in page and page.count('<td style="text-align:right">') == 3
