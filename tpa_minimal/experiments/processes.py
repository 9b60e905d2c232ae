"""What a run shares with others: the processes that train together, the signals that stop it, its folder's lock."""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tpa_minimal.experiments.checkpoint import SettingError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class LostError(RuntimeError):
    """Another of the processes that train together has ended, or cannot be reached."""


class Processes:
    """The processes that train one model together: one, or those that torchrun started."""

    def __init__(self, device: torch.device):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.count > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # The others wait for the first while it prepares the data, which can take hours.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))

    def sum(self, values: list[float]) -> list[float]:
        """Each value's sum over the processes."""
        if self.count == 1:
            return values
        total = torch.tensor(values, device=self.device, dtype=torch.float64)
        self.add([total])
        return total.tolist()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes. Raises LostError if one of them has ended."""
        self._exchange(dist.all_reduce, tensors)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first process's. Raises LostError if one of them has ended."""
        self._exchange(functools.partial(dist.broadcast, src=0), tensors)

    def _exchange(self, how: Callable, tensors: Iterable[Tensor]) -> None:
        try:
            for work in [how(tensor, async_op=True) for tensor in tensors] if self.count > 1 else ():
                work.wait()
        except RuntimeError as error:  # of gloo or NCCL
            reason = f"one of the {self.count} processes has ended ({str(error).strip().splitlines()[0][:120]})"
            raise LostError(f"{reason}; continue with --resume") from error

    def each(self, value: float) -> list[float]:
        """The value of every process, in the order of their ranks."""
        return self.sum([value * (rank == self.rank) for rank in range(self.count)])

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """What the first process makes within this block is there when the others enter it."""
        if self.rank > 0:
            self.sum([0.0])
        yield
        if self.rank == 0:
            self.sum([0.0])

    def close(self) -> None:
        """Part from the others."""
        if self.count > 1:
            dist.destroy_process_group()


class StopRequest:
    """Within its `with` block, the signals `numbers` set `.signal` instead of ending the process.

    What is ignored stays so, such as SIGHUP under nohup. A second Ctrl-C ends it. A `handler` of your own is called
    in place of all this. Outside the main thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self, numbers: list[int], handler=None):
        self.numbers, self.handler = numbers, handler or self.note
        self.signal = 0
        self.previous = {}

    def note(self, number, frame):
        """Remember the signal."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.numbers if signal.getsignal(number) is not signal.SIG_IGN]  # by nohup
            self.previous = {number: signal.signal(number, self.handler) for number in heard}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder `out` and keep every other run from it; the end of the process, however it ends, unlocks it.

    Raises SettingError if another run has it.
    """
    import filelock

    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise SettingError(
            f"--out {out}: another run is writing there; wait for it, or choose another --out"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def remove_if_empty(out: Path) -> None:
    """Remove a folder that holds nothing but the lock."""
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] in ([], [".lock"]):
            (out / ".lock").unlink(missing_ok=True)
            out.rmdir()
