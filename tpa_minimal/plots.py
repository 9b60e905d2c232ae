"""Figures: a common style for all notebooks, and the memory explorer."""

import matplotlib.pyplot as plt

# Okabe and Ito's palette: told apart with every common form of colour blindness, and of different grey values.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def style() -> None:
    """Set the course's figure style: small PNGs, readable labels, a palette that survives colour blindness."""
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
