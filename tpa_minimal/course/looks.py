"""How every figure of the course looks: one style, one look for each mechanism, and numbers as text."""

import io
import itertools
import math
import sys

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from tpa_minimal.memory import Layer

# Okabe and Ito's palette: told apart with every common form of colour blindness, and of different grey values.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def small_png(fig: Figure) -> bytes | None:
    """The figure as a PNG of 128 colours: half the bytes or fewer, and no difference that one sees; None if empty."""
    if not fig.axes:
        return None
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", bbox_inches="tight")
    few = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True)
    return small.getvalue()


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


# One look for each mechanism in all figures; markers, lines and hatches tell them apart in grey. TPA's versions take
# theirs in order, blue first.
LOOKS = {  # colour, marker, line, hatch
    "mha": ("0.45", "o", "-", ""),
    "gqa": (COLOURS[1], "s", "--", "//"),
    "mla": (COLOURS[2], "D", ":", "xx"),
    "mqa": (COLOURS[3], "v", (0, (6, 2, 1, 2)), "\\\\"),
}
TPA_LOOKS = [(COLOURS[0], "^", "-.", ".."), (COLOURS[5], "P", "-", "++"), (COLOURS[4], "X", "--", "oo")]
RANKS = ((16, 1, 1), (16, 2, 2))
GPUS = {
    24: "RTX 4090",
    48: "L40S",
    80: "A100, H100",
    141: "H200",
    180: "B200",
}  # GB of memory; DGX and HGX B200: 1,440 GB for 8


def tokens_text(tokens: float) -> str:
    """A number of tokens as people say it: 512, 8k, 128k, 1M; in units of 1,024."""
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


def looks_of(layers: list[Layer]) -> list[tuple]:
    """The look of each layer; versions of TPA take theirs in order."""
    tpa = itertools.cycle(TPA_LOOKS)
    return [LOOKS.get(layer.mechanism) or next(tpa) for layer in layers]
