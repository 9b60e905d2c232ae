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
    fig, axes = plt.subplots(1, len(ranks), figsize=(min(2.8 * len(ranks), 8.6), 3.5), sharey=True, squeeze=False)
    label = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for ax, rank in zip(axes[0], ranks):
        ratio = G * d_h / (rank * (h + d_h))
        # Bands of half an octave: a smooth gradient would make the PNG ten times as large.
        ax.contourf(heads, widths, np.log2(ratio), levels=np.arange(-4, 7.1, 0.5), cmap="Blues", vmin=-2, vmax=10)
        ax.contourf(heads, widths, ratio, levels=[0, 1], colors="none", hatches=["xxx"])
        lines = ax.contour(heads, widths, ratio, levels=[2, 4, 8, 16, 32], colors="black", linewidths=0.8)
        places = []  # of the lines' labels: low, where no mark is, and not so near an edge that they would be cut
        for line in (line for level in lines.allsegs for line in level if len(line) > 30):
            inner = line[(line[:, 0] > 1.5 * heads[0]) & (line[:, 0] < 0.7 * heads[-1]) & (line[:, 1] < 200)]
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
    fig, ax = plt.subplots(figsize=(8.6, 3.8))
    shown = versions(model, ranks)
    width = 0.92 / len(shown)
    looks = looks_of([version.layer for version in shown.values()])
    for i, ((label, version), (colour, _, _, hatch)) in enumerate(zip(shown.items(), looks)):
        x = np.arange(len(GPUS)) + (i - (len(shown) - 1) / 2) * width
        most = [version.largest_context(size * GB, batch_size, dtype, weight_dtype) for size in GPUS]
        heights = [min(context, 2**24) for context in most]  # an unbounded one is drawn as 16M and labelled
        ax.bar(x, heights, width, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        for position, context in zip(x, most):
            ax.annotate(tokens_text(context), (position, max(context, 1024)), (0, 2), textcoords="offset points",
                        ha="center", fontsize=7.5)  # fmt: skip
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
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6))
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
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
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


# --------------------------------------------------------------------------- pictures of attention and of the model


def _in_a_row(ax, left: float, top: float, middle: float, parts, gap: float = 5.0) -> None:
    """Tensors (rows, R, width) or (rows, width), and the signs between them at the height `middle`, to the right."""
    for name, tensor, kind in parts:
        pieces = tensor[:, None] if tensor.ndim == 2 else tensor  # (rows, R, width)
        R, width = pieces.shape[1:]
        ink, start = of("tpa").colour if kind == "cached" else "black", left
        for r in range(R):
            cells(ax, left, top, pieces[:, r], kind)
            left += width + (r < R - 1)
        shape = " × ".join(map(str, tensor.shape))
        above = dict(ha="center", va="center", fontsize=8.5, color=ink, linespacing=1.1)
        ax.text((start + left) / 2, top - 1.9, f"{name.rstrip('·→×⊙ ')}\n{shape}", **above)
        if sign := name[len(name.rstrip("·→×⊙")) :]:
            ax.text(left + gap / 2, middle, sign, ha="center", va="center", fontsize=13)
        left += gap


def contraction(factors, step: int = 6) -> tuple[Figure, str]:
    """One query's attention from factors in six steps, those up to `step` drawn; returns the figure and its alt text.

    factors: a_q (R_Q, h), b_q (R_Q, d_h), a_k (M, R_K, h), b_k (M, R_K, d_h), a_v (M, R_V, h), b_v (M, R_V, d_h).
    Steps 1 to 3 lead to the scores, on the left in Algorithm 1's order and on the right in the module's; 4 is the
    softmax, 5 and 6 the values. A tensor of rank R is drawn as R matrices whose rows are the positions.
    """
    a_q, b_q, a_k, b_k, a_v, b_v = (np.asarray(factor, dtype=float) for factor in factors)
    rank_q, (M, rank_k, d_h), rank_v = len(a_q), b_k.shape, b_v.shape[1]
    P = np.einsum("qd,mrd->mrq", b_q, b_k)
    per_head = np.einsum("mrq,qh->mrh", P, a_q) / rank_q
    q = a_q.T @ b_q / rank_q
    p = np.einsum("hd,mrd->mrh", q, b_k)
    scores = (per_head * a_k).sum(1) / (rank_k * np.sqrt(d_h))  # (M, h)
    alpha = np.exp(scores - scores.max(0))
    alpha /= alpha.sum(0)
    weighed = alpha[:, None] * a_v / rank_v
    out = np.einsum("mrh,mrd->hd", weighed, b_v)
    wide, row = 96, M + 7.3
    fig, ax = canvas(wide, 3 + 4 * row, wide=8.5)

    orders = (
        (1, "Algorithm 1 of the paper: features first", (
            ("compare features: P has no head index", [("$b_q$ ·", b_q, "shown"), ("$b_k$ →", b_k, "cached"),
                                                       ("$P$", P, "shown")]),
            ("each head weighs P by its $a_q$", [("$P$ ×", P, "shown"), ("$a_q$ →", a_q, "shown"),
                                                 ("per head", per_head, "shown")]),
            ("… and by its $a_k$; sum over the rank", [("per head ⊙", per_head, "shown"), ("$a_k$ →", a_k, "cached"),
                                                       ("scores", scores, "shown")]),
        )),
        (wide / 2 + 2, "the module, factor_attention: queries first", (
            ("assemble the one query", [("$a_q$ ×", a_q, "shown"), ("$b_q$ →", b_q, "shown"), ("$q$", q, "shown")]),
            ("compare it with features, head by head", [("$q$ ·", q, "shown"), ("$b_k$ →", b_k, "cached"),
                                                        ("$p$", p, "shown")]),
            ("each head weighs by its $a_k$; sum over the rank", [("$p$ ⊙", p, "shown"), ("$a_k$ →", a_k, "cached"),
                                                                  ("scores", scores, "shown")]),
        )),
    )  # fmt: skip
    for left, title, rows in orders:
        ax.text(left, 1.6, title, va="center", fontsize=11, fontweight="bold")
        for n, (words, parts) in enumerate(rows[:step]):
            top = 4.5 + n * row
            ax.text(left, top, f"{n + 1}  {words}", va="center", fontsize=9.5)
            _in_a_row(ax, left + 1.5, top + 4.6, top + 4.6 + M / 2, parts)
    ax.plot([wide / 2] * 2, [0.6, 3 + 3 * row - 1], color="0.8", linewidth=1)
    ends = (
        (1, "softmax over the positions", [("scores →", scores, "shown"), ("α ⊙", alpha, "shown")]),
        (30, "each head weighs α by its $a_v$", [("$a_v$ →", a_v, "cached"), ("$w$ ·", weighed, "shown")]),
        (61, "sum the features with these weights", [("$b_v$ →", b_v, "cached"), ("output", out, "shown")]),
    )
    for n, (left, words, parts) in enumerate(ends[: max(0, step - 3)]):
        top = 4.5 + 3 * row
        ax.text(left, top, f"{n + 4}  {words}", va="center", fontsize=9.5)
        parts = [(name if n + 4 < step or name[-1] not in "⊙·" else name[:-2], *rest) for name, *rest in parts]
        _in_a_row(ax, left + 1.5, top + 4.6, top + 4.6 + M / 2, parts)
    done = ("b_q times b_k gives P", "a_q weighs P", "a_k weighs it, and the sum is the scores", "softmax gives α",
            "α times a_v", "times b_v is the output")  # fmt: skip
    alt = (
        f"Attention of one query to {M} positions from factors, drawn as small matrices with their shapes: "
        f"{'; '.join(done[:step])}. Beside it the module's order, which assembles the query first and compares it with "
        "b_k head by head: the scores are the same. Blue frames mark what is cached; K and V appear nowhere."
    )
    return closed(fig), alt


def causal_mask(cached: int, new: int) -> tuple[Figure, str]:
    """Which keys each new query sees when the mask is aligned top left, and bottom right; the figure and its alt text.

    cached: C, new: T; the T queries are the last of the M = C + T positions.
    """
    M = cached + new
    fig, ax = canvas(47, max(new, 4) + 8.5)
    keys, queries = np.arange(M), np.arange(new)
    should = keys <= cached + queries[:, None]  # (T, M)
    kinds = {
        "seen, cached": (of("tpa").colour, ""),
        "seen, new": ("#8FBCE0", ""),
        "ahead: not seen": ("#EEEEEE", ""),
        "behind, but missed": ("#C24A00", "////"),
    }
    panels = ((5.5, "top left: is_causal=True", keys <= queries[:, None]), (29, "bottom right: right", should))
    for left, title, seen in panels:
        ax.text(left, 1, title, va="center", fontsize=11, fontweight="bold")
        for place, width, words in ((0, cached, f"C = {cached} cached"), (cached, new, f"T = {new} new")):
            if width:
                ax.plot([left + place + 0.15, left + place + width - 0.15], [3.6, 3.6], color="black", linewidth=1.2)
                ax.text(left + place + width / 2, 2.7, words if width > 3 else words[:5], ha="center", va="center",
                        fontsize=9)  # fmt: skip
        for i in queries:
            ax.text(left - 0.4, 4.5 + i, f"query {cached + i}", ha="right", va="center", fontsize=8.5)
            for j in keys:
                kind = ("seen, cached" if j < cached else "seen, new") if seen[i, j] else "ahead: not seen"
                kind = "behind, but missed" if should[i, j] and not seen[i, j] else kind
                colour, hatch = kinds[kind]
                look = dict(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=1, label=kind)
                ax.add_patch(Rectangle((left + j, 4 + i), 1, 1, **look))
    bottom = max(new, 4) + 7
    for n, (kind, (colour, hatch)) in enumerate(kinds.items()):
        ax.add_patch(Rectangle((2 + 11.2 * n, bottom - 0.5), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white"))
        ax.text(3.5 + 11.2 * n, bottom, kind, va="center", fontsize=9)
    missed = int((should & ~panels[0][2]).sum())
    ax.text(5.5, bottom - 1.7, f"{missed} of {should.sum()} pairs are missed", va="center", fontsize=10)
    ax.text(29, bottom - 1.7, f"all {should.sum()} pairs are seen", va="center", fontsize=10)
    alt = (
        f"Two grids of {new} new queries by {M} keys, {cached} of them cached. With the mask aligned at the top left "
        f"{missed} of the {should.sum()} pairs that should be seen are missed; aligned at the bottom right, none."
    )
    return closed(fig), alt


def online_softmax(scores, values, block: int, steps) -> tuple[Figure, str]:
    """Softmax block by block: a panel for each of `steps` (from 1), the figure and its alt text.

    scores, values: (M,). Above, the scores seen so far and their maximum m; below, the terms exp(score - m) of the sum
    s, with a dotted outline where a larger m has just shrunk a term.
    """
    scores, values, steps = np.asarray(scores, dtype=float), np.asarray(values, dtype=float), list(steps)
    wide = 7.8 if len(steps) > 1 else 6.5
    fig, axes = plt.subplots(2, len(steps), figsize=(wide, 3.9), sharey="row", squeeze=False, height_ratios=(2, 3))
    said = []
    for (upper, lower), step in zip(axes.T, steps):
        seen, before = min(step * block, len(scores)), (step - 1) * block
        m, old = scores[:seen].max(), scores[:before].max() if before else -np.inf
        terms, shrink = np.exp(scores[:seen] - m), np.exp(old - m)
        new = np.arange(seen) >= before
        colours = np.where(new, COLOURS[1], of("tpa").colour)
        upper.vlines(np.arange(seen), scores.min() - 0.4, scores[:seen], color=colours, linewidth=3)
        upper.axhline(m, color="black", linewidth=1.2, linestyle="--")
        upper.text(len(scores) - 0.5, m + 0.12, f"m = {m:.1f}", ha="right", va="bottom", fontsize=9.5)
        lower.bar(np.arange(seen), terms, 0.75, color=colours, hatch=["//" if n else "" for n in new],
                  edgecolor="white", linewidth=0)  # fmt: skip
        if before and shrink < 1:
            lower.bar(np.arange(before), np.exp(scores[:before] - old), 0.75, color="none", edgecolor="0.35",
                      linestyle=":", linewidth=1.2)  # fmt: skip
        s, average = terms.sum(), terms @ values[:seen] / terms.sum()
        words = f"block {step}" + (f": past × {shrink:.2f}" if before else "")
        upper.set_title(words, fontsize=10)
        lower.set_xlabel(f"s = {s:.2f},  y/s = {average:+.3f}", fontsize=9.5)
        for ax in (upper, lower):
            ax.set(xlim=(-0.6, len(scores) - 0.4), xticks=())
            ax.grid(visible=False)
        upper.set_ylim(scores.min() - 0.4, scores.max() + 0.9)
        lower.set_ylim(0, 1.12)
        said.append(f"{words}, s = {s:.2f}, average {average:.3f}")
    axes[0, 0].set_ylabel("scores")
    axes[1, 0].set_ylabel("exp(score − m)")
    alt = (
        f"Bars of exp(score minus m) of the positions seen, new ones in orange; where a larger maximum m arrives the "
        f"earlier bars shrink by one common factor, from their dotted outlines. {'; '.join(said)}."
    )
    return closed(fig), alt


PALE = "#CFE2F3"  # TPA's blue, for areas with words on them


class _Flow:
    """Boxes, arrows and words of a flow chart."""

    def __init__(self, ax):
        self.ax = ax

    def box(self, x, y, width, words, colour="#EDEDED", edge="black", height=5.0, ink="black"):
        look = dict(facecolor=colour, edgecolor=edge, linewidth=1.1)
        self.ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, zorder=3, **look))
        self.ax.text(x, y, words, ha="center", va="center", fontsize=8.7, color=ink, zorder=4, linespacing=1.25)

    def arrow(self, *points):
        self.ax.plot(*zip(*points[:-1]), color="black", linewidth=1.2, zorder=1)
        look = dict(arrowstyle="-|>", linewidth=1.2, shrinkA=0, shrinkB=0)
        self.ax.annotate("", points[-1], points[-2], arrowprops=look, zorder=1)

    def meet(self, x, y, sign):
        self.ax.add_patch(Circle((x, y), 1.6, facecolor="white", edgecolor="black", linewidth=1.2, zorder=3))
        self.ax.text(x, y, sign, ha="center", va="center", fontsize=11, zorder=4)

    def say(self, x, y, words):
        self.ax.text(x, y, words, va="center", fontsize=8.5, color="#444444", zorder=5)


def _t6_stack(flow: _Flow, c, T: int) -> None:
    """T6 from tokens to logits, on the left of its map."""
    ax = flow.ax
    ax.text(3, 3, "T6", fontsize=13, fontweight="bold", va="center")
    x, stream = 13, f"{T} × {c.d_model}"
    parts = (("embedding", "#EDEDED", f"tokens: {T}"), ("block 1", PALE, stream), ("block 2", PALE, stream),
             ("⋮", "white", stream), (f"block {c.n_layer}", PALE, stream), ("norm", "#EDEDED", stream),
             ("embeddingᵀ", "#EDEDED", stream), ("", "white", f"logits: {T} × {c.vocab_size:,}"))  # fmt: skip
    for n, (words, colour, comes) in enumerate(parts):
        y = 13 + 11.2 * n
        flow.arrow((x, y - 8.7), (x, y - 2.5))
        flow.say(x + 1, y - 5.8, comes)
        if words:
            flow.box(x, y, 19, words, colour, colour if words == "⋮" else "black")


def _t6_block(flow: _Flow, c, C: int, T: int, numbers: int) -> None:
    """One of T6's blocks, which caches `numbers` for each token, on the right of its map."""
    ax, M, stream, blue, pale = flow.ax, C + T, f"{T} × {c.d_model}", of("tpa").colour, PALE
    ax.add_patch(Rectangle((29, 6), 70, 84, facecolor="#F4F8FC", edgecolor="#7FA6C9", linewidth=1, zorder=0))
    for start, end in ((21.7, 6), (26.7, 90)):
        ax.plot([22.5, 29], [start, end], color="#7FA6C9", linewidth=1, linestyle=":")
    ax.text(29, 3, "one block: LLaMA's, with TPA inside", fontsize=13, fontweight="bold", va="center")
    s = 34  # the residual stream
    for start, end in ((7, 56.4), (59.6, 82.4), (85.6, 89.6)):
        flow.arrow((s, start), (s, end))
    ax.text(s - 1.7, 34, f"residual stream, {stream}", rotation=90, ha="center", va="center", fontsize=8.5)
    for y in (58, 84):
        flow.meet(s, y, "+")
    flow.arrow((s, 9.8), (40, 9.8))
    flow.box(44.5, 9.8, 9, "norm")
    flow.arrow((49, 9.8), (56, 9.8))
    flow.box(66, 9.8, 20, "factor_proj, then RoPE")
    names = ("a_q", "b_q", "a_k", "b_k", "a_v", "b_v")
    sizes = zip((c.rank_q,) * 2 + (c.rank_k,) * 2 + (c.rank_v,) * 2, (c.n_head, c.d_head) * 3)
    places = [41.5 + 10.3 * n for n in range(6)]
    for name, (rank, width), place in zip(names, sizes, places):
        kept = name[-1] != "q"
        flow.arrow((66, 12.3), (66, 14.2), (place, 14.2), (place, 16.4))
        flow.arrow((place, 21.8), (place, 25.5 if kept else 35.2))
        flow.box(place, 19.1, 9.5, f"${name}$\n{T} × {rank} × {width}", pale if kept else "white",
                 blue if kept else "black", height=5.4)  # fmt: skip
    middle = sum(places[2:]) / 4
    flow.box(middle, 28.5, 40.4, f"factor cache: C + T = {C} + {T} = {M} tokens\n{numbers} numbers a token in this "
             "block", blue, blue, height=6, ink="white")  # fmt: skip
    flow.arrow((middle, 31.5), (middle, 35.2))
    flow.box(67.2, 38.2, 61, "attention, in factor space when few tokens are new\n"
        f"weights α: h × T × M = {c.n_head} × {T} × {M}", height=6)  # fmt: skip
    flow.arrow((67.2, 41.2), (67.2, 46.5))
    flow.say(68.2, 43.8, f"T × h × d_h = {T} × {c.n_head} × {c.d_head}")
    flow.box(67.2, 49, 40, f"heads side by side, {T} × {c.n_head * c.d_head:,}; out_proj")
    flow.arrow((67.2, 51.5), (67.2, 58), (s + 1.6, 58))
    flow.say(46, 56.6, stream)
    flow.arrow((s, 65), (40, 65))
    flow.box(44.5, 65, 9, "norm")
    for y, words in ((65, "gate_proj, then silu"), (72, "up_proj")):
        flow.arrow((49, 65), (52, 65), (52, y), (55, y))
        flow.box(65, y, 20, words)
    flow.arrow((75, 65), (80, 65), (80, 66.9))
    flow.arrow((75, 72), (80, 72), (80, 70.1))
    flow.meet(80, 68.5, "⊙")
    flow.arrow((81.6, 68.5), (91, 68.5), (91, 75.5))
    flow.say(82.3, 67, f"{T} × {c.d_ff:,}")
    flow.box(87, 78, 18, "down_proj")
    flow.arrow((87, 80.5), (87, 84), (s + 1.6, 84))
    flow.say(46, 82.6, stream)


def t6_map(config, cached: int, new: int) -> tuple[Figure, str]:
    """The whole T6, and one of its blocks with TPA inside, with the shapes of a call; the figure and its alt text.

    config: a T6Config. cached: C, new: T; M = C + T. Blue is what the cache keeps.
    """
    c, C, T, M = config, cached, new, cached + new
    fig, ax = canvas(100, 92, wide=8.5)
    flow = _Flow(ax)
    _t6_stack(flow, c, T)
    numbers = (c.rank_k + c.rank_v) * (c.n_head + c.d_head)
    _t6_block(flow, c, C, T, numbers)
    alt = (
        f"Left, T6: {T} new tokens, the embedding, {c.n_layer} blocks, a norm and the embedding again, to logits of "
        f"{c.vocab_size:,} words. Right, one block: a norm, one projection to six factors with their shapes, four of "
        f"which go into the cache, {numbers} numbers for each token; attention over {M} tokens, the output projection, "
        "and a sum; then a norm, SwiGLU and another sum."
    )
    return closed(fig), alt


def head_factors(pictures) -> tuple[Figure, str]:
    """Head factors Aᵀ/R side by side, a row for each head and a column for each rank; the figure and its alt text.

    pictures: a name, a matrix (h, R) and how `cells` draws it ("cached" where each token brings its own) of each.
    """
    pictures = [(name, np.asarray(matrix, dtype=float), kind) for name, matrix, kind in pictures]
    h, gap, top = len(pictures[0][1]), 1.7, 2.1
    wide = 1.2 + sum(matrix.shape[1] + gap for _, matrix, _ in pictures)
    fig, ax = canvas(wide, top + h + 0.9)
    left = 1.6
    for i in range(h):
        ax.text(left - 0.25, top + i + 0.5, f"head {i}", ha="right", va="center", fontsize=8)
    for name, matrix, kind in pictures:
        cells(ax, left, top, matrix, kind, scale=1.6)
        for (i, r), value in np.ndenumerate(matrix):
            text = f"{value:.0f}" if value in (0, 1) else f"{value:.1f}".replace("-0.0", "0.0")
            ink = "white" if abs(value) > 1.1 else "black"
            ax.text(left + r + 0.5, top + i + 0.5, text, ha="center", va="center", fontsize=8.5, color=ink)
        ink = of("tpa").colour if kind == "cached" else "black"
        ax.text(left + matrix.shape[1] / 2, top - 0.95, name, ha="center", va="center", fontsize=9, color=ink)
        left += matrix.shape[1] + gap
    constants = [name.replace("\n", " ") for name, _, kind in pictures if kind != "cached"]
    contextual = [name.replace("\n", " ") for name, _, kind in pictures if kind == "cached"]
    alt = (
        f"Head factors of {h} heads as small matrices. The same for every token: {'; '.join(constants)}. Another "
        f"matrix for every token, framed in blue because it is cached: {'; '.join(contextual)}."
    )
    return closed(fig), alt
