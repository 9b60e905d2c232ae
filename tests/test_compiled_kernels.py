"""Every kernel compiled for the GPUs that people have, with no GPU: registers and instructions as the compiler says.

The kernels are launched as always, by the functions that launch them, but on tensors on the CPU, and the driver that
Triton asks for the GPU says what a test wants to hear; its launcher then compiles, and nothing runs.
"""

import contextlib
import functools
import importlib.util
import math
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
M = 2**17
NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "src" / "10_flash_decode.py"


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
def decoding(capability, ranks, h, d_head=64, dtype=torch.bfloat16, with_length=False):
    """The split and the merge kernel, each with its grid, as decoding with a cache of M positions launches them."""
    rank_q, rank_k, rank_v = ranks
    a_q, b_q = (torch.zeros(1, 1, rank_q, width, dtype=dtype) for width in (h, d_head))
    shapes = [(rank, width) for rank in (rank_k, rank_v) for width in (h, d_head)]
    cached = FactorCache(shapes, 1, M + 3, dtype=dtype).view(0, M)
    with compiling(capability) as compiled:
        flash_decode.decode(a_q, b_q, *cached, torch.full((1,), M) if with_length else None)
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


def resources(kernel, capability: int) -> dict:
    """Registers of a thread, bytes that spilled, and how many programs fit on a processor at a time."""
    usage = machine_code(kernel.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * kernel.metadata.num_warps)
    by_shared = SHARED_KB[capability] * 1024 // (kernel.metadata.shared + 1024)
    return {"registers": registers, "spilled": spilled, "fit": min(by_registers, by_shared)}


def widths_of_loads(kernel) -> set[int]:
    """Bytes that one instruction brings from the cache: those of cp.async, and of loads of more than two bytes."""
    ptx = kernel.asm["ptx"]
    asynchronous = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+),", ptx)
    return {int(size, 16) for size in asynchronous} | {
        4 * int(n) for n in re.findall(r"ld\.global\S*\.v(\d)\.b32", ptx)
    }


# Everything with TPA_FULL=1; else the case with most registers on every card, and all cases on two that differ most.
FULL = os.environ.get("TPA_FULL") == "1"
CASES = [
    (capability, ranks, h)
    for capability in PROCESSORS
    for ranks in ((16, 1, 1), (6, 2, 2))
    for h in (32, 34, 64)
    if FULL or (ranks, h) == ((6, 2, 2), 34) or capability in (86, 90)
]


@pytest.mark.parametrize("capability, ranks, h", CASES)
def test_decoding_in_bfloat16(capability, ranks, h):
    """No register spills, all programs run at once, loads are as wide as the strides allow, tensor cores multiply."""
    (split, grid), (merge, _) = decoding(capability, ranks, h)
    used, programs = resources(split, capability), math.prod(grid)
    assert used["spilled"] == resources(merge, capability)["spilled"] == 0
    room = used["fit"] * PROCESSORS[capability]
    assert PROCESSORS[capability] * 0.9 <= programs <= room, used  # one wave, and no processor idle
    # b has rows of 128 bytes, a such of 64, 68 or 128: those of 34 heads are aligned to 4 bytes only.
    assert widths_of_loads(split) == ({16} if h % 8 == 0 else {16, 4})
    ptx = split.asm["ptx"]
    assert re.search(r"wgmma\.mma_async\S*bf16" if capability == 90 else r"mma\.sync\S*bf16", ptx)
    if capability == 90 and h > 32:
        assert "mma.sync" not in ptx  # both products by warp groups


OTHERS = [(90, torch.float32), (86, torch.float32), (80, torch.float16)]


@pytest.mark.parametrize("capability, dtype", OTHERS)
def test_decoding_in_other_types(capability, dtype):
    (split, grid), _ = decoding(capability, (6, 2, 2), 34, 64, dtype, with_length=True)
    used = resources(split, capability)
    assert used["spilled"] == 0 and math.prod(grid) <= used["fit"] * PROCESSORS[capability]


def test_a_longer_cache_compiles_nothing_anew():
    """Only sizes that stay while decoding are compiled in."""
    compiled = []
    for length in (1000, 1001, 1024):
        for room in (1024, 2000):
            shapes = [(1, 32), (1, 64)] * 2
            cached = FactorCache(shapes, 1, room, dtype=torch.bfloat16).view(0, length)
            a_q, b_q = (torch.zeros(1, 1, 6, width, dtype=torch.bfloat16) for width in (32, 64))
            with compiling(90) as both:
                flash_decode.decode(a_q, b_q, *cached)
            compiled.append(tuple(kernel.hash for kernel, _ in both))
    assert len(set(compiled)) == 1


@pytest.mark.parametrize("capability", PROCESSORS if FULL else (86, 90))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appending_spills_nothing(capability, dtype):
    h, d_head, ranks = 34, 64, (6, 2, 2)
    cached = FactorCache([(2, h), (2, d_head)] * 2, 3, 100, dtype=dtype).view(0, 100)
    new, tables = torch.zeros(3, 1, sum(ranks) * (h + d_head), dtype=dtype), torch.zeros(2, 100, d_head // 2)
    with compiling(capability) as compiled:
        flash_decode.append(new, torch.ones(3, dtype=torch.int32), *tables, *cached)
    [(kernel, grid)] = compiled
    assert grid == (6, 3) and resources(kernel, capability)["spilled"] == 0


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The kernels of notebook 10, as a module."""
    kernels = re.findall(
        r"^@triton\.jit\ndef .*?(?=\n\n\n|\n\n# %%)", NOTEBOOK.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    path = tmp_path_factory.mktemp("notebook") / "kernels.py"
    path.write_text("import triton\nimport triton.language as tl\n\n\n" + "\n\n\n".join(kernels), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(kernels) == 2
    return module


@pytest.mark.parametrize("capability", PROCESSORS if FULL else (86, 90))
def test_the_kernels_of_notebook_10(notebook, capability):
    h, d_h, n = 32, 64, 1000
    query, a, b, out = (torch.zeros(rows, width) for rows, width in ((h, d_h), (n, h), (n, d_h), (4 * h, d_h)))
    with compiling(capability) as compiled:
        notebook.scores_kernel[4,](query, a, b, torch.zeros(n, h), n, H=h, D=d_h, BLOCK=32)
        notebook.split_kernel[4,](query, a, b, a, b, out, out, out, n, 250, H=h, D=d_h, BLOCK=16)
    assert [resources(kernel, capability)["spilled"] for kernel, _ in compiled] == [0, 0]
