"""What stands between a factor cache and a server, each in a page: pages, batches that change, and speculation.

    pools = new_pools(model, n_pages=100)
    system = paged_cache(pools)                         # one sequence's cache; model(tokens, system) fills it, as ever
    texts, steps = serve(model, requests, slots=8, new_cache=lambda: fork(system))
    tokens, accepted = speculate(model, draft, prompt, n_new=50)

All of it is greedy and made for reading. Kernels of real servers read pages where they lie; here they are gathered.
"""

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_minimal.tpa import T6, Cache, rope_tables

# ------------------------------------------------------------------------------------------------------- pages


class Pages:
    """Room of one layer for many sequences: pages of `page_size` positions, each held by none, one or more of them.

    shapes: (rank, width) of each thing kept, as for FactorCache. Raises ValueError for sizes below 1.
    """

    def __init__(self, shapes, n_pages: int, page_size: int = 16, device=None, dtype=None):
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"n_pages={n_pages}, page_size={page_size}: both must be 1 or more")
        self.page_size = page_size
        self.kept = [torch.zeros(n_pages, page_size, R, width, device=device, dtype=dtype) for R, width in shapes]
        self.holders = [0] * n_pages  # reference counts

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return self.holders.count(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that are held, each counted once however many sequences share it."""
        held = len(self.holders) - self.free
        return held * sum(kept[0].numel() * kept.element_size() for kept in self.kept)

    def take(self) -> int:
        """The number of a page that was free and now has one holder."""
        page = self.holders.index(0)
        self.holders[page] = 1
        return page


class PagedCache:
    """One sequence's FactorCache (batch size 1), in pages of a common pool; same interface, and `fork`.

    table[i] is the page of positions i · page_size and on. A page that others hold too is copied before it is written
    to. `truncate(0)` gives all pages back.
    """

    def __init__(self, pages: Pages):
        self.pages, self.table, self.length = pages, [], 0

    def view(self, start: int, end: int) -> tuple[Tensor, ...]:
        """What is kept of positions start to end - 1, gathered from its pages, each (1, end - start, R, width)."""
        return tuple(kept.flatten(0, 1)[None, self._places(start, end)] for kept in self.pages.kept)

    def _places(self, start: int, end: int) -> Tensor:
        """Where positions start to end - 1 lie if the pool is one long row of positions."""
        positions, device = torch.arange(start, end), self.pages.kept[0].device
        page = torch.tensor(self.table, dtype=torch.long)[positions // self.pages.page_size]
        return (page * self.pages.page_size + positions % self.pages.page_size).to(device)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what T new tokens bring, each (1, T, R, width); return all that is held, each (1, C + T, R, width).

        Raises ValueError, with nothing changed, if their shapes are wrong or too few pages are free.
        """
        pages, T = self.pages, new[0].shape[1]
        expected, given = [(1, T, *kept.shape[2:]) for kept in pages.kept], [tuple(x.shape) for x in new]
        if expected != given:
            raise ValueError(f"the cache expects tensors of shapes {expected}, not {given}")
        # The last page is written to if it has room left: a copy of its own, should others hold it too.
        copy = T > 0 and self.length % pages.page_size > 0 and pages.holders[self.table[-1]] > 1
        more = -(-(self.length + T) // pages.page_size) - len(self.table)
        if more + copy > pages.free:
            remedy = "truncate(0) a sequence that is done, or make the pool larger"
            raise ValueError(f"{T} more positions need {more + copy} free pages, and {pages.free} are free; {remedy}")
        if copy:
            shared, self.table[-1] = self.table[-1], pages.take()
            pages.holders[shared] -= 1
            for kept in pages.kept:
                kept[self.table[-1]] = kept[shared]
        self.table += [pages.take() for _ in range(more)]
        places = self._places(self.length, self.length + T)
        for kept, x in zip(pages.kept, new):
            kept.flatten(0, 1)[places] = x[0].detach().to(kept.dtype)
        self.length += T
        return self.view(0, self.length)

    def fork(self) -> "PagedCache":
        """A second sequence with the same past, which shares all pages until one of the two writes."""
        other = PagedCache(self.pages)
        other.table, other.length = list(self.table), self.length
        for page in self.table:
            self.pages.holders[page] += 1
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of what this sequence caches now, as FactorCache counts; `Pages.nbytes` counts whole pages, once."""
        return self.length * sum(kept[0, 0].numel() * kept.element_size() for kept in self.pages.kept)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError unless 0 <= length <= the present length."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate({length}): the cache holds {self.length} positions, so 0 to {self.length} work")
        keep = -(-length // self.pages.page_size)
        for page in self.table[keep:]:
            self.pages.holders[page] -= 1
        self.table, self.length = self.table[:keep], length


def new_pools(model: T6, n_pages: int, page_size: int = 16) -> list[Pages]:
    """A pool for each layer of `model`, whatever its attention caches."""
    kept = [block.attention.new_cache(1, 1).view(0, 1) for block in model.blocks]  # of one position, for the shapes
    return [Pages([x.shape[2:] for x in xs], n_pages, page_size, xs[0].device, xs[0].dtype) for xs in kept]


def paged_cache(pools: list[Pages]) -> Cache:
    """An empty cache for one sequence, one entry per layer."""
    return Cache(PagedCache(pool) for pool in pools)


def fork(cache: Cache) -> Cache:
    """A second sequence with the same past as that of a paged cache; see `PagedCache.fork`."""
    return Cache(layer.fork() for layer in cache)


# ------------------------------------------------------------------------------------------ batches that change


class Ragged:
    """One layer's caches of several sequences, of any lengths, as the cache of one batch.

    What `append` returns ends at the right, behind padding for the shorter ones; `padding` (B,) says how much.
    """

    def __init__(self, caches: list):
        self.caches, lengths = caches, torch.tensor([cache.length for cache in caches])
        self.length = lengths.max().item()
        self.padding = self.length - lengths

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store one new token for each sequence, each (B, 1, R, width); return all, each (B, length + 1, R, width).

        Raises ValueError, with nothing changed, if one of the caches is full.
        """
        kept = []
        try:
            for b, cache in enumerate(self.caches):
                kept.append(cache.append(*(x[b : b + 1] for x in new)))
        except ValueError:
            for cache, _ in zip(self.caches, kept):
                cache.truncate(cache.length - 1)
            raise
        self.length += 1
        return tuple(torch.cat([F.pad(x, (0,) * 4 + (self.length - x.shape[1], 0)) for x in xs]) for xs in zip(*kept))


@torch.no_grad()
def decode(model: T6, tokens: Tensor, caches: list[Cache]) -> Tensor:
    """One step for sequences of any lengths: each one's next token (B,) and cache -> logits (B, vocab_size).

    The positions are each sequence's own, so the rotation differs from row to row.
    """
    x = model.embedding(tokens)[:, None]  # (B, 1, d_model)
    positions = torch.tensor([cache.length for cache in caches], device=x.device)
    for block, *layer in zip(model.blocks, *caches):
        rope, cache = block.attention.rope, Ragged(layer)
        tables = [table[:, None] for table in rope_tables(positions, *rope, x.dtype)]  # (B, 1, d_h/2)
        x = block(x, cache, rope=tables, padding=cache.padding.to(x.device))
    return model.logits(model.norm(x))[:, 0]


@torch.no_grad()
def serve(model: T6, requests: list, slots: int, new_cache: Callable[[], Cache], static=False) -> tuple[list, int]:
    """Continue each prompt greedily, at most `slots` at once; continuous batching: who is done makes room for the next.

    requests: pairs (prompt (T,), number of new tokens), both 1 or more; new_cache() makes one sequence's cache, empty
    or with a past that all share. static: the next are admitted only when all are done, as in a batch of `generate`.
    Returns all texts as lists of tokens, and the number of steps. Raises ValueError for what cannot work.
    """
    if slots < 1 or not all(prompt.numel() and n_new >= 1 for prompt, n_new in requests):
        sizes = [(prompt.numel(), n_new) for prompt, n_new in requests]
        raise ValueError(f"slots={slots}, prompts and new tokens {sizes}: all must be 1 or more")
    texts, waiting, running, steps = [prompt.tolist() for prompt, _ in requests], deque(range(len(requests))), {}, 0
    while waiting or running:
        if not (static and running):
            while waiting and len(running) < slots:  # admit: cache all of the prompt but its last token
                i = waiting.popleft()
                running[i] = new_cache()
                if len(texts[i]) > 1:
                    model.hidden(requests[i][0][None, :-1], running[i])
        last = requests[0][0].new_tensor([texts[i][-1] for i in running])
        logits = decode(model, last, list(running.values()))
        steps += 1
        for i, token in zip(list(running), logits.argmax(-1).tolist()):
            texts[i].append(token)
            if len(texts[i]) == len(requests[i][0]) + requests[i][1]:  # retire
                running.pop(i).truncate(0)
    return texts, steps


# ------------------------------------------------------------------------------------------------- speculation


@torch.no_grad()
def speculate(model: T6, draft: T6, prompt: Tensor, n_new: int, n_draft: int = 4) -> tuple[Tensor, list[int]]:
    """Greedy decoding in which `draft` proposes n_draft tokens at a time and `model` checks them in one chunk.

    prompt: (1, T) -> (1, T + n_new), the tokens that `model` alone would write, and for each check how many of the
    proposed were right. (Leviathan et al. 2023, Algorithm 1, at temperature 0.) Raises ValueError for what cannot work.
    """
    if prompt.shape[0] != 1 or prompt.shape[1] < 1 or n_new < 0 or n_draft < 0:
        rule = "need one prompt of 1 or more tokens, and 0 or more of the others"
        raise ValueError(f"prompt of shape {tuple(prompt.shape)}, n_new={n_new}, n_draft={n_draft}: {rule}")
    tokens, end, accepted = prompt, prompt.shape[1] + n_new, []
    cache, draft_cache = model.new_cache(1, end), draft.new_cache(1, end)
    while tokens.shape[1] < end:
        proposed = tokens
        for _ in range(min(n_draft, end - tokens.shape[1] - 1)):  # the check itself gives one token more
            logits = draft(proposed[:, draft_cache.length :], draft_cache)
            proposed = torch.cat((proposed, logits[:, -1:].argmax(-1)), dim=1)
        n = proposed.shape[1] - tokens.shape[1]
        # Row i of what the model says is about the token after i: n + 1 rows, for the proposed and one more.
        says = model(proposed[:, cache.length :], cache)[:, -n - 1 :].argmax(-1)  # (1, n + 1)
        right = (says[:, :n] == proposed[:, tokens.shape[1] :]).long().cumprod(-1).sum().item()
        tokens = torch.cat((tokens, says[:, : right + 1]), dim=1)
        accepted.append(right)
        for remembered in (cache, draft_cache):  # what was refused is forgotten; the last token is in no cache yet
            remembered.truncate(min(remembered.length, tokens.shape[1] - 1))
    return tokens, accepted
