"""Side-by-side measurements: how long decoding, training and prefill take with MHA, MQA, GQA, MLA and TPA.

    python -m tpa_minimal bench decode                      one new token against caches of growing length
    python -m tpa_minimal bench train                       a step of a T6 with each attention
    python -m tpa_minimal bench prefill                     one layer's pass over a prompt
    python -m tpa_minimal bench latency                     a T6's time to the first token, and per token after it
    python -m tpa_minimal bench device --out DIR            all that a first, short time on a GPU should tell
    ... --device cuda --dtype bfloat16 --lengths 65536 524288

One mechanism is in memory at a time, and all of them come in turns several times over, so that a disturbance strikes
everybody; a table gives the median and the quartiles. On CUDA each timing starts with a cold L2 cache. For decoding the
table also gives the bytes that must be read, which is the whole cache, and the share that was reached of the bandwidth
at which this device copies: decoding cannot be faster than the reading of its cache.
"""

import functools
import importlib.util
import math
import platform
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from tpa_minimal import cpu_decode, decode_graph, tpa
from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.decode_graph import graphed
from tpa_minimal.experiments import train as training
from tpa_minimal.experiments.checkpoint import latest_checkpoint
from tpa_minimal.experiments.options import finish, parse, say
from tpa_minimal.files import FileError, check_folder, read_json, write_json, write_whole
from tpa_minimal.tpa import T6, FactorCache, T6Config, TensorProductAttention

RESULTS = Path(__file__).parent / "results"  # what we measured, for the course to show; your own runs go to --out
PASSES = 3  # over all mechanisms


@dataclass(frozen=True)
class Settings:
    """What every benchmark takes. None is what suits the device."""

    device: Literal["cpu", "cuda"] | None = None  # cuda where there is one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # bfloat16 on CUDA, else float32
    threads: int | None = None  # of the CPU
    repeats: int = 15  # timings of each
    batch_size: int | None = None
    compile: bool = False  # layers (decode, prefill) or models (train) by torch.compile
    out: Path = Path(".")  # folder for bench_KIND.json and bench_KIND.png


@dataclass(frozen=True)
class Layers(Settings):
    """One layer of these sizes."""

    lengths: tuple[int, ...] = (4096, 32768, 131072)  # contexts in tokens
    d_model: int = 512
    n_head: int = 32
    d_head: int = 64


@dataclass(frozen=True)
class Decode(Layers):
    """One new token against M - 1 cached ones and itself."""


@dataclass(frozen=True)
class Prefill(Layers):
    """One layer's pass over a prompt into an empty cache."""

    lengths: tuple[int, ...] = (512, 2048)  # of the prompt


@dataclass(frozen=True)
class Latency(Layers):
    """A T6 of two such layers and 1,024 kinds of tokens: time to the first token, and per token after it."""

    lengths: tuple[int, ...] = (256, 1024)  # of the prompt, for the first token
    contexts: tuple[int, ...] = (1024, 8192)  # what is in the cache then, for a token after it


@dataclass(frozen=True)
class Train(Settings):
    """A step of AdamW on batches of random tokens."""

    lengths: tuple[int, ...] | None = None  # of the sequences: 1024 on CUDA, else 256
    preset: str | None = None  # small-124M on CUDA, where with a smaller one launches take the time; else tiny


@dataclass(frozen=True)
class Device:
    """At most 8 minutes on a GPU: is the kernel right, how fast are decoding, training and generating.

    Writes DIR/device.json after each section; the same command goes on where it stopped.
    """

    out: Path
    authors: Path | None = None  # flashtpa_decode_triton.py of the authors, to be timed too
    seconds: float = 450  # after which no section or row begins


def settled(settings: Settings) -> Settings:
    """Every None filled in. Raises SystemExit(2) with one line for a value that cannot work."""
    for name, value in asdict(settings).items():
        for number in value if isinstance(value, tuple) else (value,):
            most = 1024 if name == "threads" else 2**24
            if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= most:
                refuse(f"--{name.replace('_', '-')} {str(number)[:40]}: must be 1 or more, and at most {most:,}")
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        refuse("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    device = settings.device or ("cuda" if cuda else "cpu")
    changes = {"device": device, "dtype": settings.dtype or ("bfloat16" if device == "cuda" else "float32")}
    if isinstance(settings, Train):
        changes |= {"batch_size": settings.batch_size or (8 if device == "cuda" else 4)}
        changes |= {"preset": settings.preset or ("small-124M" if device == "cuda" else "tiny")}
        changes |= {"lengths": settings.lengths or ((1024,) if device == "cuda" else (256,))}
    try:
        settings = replace(settings, **{"batch_size": settings.batch_size or 1, **changes})
        config_of(settings, 1)
    except ValueError as error:
        refuse(str(error))
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    return settings


def refuse(message: str):
    """Say what is wrong and leave with status 2."""
    raise SystemExit(finish("python -m tpa_minimal bench", 2, message))


def config_of(settings: Settings, max_len: int, ranks=(6, 2, 2)) -> T6Config:
    """The sizes that a benchmark is about."""
    rank_q, rank_k, rank_v = ranks
    changes = dict(rank_q=rank_q, rank_k=rank_k, rank_v=rank_v, max_len=max_len)
    if isinstance(settings, Train):
        return T6Config.preset(settings.preset, **changes)
    return T6Config.for_layer(settings.d_model, settings.n_head, settings.d_head, **changes)


# ------------------------------------------------------------------------------------------------------- timing


@functools.lru_cache
def flood(device: str) -> Tensor:
    """More bytes than any L2 cache has."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def seconds_of(function, device: str) -> float:
    """How long one call takes until its result is there; on CUDA with a cold L2 cache."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flood(device).zero_()  # and while the device is busy with it, what follows is enqueued
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def times_of(functions: dict, repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each function, called in turns `repeats` times after two rounds that do not count."""
    rounds = [{name: 1000 * seconds_of(f, device) for name, f in functions.items()} for _ in range(repeats + 2)]
    return {name: [times[name] for times in rounds[2:]] for name in functions}


def spread(values: list[float]) -> dict:
    """Median, quartiles and minimum."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median_ms": statistics.median(values), "low_ms": low, "high_ms": high, "min_ms": min(values)}


def in_turns(functions: dict, repeats: int, device: str = "cpu") -> dict[str, dict]:
    """For each name the median, lower and upper quartile and minimum of `times_of`, in milliseconds."""
    return {name: spread(values) for name, values in times_of(functions, repeats, device).items()}


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes per second that a copy of a large tensor reads and writes: the best of ten."""
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    copies = in_turns({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.nbytes / (copies["min_ms"] / 1000)


def environment(settings: Settings) -> dict:
    """What the numbers depend on."""
    cuda = settings.device == "cuda"
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "device": f"{settings.device}: {torch.cuda.get_device_name() if cuda else cpu_name()}",
        "threads": torch.get_num_threads(),
        "dtype": settings.dtype,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "copy_bandwidth_GB_per_s": copy_bandwidth(settings.device) / 1e9,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------- decode


def key_value_ways(q: Tensor, k: Tensor, v: Tensor) -> dict:
    """The ways in which PyTorch attends with G shared keys and values; q (B, 1, h, d), k and v (B, M, G, d)."""
    B, _, h, d = q.shape
    G = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, M, d), contiguous if the cache is full
    rows = q.view(B, G, h // G, d)
    ways = {
        "sdpa": lambda: F.scaled_dot_product_attention(rows, k, v),
        "products": lambda: (rows @ k.mT / math.sqrt(d)).softmax(-1) @ v,
    }
    if G < h:
        heads = q.transpose(1, 2)
        ways["sdpa, enable_gqa"] = lambda: F.scaled_dot_product_attention(heads, k, v, enable_gqa=True)
    return ways


def factor_ways(a_q: Tensor, b_q: Tensor, *factors: Tensor) -> dict:
    """TPA in factor space by each of our functions that serve on this device."""
    ways, start = {"tpa": tpa.factor_attention}, factors[0].shape[1] - 1
    if not a_q.is_cuda:
        ways["cpu_decode"] = cpu_decode.factor_attention
    elif importlib.util.find_spec("triton"):
        from tpa_minimal import flash_decode

        ways["flash_decode"] = flash_decode.factor_attention
    return {name: functools.partial(way, a_q, b_q, *factors, start=start) for name, way in ways.items()}


def ways_of(layer: nn.Module, cached: tuple[Tensor, ...]) -> dict:
    """Name -> function: attention alone, a new token's random queries against what is cached, by all ways there are."""
    B, config, x = cached[0].shape[0], layer.config, cached[0]
    random = functools.partial(torch.randn, dtype=x.dtype, device=x.device)
    if isinstance(layer, TensorProductAttention):
        queries = (random(B, 1, config.rank_q, width) for width in (config.n_head, config.d_head))
        return factor_ways(*queries, *cached)
    if isinstance(layer, MultiHeadLatentAttention):  # absorbed: MQA whose keys and values are both the latents
        ways = key_value_ways(random(B, 1, config.n_head, x.shape[-1]), x, x)
        return {f"absorbed, {name}": way for name, way in ways.items()}
    return key_value_ways(random(B, 1, config.n_head, config.d_head), *cached)


def mechanisms(n_head: int, ranks=((16, 1, 1), (16, 2, 2))) -> dict:
    """Name -> (attention class to call with a config, ranks)."""
    groups = max(G for G in (4, 2, 1) if n_head % G == 0)
    kinds = {
        "MHA": (MultiHeadAttention, (1, 1, 1)),
        "MQA": (functools.partial(MultiHeadAttention, n_kv_head=1), (1, 1, 1)),
        f"GQA-{groups}": (functools.partial(MultiHeadAttention, n_kv_head=groups), (1, 1, 1)),
        "MLA": (MultiHeadLatentAttention, (1, 1, 1)),
    }
    return kinds | {f"TPA {rank}": (TensorProductAttention, rank) for rank in ranks}


def fastest(layer: nn.Module) -> nn.Module:
    """The layer or model, decoding by the function of ours that its device has."""
    if not next(layer.parameters()).is_cuda:
        return cpu_decode.use(layer)
    if importlib.util.find_spec("triton"):
        from tpa_minimal import flash_decode

        return flash_decode.use(layer)
    return layer


def fill(cache: FactorCache, M: int) -> tuple[Tensor, ...]:
    """Fill a layer's cache with M positions of random numbers; returns the views of what is cached."""
    for first in range(0, M, 4096):
        cache.append(*(torch.randn_like(place) for place in cache.view(first, min(M, first + 4096))))
    return cache.view(0, M)


def step(run, cache, x: Tensor, M: int) -> Tensor:
    """run(x, cache), the tokens of x being the last of M positions: one to decode, or all M of a prompt."""
    cache.truncate(M - x.shape[1])
    return run(x, cache)


@torch.no_grad()
def decode(settings: Decode) -> list[dict]:
    """For each context and mechanism: attention alone by its fastest way (TPA: by each), and the whole layer's step.

    The first has queries and a full cache given; the second adds projections, appending and the output projection. On
    CUDA both are replays of a graph.
    """
    return [row for M in settings.lengths for row in decode_at(settings, M)]


def decode_at(settings: Decode, M: int) -> list[dict]:
    """Rows for one context."""
    times, size, dtype = {}, {}, getattr(torch, settings.dtype)
    for _ in range(PASSES):
        for name, (attention, ranks) in mechanisms(settings.n_head).items():
            layer = fastest(attention(config_of(settings, M, ranks)).to(settings.device, dtype))
            cache = layer.new_cache(settings.batch_size)
            functions = ways_of(layer, fill(cache, M))
            size[name] = cache.nbytes
            x = torch.randn(settings.batch_size, 1, settings.d_model, device=settings.device, dtype=dtype)
            run = torch.compile(layer) if settings.compile else layer
            functions["layer"] = functools.partial(step, run, cache, x, M)
            functions = {way: graphed(function, settings.device) for way, function in functions.items()}
            for way, values in times_of(functions, -(-settings.repeats // PASSES), settings.device).items():
                times.setdefault((name, way), []).extend(values)
            del layer, run, cache, functions  # the next needs the memory
    rows = []
    for name in size:
        ways = {way: spread(values) for (of, way), values in times.items() if of == name and way != "layer"}
        best = min(ways, key=lambda way: ways[way]["median_ms"])
        for way in ways if name.startswith("TPA") else [best]:
            row = {"mechanism": name, "way": way, "context": M, "bytes": size[name], **ways[way]}
            rows.append({**row, "layer_ms": statistics.median(times[name, "layer"])})
    return rows


# -------------------------------------------------------------------------------------------- train and prefill


def one_after_another(settings: Settings, length: int, make, ranks=((6, 2, 2),)) -> list[dict]:
    """Rows of `make(attention, config)`, a function to time, for each mechanism, the others not being in memory.

    ranks: the triples of TPA.
    """
    times, n_head = {}, config_of(settings, length).n_head
    for _ in range(PASSES):
        for name, (attention, triple) in mechanisms(n_head, ranks).items():
            run = make(attention, config_of(settings, length, triple))
            taken = times_of({name: run}, -(-settings.repeats // PASSES), settings.device)
            times.setdefault(name, []).extend(taken[name])
            del run
    return [{"mechanism": name, "context": length, **spread(values)} for name, values in times.items()]


def train(settings: Train) -> list[dict]:
    """A step of AdamW on random tokens, for each length; all models have the preset's sizes."""
    make = functools.partial(training_function, settings)
    return [row for T in settings.lengths for row in one_after_another(settings, T, make)]


def training_function(settings: Train, attention, config: T6Config):
    """A function that makes one update of a new model on a batch of sequences of length config.max_len."""
    model = T6(config, attention=attention).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(config.vocab_size, (settings.batch_size, config.max_len + 1), device=settings.device)
    loss_of = torch.compile(loss) if settings.compile else loss
    return functools.partial(training_step, model, loss_of, optimizer, tokens, getattr(torch, settings.dtype))


def loss(model: T6, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token after those before it."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def training_step(model: T6, loss_of, optimizer, tokens: Tensor, dtype: torch.dtype) -> None:
    """Forward, backward and update; half precision by autocast."""
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        value = loss_of(model, tokens)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def prefill(settings: Prefill) -> list[dict]:
    """One layer's pass over a prompt into an empty cache, for each length."""

    def make(attention, config):
        dtype = getattr(torch, settings.dtype)
        layer = attention(config).to(settings.device, dtype)
        x = torch.randn(settings.batch_size, config.max_len, config.d_model, device=settings.device, dtype=dtype)
        run = torch.compile(layer) if settings.compile else layer
        return functools.partial(step, run, layer.new_cache(settings.batch_size), x, config.max_len)

    return [row for T in settings.lengths for row in one_after_another(settings, T, make)]


@torch.no_grad()
def latency(settings: Latency) -> list[dict]:
    """For each mechanism the time of a prompt's pass up to its first new token, and of one token after it.

    Both choose the most likely token. Rows have `way` "first token" and a prompt's length as `context`, or "next token"
    and the number of positions that it attends to.
    """

    def make(way, attention, config):
        config, device = replace(config, n_layer=2, vocab_size=1024), settings.device
        model = fastest(T6(config, attention=attention).to(device, getattr(torch, settings.dtype)))
        cache = model.new_cache(settings.batch_size)
        for layer in cache:
            fill(layer, config.max_len)
        T = config.max_len if way == "first token" else 1
        tokens = torch.randint(config.vocab_size, (settings.batch_size, T), device=device)

        def choose(tokens, cache):
            return model.logits(model.hidden(tokens, cache)[:, -1]).argmax(-1)

        run = torch.compile(choose) if settings.compile else choose
        return functools.partial(step, run, cache, tokens, config.max_len)

    return [
        {**row, "way": way}
        for way, lengths in (("first token", settings.lengths), ("next token", settings.contexts))
        for M in lengths
        for row in one_after_another(settings, M, functools.partial(make, way), ((16, 1, 1), (6, 2, 2)))
    ]


# ------------------------------------------------------------------------------------------------------ results


def table(result: dict) -> str:
    """The rows of a result as a Markdown table, with what they depend on above it."""
    about = ", ".join(f"{key} {value}" for key, value in {**result["environment"], **result["settings"]}.items())
    bandwidth = result["environment"]["copy_bandwidth_GB_per_s"]
    decoding, cuda = result["kind"] == "decode", result["settings"]["device"] == "cuda"
    graph = " (CUDA graph)" if decoding and cuda else " (no graph)"
    head = ["mechanism", "context", f"median ms{graph}", "quartiles ms"]
    head += ["MB to read", "share of copy bandwidth", f"whole layer ms{graph}"] if decoding else []
    lines = [about, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        way = f" ({row['way']})" if "way" in row else ""
        cells = [row["mechanism"] + way, f"{row['context']:,}"]
        cells += [f"{row['median_ms']:.2f}", f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"]
        if decoding:
            share = row["bytes"] / (row["median_ms"] / 1000) / (bandwidth * 1e9)
            cells += [f"{row['bytes'] / 1e6:,.1f}", f"{share:.0%}", f"{row['layer_ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(result: dict):
    """Time against context, each mechanism a line; for decoding also how long reading TPA's cache must take."""
    from matplotlib.figure import Figure  # pyplot would keep it open

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax, series = fig.subplots(), {}
    for row in result["rows"]:
        series.setdefault(row["mechanism"] + (f", {row['way']}" if "way" in row else ""), []).append(row)
    for (name, rows), (marker, line) in zip(series.items(), [(m, s) for s in ("-", "--") for m in "os^DvP"]):
        x, y = [row["context"] for row in rows], [row["median_ms"] for row in rows]
        ax.plot(x, y, marker=marker, linestyle=line, label=name)
        ax.fill_between(x, [row["low_ms"] for row in rows], [row["high_ms"] for row in rows], alpha=0.2)
    if result["kind"] == "decode":
        rows = next(rows for name, rows in series.items() if name.startswith("TPA"))
        speed = result["environment"]["copy_bandwidth_GB_per_s"] * 1e6  # bytes per millisecond
        bound = [row["bytes"] / speed for row in rows]
        ax.plot([r["context"] for r in rows], bound, color="black", linestyle=":", label="reading that TPA's cache")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(xlabel="context, tokens", ylabel="milliseconds (median, quartiles)")
    ax.set_title(f"{result['kind']}: {result['environment']['device']}, {result['environment']['dtype']}", loc="left")
    ax.legend(fontsize=8)
    return fig


# ------------------------------------------------------------------------------------- a first, short time on a GPU


class Check:
    """The sections of `bench device`. Without a GPU they are rehearsed on tiny sizes."""

    def __init__(self, settings: Device):
        self.settings, self.begin, self.path = settings, time.monotonic(), settings.out / "device.json"
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        self.done = read_json(self.path) if self.path.exists() else {}
        if not isinstance(self.done, dict) or not all(isinstance(found, dict) for found in self.done.values()):
            raise FileError(f"{self.path}: is there and holds no results of this command")

    def left(self) -> float:
        """Seconds."""
        return self.settings.seconds - (time.monotonic() - self.begin)

    def run(self) -> None:
        """Every section that has no result yet, each with what it gives or how it failed, saved at once."""
        for section in (self.machine, self.correct, self.decode, self.lessons, self.throughput):
            name = section.__name__
            if "rows" in self.done.get(name, {}) or self.left() <= 0:
                continue
            begin = time.monotonic()
            try:
                got = {"rows": section()}
            except Exception:  # a section that fails is a result: the others must still run
                got = {"error": traceback.format_exc()[-2000:]}
            self.done[name] = {"seconds": round(time.monotonic() - begin, 1), **got}
            write_json(self.path, self.done)
            say(f"{name}: {str(got)[:1000]}")

    def median_ms(self, function) -> float:
        """Of a function's replays as a graph, the L2 cache being cold."""
        return in_turns({"": graphed(function, self.device)}, 15 if self.gpu else 1, self.device)[""]["median_ms"]

    def machine(self) -> dict:
        """What the device is, and its ceilings."""
        n, dtype = (8192, torch.bfloat16) if self.gpu else (64, torch.float32)
        matrix = torch.randn(n, n, device=self.device, dtype=dtype)
        copied = copy_bandwidth(self.device, 1024 if self.gpu else 1)
        about = environment(Settings(device=self.device, dtype=str(dtype).removeprefix("torch.")))
        flops = 2e-9 * n**3 / self.median_ms(lambda: matrix @ matrix)
        return {**about, "copy_GB_per_s": copied / 1e9, "TFLOP_per_s": flops}

    @torch.no_grad()
    def correct(self) -> list[dict]:
        """The kernels against float64, twice, where memory that nobody wrote holds NaN."""
        from tpa_minimal import flash_decode

        rows, (h, d_head) = [], (34, 64) if self.gpu else (5, 8)
        torch.use_deterministic_algorithms(True, warn_only=True)
        for ranks, M in (((16, 1, 1), 4097), ((6, 2, 2), 1000)) if self.gpu else (((16, 1, 1), 33), ((6, 2, 2), 9)):
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
                for scale in (1.0, 30.0):
                    shapes = [(t, r, w) for t, r in zip((1, M, M), ranks) for w in (h, d_head)]
                    a_q, b_q, *new = (scale * torch.randn(2, *s, device=self.device) for s in shapes)
                    a_q, b_q, *new = (x.to(dtype) for x in (a_q, b_q, *new))
                    sizes = [(x.shape[2], x.shape[3]) for x in new]
                    cached = FactorCache(sizes, 2, M + 9, self.device, dtype).append(*new)
                    exact = tpa.factor_attention(*(x.double() for x in (a_q, b_q, *cached)), start=M - 1)
                    got, again = (flash_decode.factor_attention(a_q, b_q, *cached, start=M - 1) for _ in range(2))
                    error = ((got.double() - exact).norm() / exact.norm()).item()
                    right = error <= bound and torch.equal(got, again)
                    rows.append(dict(ranks=ranks, M=M, dtype=str(dtype), scale=scale, error=error, right=right))
        torch.use_deterministic_algorithms(False)
        return rows

    def decode(self) -> list[dict]:
        """Attention and layer for every mechanism, shortest contexts first; the authors' kernel where it is given."""
        rows, sizes = [], dict(repeats=3, d_model=16, n_head=4, d_head=8)
        if self.gpu:
            sizes = dict(repeats=9, d_model=512, n_head=32, d_head=64, dtype="bfloat16")
        for M in [2**n for n in range(12, 20)] if self.gpu else [16]:
            for batch_size in (1, 16) if self.gpu else (1,):
                if self.left() < 0.45 * self.settings.seconds:
                    return rows
                settings = settled(Decode(device=self.device, batch_size=batch_size, **sizes))
                try:
                    rows += [{"batch": batch_size, **row} for row in decode_at(settings, M)]
                except torch.OutOfMemoryError:
                    rows.append({"batch": batch_size, "context": M, "way": "out of memory"})
                if self.settings.authors and batch_size == 1 and M in (2**14, 2**17, 2**19):
                    rows.append({"batch": 1, "context": M, "way": "authors", "median_ms": self.authors(M)})
        return rows

    @torch.no_grad()
    def authors(self, M: int) -> float:
        """Milliseconds of the authors' kernel at ranks (16, 1, 1)."""
        spec = importlib.util.spec_from_file_location("authors", self.settings.authors)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        random = functools.partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        a_q, b_q = random(1, 1, 32, 16), random(1, 1, 16, 64)
        cached = [random(1, M, width) for width in (32, 32, 64, 64)]
        a_k, a_v, b_k, b_v = cached
        return self.median_ms(lambda: module.tpa_decode_parallel_bn_triton(a_q, a_k, a_v, b_q, b_k, b_v))

    def lessons(self) -> dict:
        """A short training run on the lessons, and tokens per second of `generate`: plain, ours, by a graph."""
        out, steps, tokens = self.settings.out / "lessons", *((300, 2_000_000) if self.gpu else (3, 100_000))
        sizes = dict(tokens=tokens, steps=steps, seq_len=None if self.gpu else 16)
        config = training.TrainConfig(out=out, data="lessons", **sizes)
        run = training.train(replace(config, resume=latest_checkpoint(out) is not None), progress=False)
        prompt, speeds = torch.zeros(1, 8, dtype=torch.long, device=self.device), {}
        model, n = run.model.to(self.device), 200 if self.gpu else 4
        for name, use in (("tpa", lambda model: model), ("ours", fastest), ("graph", decode_graph.use)):
            generate = functools.partial(use(model).generate, prompt, n)
            speeds[name] = n / (in_turns({name: generate}, 1, self.device)[name]["median_ms"] / 1000)
        trained = {"train_tokens_per_s": run.tokens_per_second, "metrics": run.metrics[-1:]}
        return {**trained, "generate_tokens_per_s": speeds}

    def throughput(self) -> list[dict]:
        """Training throughput of small-124M with TPA and MHA, eager and compiled, and the memory that it takes."""
        rows, settings = [], settled(Train(device=self.device, batch_size=8 if self.gpu else 1))
        config = config_of(settings, 1024) if self.gpu else T6Config(31, 1, 16, 4, 8, max_len=8)
        for compiled in (False, True) if self.gpu else (False,):
            for name, attention in (("TPA", TensorProductAttention), ("MHA", MultiHeadAttention)):
                if self.left() < (100 if compiled else 20):
                    return rows
                begin = time.monotonic()
                function = training_function(replace(settings, compile=compiled), attention, config)
                taken = in_turns({"": function}, 5, self.device)[""]
                tokens_per_s = settings.batch_size * config.max_len / (taken["median_ms"] / 1000)
                rows.append({"mechanism": name, "compiled": compiled, "tokens_per_s": tokens_per_s, **taken})
                rows[-1]["seconds"] = time.monotonic() - begin
                if self.gpu:
                    rows[-1]["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
                    torch.cuda.reset_peak_memory_stats()
                del function
        return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line: measure, print the table, write the files. A wrong value ends with status 2."""
    commands = {"decode": Decode, "train": Train, "prefill": Prefill, "latency": Latency, "device": Device}
    kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()]
    settings = parse(functools.reduce(lambda x, y: x | y, kinds), arguments, "python -m tpa_minimal bench")
    try:
        check_folder(settings.out)  # before any long work
        check = Check(settings) if isinstance(settings, Device) else None
    except (OSError, FileError) as error:
        refuse(f"--out {settings.out}: {error}; choose another folder, or change its permissions")
    if check:
        check.run()
        return 0
    settings, kind = settled(settings), type(settings).__name__.lower()
    result = {"kind": kind, "environment": environment(settings)}
    result["settings"] = {name: value for name, value in asdict(settings).items() if name not in ("out", "threads")}
    measure = {"decode": decode, "train": train, "prefill": prefill, "latency": latency}[kind]
    try:
        result["rows"] = measure(settings)
    except RuntimeError as error:
        if "memory" not in str(error):  # CUDA's and the CPU's allocator agree in this word alone
            raise
        return finish("python -m tpa_minimal bench", 1, f"{str(error).splitlines()[0][:200]}; choose smaller sizes")
    say(table(result))  # first, so that a full disk does not take it all
    write_json(settings.out / f"bench_{kind}.json", result)
    write_whole(settings.out / f"bench_{kind}.png", lambda path: figure(result).savefig(path, dpi=120, format="png"))
    print(f"wrote bench_{kind}.json and bench_{kind}.png in {settings.out}", file=sys.stderr)
    return 0
