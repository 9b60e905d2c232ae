"""Documents -> tokens -> shards on disk -> batches, from FineWeb-Edu, local files or the built-in lessons.

`prepare` does it all and keeps the result under TPA_CACHE (default: the user's cache folder), so that the second
request for the same thing costs a checksum. Nothing in a data set is ever executed or unpickled.

FineWeb-Edu (Penedo et al. 2024) is published under the licence ODC-BY 1.0 by its makers at Hugging Face.
"""

import base64
import functools
import hashlib
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from tpa_minimal.experiments import lessons

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
HUB_REPOSITORY, HUB_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"  # the configuration "sample-10BT"
VALIDATION_SHARE = 0.08  # of the documents, by a hash of their text
LEAST_TOKENS = 1000
SUFFIXES = (".parquet", ".jsonl", ".txt")
SPLITS = ("train", "val")
TOKENIZERS = ("gpt2", "lessons")

ATTEMPTS, PATIENCE = 4, 60.0  # reading from the hub is tried this often, and not again after so many seconds


class DataError(ValueError):
    """Data that cannot be had or used; the message is one line that names the value and the remedy."""


def _say(line: str) -> None:
    print(f"data: {line}", flush=True)


# -------------------------------------------------------------------------------------------------- token data


@dataclass(frozen=True)
class TokenData:
    """Tokenized documents on disk, each ended by <|endoftext|>, and what is known about them.

    `train` and `val` are memory-mapped uint16; `vocab_size` is the tokenizer's rounded up to a multiple of 64, the
    size to build a model with; `meta` is the sidecar: source, tokenizer, documents, tokens, checksums and the request.
    """

    folder: Path
    source: str
    tokenizer: "tiktoken.Encoding"
    vocab_size: int
    train: np.memmap
    val: np.memmap
    meta: dict

    def batch(self, split: str, step: int, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """Windows at random places: inputs and targets (the inputs moved on by one), both (batch_size, seq_len) int64.

        A pure function of its arguments, so that training resumes with exactly the batches it would have had. Raises
        DataError if the split is shorter than a window.
        """
        tokens = self._tokens(split, seq_len)
        # The raw bits of PCG64 are the part of NumPy's random numbers that is promised never to change.
        bits = np.random.PCG64([seed, step]).random_raw(batch_size)
        starts = (bits % np.uint64(len(tokens) - seq_len)).astype(np.int64)
        return _windows(tokens, starts, seq_len)

    def validation_batches(self, batch_size: int, seq_len: int, max_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first windows of the validation split, side by side: the same ones at every call.

        Yields at most `max_batches` times (inputs, targets) of shape (batch_size, seq_len); fewer where the split
        ends, and then the last batch may be smaller. Raises DataError if it is shorter than one window.
        """
        tokens = self._tokens("val", seq_len)
        starts = np.arange(0, len(tokens) - seq_len, seq_len)[: batch_size * max_batches]
        for first in range(0, len(starts), batch_size):
            yield _windows(tokens, starts[first : first + batch_size], seq_len)

    def _tokens(self, split: str, seq_len: int) -> np.memmap:
        if split not in SPLITS:
            raise DataError(f'split {split!r} does not exist; choose "train" or "val"')
        tokens = self.train if split == "train" else self.val
        if len(tokens) <= seq_len:
            raise DataError(
                f"sequences of {seq_len} tokens do not fit: split {split} of {self.source} holds {len(tokens)} tokens; "
                "ask for more tokens or shorter sequences"
            )
        return tokens


def _windows(tokens: np.memmap, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(np.stack([tokens[s : s + seq_len + 1] for s in starts]).astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def load(folder: str | Path) -> TokenData:
    """Open what `prepare` made, after checking the size and the SHA-256 sum of both shards.

    Raises DataError if a file is missing, cut short or changed.
    """
    folder = Path(folder)
    remedy = f"delete the folder {folder} and the data will be made again"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        name, source, vocab_size = meta["tokenizer"], meta["source"], int(meta["vocab_size"])
        sizes = {split: int(meta["tokens"][split]) for split in SPLITS}
        sums = {split: str(meta["sha256"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / 'meta.json'} cannot be read ({_short(error)}); {remedy}") from error
    shards = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        held = file.stat().st_size if file.exists() else 0
        if held != 2 * sizes[split]:
            raise DataError(f"{file} holds {held} bytes where {2 * sizes[split]} were written; {remedy}")
        if (found := _sha256(file)) != sums[split]:
            raise DataError(f"{file} has SHA-256 {found[:12]}… where {sums[split][:12]}… was written; {remedy}")
        shards[split] = np.memmap(file, dtype=np.uint16, mode="r")
    return TokenData(folder, source, load_tokenizer(name), vocab_size, meta=meta, **shards)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _short(error: BaseException) -> str:
    """The first line of an error's message, for use within a line of ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"


# --------------------------------------------------------------------------------------------------- preparing


def prepare(
    source: str | Path = "auto",
    tokens: int = 2_000_000,
    *,
    tokenizer: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TokenData:
    """Tokenize documents until there are `tokens` tokens, training and validation together, or reuse the shards.

    source: "fineweb-edu" (streamed from the Hugging Face Hub), "lessons" (built in; `seed` chooses which), the path
    of a .parquet, .jsonl or .txt file or of a folder of them, or "auto": FineWeb-Edu where the hub can be reached,
    otherwise the lessons. tokenizer: "gpt2" or "lessons"; by default gpt2 for real text where it can be had, otherwise
    the lessons' own. Says in one line what is in use. The shards appear whole or not at all. Raises DataError.
    """
    if tokenizer not in (None, *TOKENIZERS):
        raise DataError(f"tokenizer={tokenizer!r}: does not exist; choose one of {', '.join(TOKENIZERS)}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < LEAST_TOKENS:
        raise DataError(f"tokens={tokens!r}: must be a whole number, {LEAST_TOKENS} or more")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed={seed!r}: must be a whole number, 0 or more")
    why = ""
    if source == "auto":
        source, why = _choose(tokens, tokenizer or "gpt2")
    if source == "fineweb-edu":
        documents, identity, name = _hub_documents, _hub_identity(), tokenizer or "gpt2"
    elif source == "lessons":
        documents, name = functools.partial(_lesson_documents, seed), tokenizer or "lessons"
        identity = {"source": "lessons", "version": lessons.VERSION, "seed": seed}
    else:
        files = _local_files(Path(source))
        documents = functools.partial(_local_documents, files)
        stats = [(os.path.realpath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity = {"source": os.path.realpath(source), "files": stats}
        name = tokenizer or "gpt2"
        if tokenizer is None and (problem := _gpt2_problem(seconds=3)):
            name, why = "lessons", f"; no gpt2 tokenizer, since {problem}"
    request = _request(identity, tokens, name)
    folder = _folder(request)
    if folder.exists():
        data, how = load(folder), ", from the cache"
    else:
        if source == "fineweb-edu" and (problem := _hub_problem(seconds=10)):
            raise DataError(f"FineWeb-Edu cannot be had: {problem}; connect to the network, or use --data lessons")
        _build(request, documents, load_tokenizer(name), folder, progress)
        data, how = load(folder), ""
    held = data.meta["tokens"]
    what = {"fineweb-edu": "FineWeb-Edu", "lessons": "the built-in lessons"}.get(source, str(source))
    _say(f"{what}, {held['train']:,} + {held['val']:,} tokens of the {name} tokenizer{how}{why}")
    if sum(held.values()) < tokens:
        _say(f"that is all there is: {what} holds {sum(held.values()):,} tokens, fewer than the {tokens:,} asked for")
    return data


def _choose(tokens: int, tokenizer: str) -> tuple[str, str]:
    """What "auto" means here and now, and the reason if it is the lessons. With no network, in under 3 seconds."""
    own = tokenizer == "lessons"
    if (own or _gpt2_cached()) and _folder(_request(_hub_identity(), tokens, tokenizer)).exists():
        return "fineweb-edu", ""
    problem = _hub_problem(seconds=2.5) or (None if own else _gpt2_problem(seconds=2))
    return ("lessons", f"; not FineWeb-Edu, since {problem}") if problem else ("fineweb-edu", "")


def _request(identity: dict, tokens: int, tokenizer: str) -> dict:
    """All that the shards depend on."""
    vocabulary = {"vocabulary": _sha256(lessons.TOKENIZER_FILE)} if tokenizer == "lessons" else {}
    return {**identity, **vocabulary, "tokens": tokens, "tokenizer": tokenizer}


def cache_folder() -> Path:
    """Where shards are kept: TPA_CACHE, or tpa-minimal in the folder that the system has for caches."""
    if os.environ.get("TPA_CACHE"):
        return Path(os.path.expanduser(os.environ["TPA_CACHE"]))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tpa-minimal"


def _folder(request: dict) -> Path:
    """The one folder for a request: equal requests, equal folder."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{Path(request['source']).stem[:40]}-{request['tokens']}-{digest}"


def _build(request: dict, documents: Callable, tokenizer, folder: Path, progress: bool) -> None:
    """Write both shards and the sidecar into a temporary folder, and give it its name at the very end."""
    from tqdm.auto import tqdm

    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        label = folder.name.rsplit("-", 2)[0]
        count = dict(total=request["tokens"], unit=" tokens", unit_scale=True, mininterval=0.5)
        with tqdm(desc=label, disable=not progress, **count) as bar:
            meta = _write_shards(documents, tokenizer, request["tokens"], temporary, bar)
        meta = {"source": request["source"], "tokenizer": tokenizer.name, **meta, "request": request}
        meta["vocab_size"] = -(-tokenizer.n_vocab // 64) * 64
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "meta.json").exists():  # otherwise somebody else made the same one meanwhile
                raise
    except OSError as error:
        raise DataError(f"writing {folder} failed: {_short(error)}; make room, or set TPA_CACHE elsewhere") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a process that was killed had begun to make, a day after it last wrote to it."""
    for left in folder.glob(".making-*"):
        try:
            age = time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except FileNotFoundError:  # another process has just finished it
            continue
        if age > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)


def _write_shards(documents: Callable, tokenizer, tokens: int, folder: Path, bar) -> dict:
    """Tokenize until there are `tokens` tokens; return the counts and checksums."""
    held, counts, lowest = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), (2.0, 0, 0)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        stream = documents()
        for text, position in stream:
            ids = tokenizer.encode_ordinary(text)[: tokens - sum(held.values()) - 1] + [tokenizer.eot_token]
            split = "val" if position < VALIDATION_SHARE else "train"
            if split == "train":
                lowest = min(lowest, (position, held["train"], len(ids)))
            (val if split == "val" else train).write(np.array(ids, dtype=np.uint16).tobytes())
            held[split] += len(ids)
            counts[split] += 1
            bar.update(len(ids))
            if sum(held.values()) >= tokens:
                break
        stream.close()
    if sum(counts.values()) < 2 or not held["train"]:
        raise DataError(
            f"{sum(counts.values())} documents with text in {tokens:,} tokens are too few to split into training and "
            "validation; give more documents, or ask for more tokens"
        )
    if not held["val"]:  # few documents, none below the threshold: take the lowest of them
        _, start, length = lowest
        whole = np.fromfile(folder / "train.bin", dtype=np.uint16)
        whole[start : start + length].tofile(folder / "val.bin")
        np.delete(whole, slice(start, start + length)).tofile(folder / "train.bin")
        held = {"train": held["train"] - length, "val": length}
        counts = {"train": counts["train"] - 1, "val": 1}
    sums = {split: _sha256(folder / f"{split}.bin") for split in SPLITS}
    checksum = hashlib.sha256("".join(sums.values()).encode()).hexdigest()  # of everything, to compare data sets by
    return {"documents": counts, "tokens": held, "sha256": sums, "checksum": checksum}


# ----------------------------------------------------------------------------------------------------- sources
# Each yields (text, position), a position between 0 and 1: below VALIDATION_SHARE the document is held out.


def _position(text: str) -> float:
    """Where a hash puts this text between 0 and 1: the same everywhere, for ever."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48


def _lesson_documents(seed: int) -> Iterator[tuple[str, float]]:
    # A hash of the text would put the same names on both sides, so the lessons choose theirs by the names.
    for text, held_out in lessons.documents(seed):
        yield text, 0.0 if held_out else 1.0


def _hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _hub_identity() -> dict:
    return {"source": "fineweb-edu", "repository": HUB_REPOSITORY, "files": HUB_FOLDER, "endpoint": _hub_endpoint()}


def _hub_problem(seconds: float) -> str | None:
    """Why FineWeb-Edu cannot be read from the hub, or None if it seems that it can."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    return _unreachable(f"{_hub_endpoint()}/api/datasets/{HUB_REPOSITORY}/tree/main/{HUB_FOLDER}", seconds)


def _unreachable(address: str, seconds: float) -> str | None:
    """Why an address does not answer well within `seconds`, or None if it does."""
    import requests

    def ask():
        with requests.get(address, timeout=seconds, stream=True) as response:
            return None if response.ok else f"answers {response.status_code}"

    try:
        problem = _within(seconds, ask)  # looking up a name has no time-out of its own
    except (TimeoutError, requests.Timeout):
        problem = f"does not answer within {seconds:g} s"
    except Exception:
        problem = "cannot be reached"
    try:
        host = urlsplit(address).netloc
    except ValueError:
        host = ""
    return problem and f"{host or address} {problem}"


def _hub_documents() -> Iterator[tuple[str, float]]:
    """FineWeb-Edu's texts in order, downloading the column `text` alone, one group of rows at a time.

    Read by pyarrow, in this thread: leaving the interpreter after taking a part of a `datasets` stream can abort it.
    """
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem(endpoint=_hub_endpoint(), skip_instance_cache=True)
    folder = f"datasets/{HUB_REPOSITORY}/{HUB_FOLDER}"
    listing = functools.partial(_within, PATIENCE / 2, lambda: sorted(hub.glob(f"{folder}/*.parquet")))
    paths = _patiently(listing, "listing FineWeb-Edu")
    for path in paths:
        # Without a cache, what is asked for is what is read, and not the 5 MB after it too.
        opening = functools.partial(hub.open, path, cache_type="none")
        yield from _parquet_documents(lambda opening=opening: _ReadInTime(opening), Path(path).name, _patiently)


class _ReadInTime:
    """A file of the hub that is opened and read in bounded time, though its library may wait for hours."""

    def __init__(self, opening: Callable):
        self._opened = _within(PATIENCE, opening)

    def read(self, size: int = -1) -> bytes:
        """As of any file; TimeoutError where less than 20 kB/s arrive for long, or nothing."""
        return _within(PATIENCE + max(size, 0) / 20_000, functools.partial(self._opened.read, size))

    def __getattr__(self, name):
        return getattr(self._opened, name)


def _within(seconds: float, action: Callable):
    """The action's result or error; TimeoutError after so many seconds, for a request that has no time-out."""
    answers = queue.Queue()

    def act():
        try:
            answers.put((action(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=act, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _patiently(action: Callable, what: str):
    """The action's result, tried again after a failure that may pass; DataError when it does not in bounded time."""
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:  # which HTTP library is beneath, and so its errors, differs between hub versions
            status = getattr(getattr(error, "response", None), "status_code", None) or 500
            final = 400 <= status < 500 and status not in (408, 429)
            if final or attempt == ATTEMPTS or time.monotonic() - started > PATIENCE:
                remedy = "try again later, or use --data lessons"
                raise DataError(f"{what} failed after {attempt} attempts: {_short(error)}; {remedy}") from error
            _say(f"{what} failed ({_short(error)}); trying again in {attempt} s")
            time.sleep(attempt)


def _at_once(action: Callable, what: str):
    """The action's result, tried once; DataError if it fails."""
    try:
        return action()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise error if isinstance(error, DataError) else DataError(f"{what} failed: {_short(error)}") from error


def _parquet_documents(open_file: Callable, name: str, attempt: Callable) -> Iterator[tuple[str, float]]:
    from pyarrow import parquet

    def open_text():
        opened = parquet.ParquetFile(open_file())
        if "text" not in opened.schema_arrow.names:
            columns = ", ".join(opened.schema_arrow.names)
            raise DataError(f"{name} has no column text, only {columns}; rename the one that holds the texts")
        if str(kind := opened.schema_arrow.field("text").type) not in ("string", "large_string", "string_view"):
            raise DataError(f"{name}: its column text holds {kind}, not text; write it as strings")
        return opened

    opened = attempt(open_text, f"opening {name}")
    for group in range(opened.num_row_groups):
        # One thread: a background thread of pyarrow's may abort an interpreter that leaves before it is done.
        read = functools.partial(opened.read_row_group, group, columns=["text"], use_threads=False)
        for text in attempt(read, f"reading {name}, row group {group}")["text"].to_pylist():
            if text and text.strip():
                yield text, _position(text)


def _local_files(path: Path) -> list[Path]:
    if not path.exists():
        known = "auto, fineweb-edu or lessons"
        raise DataError(f"data source {str(path)!r} is no file or folder; give a path that exists, or {known}")
    inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = [path] if path.is_file() else sorted(inside)
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is not and does not hold a file that can be read; give one of {', '.join(SUFFIXES)}")
    return files


def _local_documents(files: list[Path]) -> Iterator[tuple[str, float]]:
    for file in files:
        if file.suffix.lower() == ".parquet":
            yield from _parquet_documents(lambda file=file: file, str(file), _at_once)
            continue
        texts = _json_texts if file.suffix.lower() == ".jsonl" else _plain_texts
        try:
            with open(file, encoding="utf-8-sig") as lines:
                for text in texts(lines, file):
                    if text.strip():
                        yield text, _position(text)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {_short(error)}; check its permissions") from error
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]
            raise DataError(f"{file} is not UTF-8 text (it holds the byte {wrong:#x}); save it as UTF-8") from error


def _json_texts(lines, file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise DataError(f'{file}, line {number}: not a JSON object with a string "text"; mend or remove it')
            yield text


def _plain_texts(lines, file: Path) -> Iterator[str]:
    """A text file's documents: divided by <|endoftext|> where that occurs, else at blank lines every 2,000 letters."""
    divided = any(END_OF_TEXT in line for line in lines)
    lines.seek(0)
    parts, length = [], 0
    for line in lines:
        *ended, line = line.split(END_OF_TEXT)
        for end in ended:
            yield "".join([*parts, end])
            parts, length = [], 0
        if not divided and length >= 2000 and not line.strip():
            yield "".join(parts)
            parts, length = [], 0
        parts.append(line)
        length += len(line)
    yield "".join(parts)


# -------------------------------------------------------------------------------------------------- tokenizers


@functools.cache
def load_tokenizer(name: str) -> "tiktoken.Encoding":
    """The tokenizer "gpt2" (50,257 tokens, tiktoken's) or "lessons" (1,024 tokens, shipped with the package).

    Both encode any text, byte by byte where they know nothing longer. Raises DataError if gpt2 cannot be had.
    """
    import tiktoken

    if name == "lessons":
        lines = lessons.TOKENIZER_FILE.read_text(encoding="ascii").splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        return tiktoken.Encoding(
            "lessons",
            pat_str=lessons.TOKEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )
    if name != "gpt2":
        raise DataError(f'tokenizer {name!r} does not exist; choose "gpt2" or "lessons"')
    if not _gpt2_cached():
        _download_gpt2()
    return tiktoken.get_encoding("gpt2")


GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {  # the two files that tiktoken builds gpt2 from, with their SHA-256 sums
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def _gpt2_file(name: str) -> Path:
    """Where tiktoken keeps its copy of one of GPT2_FILES."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder == "":
        raise DataError("TIKTOKEN_CACHE_DIR is empty, so gpt2's vocabulary cannot be kept; name a folder, or unset it")
    folder = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
    return folder / hashlib.sha1((GPT2_ADDRESS + name).encode()).hexdigest()


def _gpt2_cached() -> bool:
    """Whether both files are there and whole, so that tiktoken will not go to the network."""
    return all(
        _gpt2_file(name).is_file() and _sha256(_gpt2_file(name)) == digest for name, digest in GPT2_FILES.items()
    )


def _gpt2_problem(seconds: float) -> str | None:
    """Why the gpt2 tokenizer cannot be had, or None if it seems that it can."""
    return None if _gpt2_cached() else _unreachable(GPT2_ADDRESS + "vocab.bpe", seconds)


def _download_gpt2() -> None:
    """Fetch gpt2's vocabulary to where tiktoken keeps it; its own download would wait without end."""
    import requests

    remedy = "connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --data lessons"
    if problem := _gpt2_problem(seconds=10):
        raise DataError(f"the gpt2 tokenizer cannot be had: {problem}; {remedy}")

    def fetch(name: str) -> bytes:
        started, content = time.monotonic(), b""
        with requests.get(GPT2_ADDRESS + name, timeout=10, stream=True) as response:
            response.raise_for_status()
            for block in response.iter_content(1 << 16):
                content += block
                if time.monotonic() - started > PATIENCE:
                    raise TimeoutError(f"not finished after {PATIENCE:g} s")
        if hashlib.sha256(content).hexdigest() != GPT2_FILES[name]:
            raise ValueError("what arrived has a wrong checksum")
        return content

    for name in GPT2_FILES:
        content = _patiently(lambda name=name: fetch(name), f"downloading gpt2's {name}")
        with _written_whole(_gpt2_file(name)) as temporary:
            temporary.write_bytes(content)


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- recall


@dataclass(frozen=True)
class RecallProbe:
    """N lessons that state C facts, continue about other things, and ask for one of the facts.

    Row (n, c) is lesson n answered with the object of fact c, then <|endoftext|> up to the common length L.
    """

    tokens: Tensor  # (N, C, L) int64
    answer_start: Tensor  # (N,) position of the answer's first token
    answer_length: Tensor  # (N, C) tokens in the answer
    correct: Tensor  # (N,) which fact is asked for
    texts: list[str]  # the N lessons with their right answers

    def __len__(self) -> int:
        return len(self.texts)


class RecallScore(NamedTuple):
    """Shares between 0 and 1. `exact` is 0 for a model that guesses, `choice` is about `chance`."""

    exact: float  # every token of the right answer is the model's first choice, given those before it
    choice: float  # the right answer is likelier than the objects of all other facts
    chance: float  # 1 / number of facts


def recall_probe(
    tokenizer: "tiktoken.Encoding", n_probes: int = 64, *, distance: int = 64, n_facts: int = 4, seed: int = 0
) -> RecallProbe:
    """Make a probe of recall: who has what, asked for at least `distance` tokens after it was said.

    The names are those of held-out lessons. `distance` counts the tokens between the end of the statement and the
    question, and is exceeded by less than one sentence; other statements count too. Raises DataError.
    """
    for name, value, least in (("n_probes", n_probes, 1), ("distance", distance, 0), ("n_facts", n_facts, 2)):
        if not isinstance(value, int) or value < least:
            raise DataError(f"{name}={value!r}: must be a whole number, {least} or more")
    if n_facts > len(lessons.COLOURS):
        raise DataError(f"n_facts={n_facts}: there are {len(lessons.COLOURS)} colours, so at most as many facts")
    draw = lessons.Draw(seed, held_out=True)
    rows, starts, lengths, correct, texts = [], [], [], [], []
    for _ in range(n_probes):
        prompt, answers, asked = lessons.recall(
            draw, n_facts, distance, lambda text: len(tokenizer.encode_ordinary(text))
        )
        head = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
        tails = [tokenizer.encode_ordinary(answer) for answer in answers]
        rows.append([head + tail for tail in tails])
        starts.append(len(head))
        lengths.append([len(tail) for tail in tails])
        correct.append(asked)
        texts.append(prompt + answers[asked])
    longest = max(len(row) for candidates in rows for row in candidates)
    padded = [[row + [tokenizer.eot_token] * (longest - len(row)) for row in candidates] for candidates in rows]
    return RecallProbe(*map(torch.tensor, (padded, starts, lengths, correct)), texts)


@torch.no_grad()
def score_recall(model: Callable, probe: RecallProbe, batch_size: int = 16) -> RecallScore:
    """How well a model recalls: `model` takes tokens (B, T) and returns logits (B, T, vocab_size)."""
    n, c, length = probe.tokens.shape
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
    rows = probe.tokens.flatten(0, 1)  # (N·C, L)
    starts = probe.answer_start.repeat_interleave(c)[:, None]  # (N·C, 1)
    places = torch.arange(1, length)  # targets' positions
    in_answer = (places >= starts) & (places < starts + probe.answer_length.flatten()[:, None])  # (N·C, L-1)
    log_likelihood, first_choice = [], []
    for some, inside in zip(rows.split(batch_size), in_answer.split(batch_size)):
        logits, targets, inside = model(some[:, :-1].to(device)), some[:, 1:].to(device), inside.to(device)
        row = inside.nonzero()[:, 0]  # only the answers' logits are normalized: (tokens of answers,)
        logits, targets = logits[inside].float(), targets[inside]
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        missed = (logits.argmax(-1) != targets).float()
        log_likelihood.append(torch.zeros(len(some), device=device).index_add(0, row, chosen).cpu())
        first_choice.append(torch.zeros(len(some), device=device).index_add(0, row, missed).cpu() == 0)
    right = torch.cat(log_likelihood).view(n, c).argmax(1) == probe.correct
    exact = torch.cat(first_choice).view(n, c)[torch.arange(n), probe.correct]
    return RecallScore(exact.float().mean().item(), right.float().mean().item(), 1 / c)
