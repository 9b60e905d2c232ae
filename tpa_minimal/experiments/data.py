"""Documents -> tokens -> shards on disk -> batches, from FineWeb-Edu, local files or the built-in lessons.

`prepare` does it all and keeps the result under TPA_CACHE (default: the user's cache folder), so that the second
request for the same thing costs a checksum. A preparation that was interrupted goes on where it stopped.

FineWeb-Edu (Penedo et al. 2024) is published under the licence ODC-BY 1.0 by its makers at Hugging Face.
"""

import base64
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpa_minimal import files
from tpa_minimal.experiments import lessons, shards, sources
from tpa_minimal.experiments.lessons import END_OF_TEXT
from tpa_minimal.experiments.shards import LEAST_TOKENS, SPLITS
from tpa_minimal.experiments.sources import BLOCK, DataError, say, short

if TYPE_CHECKING:
    import tiktoken

TOKENIZERS = ("gpt2", "lessons")


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
    """Open what `prepare` made, after checking the sidecar, and of both shards the size, the sum and the tokens.

    Raises DataError if a file is missing, cut short or changed, or says what the others contradict.
    """
    folder = Path(folder)
    remedy = f"delete the folder {folder} and the data will be made again, or set TPA_CACHE elsewhere"
    try:
        meta = files.read_json(folder / "meta.json")
        name, source = meta["tokenizer"], meta["source"]
        said = {split: [meta[of][split] for of in ("tokens", "documents", "sha256")] for split in SPLITS}
        if name not in TOKENIZERS or [name, source] != [meta["request"][of] for of in ("tokenizer", "source")]:
            raise ValueError("it contradicts itself")
        tokenizer = load_tokenizer(name)
        if meta["vocab_size"] != (vocab_size := shards.padded_vocabulary(tokenizer)):
            raise ValueError(f"vocab_size {str(meta['vocab_size']):.40} is not that of the tokenizer {name}")
        held = {}
        for split, (tokens, documents, written) in said.items():
            file = folder / f"{split}.bin"
            size = file.stat().st_size if file.exists() else 0
            if type(tokens) is not int or not 0 < 2 * tokens == size:
                raise DataError(f"{file} holds {size} bytes where {str(tokens):.40} tokens were written; {remedy}")
            if (found := files.sha256(file)) != written:
                raise DataError(f"{file} has SHA-256 {found[:12]}… where {str(written)[:12]}… was written; {remedy}")
            held[split] = ids = np.memmap(file, dtype=np.uint16, mode="r")
            ends = sum(int((ids[i : i + BLOCK] == tokenizer.eot_token).sum()) for i in range(0, tokens, BLOCK))
            if ids.max() >= tokenizer.n_vocab or ends != documents:
                raise DataError(f"{file} does not hold documents of the tokenizer {name}; {remedy}")
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / 'meta.json'} cannot be read ({short(error)}); {remedy}") from error
    return TokenData(folder, source, tokenizer, vocab_size, meta=meta, **held)


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
    of a parquet, JSON lines or text file, plain or compressed, or of a folder of them, or "auto": FineWeb-Edu where the
    hub can be reached, otherwise the lessons. tokenizer: "gpt2" or "lessons"; by default gpt2 for real text where it is
    available, otherwise the lessons' own. Says in one line what is in use. The shards appear whole or not at all; what
    an interrupted call had made is kept beside them, and the next one goes on from there. Raises DataError.
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
        (identity, documents), name = sources.hub(), tokenizer or "gpt2"
    elif source == "lessons":
        (identity, documents), name = sources.from_lessons(seed), tokenizer or "lessons"
    else:
        (identity, documents), name = sources.local(source), tokenizer or "gpt2"
        if tokenizer is None and (problem := _gpt2_problem(seconds=3)):
            name, why = "lessons", f"; no gpt2 tokenizer, since {problem}"
    request = _request(identity, tokens, name)
    folder, how = _folder(request), ", from the cache"
    if not os.path.exists(folder):
        if source == "fineweb-edu" and (problem := sources.hub_problem(seconds=5)):
            raise DataError(f"FineWeb-Edu is unavailable: {problem}; connect to the network, or use --data lessons")
        shards.build(request, documents, load_tokenizer(name), folder, progress)
        how = ""
    data = load(folder)
    if data.meta["request"] != request:
        raise DataError(f"{folder / 'meta.json'} is of another request; delete the folder and it will be made again")
    held = data.meta["tokens"]
    what = {"fineweb-edu": "FineWeb-Edu", "lessons": "the built-in lessons"}.get(source, str(source))
    say(f"{what}, {held['train']:,} + {held['val']:,} tokens of the {name} tokenizer{how}{why}")
    if sum(held.values()) < tokens:
        say(f"that is all there is: {what} holds {sum(held.values()):,} tokens, fewer than the {tokens:,} asked for")
    return data


def _choose(tokens: int, tokenizer: str) -> tuple[str, str]:
    """What "auto" means here and now, and the reason if it is the lessons. With no network, in under 5 seconds."""
    own = tokenizer == "lessons"
    if (own or _gpt2_cached()) and os.path.exists(_folder(_request(sources.hub_identity(), tokens, tokenizer))):
        return "fineweb-edu", ""
    problem = sources.hub_problem(seconds=2.5) or (None if own else _gpt2_problem(seconds=2))
    return ("lessons", f"; not FineWeb-Edu, since {problem}") if problem else ("fineweb-edu", "")


def _request(identity: dict, tokens: int, tokenizer: str) -> dict:
    """All that the shards depend on."""
    vocabulary = {"vocabulary": files.sha256(lessons.TOKENIZER_FILE)} if tokenizer == "lessons" else {}
    return {**identity, **vocabulary, "tokens": tokens, "tokenizer": tokenizer}


def cache_folder() -> Path:
    """Where shards are kept: TPA_CACHE, or tpa-minimal in the folder that the system has for caches."""
    import platformdirs

    folder = os.path.expanduser(os.environ.get("TPA_CACHE") or platformdirs.user_cache_dir("tpa-minimal", False))
    if folder.startswith("~"):
        raise DataError(f"the cache {folder} is unavailable, as there is no home folder; set TPA_CACHE to a folder")
    return Path(folder)


def _folder(request: dict) -> Path:
    """The one folder for a request: equal requests, equal folder."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", Path(request["source"]).stem, flags=re.ASCII)[:40]
    return cache_folder() / f"{name}-{request['tokens']}-{digest}"


# -------------------------------------------------------------------------------------------------- tokenizers


@functools.cache
def load_tokenizer(name: str) -> "tiktoken.Encoding":
    """The tokenizer "gpt2" (50,257 tokens, tiktoken's) or "lessons" (1,024 tokens, shipped with the package).

    Both encode any text, byte by byte where they know nothing longer. Raises DataError if gpt2 is unavailable.
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
    remedy = "connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --data lessons"
    if not _gpt2_cached() and (problem := sources.unreachable(GPT2_ADDRESS, seconds=5)):
        raise DataError(f"the gpt2 tokenizer is unavailable: {problem}; {remedy}")
    get = functools.partial(tiktoken.get_encoding, "gpt2")
    try:
        return sources.within(sources.PATIENCE, get)  # its download has no time-out
    except Exception as error:
        raise DataError(f"the gpt2 tokenizer is unavailable: {short(error)}; {remedy}") from error


GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_FILES = {  # what tiktoken calls its copies of the two files that it builds gpt2 from, with their SHA-256 sums
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def _gpt2_cached() -> bool:
    """Whether both files are there and whole, so that tiktoken will not go to the network."""
    usual = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", usual))
    try:
        return all(files.sha256(Path(folder, name)) == digest for name, digest in GPT2_FILES.items())
    except OSError:
        return False


def _gpt2_problem(seconds: float) -> str | None:
    """Why the gpt2 tokenizer is unavailable, or None if it is there."""
    if not _gpt2_cached() and (problem := sources.unreachable(GPT2_ADDRESS, seconds)):
        return problem
    try:
        load_tokenizer("gpt2")
    except DataError as error:
        return str(error).split(";")[0]
    return None


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
    choice: float  # the right answer is more likely than the objects of all other facts
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
