"""The explorer of notebook 09: the memory that a model needs with MHA, as shipped and with TPA, under controls.

explorer.show(Settings(model="Llama 3 8B", memory_gb=24))        the answer at one setting, kept by a saved notebook
explorer.explore(Settings(model="Llama 3 8B", memory_gb=24))     controls, and the answer live below them
"""

import html
from dataclasses import dataclass

import numpy as np
from IPython.display import display
from PIL import Image

from tpa_minimal.course import looks
from tpa_minimal.course.diagrams import versions
from tpa_minimal.course.looks import bytes_text, tokens_text
from tpa_minimal.memory import GB, MODELS, Model

BAR = (760, 22)  # width and height in pixels


@dataclass(frozen=True)
class Settings:
    """What the explorer's controls say; memory_gb is that of each GPU, in 10^9 bytes, and heads are split over gpus."""

    model: str = "Llama 3 70B"
    context: int = 131_072
    batch_size: int = 1
    memory_gb: int = 80
    gpus: int = 1
    rank_q: int = 16
    rank_k: int = 1
    rank_v: int = 1
    dtype: str = "bfloat16"
    weight_dtype: str = "int8"


@dataclass(frozen=True)
class Account:
    """One bar of the explorer: a version of the model, as far as one GPU has it, and what that needs in bytes."""

    label: str
    model: Model
    weights: float
    cache: float
    largest_context: float

    @property
    def total(self) -> float:
        """Weights and cache together."""
        return self.weights + self.cache


def accounts(settings: Settings) -> list[Account]:
    """MHA with the model's own heads, the model as shipped (if that is something else), and its TPA version, last.

    Raises ValueError where the heads cannot be split over that many GPUs.
    """
    s = settings
    found = []
    for label, model in versions(MODELS[s.model], [(s.rank_q, s.rank_k, s.rank_v)]).items():
        model = model.split(s.gpus)
        most = model.largest_context(s.memory_gb * GB, s.batch_size, s.dtype, s.weight_dtype)
        cache = model.cache_bytes(s.context, s.batch_size, s.dtype)
        found.append(Account(label, model, model.weight_bytes(s.weight_dtype), cache, most))
    return found


def on_each(settings: Settings) -> str:
    """The words that say that bytes and numbers are those of one GPU among several."""
    return f" on each of {settings.gpus} GPUs" if settings.gpus > 1 else ""


def headline(settings: Settings) -> tuple[str, str]:
    """The number that matters, and the sentence that says what it is and against which baseline."""
    *_, shipped, tpa = accounts(settings)
    ratio = tpa.model.layer.cached_numbers / shipped.model.layer.cached_numbers
    baseline = f"the model as shipped ({MODELS[settings.model].layer.describe()})"
    sizes = f"{bytes_text(tpa.cache)} instead of {bytes_text(shipped.cache)}{on_each(settings)}"
    if 0.9 < ratio < 1.1:  # "1.0 times less" would say nothing
        return f"{ratio:.2f} times", f"the cache of {baseline}: {sizes}"
    return f"{max(ratio, 1 / ratio):.1f} times", f"{'less' if ratio < 1 else 'more'} cache than {baseline}: {sizes}"


def warnings(settings: Settings) -> list[str]:
    """What speaks against TPA at these settings, and what limits the figures, in plain sentences."""
    *_, shipped, tpa = accounts(settings)
    model, said = MODELS[settings.model], []
    layer, numbers, ranks = tpa.model.layer, shipped.model.layer.cached_numbers, settings.rank_k + settings.rank_v
    if numbers <= layer.cached_numbers:
        more = "as much as" if numbers == layer.cached_numbers else "more than"
        rule = f"at R_K + R_V = {ranks} TPA caches {layer.cached_numbers:,} numbers per token and layer"
        limit = numbers / (layer.n_head + layer.d_head)
        said.append(
            f"Not worth it: {rule}{on_each(settings)}, {more} the {numbers:,} of {model.layer.describe()}. "
            f"Break-even is at R_K + R_V = {limit:.1f}."
        )
    if settings.gpus > 1:
        said.append("All heads read TPA's feature factors and MLA's latent, so each GPU keeps the whole of these.")
    share = shipped.cache / shipped.total
    if share < 0.1:
        said.append(f"The shipped model's cache is only {share:.1%} of its memory here: the weights are what counts.")
    if settings.context > model.max_len:
        said.append(f"{model.name} was made for {model.max_len:,} tokens at most.")
    if model.note:
        said.append(f"{model.name}: {model.note}.")
    return said


def details(settings: Settings) -> str:
    """Weights added or saved by the TPA version, and its attention arithmetic against the shipped layer's."""
    *_, shipped, tpa = accounts(settings)
    model = MODELS[settings.model]
    added = model.with_tpa(settings.rank_q, settings.rank_k, settings.rank_v).parameters - model.parameters
    work = tpa.model.layer.decode_multiply_adds(1) / shipped.model.layer.decode_multiply_adds(1)
    comparison = "more" if added > 0 else "fewer"
    return (
        f"The TPA version has {abs(added) / 1e9:.2f} billion weights {comparison}, takes {work:.2f} times the "
        f"attention arithmetic per cached token{on_each(settings)}, and would have to be trained."
    )


def verdict(account: Account, settings: Settings) -> str:
    """Whether weights and cache fit into the memory, and how long a context could be."""
    memory = settings.memory_gb * GB
    if account.weights > memory:
        return f"the weights alone do not fit in {settings.memory_gb} GB"
    fits = "fits" if account.total <= memory else "does not fit"
    most = account.largest_context
    tokens = "any" if most == float("inf") else f"{tokens_text(most)} tokens"
    return f"{fits} in {settings.memory_gb} GB; largest context: {tokens}"


def bar_pixels(account: Account, settings: Settings, right: float) -> np.ndarray:
    """One bar, (height, width, 3) bytes: weights striped, then the cache, and a line where the memory ends.

    right: the bytes at the right edge, where a longer bar is cut.
    """
    width, height = BAR
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    at = (x + 0.5) / width * right  # bytes at each pixel, (1, width)
    stripes = np.where((x + y) % 8 < 3, 120, 215)  # (height, width)
    pixels = np.full((height, width, 3), 255)
    pixels[:] = np.where((at < account.weights)[..., None], stripes[..., None], pixels)
    colour = looks.looks_of([account.model.layer])[0].colour
    pixels[:, ((at >= account.weights) & (at < account.total))[0]] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    end = round(settings.memory_gb * GB / right * width)
    pixels[:, end - 4 : end + 4] = 255  # the line is seen on every colour
    pixels[:, end - 2 : end + 2] = 0
    pixels[[0, -1]] = 120
    pixels[:, [0, -1]] = 120
    return pixels.astype(np.uint8)


def answer(settings: Settings) -> tuple[str, str]:
    """The answer as HTML and as plain text: the ratio, one bar for each version, warnings and details.

    It reads without styles too, which some hosts remove: the bars are pictures.
    """
    s = settings
    try:
        MODELS[s.model].split(s.gpus)
    except ValueError as error:  # its heads cannot be split over so many
        return f"<div>{html.escape(s.model)}: {html.escape(str(error))}</div>", f"{s.model}: {error}"
    found = accounts(s)
    # Room for the memory and for all versions but MHA, whose bar may leave the picture.
    right = 1.1 * max([s.memory_gb * GB] + [account.total for account in found[-2:]])
    number, sentence = headline(s)
    sequences = "one sequence" if s.batch_size == 1 else f"{s.batch_size} sequences"
    context = f"{s.model}, {sequences} of {s.context:,} tokens, cache in {s.dtype}, weights in {s.weight_dtype}"
    context += f", heads split over {s.gpus} GPUs" if s.gpus > 1 else ""
    parts = [
        f"<div>{html.escape(context)}</div><div><b style='font-size:2.6em;line-height:1.3'>{number}</b> "
        f"<span style='font-size:1.1em'>{html.escape(sentence)}</span></div>"
    ]
    plain = [context, f"{number} {sentence}"]
    for account in found:
        sizes = (
            f"weights {bytes_text(account.weights)} + cache {bytes_text(account.cache)} = {bytes_text(account.total)}, "
            f"{verdict(account, s)}{' (bar cut)' if account.total > right else ''}"
        )
        png = looks.png_of([Image.fromarray(bar_pixels(account, s, right)).quantize(16)])
        drawn = looks.image_html(png, f"bar: {min(1, account.weights / right):.0%} weights, "
                                      f"{min(account.cache, max(0, right - account.weights)) / right:.0%} cache; the "
                                      f"memory ends at {s.memory_gb * GB / right:.0%}")  # fmt: skip
        parts.append(f"<div style='margin-top:.7em'><b>{html.escape(account.label)}</b>: {sizes}</div>{drawn}")
        plain.append(f"{account.label}: {sizes}")
    parts.append(f"<div>striped: weights; filled: cache; black line: {s.memory_gb} GB{on_each(s)}</div>")
    for said in warnings(s):
        grave = f"<b>{html.escape(said)}</b>" if said.startswith("Not worth it") else html.escape(said)
        parts.append(f"<div style='margin-top:.4em;border-left:4px solid #888;padding-left:.6em'>{grave}</div>")
    parts.append(f"<div style='margin-top:.4em'>{html.escape(details(s))}</div>")
    inside = "".join(parts)
    return f"<div style='max-width:{BAR[0]}px;line-height:1.4'>{inside}</div>", "\n".join(
        [*plain, *warnings(s), details(s)]
    )


def show(settings: Settings = Settings()) -> None:  # noqa: B008 (frozen)
    """Show the answer at one setting; a saved or exported notebook keeps it. The static twin of `explore`."""
    as_html, as_text = answer(settings)
    display({"text/html": as_html, "text/plain": as_text}, raw=True)


def build(settings: Settings = Settings()):  # noqa: B008 (frozen)
    """The explorer as an ipywidgets box: a control for each field of Settings, and the answer below them.

    The controls stand side by side where there is room, and below each other in a narrow window. Raises ValueError for
    a setting that is not among a control's choices.
    """
    import ipywidgets

    wide = {"style": {"description_width": "7em"}, "layout": {"width": "23em", "max_width": "100%"}}
    sizes = [8, 16, 24, 48, 80, 141, 180]
    choices = {  # of the menus, with what is seen and read aloud for each
        "model": ("model", {name: name for name in MODELS}),
        "context": ("context", {f"{tokens_text(2**n)} tokens": 2**n for n in range(10, 21)}),
        "batch_size": ("batch", {f"{2**n} sequence{'s' if n else ''}": 2**n for n in range(9)}),
        "memory_gb": ("memory", {f"{size} GB": size for size in sizes}),
        "gpus": ("GPUs", {f"{2**n} GPU{'s' if n else ''}": 2**n for n in range(6)}),
        "rank_q": ("rank R_Q", 32),
        "rank_k": ("rank R_K", 16),
        "rank_v": ("rank R_V", 16),
        "dtype": ("cache in", {name: name for name in ("float32", "bfloat16", "float8", "int4")}),
        "weight_dtype": ("weights in", {name: name for name in ("float32", "bfloat16", "int8", "int4")}),
    }
    controls = {}
    for name, (label, possible) in choices.items():
        value = getattr(settings, name)
        allowed = list(range(1, possible + 1) if isinstance(possible, int) else possible.values())
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: is not among the explorer's choices; use one of {allowed}")
        if isinstance(possible, int):
            controls[name] = ipywidgets.IntSlider(value, 1, possible, description=label, **wide)
        else:
            controls[name] = ipywidgets.Dropdown(options=list(possible.items()), value=value, description=label, **wide)
    below = ipywidgets.HTML()

    def update(_change=None) -> None:
        below.value, _ = answer(Settings(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(update, names="value")
    update()
    wrapping = {"display": "flex", "flex_flow": "row wrap", "max_width": "72em"}
    return ipywidgets.VBox([ipywidgets.Box(list(controls.values()), layout=wrapping), below])


def explore(settings: Settings = Settings()) -> None:  # noqa: B008 (frozen)
    """Show the explorer: model, context, batch, memory, ranks and types as controls, and the answer below them.

    Without ipywidgets one sentence appears instead. Raises ValueError as `build` does.
    """
    try:
        box = build(settings)
    except ImportError:
        return print("The controls need ipywidgets, which is not installed; the picture above shows one setting.")
    looks.show_live(box)
