"""Memory of a process while it decodes, as the operating system counts it, beside the formula; Linux only.

measure()["TPA"]     {"formula": ..., "cache": ..., "between_steps": ..., "peak": ...}, in bytes
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.memory import Layer
from tpa_minimal.tpa import T6Config, TensorProductAttention

STEPS = BATCH_SIZE = 128
SIZES = dict(d_model=32, n_head=16, d_head=64, rank_q=2, rank_k=1, rank_v=1)
# Small caches first, so that each sets a new peak.
ATTENTIONS = {
    "MQA": functools.partial(MultiHeadAttention, n_kv_head=1),
    "TPA": TensorProductAttention,
    "MLA": MultiHeadLatentAttention,
    "GQA": functools.partial(MultiHeadAttention, n_kv_head=4),
    "MHA": MultiHeadAttention,
}


@torch.no_grad()
def watch(name: str) -> dict:
    """Decode token by token with one layer; bytes of the cache by formula and by object, and what the process uses.

    between_steps: how much more it uses after a step than at the start, at most. peak: the same within a step.
    """
    layer = ATTENTIONS[name](T6Config(vocab_size=64, n_layer=1, max_len=STEPS, **SIZES))
    x, in_use = torch.zeros(BATCH_SIZE, 1, SIZES["d_model"]), psutil.Process().memory_info
    warm = layer.new_cache(BATCH_SIZE, 3)
    for _ in range(3):  # loads what a step needs
        layer(x, warm)
    del warm
    before, cache, most = in_use().rss, layer.new_cache(BATCH_SIZE), 0
    while cache.length < STEPS:
        layer(x, cache)
        most = max(most, in_use().rss - before)
    highest = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # in kB
    formula = Layer(name.lower(), **SIZES, n_kv_head=4).cached_numbers * BATCH_SIZE * STEPS * 4  # float32
    return dict(formula=formula, cache=cache.nbytes, between_steps=most, peak=int(highest) * 1024 - before)


def measure() -> dict[str, dict]:
    """`watch` of each mechanism, in a process of its own."""
    # A fixed threshold makes the allocator return freed blocks at once; otherwise one mechanism would reuse another's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tpa_minimal.experiments.watch_memory"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps({name: watch(name) for name in ATTENTIONS}))
