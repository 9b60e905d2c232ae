"""How every figure of the course looks: one style, one look for each mechanism, alt text, and numbers as text.

looks.style()                                                   once, at the top of a notebook
ax.plot(x, y, **looks.of("mha").line_style(), label="MHA")      the same colour, marker and line everywhere
ax.bar(x, y, **looks.of("tpa").bar_style())
looks.show(fig, alt="what the figure shows, for somebody who cannot see it")
looks.table(["", "numbers"], [["MHA", 1536], ["TPA", 392]], caption="cached per token and layer")

def draw(rank): ...; return fig, f"the best fit of rank {rank}"  # a figure and its alt text
looks.show(*draw(rank=2))                                        # the static twin, in a cell of its own
looks.control(draw, rank=(1, 8, 2))                              # the control: first, last and initial value
"""

import base64
import functools
import html
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from tpa_minimal.memory import Layer

# For curves that are no mechanism. Near Okabe and Ito's palette, darkened to a contrast of 3:1 or more against white.
COLOURS = ["#0072B2", "#CC5500", "#00916A", "#B5488F", "#9A7B00", "#3F9BDD", "#000000"]
MAX_WIDTH = 800  # pixels of a figure: a notebook's column
PREDRAWN = 12  # a control of so few states draws them all at the beginning, and then answers at once


class Look(NamedTuple):
    """How a mechanism looks in every figure; markers, lines and hatches tell mechanisms apart without colour."""

    colour: str
    marker: str | tuple
    line: str | tuple
    hatch: str

    def line_style(self) -> dict:
        """The keywords of a line for `ax.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}

    def bar_style(self) -> dict:
        """The keywords of bars for `ax.bar` and `ax.barh`: the hatch is white on the colour."""
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0}


# Blues and what is near to them are TPA and its versions. The first six differ in lightness as well, by 5 or more of
# CIE's 100 steps from one to the next. Contrast against white is 3:1 or more throughout (tests/course/test_looks.py).
LOOKS = {
    "mha": Look("#2B2B2B", "o", "-", ""),
    "mqa": Look("#7A2465", "v", (0, (6, 2, 1, 2)), "\\\\"),
    "gqa": Look("#C24A00", "s", "--", "//"),
    "mla": Look("#00916A", "D", ":", "xx"),
    "tpa": Look("#0062A0", "^", "-.", ".."),
    "tpa-kv-only": Look("#2C9AA8", "P", (0, (4, 1)), "++"),
    "tpa-fixed-a": Look("#6A51A3", "<", (0, (1, 1)), "--"),
    "tpa-fixed-b": Look("#9A7B00", ">", (0, (8, 2)), "||"),
    "tpa-shared-b": Look("#7A4B00", "p", (0, (3, 1, 1, 1)), "oo"),
    "tpa-sigmoid-a": Look("#B5488F", "*", (0, (2, 2)), "**"),
    "tpa-softmax-a": Look("#8C3B6B", "h", (0, (5, 5)), "OO"),
    "tpa-third-order": Look("#5F7A1F", "X", (0, (3, 1, 1, 1, 1, 1)), "\\\\||"),
    "tpa-partial-rope": Look("#4F6D8F", "d", (0, (1, 3)), "//||"),
    "tpa-heads-of-mha": Look("#003B73", "H", (0, (10, 3)), "//--"),
    "tpa-init-authors": Look("#4793D6", (3, 1, 0), (0, (2, 1, 2, 4)), "++||"),
}
# Where one figure holds TPA with several ranks, they take these in order.
TPA_LOOKS = [LOOKS["tpa"], Look("#4793D6", (4, 1, 0), "-", "++"), Look("#003B73", (6, 1, 0), "--", "oo")]


def of(mechanism: str) -> Look:
    """The look of a mechanism, such as "mha" or "tpa-kv-only". Raises ValueError for one that has none."""
    if mechanism not in LOOKS:
        raise ValueError(f"mechanism={mechanism!r}: has no look; choose one of {', '.join(LOOKS)}")
    return LOOKS[mechanism]


def looks_of(layers: list[Layer]) -> list[Look]:
    """The look of each layer; several TPA of different ranks take theirs in order."""
    tpa = itertools.cycle(TPA_LOOKS)
    return [next(tpa) if layer.mechanism == "tpa" else of(layer.mechanism) for layer in layers]


def quantized(fig: Figure, dpi: float | str = "figure") -> Image.Image:
    """The figure in 128 colours: half the bytes or fewer, and no difference that one sees."""
    drawn = io.BytesIO()
    # To cut to the content a figure is drawn twice; one without a layout engine has its margins already.
    fig.savefig(drawn, format="png", bbox_inches="tight" if fig.get_layout_engine() else None, dpi=dpi)
    return Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)


def small_png(fig: Figure) -> bytes | None:
    """The figure as a small PNG; None if it is empty."""
    return png_of([quantized(fig)]) if fig.axes else None


def png_of(pictures: list[Image.Image], milliseconds: Sequence[int] = ()) -> bytes:
    """One picture as a PNG, or several as one that moves (APNG), shown for so long each, twice over."""
    small = io.BytesIO()
    moving = dict(save_all=True, append_images=pictures[1:], duration=list(milliseconds), loop=2)
    pictures[0].save(small, format="png", optimize=True, **(moving if len(pictures) > 1 else {}))
    return small.getvalue()


def image_html(png: bytes, alt: str) -> str:
    """An HTML image that carries its own bytes and its alt text.

    JupyterLab drops the alt text of a plain image/png output; of an HTML one JupyterLab, Colab, nbconvert and
    jupyter-book all keep it. Raises ValueError for an empty alt text and for a picture wider than MAX_WIDTH.
    """
    width, height = Image.open(io.BytesIO(png)).size
    if not alt.strip():
        raise ValueError(f"alt={alt!r}: every figure needs alt text; say in a sentence what the figure shows")
    if width > MAX_WIDTH:
        raise ValueError(f"the figure is {width} pixels wide: at most {MAX_WIDTH} fit; make its figsize narrower")
    source = base64.b64encode(png).decode()
    return (
        f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt)}" width="{width}" height="{height}" '
        'style="max-width:100%;height:auto">'
    )


def _display(as_html: str, as_text: str) -> None:
    display({"text/html": as_html, "text/plain": as_text}, raw=True)


def show(fig: Figure, alt: str) -> None:
    """Show a figure as a small PNG with alt text, which a saved or exported notebook keeps, and close it.

    Raises ValueError as `image_html` does.
    """
    _display(image_html(small_png(closed(fig)), alt), alt)


def animate(figures: Iterable[Figure], alt: str, milliseconds: int = 400, rest: int = 2500) -> None:
    """Show figures one after the other, twice. The last is the still: it comes first too, and it is what remains.

    Figures of one size only; each is shown for `milliseconds`, the still for `rest`. Raises ValueError as `image_html`.
    """
    drawn = []
    for fig in figures:
        canvas = io.BytesIO()
        closed(fig).savefig(canvas, format="png")  # not cut to its content: all frames need one size
        drawn.append(Image.open(canvas).convert("RGB"))
    still = drawn[-1].quantize(32, dither=Image.Dither.NONE)
    frames = [still, *(frame.quantize(palette=still, dither=Image.Dither.NONE) for frame in drawn[:-1]), still]
    times = [rest, *[milliseconds] * (len(frames) - 2), rest]
    _display(image_html(png_of(frames, times), alt), alt)


def control(draw: Callable[..., tuple[Figure, str]], **settings) -> None:
    """Show controls that redraw a figure at once; all work from the keyboard. Its static twin is `show(*draw(...))`.

    draw: takes the settings by name and returns a figure and its alt text. A setting is (first, last, initial) for a
    slider of whole numbers, or a list of choices, of which the first is taken at the beginning. Without ipywidgets
    one sentence appears instead.
    """
    try:
        import ipywidgets
    except ImportError:
        return print("The control needs ipywidgets, which is not installed; the picture above shows one of its states.")

    @functools.cache
    def picture(values: tuple) -> str:
        fig, alt = draw(**dict(zip(settings, values)))
        return image_html(small_png(closed(fig)), alt)

    wide = {"layout": {"width": "30em", "max_width": "98%"}, "style": {"description_width": "7em"}}
    handles, states = [], []
    for name, setting in settings.items():
        label = name.replace("_", " ")
        if isinstance(setting, tuple):
            first, last, value = setting
            states.append(range(first, last + 1))
            handle = ipywidgets.IntSlider(value, first, last, description=label, **wide)
        else:
            states.append(setting)
            handle = ipywidgets.Dropdown(options=setting, description=label, **wide)
        handles.append(handle)
    answer = ipywidgets.HTML()

    def redraw(_=None) -> None:
        answer.value = picture(tuple(handle.value for handle in handles))

    for handle in handles:
        handle.observe(redraw, "value")
    redraw()
    if math.prod(map(len, states)) <= PREDRAWN:
        for values in itertools.product(*states):
            picture(values)
    show_live(ipywidgets.VBox([*handles, answer]))


def show_live(box) -> None:
    """Show an ipywidgets box; a page without a kernel, which cannot, shows a sentence in its place."""
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    sentence = "The controls work while the notebook runs; the picture above shows one of their states."
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": sentence}, raw=True)


def table(header: Sequence[str], rows: Iterable[Sequence], caption: str) -> None:
    """Show a table as HTML, with its first column as the rows' headings; numbers get separators and stand right.

    A column of words, of which most cells begin with a letter, stands left.
    """

    def text(value) -> str:
        return f"{value:,}" if isinstance(value, int) else str(value)

    cells = [[text(value) for value in row] for row in rows]
    words = [sum(value[:1].isalpha() for value in column) * 2 > len(cells) for column in zip(*cells)]
    sides = ["left", *("left" if said else "right" for said in words[1:])]
    line = '<th scope="row" style="text-align:left">{}</th>'
    column = '<th scope="col" style="text-align:{}">{}</th>'
    parts = [f'<table><caption style="text-align:left">{html.escape(caption)}</caption><thead><tr>']
    parts += [column.format(side, html.escape(name)) for side, name in zip(sides, header)]
    parts.append("</tr></thead><tbody>")
    for first, *others in cells:
        data = "".join(f'<td style="text-align:{s}">{html.escape(v)}</td>' for s, v in zip(sides[1:], others))
        parts.append(f"<tr>{line.format(html.escape(first))}{data}</tr>")
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = ["  ".join(value.rjust(width) for value, width in zip(row, widths)) for row in [header, *cells]]
    _display("".join(parts) + "</tbody></table>", "\n".join([caption, *lines]))


def style() -> None:
    """Set the course's figure style: small PNGs, readable labels, a palette that survives colour blindness."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:  # notebooks keep their figures, so these must be small

        def keep_small(*_) -> None:
            shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)

        keep_small()
        # At the end of the cell that loads it, the inline backend registers its own formatter: come back after that.
        shell.events.register("pre_run_cell", keep_small)
    plt.rcParams.update(
        {
            "figure.figsize": (7, 3.6),
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "font.size": 10.5,
            "lines.linewidth": 2,
            "image.interpolation": "nearest",
        }
    )


RANKS = ((16, 1, 1), (16, 2, 2))
GPUS = {
    24: "RTX 4090",
    48: "L40S",
    80: "A100, H100",
    141: "H200",
    180: "B200",
}  # GB of memory; DGX and HGX B200: 1,440 GB for 8


def tokens_text(tokens: float) -> str:
    """A number of tokens in human-readable form: 512, 8k, 128k, 1M; in units of 1,024."""
    if tokens == math.inf:
        return "any"
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit:
            number = tokens / unit
            return f"{number:.0f}{letter}" if number >= 10 or number == int(number) else f"{number:.1f}{letter}"
    return f"{tokens:.0f}"


def bytes_text(number: float) -> str:
    """A number of bytes with three digits and its unit, in powers of 1,000."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= 0.9995 * unit:  # three digits round it up to this unit
            return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:,.0f} {name}"
    return f"{number:.0f} bytes"


def closed(fig: Figure) -> Figure:
    """The figure, which pyplot no longer holds."""
    plt.close(fig)
    return fig
