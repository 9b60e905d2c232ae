"""The explorer of notebook 09: what a model's cache weighs with MHA, as shipped and with TPA, under controls."""

import html
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from tpa_minimal.course.diagrams import versions
from tpa_minimal.course.looks import COLOURS, bytes_text, closed, tokens_text
from tpa_minimal.memory import GB, MODELS, Model, ratios


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
    for label, model in versions(MODELS[s.model], [(s.rank_q, s.rank_k, s.rank_v)]).items():
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
    return closed(fig)


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
