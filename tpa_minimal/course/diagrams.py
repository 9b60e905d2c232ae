"""Figures about memory and cost, drawn from `memory.py`; nothing here measures.

Each function returns a figure that pyplot no longer holds: a notebook shows it where it is a cell's last expression,
and `figure.savefig("name.png")` writes it.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tpa_minimal.course.looks import COLOURS, GPUS, RANKS, closed, looks_of, tokens_text
from tpa_minimal.memory import GB, Layer, Model


def contexts_axis(ax, contexts) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts[:: max(1, len(contexts) // 7)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    ax.minorticks_off()
    ax.set_xlabel("context [tokens]")


def versions(model: Model, ranks=RANKS) -> dict[str, Model]:
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
    shown = versions(model, ranks)
    looks = looks_of([version.layer for version in shown.values()])
    for (label, version), (colour, marker, line, _) in zip(shown.items(), looks):
        held = [version.cache_bytes(context, batch_size, dtype) / GB for context in contexts]
        ax.plot(contexts, held, marker=marker, linestyle=line, color=colour, markersize=4)
        ax.annotate(label, (contexts[-1], held[-1]), (6, 0), textcoords="offset points", va="center")
    if memory is not None and (free := memory - model.weight_bytes(weight_dtype)) > 0:
        ax.axhline(free / GB, color="black", linewidth=1)
        text = f"{free / GB:.3g} GB free\nbeside the shipped\nmodel's {weight_dtype} weights"
        ax.annotate(text, (contexts[0], free / GB), (0, 4), textcoords="offset points", fontsize=9)
    contexts_axis(ax, contexts)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    sequences = "one sequence" if batch_size == 1 else f"{batch_size} sequences"
    ax.set_ylabel(f"cache of {sequences} in {dtype} [GB]")
    ax.set_title(title or f"{model.name}: what the cache holds")
    return closed(fig)


def per_token_bars(layers: dict[str, Layer], title: str = "Numbers cached per token and layer") -> Figure:
    """One bar per mechanism: the numbers that a layer caches for each token, written at the bar's end."""
    fig, ax = plt.subplots(figsize=(7.5, 0.6 + 0.42 * len(layers)))
    numbers = [layer.cached_numbers for layer in layers.values()]
    bars = ax.barh(list(layers), numbers, edgecolor="white", linewidth=0)
    for bar, look in zip(bars, looks_of(list(layers.values()))):
        bar.set(facecolor=look.colour, hatch=look.hatch)
    ax.bar_label(bars, [f"{n:,}" for n in numbers], padding=4)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1.12 * max(numbers))
    ax.set_xlabel("numbers per token and layer")
    ax.set_title(title)
    return closed(fig)


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
    return closed(fig)


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
    shown = versions(model, ranks)
    width = 0.8 / len(shown)
    looks = looks_of([version.layer for version in shown.values()])
    for i, ((label, version), (colour, _, _, hatch)) in enumerate(zip(shown.items(), looks)):
        x = np.arange(len(GPUS)) + (i - (len(shown) - 1) / 2) * width
        most = [version.largest_context(size * GB, batch_size, dtype, weight_dtype) for size in GPUS]
        shown = [min(context, 2**24) for context in most]  # an unbounded one is drawn as 16M and labelled
        ax.bar(x, shown, width, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
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
    return closed(fig)


def decode_cost(layers: dict[str, Layer], dtype: str = "bfloat16", title: str | None = None) -> Figure:
    """What one new token costs a layer, against the context: multiply-adds (App. A.4), and bytes of cache read."""
    contexts = [2**n for n in range(12, 20)]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    by_cost = {}  # layers of equal arithmetic, whose lines hide each other
    for (label, layer), (colour, marker, line, _) in zip(layers.items(), looks_of(list(layers.values()))):
        by_cost.setdefault(layer.decode_multiply_adds(contexts[0]), []).append(layer)
        kind = dict(marker=marker, linestyle=line, color=colour, markersize=5, label=label)
        left.plot(contexts, [layer.decode_multiply_adds(context) / 1e9 for context in contexts], **kind)
        model = Model("", layer, 1, 0, 0, "")
        right.plot(contexts, [model.cache_bytes(context, dtype=dtype) / GB for context in contexts], **kind)
    for ax, what, unit in ((left, "Arithmetic", "multiply-adds [10⁹]"), (right, "Memory traffic", "cache read [GB]")):
        contexts_axis(ax, contexts)
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
    return closed(fig)
