"""Figures of the course: memory and cost, drawn from `memory.py`, and factors and keys, drawn from a run's values.

Nothing here measures. Each function returns figures that pyplot no longer holds: a notebook shows one by `looks.show`,
and `figure.savefig("name.png")` writes it.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter

from tpa_minimal.course.looks import COLOURS, GPUS, RANKS, closed, looks_of, of, png_of, quantized, tokens_text
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


# ------------------------------------------------------------------------------- pictures of factors and their keys
# All are drawn from the values of a run. What a cache holds is coloured and framed, blue above zero and orange below;
# what a layer never has to build is grey and hatched; what is merely shown is coloured without a frame.


def cells(ax, left: float, top: float, values, kind: str, scale=None, size=None, dark: bool = False) -> None:
    """Draw a matrix with its upper left corner at (left, top) of an axis whose y points down.

    kind: "cached", "shown" or "never built". scale: the value that gets the full colour, by default the largest.
    size: width and height, by default one unit for each entry.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float))
    rows, columns = values.shape
    width, height = size or (columns, rows)
    middle, ink = ("#161B22", "#9DA7B3") if dark else ("#FFFFFF", "#444444")
    ends = ("#E8833A", middle, "#3F9BDD") if dark else ("#C24A00", middle, "#0062A0")
    greys = ("#161B22", "#4A525B", "#B4BDC7") if dark else ("#6E6E6E", "#D4D4D4", "#FFFFFF")
    colours = LinearSegmentedColormap.from_list("", greys if kind == "never built" else ends)
    most = scale or np.abs(values).max() or 1
    ax.imshow(values, cmap=colours, vmin=-most, vmax=most, extent=(left, left + width, top + height, top))
    lines = dict(color=middle, linewidth=0.5)
    ax.vlines(left + width / columns * np.arange(1, columns), top, top + height, **lines)
    ax.hlines(top + height / rows * np.arange(1, rows), left, left + width, **lines)
    frame = dict(edgecolor=ends[2], linewidth=1.6) if kind == "cached" else dict(edgecolor=ink, linewidth=0.8)
    hatch = dict(hatch="///", hatch_linewidth=0.4) if kind == "never built" else {}
    ax.add_patch(Rectangle((left, top), width, height, facecolor="none", label=kind, **frame, **hatch))


def canvas(width: float, height: float, wide: float = 8.0, dark: bool = False):
    """A figure of one empty axis, `width` × `height` units with y pointing down, `wide` inches across."""
    paper = "#0D1117" if dark else "white"  # GitHub's two backgrounds
    fig = plt.figure(figsize=(wide, wide * height / width), facecolor=paper, layout="none")
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig, ax


def hero(a, b, dark: bool = False) -> Figure:
    """One token's keys as the mean of R outer products: factors, cached, in colour; products and keys, never built.

    a: (R, h), b: (R, d_h), the key factors of one token. dark: for a dark page.
    """
    a, b = (np.asarray(factor, dtype=float) for factor in (a, b))
    (R, h), d_h = a.shape, b.shape[1]
    unit = h / 8  # of all that is no matrix
    block, between = 1.5 * unit + d_h, 2.8 * unit  # a at the left margin of a product, b above it
    first = 0.3 * unit + d_h + 6.8 * unit  # where the first product begins
    top, low = 4.4 * unit, 4.4 * unit + h
    fig, ax = canvas(first + R * (block + between) - 0.6 * unit, low + 6 * unit, dark=dark)
    style = dict(color="#E6EDF3" if dark else "black", va="center", ha="center")
    colour, grey = ("#58A6FF", "#9DA7B3") if dark else (of("tpa").colour, "#555555")
    products = [np.outer(a[r], b[r]) for r in range(R)]
    scale = max(np.abs(product).max() for product in products)
    left = 0.3 * unit
    cells(ax, left, top, sum(products) / R, kind="never built", dark=dark)
    ax.text(left + d_h / 2, top - 2.6 * unit, "$K_t$", fontsize=18, **style)
    ax.text(left + d_h / 2, top - 0.9 * unit, f"{h} heads × {d_h} features", fontsize=10, **style)
    ax.text(left + d_h + 3.2 * unit, top + h / 2, rf"$=\;\frac{{1}}{{{R}}}\;($", fontsize=22, **style)
    for r in range(R):
        left, right = first + r * (block + between), first + r * (block + between) + block
        cells(ax, left, top, a[r][:, None], kind="cached", size=(unit, h), dark=dark)
        cells(ax, right - d_h, top - 1.5 * unit, b[r][None], kind="cached", size=(d_h, unit), dark=dark)
        cells(ax, right - d_h, top, products[r], kind="never built", scale=scale, dark=dark)
        ax.text(left + 0.5 * unit, low + unit, f"$a_{r + 1}$", fontsize=16, **{**style, "color": colour})
        ax.text(right - d_h / 2, top - 2.8 * unit, f"$b_{r + 1}$", fontsize=16, **{**style, "color": colour})
        ax.text(right + between / 2 - 0.2 * unit, top + h / 2, "+" if r < R - 1 else ")", fontsize=22, **style)
    lines = (
        (0.3 * unit, grey, "never built (hatched):", f"{h} × {d_h} = {h * d_h} numbers"),
        (first, colour, "cached (in colour): which heads, $a$, and which features, $b$",
         f"{R} × ({h} + {d_h}) = {R * (h + d_h)} numbers"),
    )  # fmt: skip
    for left, ink, what, count in lines:
        ax.text(left, low + 3 * unit, what, va="center", color=ink, fontsize=11)
        ax.text(left, low + 4.8 * unit, count, va="center", color=ink, fontsize=13, fontweight="bold")
    return closed(fig)


def write_hero(a, b, folder: Path) -> None:
    """Write the front page's pictures, hero-light.png and hero-dark.png, at twice the resolution of a notebook's."""
    for dark, name in ((False, "hero-light.png"), (True, "hero-dark.png")):
        (folder / name).write_bytes(png_of([quantized(hero(a, b, dark), dpi=180)]))


def best_fit(matrix, rank: int) -> tuple[Figure, str]:
    """One token's keys (h, d_h), their best fit of a rank, and its outer products with the vectors at the margins.

    Returns the figure and its alt text. The sizes s_r go half into each vector.
    """
    matrix = np.asarray(matrix, dtype=float)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    fit = (u[:, :rank] * s[:rank]) @ vh[:rank]
    (h, d_h), error = matrix.shape, np.sqrt(max(0, (s[rank:] ** 2).sum() / (s**2).sum()))
    across = 4  # products in a row; room is kept for all ranks, so that nothing jumps
    block, top = d_h + 4, h + 5
    fig, ax = canvas(across * block, top + -(-len(s) // across) * (h + 5) - 0.5)
    scale = np.abs(matrix).max()
    numbers = rank * (h + d_h)
    shown = (("the token's keys", matrix, 0), (f"best fit of rank {rank}", fit, 1), ("what it misses", matrix - fit, 2))
    for name, values, place in shown:
        cells(ax, place * block + 2.5, 2, values, kind="shown", scale=scale)
        ax.text(place * block + 2.5, 1, name, va="center", fontsize=10.5)
    said = f"error {100 * error:.0f} %\n\n{rank} × ({h} + {d_h}) = {numbers}\nin place of {h * d_h}\nnumbers"
    ax.text(3 * block + 2.5, 2 + h / 2, said, va="center", fontsize=10.5)
    for r in range(len(s)):
        left, low = r % across * block + 2.5, top + r // across * (h + 5) + 2
        if r >= rank:  # left out: a ghost
            ax.add_patch(Rectangle((left, low), d_h, h, facecolor="none", edgecolor="0.75", linestyle=":"))
            continue
        a, b = u[:, r] * np.sqrt(s[r]), vh[r] * np.sqrt(s[r])
        largest = np.sqrt(s[0])  # one scale for all vectors, so that the later ones are seen to be paler
        cells(ax, left - 1.5, low, a[:, None], kind="cached", scale=0.7 * largest)
        cells(ax, left, low - 1.5, b[None], kind="cached", scale=0.7 * largest)
        cells(ax, left, low, np.outer(a, b), kind="never built", scale=scale)
    alt = (
        f"A token's keys, {h} heads by {d_h} features, beside their best fit of rank {rank} and what the fit misses, "
        f"{100 * error:.0f} percent. Below, the {rank} outer products that make up the fit, each with its two vectors "
        f"in colour at the margins: {numbers} numbers in place of {h * d_h}."
    )
    return closed(fig), alt


def cube(keys, rank: int) -> Figure:
    """The keys of a sequence, (T, h, d_h), as a cube with three cuts, and the singular values of one slice of each.

    The slice of one token has at most `rank` of them above zero; that of one head, or of one feature, has more.
    """
    keys = np.asarray(keys, dtype=float)
    T, h, d_h = keys.shape
    slices = (
        ("one token: $h × d_h$", keys[-1], COLOURS[0], f"rank ≤ R = {rank}"),
        ("one head, all tokens: $T × d_h$", keys[:, 0], COLOURS[1], f"up to {min(T, d_h)}"),
        ("one feature, all tokens: $T × h$", keys[:, :, -1], COLOURS[2], f"up to {min(T, h)}"),
    )
    fig = plt.figure(figsize=(8, 3.7), layout="none")
    ax = fig.add_axes((0.0, 0.0, 0.44, 0.9))
    deep = np.arange(T + 1)[:, None] * np.array([0.42, -0.28])  # where the edge of each token's slice lies
    faces = LinearSegmentedColormap.from_list("", ("#6E6E6E", "#E4E4E4", "#FFFFFF"))
    rows, columns = np.arange(h + 1), np.arange(d_h + 1)
    front = np.meshgrid(columns, rows)
    upper = columns[None] + deep[:, :1], np.broadcast_to(deep[:, 1:], (T + 1, d_h + 1))
    side = d_h + np.broadcast_to(deep[:, :1], (T + 1, h + 1)), rows[None] + deep[:, 1:]
    # The token that is written last stands in front, so the depth counts backwards.
    values, most = (keys[-1], keys[::-1, 0], keys[::-1, :, -1]), 3 * keys.std()
    for (x, y), face, (_, _, colour, _) in zip((front, upper, side), values, slices):
        ax.pcolormesh(x, y, face, cmap=faces, edgecolors="white", linewidth=0.3, vmin=-most, vmax=most)
        edge = [(x[0, 0], y[0, 0]), (x[0, -1], y[0, -1]), (x[-1, -1], y[-1, -1]), (x[-1, 0], y[-1, 0])]
        ax.add_patch(Polygon(edge, facecolor="none", edgecolor=colour, linewidth=2.5, zorder=3))
    ax.text(d_h / 2, h + 1.1, f"{d_h} features", ha="center", va="center")
    ax.text(-1, h / 2, f"{h} heads", ha="center", va="center", rotation=90)
    ax.text(deep[T // 2, 0] - 0.7, deep[T // 2, 1] - 0.7, f"{T} tokens", ha="right", va="center")
    ax.set(aspect="equal", xlim=(-2, d_h + deep[-1, 0] + 0.5), ylim=(h + 2, deep[-1, 1] - 0.5))
    ax.axis("off")
    for n, (name, values, colour, bound) in enumerate(slices):
        small = fig.add_axes((0.5, 0.7 - 0.27 * n, 0.48, 0.14))
        sizes = np.linalg.svd(values, compute_uv=False)
        small.bar(range(1, len(sizes) + 1), sizes / sizes[0], color=colour, width=0.7)
        found = int((sizes > 1e-5 * sizes[0]).sum())
        small.set_title(f"{name}: rank {found} ({bound})", fontsize=10, color=colour, fontweight="bold")
        small.set(xlim=(0.4, d_h + 0.6), ylim=(0, 1.05), yticks=(), xticks=range(1, d_h + 1))
        small.tick_params(labelsize=7.5)
        small.grid(visible=False)
    small.set_xlabel("singular values, each divided by the largest", fontsize=9)
    fig.suptitle(
        "Only the slice of one token has a rank bounded by R: the next token brings its own $a$ and $b$",
        x=0.02,
        ha="left",
        fontsize=12,
    )
    return closed(fig)


def rope_planes(q, k, t: int, distance: int, base: float = 10000.0) -> tuple[Figure, str]:
    """A query at position t and a key `distance` before it, each of their d_h/2 planes as a dial; and the dot product.

    q, k: (d_h,), not rotated. The faint arrows are where both stood at position 0. Returns the figure and its alt text.
    """
    q, k = (np.asarray(vector, dtype=float) for vector in (q, k))
    half = len(q) // 2
    speed = base ** (-np.arange(half) / half)  # θ_j
    s = t - distance
    # The plane of features j and j + d_h/2 as complex numbers: a row times T_t is turned clockwise.
    planes_q, planes_k = q[:half] + 1j * q[half:], k[:half] + 1j * k[half:]
    turned_q, turned_k = planes_q * np.exp(-1j * t * speed), planes_k * np.exp(-1j * s * speed)
    parts = (turned_q * turned_k.conj()).real
    fig, ax = canvas(2.6 * half, 3.9)
    for j in range(half):
        x, y = 1.3 + 2.6 * j, 1.75
        ax.add_patch(Circle((x, y), 1, facecolor="0.96", edgecolor="0.6", linewidth=0.8))
        longest = max(abs(planes_q[j]), abs(planes_k[j]))
        arrows = (
            (planes_q, "0.8", "-"),
            (planes_k, "0.8", "--"),
            (turned_q, "black", "-"),
            (turned_k, COLOURS[1], "--"),
        )
        for planes, colour, line in arrows:
            end = planes[j] / longest
            arrow = dict(arrowstyle="-|>", color=colour, linestyle=line, linewidth=2, shrinkA=0, shrinkB=0)
            ax.annotate("", (x + end.real, y - end.imag), (x, y), arrowprops=arrow)
        ax.text(x, 0.35, f"plane {j}: {np.degrees(speed[j]):.3g}° a token", ha="center", fontsize=10)
        ax.text(x, 3.1, f"{parts[j]:+.3f}", ha="center", va="center", fontsize=11)
    words = f"query (black) at t = {t}, key (orange, dashed) at s = {s}:  dot product"
    ax.text(0.3, 3.62, f"{words} = sum of the planes = {parts.sum():.3f}", va="center", fontsize=11)
    alt = (
        f"{half} dials, one for each plane of RoPE, the first turning fastest. In each an arrow for the query at "
        f"position {t} and one for the key at position {s}. The dot product, the sum over the planes, is "
        f"{parts.sum():.3f}; it depends on the distance {distance} alone."
    )
    return closed(fig), alt


def two_orders(matrices, names, kinds, above, below) -> Figure:
    """A product of three matrices in its two orders: the first pair's product above, the second pair's below.

    names: of the three matrices and of the result. kinds: how `cells` draws these four. above, below: kind of the
    pair's product and what is said about it, such as ("never built", "assembled first").
    """
    first, second, third = (np.atleast_2d(np.asarray(matrix, dtype=float)) for matrix in matrices)
    pairs = first @ second, second @ third
    row = first, second, third, first @ second @ third
    gap = 4
    lefts = np.cumsum([1.5, *(matrix.shape[1] + gap for matrix in row)])
    high = len(pairs[0]) + 3.5  # of the upper bracket; the tallest matrix of the row may stand beside what is above it
    middle = high + max(max(len(first), len(second)) / 2 + 2, max(map(len, row)) / 2 + 5 - len(pairs[0]))
    low = middle + max(map(len, row)) / 2
    fig, ax = canvas(max(lefts[-1] - gap + 1.5, 40), low + len(pairs[1]) + 4.5)
    for matrix, left, name, kind, sign in zip(row, lefts, names, kinds, ("×", "×", "=", "")):
        height, width = matrix.shape
        cells(ax, left, middle - height / 2, matrix, kind)
        ax.text(left + width / 2, middle - height / 2 - 0.9, name, ha="center", va="center", fontsize=10.5)
        ax.text(left + width + gap / 2, middle, sign, ha="center", va="center", fontsize=15)
    brackets = ((0, pairs[0], above, high, -1, 2), (1, pairs[1], below, low + 1, 1, low + 3))
    for n, product, (kind, words), y, way, top in brackets:
        left, right = lefts[n], lefts[n + 2] - gap
        ax.plot([left, left, right, right], [y, y + 0.7 * way, y + 0.7 * way, y], color="0.3", linewidth=1)
        place = (left + right - product.shape[1]) / 2
        cells(ax, place, top, product, kind)
        ink = COLOURS[0] if kind == "cached" else "black"
        ax.text(place + product.shape[1] + 1.5, top + len(product) / 2, words, va="center", fontsize=10.5, color=ink)
    return closed(fig)


def filling_caches(lengths, cached: dict[str, list[int]], texts: list[str]) -> Iterator[Figure]:
    """The frames of caches that fill while a model writes: for each length the text so far, and one bar per cache.

    cached: bytes at each length, by mechanism ("mha", "tpa"). texts: what stands there at each length.
    """
    most = max(max(held) for held in cached.values())
    for n, (length, text) in enumerate(zip(lengths, texts)):
        fig = plt.figure(figsize=(7.5, 3.0), layout="none")
        written = fig.add_axes((0.02, 0.6, 0.96, 0.38))
        written.axis("off")
        tail = textwrap.wrap(text, 88)[-3:]
        written.text(0, 0.95, f"{length} tokens written and remembered", va="top", fontsize=11, fontweight="bold")
        written.text(0, 0.68, "\n".join(tail) + " ▌", va="top", fontsize=9.5, family="monospace", parse_math=False)
        ax = fig.add_axes((0.1, 0.17, 0.86, 0.38))
        for row, (mechanism, held) in enumerate(cached.items()):
            ax.barh(row, held[n] / 1e3, 0.62, **of(mechanism).bar_style())
            ax.text(held[n] / 1e3 + most / 8e4, row, f"{held[n]:,} bytes", va="center", fontsize=11)
        ax.set(xlim=(0, 1.24 * most / 1e3), ylim=(len(cached) - 0.5, -0.5), xlabel="cache [kB]")
        ax.set_yticks(range(len(cached)), [name.upper() for name in cached])
        ax.grid(axis="y", visible=False)
        yield closed(fig)
