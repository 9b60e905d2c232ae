"""Figures: a common style for all notebooks, figures about memory, and the explorer.

Each function returns a figure that pyplot no longer holds: a notebook shows it where it is a cell's last expression,
and `figure.savefig("name.png")` writes it. What they draw comes from `memory.py`; nothing here measures.
"""

import html
import io
import itertools
import math
import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from tpa_minimal.memory import GB, MODELS, Layer, Model, ratios

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


# ------------------------------------------------------------------------------------------------------- figures

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


def _closed(fig: Figure) -> Figure:
    plt.close(fig)
    return fig


def _looks(layers: list[Layer]) -> list[tuple]:
    tpa = itertools.cycle(TPA_LOOKS)
    return [LOOKS.get(layer.mechanism) or next(tpa) for layer in layers]


def _contexts_axis(ax, contexts) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts[:: max(1, len(contexts) // 7)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    ax.minorticks_off()
    ax.set_xlabel("context [tokens]")


def _versions(model: Model, ranks=RANKS) -> dict[str, Model]:
    """The model with MHA of its own heads, as shipped, and with TPA of each triple of ranks, by short label."""
    shape = (model.layer.d_model, model.layer.n_head, model.layer.d_head)
    versions = {f"MHA, {model.layer.n_head} heads": model.with_attention(Layer("mha", *shape))}
    versions[f"{model.layer.describe()} (as shipped)"] = model
    for triple in ranks:
        version = model.with_tpa(*triple)
        versions[version.layer.describe()] = version
    return {label: version for label, version in versions.items() if version is model or version.layer != model.layer}


def cache_against_context(
    model: Model,
    ranks=RANKS,
    *,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    memory: float | None = None,
    weight_dtype: str = "bfloat16",
    title: str | None = None,
) -> Figure:
    """Bytes of the cache against the context, one line for MHA, the shipped layer and each TPA.

    memory: bytes of the GPU; what the shipped model's weights leave of it is drawn as a level, if they fit at all.
    Both axes are logarithmic.
    """
    contexts = [2**n for n in range(10, 21)]
    fig, ax = plt.subplots(figsize=(8, 4))
    versions = _versions(model, ranks)
    looks = _looks([version.layer for version in versions.values()])
    for (label, version), (colour, marker, line, _) in zip(versions.items(), looks):
        held = [version.cache_bytes(context, batch_size, dtype) / GB for context in contexts]
        ax.plot(contexts, held, marker=marker, linestyle=line, color=colour, markersize=4)
        ax.annotate(label, (contexts[-1], held[-1]), (6, 0), textcoords="offset points", va="center")
    if memory is not None and (free := memory - model.weight_bytes(weight_dtype)) > 0:
        ax.axhline(free / GB, color="black", linewidth=1)
        text = f"{free / GB:.3g} GB free\nbeside the shipped\nmodel's {weight_dtype} weights"
        ax.annotate(text, (contexts[0], free / GB), (0, 4), textcoords="offset points", fontsize=9)
    _contexts_axis(ax, contexts)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    sequences = "one sequence" if batch_size == 1 else f"{batch_size} sequences"
    ax.set_ylabel(f"cache of {sequences} in {dtype} [GB]")
    ax.set_title(title or f"{model.name}: what the cache holds")
    return _closed(fig)


def per_token_bars(layers: dict[str, Layer], title: str = "Numbers cached per token and layer") -> Figure:
    """One bar per mechanism: the numbers that a layer caches for each token, written at the bar's end."""
    fig, ax = plt.subplots(figsize=(7.5, 0.6 + 0.42 * len(layers)))
    numbers = [layer.cached_numbers for layer in layers.values()]
    colours = [COLOURS[0] if layer.mechanism.startswith("tpa") else "0.75" for layer in layers.values()]
    bars = ax.barh(list(layers), numbers, color=colours, edgecolor="black", linewidth=0.6)
    for bar, layer in zip(bars, layers.values()):
        bar.set_hatch("//" if layer.mechanism.startswith("tpa") else "")
    ax.bar_label(bars, [f"{n:,}" for n in numbers], padding=4)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1.12 * max(numbers))
    ax.set_xlabel("numbers per token and layer")
    ax.set_title(title)
    return _closed(fig)


def ratio_map(ranks=(1, 2, 4, 8), n_kv_head=None, marks: dict[str, tuple[int, int]] | None = None) -> Figure:
    """How many times less TPA caches than MHA (or than G shared heads), over heads and head width, a panel per rank.

    ranks: R_K = R_V of each panel. n_kv_head: G; None is MHA. marks: points to label, each (h, d_h). The heavy line is
    break-even, R_K + R_V = 2 G d_h / (h + d_h); where hatched, TPA caches more. h starts at G, since no model has more
    key-value heads than heads.
    """
    heads, widths = np.arange(n_kv_head or 4, 129), np.arange(16, 257)
    h, d_h = np.meshgrid(heads, widths)
    G = h if n_kv_head is None else n_kv_head
    fig, axes = plt.subplots(1, len(ranks), figsize=(2.8 * len(ranks), 3.5), sharey=True, squeeze=False)
    label = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for ax, rank in zip(axes[0], ranks):
        ratio = G * d_h / (rank * (h + d_h))
        # Bands of half an octave: a smooth gradient would make the PNG ten times as large.
        ax.contourf(heads, widths, np.log2(ratio), levels=np.arange(-4, 7.1, 0.5), cmap="Blues", vmin=-2, vmax=10)
        ax.contourf(heads, widths, ratio, levels=[0, 1], colors="none", hatches=["xxx"])
        lines = ax.contour(heads, widths, ratio, levels=[2, 4, 8, 16, 32], colors="black", linewidths=0.8)
        places = []  # of the lines' labels: low, where no mark is, and not so near an edge that they would be cut
        for line in (line for level in lines.allsegs for line in level if len(line) > 30):
            inner = line[(line[:, 0] > 1.5 * heads[0]) & (line[:, 0] < 0.8 * heads[-1]) & (line[:, 1] < 200)]
            if len(inner):
                places.append(inner[np.abs(np.log(inner[:, 1] / 28)).argmin()])
        ax.contour(heads, widths, ratio, levels=[1], colors=COLOURS[1], linewidths=3.5)
        for name, (x, y) in (marks or {}).items():
            ax.plot(x, y, "o", color="white", markeredgecolor="black", markersize=7)
            ax.annotate(name, (x, y), (-6, 6), textcoords="offset points", fontsize=9, ha="right", bbox=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        for text in ax.clabel(lines, fmt=lambda level: f"{level:g}×", fontsize=9, manual=places):
            text.set(bbox=label, rotation=0)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set_title(f"$R_K = R_V = {rank}$", fontsize=11)
        ax.set_xlabel("heads $h$")
        ax.grid(visible=False)
    axes[0][0].set_ylabel("head width $d_h$")
    baseline = "MHA with the same heads" if n_kv_head is None else f"GQA with {n_kv_head} key-value heads"
    title = f"How many times less TPA caches than {baseline} (hatched: it caches more)"
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return _closed(fig)


def largest_context_by_memory(
    model: Model,
    ranks=RANKS,
    *,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    weight_dtype: str = "bfloat16",
    title: str | None = None,
) -> Figure:
    """The largest context that fits beside the weights on GPUs of several sizes, a bar for each version."""
    fig, ax = plt.subplots(figsize=(9.5, 3.8))
    versions = _versions(model, ranks)
    width = 0.8 / len(versions)
    looks = _looks([version.layer for version in versions.values()])
    for i, ((label, version), (colour, _, _, hatch)) in enumerate(zip(versions.items(), looks)):
        x = np.arange(len(GPUS)) + (i - (len(versions) - 1) / 2) * width
        most = [version.largest_context(size * GB, batch_size, dtype, weight_dtype) for size in GPUS]
        shown = [min(context, 2**24) for context in most]  # an unbounded one is drawn as 16M and labelled
        ax.bar(x, shown, width, label=label, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
        for position, context in zip(x, most):
            ax.annotate(tokens_text(context), (position, max(context, 1024)), (0, 2), textcoords="offset points",
                        ha="center", fontsize=8)  # fmt: skip
    ax.set_yscale("log", base=2)
    ax.set_ylim(1024, 2**24)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tokens_text(y)))
    ax.set_xticks(range(len(GPUS)), [f"{size} GB\n{name}" for size, name in GPUS.items()])
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("largest context [tokens]")
    ax.legend(fontsize=9, loc="upper left", ncols=2)
    ax.set_xlabel(f"GPU; weights in {weight_dtype}, cache in {dtype} (0: the weights do not fit)")
    ax.set_title(title or f"{model.name}: what fits on one GPU")
    return _closed(fig)


def decode_cost(layers: dict[str, Layer], dtype: str = "bfloat16", title: str | None = None) -> Figure:
    """What one new token costs a layer, against the context: multiply-adds (App. A.4), and bytes of cache read."""
    contexts = [2**n for n in range(12, 20)]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    by_cost = {}  # layers of equal arithmetic, whose lines hide each other
    for (label, layer), (colour, marker, line, _) in zip(layers.items(), _looks(list(layers.values()))):
        by_cost.setdefault(layer.decode_multiply_adds(contexts[0]), []).append(layer)
        kind = dict(marker=marker, linestyle=line, color=colour, markersize=5, label=label)
        left.plot(contexts, [layer.decode_multiply_adds(context) / 1e9 for context in contexts], **kind)
        model = Model("", layer, 1, 0, 0, "")
        right.plot(contexts, [model.cache_bytes(context, dtype=dtype) / GB for context in contexts], **kind)
    for ax, what, unit in ((left, "Arithmetic", "multiply-adds [10⁹]"), (right, "Memory traffic", "cache read [GB]")):
        _contexts_axis(ax, contexts)
        ax.set_yscale("log")
        ax.set_title(f"{what} of one new token, one layer", fontsize=11 if title else None)
        ax.set_ylabel(unit)
    fig.suptitle(title or "", x=0.01, ha="left", fontsize=12)
    for same in by_cost.values():
        if len(same) > 1:
            names = " and ".join(layer.mechanism.upper() for layer in same)
            place = contexts[4], same[0].decode_multiply_adds(contexts[4]) / 1e9
            left.annotate(f"{names} coincide", place, (2, -48), textcoords="offset points", fontsize=9,
                          arrowprops={"arrowstyle": "-", "linewidth": 0.8})  # fmt: skip
    fig.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return _closed(fig)


# ------------------------------------------------------------------------------------------------------ explorer


@dataclass(frozen=True)
class Settings:
    """What the explorer's controls say; memory_gb is in 10^9 bytes."""

    model: str = "Llama 3 70B"
    rank_q: int = 16
    rank_k: int = 1
    rank_v: int = 1
    dtype: str = "bfloat16"
    weight_dtype: str = "int8"
    context: int = 131_072
    batch_size: int = 1
    memory_gb: int = 80


@dataclass(frozen=True)
class Account:
    """One bar of the explorer: a version of the model, and what it needs in bytes."""

    label: str
    model: Model
    weights: float
    cache: float
    largest_context: float


def accounts(settings: Settings) -> list[Account]:
    """MHA with the model's own heads, the model as shipped (if that is something else), and its TPA version, last."""
    s = settings
    found = []
    for label, model in _versions(MODELS[s.model], [(s.rank_q, s.rank_k, s.rank_v)]).items():
        most = model.largest_context(s.memory_gb * GB, s.batch_size, s.dtype, s.weight_dtype)
        cache = model.cache_bytes(s.context, s.batch_size, s.dtype)
        found.append(Account(label, model, model.weight_bytes(s.weight_dtype), cache, most))
    return found


def headline(settings: Settings) -> tuple[str, str]:
    """The number that matters, and the sentence that says what it is and against which baseline."""
    *_, tpa = accounts(settings)
    shipped = MODELS[settings.model]
    (baseline, ratio), *_ = ratios(tpa.model.layer, shipped.layer).items()
    before = shipped.cache_bytes(settings.context, settings.batch_size, settings.dtype)
    comparison = "less" if ratio >= 1 else "more"
    sizes = f"{bytes_text(tpa.cache)} in place of {bytes_text(before)}"
    return f"{max(ratio, 1 / ratio):.1f}×", f"{comparison} cache than {baseline}: {sizes}"


def warnings(settings: Settings) -> list[str]:
    """What speaks against TPA at these settings, and what limits the figures, in plain sentences."""
    *_, tpa = accounts(settings)
    shipped, said = MODELS[settings.model], []
    layer, ranks = tpa.model.layer, settings.rank_k + settings.rank_v
    ratio = shipped.layer.cached_numbers / layer.cached_numbers
    if ratio <= 1:
        more = "as much as" if ratio == 1 else "more than"
        rule = f"at R_K + R_V = {ranks} TPA caches {layer.cached_numbers:,} numbers per token and layer, {more}"
        limit = shipped.layer.cached_numbers / (layer.n_head + layer.d_head)
        said.append(
            f"Not worth it: {rule} the {shipped.layer.cached_numbers:,} of {shipped.layer.describe()}. "
            f"Break-even is at R_K + R_V = {limit:.1f}."
        )
    cache = shipped.cache_bytes(settings.context, settings.batch_size, settings.dtype)
    share = cache / (cache + shipped.weight_bytes(settings.weight_dtype))
    if share < 0.1:
        said.append(f"The shipped cache is only {share:.1%} of the memory in use here: the weights are what counts.")
    if settings.context > shipped.max_len:
        said.append(f"{shipped.name} was made for {shipped.max_len:,} tokens at most.")
    if shipped.note:
        said.append(f"{shipped.name}: {shipped.note}.")
    return said


def details(settings: Settings) -> str:
    """Weights added or saved by the TPA version, and its attention arithmetic against the shipped layer's."""
    *_, tpa = accounts(settings)
    shipped = MODELS[settings.model]
    added = tpa.model.parameters - shipped.parameters
    work = tpa.model.layer.decode_multiply_adds(1) / shipped.layer.decode_multiply_adds(1)
    comparison = "more" if added > 0 else "fewer"
    return (
        f"The TPA version has {abs(added) / 1e9:.2f} billion weights {comparison}, takes {work:.2f} times the "
        "attention arithmetic per cached token, and would have to be trained."
    )


def _verdict(account: Account, settings: Settings) -> str:
    total = account.weights + account.cache
    if account.weights > settings.memory_gb * GB:
        return f"{bytes_text(total)}: the weights alone do not fit"
    fits = "fits" if total <= settings.memory_gb * GB else "does not fit"
    most = tokens_text(account.largest_context)
    return f"{bytes_text(total)}: {fits}; largest context {most}"


def _scale(found: list[Account], settings: Settings) -> float:
    """Bytes at the right edge: room for the memory and for all versions but MHA, whose bar may leave the picture."""
    return 1.1 * max([settings.memory_gb * GB] + [a.weights + a.cache for a in found[-2:]])


def explorer_figure(settings: Settings = Settings()) -> Figure:  # noqa: B008 (frozen)
    """The explorer as a picture: weights and cache of each version against the memory, the ratio as title."""
    found = accounts(settings)
    right = _scale(found, settings)
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.75 * len(found)))
    for row, account in enumerate(found):
        colour = COLOURS[0] if account is found[-1] else "0.6"
        cache = min(account.cache, max(0, right - account.weights))
        weights = min(account.weights, right)
        ax.barh(row, weights / GB, 0.5, color="white", edgecolor="black", hatch="//", linewidth=0.8)
        ax.barh(row, cache / GB, 0.5, left=weights / GB, color=colour, edgecolor="black", linewidth=0.8)
        text = f"{account.label}: weights {bytes_text(account.weights)} + cache {bytes_text(account.cache)} = "
        beyond = "  (bar cut)" if account.weights + account.cache > right else ""
        ax.text(0, row - 0.32, text + _verdict(account, settings) + beyond, va="bottom", fontsize=9.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    ax.axvline(settings.memory_gb, color=COLOURS[1], linewidth=2.5)
    ax.annotate(f"{settings.memory_gb} GB", (settings.memory_gb, len(found) - 0.6), (-4, 0), va="center", ha="right",
                textcoords="offset points", color=COLOURS[1], fontweight="bold")  # fmt: skip
    ax.set_xlim(0, right / GB)
    ax.set_ylim(len(found) - 0.4, -0.75)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.set_xlabel("memory [GB]; hatched: weights, filled: cache")
    number, sentence = headline(settings)
    s = settings
    sizes = f"{s.model}, {s.context:,} tokens × {s.batch_size}, cache in {s.dtype}, weights in {s.weight_dtype}"
    ax.set_title(f"{sizes}\n{number} {sentence}")
    return _closed(fig)


def explorer_html(settings: Settings) -> str:
    """The explorer's answer as HTML: the ratio in large type, one bar per version, warnings and details."""
    found = accounts(settings)
    right = _scale(found, settings)
    number, sentence = headline(settings)
    parts = [
        '<div class="tpa-explorer" style="font-family:sans-serif;max-width:60em;line-height:1.35">'
        f'<div><span class="tpa-number" style="font-size:3.2em;font-weight:700;color:{COLOURS[0]}">{number}</span> '
        f'<span class="tpa-sentence" style="font-size:1.1em">{html.escape(sentence)}</span></div>'
    ]
    mark = 100 * settings.memory_gb * GB / right
    inside, stripes = "position:absolute;top:0;bottom:0;", "repeating-linear-gradient(45deg,#999 0 2px,#ddd 2px 7px)"
    for account in found:
        colour = COLOURS[0] if account is found[-1] else "#888"
        weights = 100 * min(1, account.weights / right)
        cache = min(100 * account.cache / right, 100 - weights)
        cut = " &#9654; bar cut" if account.weights + account.cache > right else ""
        sizes = f'weights {bytes_text(account.weights)} + cache <b class="tpa-cache">{bytes_text(account.cache)}</b>'
        parts.append(
            f'<div style="margin-top:.7em"><b>{html.escape(account.label)}</b>: {sizes} = '
            f"{_verdict(account, settings)}{cut}</div>"
            '<div style="position:relative;height:22px;border:1px solid #999;overflow:hidden">'
            f'<div class="tpa-bar-weights" style="{inside}left:0;width:{weights:.2f}%;background:{stripes}"></div>'
            f'<div class="tpa-bar-cache" style="{inside}left:{weights:.2f}%;width:{cache:.2f}%;'
            f'background:{colour}"></div>'
            f'<div style="{inside}left:{mark:.2f}%;width:3px;background:{COLOURS[1]}"></div></div>'
        )
    parts.append(
        f'<div style="position:relative;height:1.5em"><span style="position:absolute;right:{100 - mark:.2f}%;'
        f'color:{COLOURS[1]};font-weight:700">{settings.memory_gb} GB &#9650;</span></div>'
        '<div style="opacity:.8">striped: weights &nbsp; filled: cache</div>'
    )
    for sentence in warnings(settings):
        grave = sentence.startswith("Not worth it")
        line = f"6px solid {COLOURS[1]}" if grave else "3px solid #999"
        weight = "font-weight:700;" if grave else ""
        parts.append(
            f'<div class="tpa-warning" style="border-left:{line};{weight}padding:.2em .6em;margin-top:.5em">'
            f"{html.escape(sentence)}</div>"
        )
    parts.append(f'<div style="margin-top:.5em">{html.escape(details(settings))}</div></div>')
    return "".join(parts)


def build_explorer(settings: Settings = Settings()):  # noqa: B008 (frozen)
    """The explorer as an ipywidgets box: a control for each field of Settings, and the answer below them.

    Only the text of one HTML widget changes when a control moves: no figure is redrawn, which would take 100 ms or more
    and stacks up in some front ends.
    """
    import ipywidgets

    wide = {"style": {"description_width": "8em"}, "layout": {"width": "26em"}}
    powers = [2**n for n in range(10, 21)]

    def choice(kind, name, options, description):
        options = list(options)
        value = getattr(settings, name)
        if value not in [option[1] if isinstance(option, tuple) else option for option in options]:
            raise ValueError(f"{name}={value!r}: is not among the explorer's choices; use one of {options}")
        return kind(options=options, value=value, description=description, **wide)

    def slider(name, most, description):
        return ipywidgets.IntSlider(getattr(settings, name), 1, most, description=description, **wide)

    drop, slide = ipywidgets.Dropdown, ipywidgets.SelectionSlider
    controls = {
        "model": choice(drop, "model", MODELS, "model"),
        "context": choice(slide, "context", [(tokens_text(n), n) for n in powers], "context"),
        "batch_size": choice(slide, "batch_size", [2**n for n in range(9)], "batch"),
        "memory_gb": choice(slide, "memory_gb", [8, 16, 24, 48, 80, 141, 180, 320, 640, 1128], "memory [GB]"),
        "rank_q": slider("rank_q", 32, "rank R_Q"),
        "rank_k": slider("rank_k", 16, "rank R_K"),
        "rank_v": slider("rank_v", 16, "rank R_V"),
        "dtype": choice(drop, "dtype", ["float32", "bfloat16", "float8", "int4"], "cache in"),
        "weight_dtype": choice(drop, "weight_dtype", ["float32", "bfloat16", "int8", "int4"], "weights in"),
    }
    answer = ipywidgets.HTML(explorer_html(settings))

    def show(_change) -> None:
        answer.value = explorer_html(Settings(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(show, names="value")
    first, second = list(controls.values())[:4], list(controls.values())[4:]
    return ipywidgets.VBox([ipywidgets.HBox([ipywidgets.VBox(first), ipywidgets.VBox(second)]), answer])


def explorer(settings: Settings = Settings()) -> None:  # noqa: B008 (frozen)
    """Show the explorer: model, ranks, types, context, batch and memory as controls, the answer live below them.

    A picture of the first setting is shown too, and vanishes as soon as a front end has drawn the controls; it is what
    remains where widgets do not run.
    """
    from IPython.display import HTML, display

    figure = explorer_figure(settings)
    picture = display(figure, display_id=True)
    plt.close(figure)
    try:
        box = build_explorer(settings)
    except ImportError:
        return
    box._view_count = 0  # from None: asks the front end to keep count of the views it has drawn

    def drawn(change) -> None:
        if change["new"] and picture is not None:
            picture.update(HTML(""))
            box.unobserve(drawn, names="_view_count")

    box.observe(drawn, names="_view_count")
    display(box)
