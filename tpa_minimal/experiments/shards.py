"""Documents -> two files of tokens, training and validation, made in a folder of their own and resumed if interrupted.

While they are made, the tokens of all documents go into ids.bin, each document's place in a split and its length into
documents.bin, and state.json says where to go on. At the end they are divided and get their name in one step.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tpa_minimal import files
from tpa_minimal.experiments.sources import LONGEST_WAIT, POSITIONS, DataError, Interrupted, cut, say, short

if TYPE_CHECKING:
    import tiktoken

SPLITS = ("train", "val")
VALIDATION_SHARE = 0.08  # of the documents, by a hash of their text
SENSIBLE_SHARE = 0.02, 0.25  # of the tokens; outside it the hash alone does not decide
LEAST_TOKENS = 1000
SAVE_EVERY = 5.0  # seconds
ROW = np.dtype([("position", "<u8"), ("length", "<u4")])


def build(request: dict, documents: Callable, tokenizer: "tiktoken.Encoding", folder: Path, progress: bool) -> None:
    """Make `folder` with meta.json, train.bin and val.bin, whole or not at all.

    After a failure that may pass, and after being ended, what was made stays beside it for the next call to go on from;
    that folder is this user's own and locked while in use. Raises DataError.
    """
    tokens, work = request["tokens"], folder.with_name(_own(folder.name))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder.parent)
        if 4 * tokens > (free := shutil.disk_usage(folder.parent).free):  # 2 bytes a token, twice while dividing
            raise DataError(
                f"tokens={tokens}: takes {4 * tokens // 10**6:,} MB of disk, and {folder.parent} has "
                f"{free // 10**6:,} MB free; ask for fewer tokens, or set TPA_CACHE elsewhere"
            )
        with _locked(work):
            keep = True
            try:
                if not os.path.exists(folder):  # otherwise another process has made it meanwhile
                    work.mkdir(exist_ok=True)
                    _collect(work, tokens, documents, tokenizer, progress)
                    _divide(work, request, tokenizer)
                    try:
                        os.rename(work / "done", folder)
                    except OSError:
                        if not os.path.exists(folder):  # otherwise another user was faster
                            raise
                keep = False
            except DataError as error:
                keep = isinstance(error, Interrupted)
                raise
            finally:
                if not keep or not (work / "state.json").exists():
                    shutil.rmtree(work, ignore_errors=True)
                    with contextlib.suppress(OSError):  # Windows does not remove what is open
                        _lock_file(work).unlink()
    except OSError as error:
        kind = Interrupted if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else DataError
        raise kind(f"writing {folder} failed: {short(error)}; make room, or set TPA_CACHE elsewhere") from error


def padded_vocabulary(tokenizer: "tiktoken.Encoding") -> int:
    """The size to build a model with: the tokenizer's, rounded up to a multiple of 64."""
    return -(-tokenizer.n_vocab // 64) * 64


def _own(name: str) -> str:
    """A working folder's name, which no other user shares, so that their leftovers are in nobody's way."""
    return f".making-{getattr(os, 'getuid', lambda: 'me')()}-{name}"


def _lock_file(work: Path) -> Path:
    return work.with_name(f"{work.name}.lock")


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One process at a time; its end, of whatever kind, releases the lock."""
    import filelock

    lock = filelock.FileLock(_lock_file(work))
    try:
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            say(f"waiting for another process that prepares the same data, at most {LONGEST_WAIT / 60:.0f} minutes")
            lock.acquire(timeout=LONGEST_WAIT)
    except filelock.Timeout:
        raise DataError(f"another process still holds {_lock_file(work)}; end it and call again") from None
    try:
        yield
    finally:
        lock.release()


def _clear_leftovers(cache: Path) -> None:
    """Remove what this user began and did not come back to for a week."""
    import filelock

    for lock in cache.glob(_own("*.lock")):
        work = lock.with_suffix("")
        with contextlib.suppress(OSError, filelock.Timeout):  # another process has just finished it, or is at work
            touched = max(path.stat().st_mtime for path in (lock, work, *work.glob("*")) if path.exists())
            if time.time() - touched > 7 * 24 * 3600:
                with filelock.FileLock(lock, timeout=0):
                    shutil.rmtree(work, ignore_errors=True)
                    lock.unlink()


def _collect(work: Path, tokens: int, documents: Callable, tokenizer: "tiktoken.Encoding", progress: bool) -> None:
    """Tokenize documents until there are enough, or no more."""
    from tqdm.auto import tqdm

    state, saved = _saved_state(work), time.monotonic()
    if total := state["tokens"]:
        say(f"going on at {total:,} tokens, where an earlier preparation stopped")
    number = state["documents"]
    with (
        open(work / "ids.bin", "ab") as ids,
        open(work / "documents.bin", "ab") as rows,
        contextlib.closing(documents(work / "scraps", state["source"])) as stream,
        tqdm(total=tokens, initial=total, unit=" tokens", unit_scale=True, disable=not progress) as bar,
    ):
        ids.truncate(2 * total)
        rows.truncate(ROW.itemsize * number)
        try:
            while total < tokens and (found := next(stream, None)):
                text, position, source = found
                # In small pieces: tiktoken panics at a million spaces, and older ones are quadratic in equal letters.
                new = list(itertools.chain.from_iterable(map(tokenizer.encode_ordinary, cut(text, 4096))))
                new = [*new[: tokens - total - 1], tokenizer.eot_token]
                ids.write(np.array(new, dtype=np.uint16).tobytes())
                rows.write(np.array((position, len(new)), dtype=ROW).tobytes())
                total, number = total + len(new), number + 1
                bar.update(len(new))
                if source is not None:  # between two pieces of one document nothing can go on
                    state |= {"tokens": total, "documents": number, "source": source}
                    if time.monotonic() - saved > SAVE_EVERY:
                        _save_state(work, state, ids, rows)
                        saved = time.monotonic()
        finally:
            if state["documents"]:
                _save_state(work, state, ids, rows)


def _save_state(work: Path, state: dict, *written) -> None:
    for file in written:
        file.flush()
        os.fsync(file.fileno())
    files.write_json(work / "state.json", state)


def _saved_state(work: Path) -> dict:
    """Where an earlier preparation stopped, if what it left fits together; otherwise the beginning."""
    versions = [importlib.metadata.version("datasets"), sys.version]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        state = files.read_json(work / "state.json")
        lengths = np.fromfile(work / "documents.bin", dtype=ROW)["length"][: state["documents"]]
        whole = len(lengths) == state["documents"] and lengths.sum(dtype=np.int64) == state["tokens"]
        if whole and state["versions"] == versions and (work / "ids.bin").stat().st_size >= 2 * state["tokens"]:
            return state
    return {"tokens": 0, "documents": 0, "source": None, "versions": versions}


def _divide(work: Path, request: dict, tokenizer: "tiktoken.Encoding") -> None:
    """Write what is to stay into work/done."""
    rows = np.fromfile(work / "documents.bin", dtype=ROW)
    lengths, held_out = _held_out(rows)
    if held_out.all() or not held_out.any():
        raise DataError(
            f"{len(np.unique(rows['position']))} different documents with text in {request['tokens']:,} tokens are too "
            "few to split into training and validation; give more documents, or ask for more tokens"
        )
    ids, done = np.memmap(work / "ids.bin", dtype=np.uint16, mode="r"), work / "done"
    shutil.rmtree(done, ignore_errors=True)
    done.mkdir()
    digests = {split: hashlib.sha256() for split in SPLITS}
    with open(done / "train.bin", "wb") as train, open(done / "val.bin", "wb") as val:
        for end, length, held in zip(np.cumsum(lengths), lengths, held_out):
            document = np.array(ids[end - length : end])
            document[-1] = tokenizer.eot_token  # also of the first half of one that was cut in two
            (val if held else train).write(document)
            digests["val" if held else "train"].update(document)
    sums = {split: digest.hexdigest() for split, digest in digests.items()}
    meta = {
        "source": request["source"],
        "tokenizer": tokenizer.name,
        "documents": {"train": int((~held_out).sum()), "val": int(held_out.sum())},
        "tokens": {"train": int(lengths[~held_out].sum()), "val": int(lengths[held_out].sum())},
        "sha256": sums,
        "checksum": hashlib.sha256("".join(sums.values()).encode()).hexdigest(),  # to compare data sets by
        "request": request,
        "vocab_size": padded_vocabulary(tokenizer),
    }
    files.write_json(done / "meta.json", meta)


def _held_out(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents' lengths, and which of them are for validation: those whose hash is below VALIDATION_SHARE.

    Where that gives no sensible share of the tokens, those with the lowest or the highest hashes that give the best
    one. Where none is sensible, the longest document is cut in two, so that there is one more. Equal texts, which have
    equal hashes, stay on one side.
    """
    lengths, total = rows["length"].astype(np.int64), rows["length"].sum(dtype=np.int64)

    def is_sensible(chosen):
        return SENSIBLE_SHARE[0] * total <= lengths[chosen].sum() <= SENSIBLE_SHARE[1] * total

    chosen = rows["position"] < VALIDATION_SHARE * POSITIONS
    if is_sensible(chosen):
        return lengths, chosen
    _, text, copies = np.unique(rows["position"], return_inverse=True, return_counts=True)
    shares = np.cumsum(np.bincount(text, lengths))[:-1] / total
    if n := len(shares):
        best = int(np.abs(np.concatenate([shares, 1 - shares]) - VALIDATION_SHARE).argmin())
        chosen = (text <= best % n) == (best < n)
        if is_sensible(chosen):
            return lengths, chosen
    single = np.where(copies[text] == 1, lengths, 0)
    longest = int(single.argmax())
    tail = min(round(VALIDATION_SHARE * total), single[longest] // 2)
    if single[longest] < LEAST_TOKENS or (n and tail < SENSIBLE_SHARE[0] * total):
        return lengths, chosen
    lengths[longest] -= tail
    held_out = np.zeros(len(lengths), dtype=bool)
    return np.insert(lengths, longest + 1, tail), np.insert(held_out, longest + 1, True)
