"""Side-by-side measurements: how long decoding, training and prefill take with MHA, MQA, GQA, MLA and TPA.

    python -m tpa_minimal.experiments.bench decode                      one new token against caches of growing length
    python -m tpa_minimal.experiments.bench train                       a step of a T6 with each attention
    python -m tpa_minimal.experiments.bench prefill                     one layer's pass over a prompt
    ... --device cuda --dtype bfloat16 --lengths 65536 524288

All that is compared is timed in one run and in turns, so that a disturbance strikes everybody; a table gives the median
and the quartiles. For decoding it also gives the bytes that must be read, which is the whole cache, and the share that
was reached of the bandwidth at which this device copies: decoding cannot be faster than the reading of its cache.
Results go to bench_KIND.json and bench_KIND.png in the folder --out.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention, causal_attention, factor_attention

RESULTS = Path(__file__).parent / "results"  # what we measured, for the course to show; your own runs go to --out

# ------------------------------------------------------------------------------------------------------- timing


def seconds_of(function, device: str) -> float:
    """How long one call takes until its result is there."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def in_turns(functions: dict, repeats: int, device: str = "cpu") -> dict[str, dict]:
    """Time all functions in turns, `repeats` times after two rounds that do not count.

    Returns for each name the median, lower and upper quartile and minimum, in milliseconds.
    """
    times = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            seconds = seconds_of(function, device)
            if turn >= 2:
                times[name].append(1000 * seconds)
        if sys.stderr.isatty():
            print(f"\r  round {turn + 1} of {repeats + 2} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict:
    """Median, quartiles and minimum."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median_ms": statistics.median(values), "low_ms": low, "high_ms": high, "min_ms": min(values)}


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes per second that a copy of a large tensor reads and writes: the best of ten."""
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    copies = in_turns({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.nbytes / (copies["min_ms"] / 1000)


def graphed(function, device: str):
    """On CUDA, `function` recorded once as a graph and replayed; so that launching kernels one by one is not timed."""
    if device != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up where nothing is recorded, as the documentation of CUDA graphs asks
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def environment(device: str, dtype: torch.dtype) -> dict:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "device": f"{device}: {name}",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "copy_bandwidth_GB_per_s": copy_bandwidth(device) / 1e9,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------- decode


def key_value_ways(config: T6Config, q: Tensor, k: Tensor, v: Tensor) -> dict:
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


def latent_ways(config: T6Config, q: Tensor, latent: Tensor) -> dict:
    """Absorbed MLA: MQA with queries as wide as the latents (B, M, 1, d_c + d_R), which are both keys and values."""
    q = torch.randn(*q.shape[:3], latent.shape[-1], dtype=q.dtype, device=q.device)
    return key_value_ways(config, q, latent, latent)


def factor_ways(config: T6Config, q: Tensor, *factors: Tensor) -> dict:
    """TPA in factor space: PyTorch, and on CUDA the Triton kernel."""
    (B, M), widths = factors[0].shape[:2], (config.n_head, config.d_head)
    a_q, b_q = (torch.randn(B, 1, config.rank_q, width, dtype=q.dtype, device=q.device) for width in widths)
    ways = {"pytorch": lambda: factor_attention(a_q, b_q, *factors, start=M - 1)}
    if q.is_cuda and importlib.util.find_spec("triton"):
        from tpa_minimal import flash_decode

        ways["triton"] = lambda: flash_decode.decode(a_q, b_q, *factors)
    return ways


def mechanisms(ranks=((16, 1, 1), (16, 2, 2)), n_kv_head: int = 4) -> dict:
    """Name -> (attention class to call with a config, ranks, what makes its ways of attending)."""
    kinds = {
        "MHA": (MultiHeadAttention, (1, 1, 1), key_value_ways),
        "MQA": (functools.partial(MultiHeadAttention, n_kv_head=1), (1, 1, 1), key_value_ways),
        f"GQA-{n_kv_head}": (functools.partial(MultiHeadAttention, n_kv_head=n_kv_head), (1, 1, 1), key_value_ways),
        "MLA": (MultiHeadLatentAttention, (1, 1, 1), latent_ways),
    }
    for rank in ranks:
        kinds[f"TPA {rank}"] = (TensorProductAttention, rank, factor_ways)
    return kinds


def with_kernel(layer: nn.Module) -> nn.Module:
    """The layer, decoding by the Triton kernel where it can."""
    if next(layer.parameters()).is_cuda and importlib.util.find_spec("triton"):
        from tpa_minimal import flash_decode

        return flash_decode.use(layer)
    return layer


@torch.no_grad()
def decode(
    lengths, *, d_model=512, n_head=32, d_head=64, batch_size=1, repeats=15, device="cpu", dtype=torch.float32, **which
) -> list[dict]:
    """One new token against M - 1 cached ones and itself, for each M of `lengths`; rows of results.

    For each mechanism: the attention alone by its fastest way (queries and a filled cache given), and the whole layer's
    step with projections, appending and the output matrix. `which` goes to `mechanisms`.
    """
    rows = []
    for M in lengths:
        attention, whole, size = {}, {}, {}
        for name, (build, (rank_q, rank_k, rank_v), ways_of) in mechanisms(**which).items():
            c = T6Config(1, 1, d_model, n_head, d_head, rank_q, rank_k, rank_v, max_len=M)
            layer = with_kernel(build(c).to(device, dtype))
            nn.init.normal_(layer.out_proj.weight, std=0.02)
            cache = layer.new_cache(batch_size)
            held = fill(layer, cache, M)
            size[name] = cache.nbytes
            q = torch.randn(batch_size, 1, n_head, d_head, device=device, dtype=dtype)
            attention |= {(name, way): graphed(f, device) for way, f in ways_of(c, q, *held).items()}
            x = torch.randn(batch_size, 1, d_model, device=device, dtype=dtype)
            whole[name] = graphed(functools.partial(step, layer, cache, x, M), device)
        names = {" | ".join(key): key for key in attention}
        taken = in_turns({text: attention[key] for text, key in names.items()}, repeats, device)
        layers = in_turns(whole, repeats, device)
        for name in size:
            ways = [text for text, key in names.items() if key[0] == name]
            kept = ways if name.startswith("TPA") else [min(ways, key=lambda text: taken[text]["median_ms"])]
            for text in kept:  # of the others' ways the fastest, of ours each
                row = {"mechanism": name, "way": names[text][1], "context": M, "bytes": size[name], **taken[text]}
                rows.append({**row, "layer_ms": layers[name]["median_ms"]})
    return rows


def fill(layer: nn.Module, cache, M: int) -> tuple[Tensor, ...]:
    """Fill a layer's cache with M positions of random numbers; returns the views of what it holds."""
    held = None
    for first in range(0, M, 4096):
        T = min(4096, M - first)
        places = [view for view in cache.view(first, first + T) if view.shape[-1]]
        held = cache.append(*(torch.randn(place.shape, device=place.device).to(place.dtype) for place in places))
    return held if isinstance(held, tuple) else (held,)


def step(layer: nn.Module, cache, x: Tensor, M: int) -> Tensor:
    """Decode one token as the M-th."""
    cache.truncate(M - 1)
    return layer(x, cache)


# -------------------------------------------------------------------------------------------- train and prefill


class SixProjections(TensorProductAttention):
    """TPA as one would first write it: six projections, and batched products of one small matrix per token."""

    def __init__(self, config: T6Config):
        super().__init__(config)
        del self.factor_proj
        self.projections = nn.ModuleList(nn.Linear(config.d_model, size, bias=False) for size in self.sizes)

    def reset_parameters(self) -> None:
        """Weights do not matter to a measurement of time."""

    def project(self, x: Tensor) -> list[Tensor]:
        """The factors before rotation, by six products."""
        return [proj(x).unflatten(-1, shape) for proj, shape in zip(self.projections, self.shapes)]

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int) -> Tensor:
        """Assemble each of q, k, v by torch.bmm over all tokens."""
        pairs = ((a_q, b_q), (a_k, b_k), (a_v, b_v))
        products = (torch.bmm(a.flatten(0, 1).mT, b.flatten(0, 1)) / b.shape[2] for a, b in pairs)
        q, k, v = (product.unflatten(0, b_q.shape[:2]) for product in products)  # (B, T, h, d_h)
        return causal_attention(q, k, v)


def trained(config: T6Config) -> dict:
    """The attentions that `train` and `prefill` compare, for models of the same sizes."""
    groups = max(G for G in (4, 2, 1) if config.n_head % G == 0)
    return {
        "MHA": MultiHeadAttention,
        "MQA": functools.partial(MultiHeadAttention, n_kv_head=1),
        f"GQA-{groups}": functools.partial(MultiHeadAttention, n_kv_head=groups),
        "MLA": MultiHeadLatentAttention,
        f"TPA ({config.rank_q}, {config.rank_k}, {config.rank_v})": TensorProductAttention,
        "TPA, six projections": SixProjections,
    }


def train(config: T6Config, lengths, *, batch_size=4, repeats=15, device="cpu", dtype=torch.float32) -> list[dict]:
    """A step of AdamW on batches of random tokens, for each length of `lengths`; all models have `config`'s sizes."""
    rows = []
    for T in lengths:
        steps = {}
        for name, attention in trained(config).items():
            model = T6(config, attention=attention).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            tokens = torch.randint(config.vocab_size, (batch_size, T + 1), device=device)
            steps[name] = functools.partial(training_step, model, optimizer, tokens, device, dtype)
        for name, taken in in_turns(steps, repeats, device).items():
            rows.append({"mechanism": name, "context": T, **taken})
    return rows


def training_step(model: T6, optimizer, tokens: Tensor, device: str, dtype: torch.dtype) -> None:
    """Forward, backward and update; half precision by autocast."""
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def prefill(
    lengths, *, d_model=512, n_head=32, d_head=64, batch_size=1, repeats=7, device="cpu", dtype=torch.float32
) -> list[dict]:
    """One layer's pass over a prompt into an empty cache, for each length of `lengths`."""
    rows = []
    for T in lengths:
        config = T6Config(1, 1, d_model, n_head, d_head, max_len=T)
        x = torch.randn(batch_size, T, d_model, device=device, dtype=dtype)
        passes = {}
        for name, attention in trained(config).items():
            layer = attention(config).to(device, dtype)
            cache = layer.new_cache(batch_size)
            passes[name] = functools.partial(prompt_pass, layer, cache, x)
        for name, taken in in_turns(passes, repeats, device).items():
            rows.append({"mechanism": name, "context": T, **taken})
    return rows


def prompt_pass(layer: nn.Module, cache, x: Tensor) -> Tensor:
    """Forget everything, then read the whole prompt."""
    cache.truncate(0)
    return layer(x, cache)


# ------------------------------------------------------------------------------------------------------ results


def table(result: dict) -> str:
    """The rows of a result as a Markdown table, with what they depend on above it."""
    about = ", ".join(f"{key} {value}" for key, value in {**result["environment"], **result["settings"]}.items())
    bandwidth = result["environment"]["copy_bandwidth_GB_per_s"]
    decoding = result["kind"] == "decode"
    head = ["mechanism", "context", "median ms", "quartiles ms"]
    head += ["MB to read", "share of copy bandwidth", "whole layer ms"] if decoding else []
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
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    series = {}
    for row in result["rows"]:
        series.setdefault(row["mechanism"] + (f" ({row['way']})" if row.get("way") == "triton" else ""), []).append(row)
    for (name, rows), (marker, line) in zip(series.items(), [(m, s) for s in ("-", "--") for m in "os^Dv"]):
        x, y = [row["context"] for row in rows], [row["median_ms"] for row in rows]
        errors = [[r["median_ms"] - r["low_ms"] for r in rows], [r["high_ms"] - r["median_ms"] for r in rows]]
        ax.errorbar(x, y, yerr=errors, marker=marker, linestyle=line, label=name, capsize=2)
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


def save(result: dict, folder: Path) -> list[Path]:
    """Write bench_KIND.json and bench_KIND.png, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench_{result['kind']}.{ending}" for ending in ("json", "png")]
    temporary = [path.with_name(f".{os.getpid()}.{path.name}") for path in paths]
    temporary[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure(result).savefig(temporary[1], dpi=120)
    for new, path in zip(temporary, paths):
        os.replace(new, path)
    return paths


def main(arguments=None) -> dict:
    """The command line: measure, print the table, write the files; returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tpa_minimal.experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["decode", "train", "prefill"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on CUDA, else float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--lengths", type=int, nargs="+", help="contexts to measure at")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-head", type=int, default=32)
    parser.add_argument("--d-head", type=int, default=64)
    parser.add_argument("--preset", default="tiny", help="for train: the T6 to train")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    if options.repeats < 1 or min(options.lengths or [1]) < 1:
        parser.error("--repeats and --lengths: must be 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    settings = {"batch_size": options.batch_size or (4 if options.kind == "train" else 1), "repeats": options.repeats}
    common = {**settings, "device": options.device, "dtype": dtype}
    sizes = {"d_model": options.d_model, "n_head": options.n_head, "d_head": options.d_head}
    about = environment(options.device, dtype)
    if options.kind == "train":
        rows = train(T6Config.preset(options.preset), options.lengths or [256], **common)
        settings["preset"] = options.preset
    elif options.kind == "decode":
        rows, settings = decode(options.lengths or [4096, 32768, 131072], **sizes, **common), {**settings, **sizes}
    else:
        rows, settings = prefill(options.lengths or [512, 2048], **sizes, **common), {**settings, **sizes}
    result = {"kind": options.kind, "environment": about, "settings": settings, "rows": rows}
    print(table(result))
    for path in save(result, options.out):
        print(f"wrote {path}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
