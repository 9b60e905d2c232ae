"""What attention costs in memory, weights and arithmetic, by formula: Table 1 and App. A.4 of the paper.

Python's standard library only; symbols as in `tpa.py`. Nothing here measures anything: tests/test_memory.py compares
every formula with the real caches and layers.

    llama = MODELS["Llama 3 70B"]
    tpa = llama.with_tpa(rank_q=16, rank_k=1, rank_v=1)
    llama.cache_bytes(131_072), tpa.cache_bytes(131_072)          # 42.9 GB and 8.1 GB in bfloat16
    llama.split(8).cache_bytes(131_072), tpa.split(8).cache_bytes(131_072)    # 5.4 GB and 5.7 GB on each of 8 GPUs

A GB is 10^9 bytes. A ratio means nothing without its baseline, so `ratios` names the baseline of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

# Bytes of one number. The narrow formats need scales beside the numbers, which are not counted here (4-bit formats
# commonly add 0.25 to 0.5 bits for each number).
DTYPES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5}
MECHANISMS = ("mha", "mqa", "gqa", "mla", "tpa", "tpa-kv-only", "tpa-fixed-a", "tpa-fixed-b")
GB = 10**9


def bytes_per_number(dtype: str) -> float:
    """The size of one number of `dtype`. Raises ValueError for a type that is not in DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


# ------------------------------------------------------------------------------------------------------ one layer


@dataclass(frozen=True)
class Layer:
    """The sizes of one attention layer; its properties are Table 1's formulas.

    mechanism: one of MECHANISMS; "tpa-fixed-a" and "tpa-fixed-b" are TPA with non-contextual A or B (App. G).
    n_kv_head is G and read for GQA only (MHA is G = h, MQA is G = 1). d_c, d_c_q, d_rope are MLA's d_c, d'_c and d_R;
    by default 4 d_h, 8 d_h and d_h/2, as in `baselines.MultiHeadLatentAttention`.
    Raises ValueError for sizes that cannot work.
    """

    mechanism: str
    d_model: int
    n_head: int
    d_head: int
    n_kv_head: int | None = None
    rank_q: int = 6
    rank_k: int = 2
    rank_v: int = 2
    d_c: int | None = None
    d_c_q: int | None = None
    d_rope: int | None = None

    def __post_init__(self):
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism={self.mechanism!r}: does not exist; choose one of {', '.join(MECHANISMS)}")
        if self.mechanism == "gqa" and self.n_kv_head is None:
            raise ValueError("n_kv_head=None: GQA needs a number of key-value heads that divides n_head")
        fixed = {"mha": self.n_head, "mqa": 1, "gqa": self.n_kv_head}
        defaults = {
            "n_kv_head": fixed.get(self.mechanism),
            "d_c": 4 * self.d_head,
            "d_c_q": 8 * self.d_head,
            "d_rope": max(2, self.d_head // 4 * 2),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None or (name == "n_kv_head" and self.mechanism != "gqa"):
                object.__setattr__(self, name, value)
        for name in "d_model n_head d_head rank_q rank_k rank_v d_c d_c_q d_rope".split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
        if self.mechanism == "gqa" and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")

    @property
    def cached_numbers(self) -> int:
        """Numbers cached per token (Table 1)."""
        h, d_h, ranks = self.n_head, self.d_head, self.rank_k + self.rank_v
        if self.n_kv_head is not None:
            return 2 * self.n_kv_head * d_h
        if self.mechanism == "mla":
            return self.d_c + self.d_rope
        return ranks * {"tpa-fixed-a": d_h, "tpa-fixed-b": h}.get(self.mechanism, h + d_h)

    def quantized_bytes(self, bits: int, scale_bytes: int = 2) -> int:
        """Bytes cached per token in `bits` bits a number, with a scale for each row: of a head, a latent or a factor.

        A row takes whole bytes. `quantized.QuantizedCache` is such a cache; MLA's latent and rotated key are one row.
        """
        h, d_h, ranks = self.n_head, self.d_head, self.rank_k + self.rank_v
        rows = ranks * {"tpa-fixed-a": [d_h], "tpa-fixed-b": [h]}.get(self.mechanism, [h, d_h])
        if self.n_kv_head is not None:
            rows = [d_h] * 2 * self.n_kv_head
        elif self.mechanism == "mla":
            rows = [self.d_c + self.d_rope]
        return sum(-(-width * bits // 8) + scale_bytes for width in rows)

    @property
    def parameters(self) -> int:
        """Weights of the layer, output projection included (Table 1)."""
        d, h, d_h = self.d_model, self.n_head, self.d_head
        ranks_kv = self.rank_k + self.rank_v
        ranks = self.rank_q + ranks_kv
        if self.n_kv_head is not None:
            return 2 * d * d_h * (h + self.n_kv_head)
        if self.mechanism == "mla":
            queries = self.d_c_q * (d + h * d_h + h * self.d_rope)
            return queries + self.d_c * (d + 2 * h * d_h) + d * (h * d_h + self.d_rope)
        if self.mechanism == "tpa-kv-only":
            return d * ranks_kv * (h + d_h) + 2 * d * h * d_h
        if self.mechanism == "tpa-fixed-a":
            return ranks * (d * d_h + h) + d * h * d_h
        if self.mechanism == "tpa-fixed-b":
            return ranks * (d * h + d_h) + d * h * d_h
        return d * ranks * (h + d_h) + d * h * d_h

    def decode_multiply_adds(self, context: int) -> int:
        """Multiply-adds of attending from one new token to `context` cached ones (App. A.4), projections not counted.

        MHA, MQA, GQA: 2 h d_h per cached token, sharing keys saves memory and no arithmetic. MLA, absorbed: every head
        takes the latent and rotated key as its key, d_c + d_R, and the latent as its value, d_c: h (2 d_c + d_R).
        TPA, as in Algorithm 1: R_Q R_K d_h products shared by all heads, h R_Q R_K to scale them, h R_V d_h values.
        KV only: each head's own query meets b_k, h R_K d_h, then h R_K and h R_V d_h. Fixed factors save nothing here.
        """
        h, d_h, Q, K, V = self.n_head, self.d_head, self.rank_q, self.rank_k, self.rank_v
        if self.n_kv_head is not None:
            per_token = 2 * h * d_h
        elif self.mechanism == "mla":
            per_token = h * (2 * self.d_c + self.d_rope)
        elif self.mechanism == "tpa-kv-only":
            per_token = h * K * d_h + h * K + h * V * d_h
        else:
            per_token = Q * K * d_h + h * Q * K + h * V * d_h
        return per_token * context

    def split(self, gpus: int) -> "Layer":
        """What each of `gpus` GPUs has of the layer under tensor parallelism: a layer with n_head / gpus of its heads.

        Key-value heads are split too; with more GPUs than these, several GPUs keep the same one. All heads read MLA's
        latent and TPA's feature factors, so every GPU keeps these whole; head factors are split.
        Raises ValueError for a number of GPUs that would cut a head, or a group of heads unevenly.
        """
        h, G = self.n_head, self.n_kv_head
        possible = [n for n in range(1, h + 1) if h % n == 0 and (G is None or G % n == 0 or n % G == 0)]
        if gpus not in possible:
            raise ValueError(
                f"gpus={gpus!r}: cannot share out whole heads of a layer of {self.describe()} with n_head={h}; "
                f"use one of {', '.join(map(str, possible))}"
            )
        return replace(self, n_head=h // gpus, n_kv_head=G and max(1, G // gpus))

    def describe(self) -> str:
        """The mechanism with the sizes that matter for its cache, such as "GQA, 8 key-value heads"."""
        if self.mechanism == "mla":
            return f"MLA, latent {self.d_c} + {self.d_rope}"
        if self.mechanism == "gqa":
            return f"GQA, {self.n_kv_head} key-value heads"
        if self.n_kv_head is not None:
            return f"{self.mechanism.upper()}, {self.n_head} heads"
        variant = {"tpa-kv-only": ", KV only", "tpa-fixed-a": ", fixed A", "tpa-fixed-b": ", fixed B"}
        ranks = (self.rank_q, self.rank_k, self.rank_v)
        if self.mechanism == "tpa-kv-only":
            ranks = ranks[1:]
        return f"TPA{variant.get(self.mechanism, '')}, ranks ({', '.join(map(str, ranks))})"


def break_even_ranks(n_head: int, d_head: int, n_kv_head: int | None = None) -> float:
    """The R_K + R_V from which on TPA caches no less than G key-value heads: 2 G d_h / (h + d_h). None: MHA, G = h."""
    return 2 * (n_head if n_kv_head is None else n_kv_head) * d_head / (n_head + d_head)


def ratios(layer: Layer, shipped: Layer) -> dict[str, float]:
    """How many times less `layer` caches per token than each baseline, which the key names; below 1 it caches more."""
    baselines = {
        f"what the model ships ({shipped.describe()})": shipped,
        f"MHA with the model's own {shipped.n_head} heads": replace(shipped, mechanism="mha"),
    }
    if layer.n_head != shipped.n_head:
        baselines[f"MHA with the layer's own {layer.n_head} heads"] = replace(layer, mechanism="mha")
    return {name: baseline.cached_numbers / layer.cached_numbers for name, baseline in baselines.items()}


# -------------------------------------------------------------------------------------------------- equal parameters

# The head counts of App. H, chosen by the authors so that a layer has about 4 d_model² parameters, and the widths that
# it states for MLA (d_c, d'_c). d_head 64, ranks (6, 2, 2), d_R 32, G = 2 for GQA.
PAPER_SIZES = {"small-124M": 768, "medium-353M": 1024, "large-773M": 1280, "xl-1.5B": 1600}  # d_model
PAPER_HEADS = {
    "small-124M": {"mha": 12, "mqa": 23, "gqa": 22, "mla": 12, "tpa-kv-only": 22, "tpa": 34},
    "medium-353M": {"mha": 16, "mqa": 31, "gqa": 30, "mla": 23, "tpa-kv-only": 29, "tpa": 47},
    "large-773M": {"mha": 20, "mqa": 39, "gqa": 38, "mla": 34, "tpa-kv-only": 37, "tpa": 61},
    "xl-1.5B": {"mha": 25, "mqa": 49, "gqa": 48, "mla": 49, "tpa-kv-only": 47, "tpa": 78},
}
PAPER_MLA_WIDTHS = {
    "small-124M": (256, 512), "medium-353M": (512, 1024), "large-773M": (512, 1024), "xl-1.5B": (512, 1024)
}  # fmt: skip


def match_heads(mechanism: str, parameters: int, d_model: int, d_head: int, **sizes) -> int:
    """The number of heads at which a layer's parameters come nearest to `parameters`.

    sizes: whatever else Layer reads for the mechanism (ranks, n_kv_head, d_c, ...). For GQA the answer is a multiple of
    n_kv_head. Raises ValueError if even the smallest such layer has too many parameters.

    With the budget 4 d_model² this gives App. H's head counts, except three at the small size, where the paper has one
    or two more or less than the nearest (TPA 34, not 33; KV only 22, not 21; MLA 12, not 13), and MLA above it: its 23,
    34 and 49 heads follow from widths (256, 512), while the stated (512, 1024) would leave room for 11, 18 and 29.
    """
    step = sizes.get("n_kv_head", 1) if mechanism == "gqa" else 1

    def count(steps: int) -> int:
        return Layer(mechanism, d_model, step * steps, d_head, **sizes).parameters

    slope = count(2) - count(1)  # every formula of Table 1 is a straight line in h
    steps = round(1 + (parameters - count(1)) / slope)
    if steps < 1:
        raise ValueError(
            f"parameters={parameters}: a layer of {mechanism.upper()} with d_model={d_model}, d_head={d_head} and "
            f"{step} heads has {count(1)} already; raise the number of parameters or make the layer's widths smaller"
        )
    return step * steps


# ------------------------------------------------------------------------------------------------------ whole models


@dataclass(frozen=True)
class Model:
    """A language model as far as memory is concerned: its layers of attention and its number of weights.

    max_len: the longest context it was made for. n_local of its n_layer layers look back `window` tokens only and cache
    no more than that; a layer of a fast implementation may hold less or more (whole pages, a ring of another size).
    """

    name: str
    layer: Layer
    n_layer: int
    parameters: int
    max_len: int
    source: str
    n_local: int = 0
    window: int = 0
    note: str = ""

    def cache_bytes(self, context: int, batch_size: int = 1, dtype: str = "bfloat16") -> float:
        """Bytes of the whole cache when each of `batch_size` sequences is `context` tokens long."""
        positions = (self.n_layer - self.n_local) * context + self.n_local * min(context, self.window)
        return self.layer.cached_numbers * positions * batch_size * bytes_per_number(dtype)

    def bytes_per_token(self, dtype: str = "bfloat16") -> float:
        """Bytes that each token adds to one sequence's cache while it is shorter than any window."""
        return self.layer.cached_numbers * self.n_layer * bytes_per_number(dtype)

    def weight_bytes(self, dtype: str = "bfloat16") -> float:
        """Bytes of all weights; of a mixture of experts all, since any may be needed next."""
        return self.parameters * bytes_per_number(dtype)

    def largest_context(
        self, budget: float, batch_size: int = 1, dtype: str = "bfloat16", weight_dtype: str = "bfloat16"
    ) -> float:
        """The longest context for which weights and cache fit in `budget` bytes; 0 if the weights alone do not.

        A whole number, or math.inf where all layers are local and the cache stops growing. It may exceed max_len.
        Activations and the allocator's own needs come on top; leave a few GB for them.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be 1 or more")
        free = budget - self.weight_bytes(weight_dtype)
        if free < 0:
            return 0
        per_layer = self.layer.cached_numbers * batch_size * bytes_per_number(dtype)
        if self.n_local and free >= self.n_layer * self.window * per_layer:  # the local layers are full
            everywhere = self.n_layer - self.n_local
            if not everywhere:
                return math.inf
            return int((free - self.n_local * self.window * per_layer) // (everywhere * per_layer))
        return int(free // (self.n_layer * per_layer))

    def largest_batch(
        self, budget: float, context: int, dtype: str = "bfloat16", weight_dtype: str = "bfloat16"
    ) -> int:
        """How many sequences of `context` tokens fit beside the weights in `budget` bytes; see `largest_context`."""
        if context < 1:
            raise ValueError(f"context={context}: must be 1 or more")
        free = budget - self.weight_bytes(weight_dtype)
        return max(0, int(free // self.cache_bytes(context, 1, dtype)))

    def split(self, gpus: int) -> "Model":
        """What each of `gpus` GPUs has of the model: attention as in `Layer.split`, an equal share of other weights.

        (The few weights of norms, which every GPU has, are counted as shared out.) Raises ValueError as `Layer.split`.
        """
        layer = self.layer.split(gpus)
        others = self.parameters - self.n_layer * self.layer.parameters
        return replace(self, layer=layer, parameters=self.n_layer * layer.parameters + math.ceil(others / gpus))

    def with_attention(self, layer: Layer) -> "Model":
        """The same model with each attention layer exchanged for `layer`; its weights are counted anew.

        Whatever else the shipped layers hold (biases, norms) is left in the count.
        """
        added = self.n_layer * (layer.parameters - self.layer.parameters)
        return replace(
            self, name=f"{self.name} with {layer.describe()}", layer=layer, parameters=self.parameters + added
        )

    def with_tpa(self, rank_q: int, rank_k: int, rank_v: int) -> "Model":
        """A TPA version with the model's own d_model, heads and head width; one that would have to be trained."""
        shape = (self.layer.d_model, self.layer.n_head, self.layer.d_head)
        return self.with_attention(Layer("tpa", *shape, rank_q=rank_q, rank_k=rank_k, rank_v=rank_v))


def _models() -> dict[str, Model]:
    mha: Callable[..., Layer] = lambda *shape: Layer("mha", *shape)  # noqa: E731
    gqa: Callable[..., Layer] = lambda *shape: Layer("gqa", *shape)  # noqa: E731
    # name, layer(d_model, h, d_h[, G]), layers, weights, longest context, repository on the Hugging Face hub
    rows = [
        Model("GPT-2 small", mha(768, 12, 64), 12, 124_439_808, 1024, "openai-community/gpt2"),
        Model("GPT-2 XL", mha(1600, 25, 64), 48, 1_557_611_200, 1024, "openai-community/gpt2-xl"),
        Model("Llama 3 8B", gqa(4096, 32, 128, 8), 32, 8_030_261_248, 131_072, "meta-llama/Llama-3.1-8B",
              note="Llama 3.1, which has the sizes of Llama 3 and a context of 131,072 in place of 8,192"),
        Model("Llama 3 70B", gqa(8192, 64, 128, 8), 80, 70_553_706_496, 131_072, "meta-llama/Llama-3.1-70B",
              note="Llama 3.1, which has the sizes of Llama 3 and a context of 131,072 in place of 8,192"),
        Model("Mistral 7B v0.1", gqa(4096, 32, 128, 8), 32, 7_241_732_096, 32_768, "mistralai/Mistral-7B-v0.1",
              n_local=32, window=4096, note="all layers look back 4,096 tokens, so the cache stops growing there"),
        Model("Mistral 7B v0.3", gqa(4096, 32, 128, 8), 32, 7_248_023_552, 32_768, "mistralai/Mistral-7B-v0.3",
              note="without v0.1's sliding window"),
        Model("Qwen2.5 7B", gqa(3584, 28, 128, 4), 28, 7_615_616_512, 131_072, "Qwen/Qwen2.5-7B"),
        Model("Qwen3 8B", gqa(4096, 32, 128, 8), 36, 8_190_735_360, 40_960, "Qwen/Qwen3-8B"),
        Model("Qwen3 32B", gqa(5120, 64, 128, 8), 64, 32_762_123_264, 40_960, "Qwen/Qwen3-32B"),
        Model("Gemma 2 9B", gqa(3584, 16, 256, 8), 42, 9_241_705_984, 8192, "google/gemma-2-9b",
              n_local=21, window=4096, note="every other layer looks back 4,096 tokens only"),
        Model("Gemma 3 27B", gqa(5376, 32, 128, 16), 62, 27_009_346_304, 131_072, "google/gemma-3-27b-pt",
              n_local=52, window=1024, note="five of six layers look back 1,024 tokens only; text model"),
        Model("DeepSeek-V3", Layer("mla", 7168, 128, 128, d_c=512, d_c_q=1536, d_rope=64), 61, 671_026_419_200,
              163_840, "deepseek-ai/DeepSeek-V3", note="all experts counted, not the multi-token prediction module"),
    ]  # fmt: skip
    return {model.name: model for model in rows}


# Well-known open models, from the `config.json` of the repository that each names as its source on huggingface.co.
MODELS: dict[str, Model] = _models()
