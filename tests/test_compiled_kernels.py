"""Every kernel compiled for the GPUs that people have, with no GPU: what the compiler says of registers and instructions.

The kernels are launched as always, by the functions that launch them, but on tensors on the CPU, and the driver that
Triton asks for the GPU says what a test wants to hear; its launcher then compiles, and nothing runs.
"""

import contextlib
import functools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is an extra: pip install triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton only interprets here", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from tpa_minimal import flash_decode  # noqa: E402
from tpa_minimal.tpa import FactorCache  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}  # A100, RTX 3090, 4090, H100, B200, RTX 5090
SHARED_KB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # shared memory of a processor
BF16_RANKS, HEADS = [(16, 1, 1), (6, 2, 2)], [32, 34, 64]


class Driver:
    """The GPU that Triton is told to compile for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # kernels are kept by device: one for each

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling(capability: int):
    """Launches inside compile for `capability` and append what was compiled, with its grid, to the list."""
    compiled, run = [], triton.JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        compiled.append((run(kernel, *args, grid=grid, warmup=True, **kwargs), grid))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        patch.setattr(flash_decode, "processors", lambda device: (PROCESSORS[capability], capability // 10))
        triton.runtime.driver.set_active(Driver(capability))
        try:
            yield compiled
        finally:
            triton.runtime.driver.set_active(None)


@functools.lru_cache
def decoding(capability, ranks, h, d_head, dtype, with_length=False):
    """The split and the merge kernel, each with its grid, as a full cache of this size would launch them."""
    B, M, room = 1, 4096, 4100
    rank_q, rank_k, rank_v = ranks
    a_q, b_q = (torch.zeros(B, 1, rank_q, width, dtype=dtype) for width in (h, d_head))
    shapes = [(rank, width) for rank in (rank_k, rank_v) for width in (h, d_head)]
    cached = FactorCache(shapes, B, room, dtype=dtype).append(*(torch.zeros(B, M, *s, dtype=dtype) for s in shapes))
    with compiling(capability) as compiled:
        flash_decode.decode(a_q, b_q, *cached, torch.full((B,), M) if with_length else None)
    return compiled


@functools.lru_cache
def machine_code(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the tools inside Triton's package prints about a compiled kernel."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"kernel-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        return subprocess.run([TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()


def resources(kernel) -> dict:
    """Registers of a thread, bytes that spilled, shared memory of a program."""
    usage = machine_code(kernel.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    number = lambda name: int(re.search(rf"{name}:(\d+)", usage)[1])  # noqa: E731
    return {"registers": number("REG"), "spilled": number("STACK"), "shared": kernel.metadata.shared}
