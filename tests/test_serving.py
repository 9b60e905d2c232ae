"""Pages, batches that change and speculation give what separate caches, `generate` and plain decoding give."""

import functools

import pytest
import torch
from helpers import exactly
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tpa_minimal import baselines, variants
from tpa_minimal.serving import (
    PagedCache,
    Pages,
    Ragged,
    decode,
    fork,
    new_pools,
    paged_cache,
    serve,
    speculate,
)
from tpa_minimal.tpa import T6, Cache, FactorCache, T6Config, TensorProductAttention

few = settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
SHAPES = [(2, 3), (2, 4), (1, 3), (1, 4)]
MECHANISMS = dict(
    tpa=TensorProductAttention,
    fixed_a=variants.FixedHeadFactors,
    gqa=functools.partial(baselines.MultiHeadAttention, n_kv_head=2),
    mla=baselines.MultiHeadLatentAttention,
)
each_mechanism = pytest.mark.parametrize("attention", MECHANISMS.values(), ids=MECHANISMS)


def small_model(attention=TensorProductAttention, seed=0, **sizes):
    model = T6(T6Config(31, **{"n_layer": 2, "d_model": 12, "max_len": 100, **sizes}, n_head=4, d_head=8), attention)
    generator = torch.Generator().manual_seed(seed)
    for p in model.double().parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    return model.eval()


def rows(n):
    return tuple(torch.randn(1, n, *shape, dtype=torch.float64) for shape in SHAPES)


def same(paged, separate):
    assert paged.length == separate.length and paged.nbytes == separate.nbytes
    kept = separate.view(0, separate.length)
    assert all(map(torch.equal, paged.view(0, paged.length), kept))


def counted(pages, sequences):
    """The reference counts and the bytes of a pool are those of the tables that are alive."""
    tables = [page for sequence in sequences for page in sequence.table]
    assert pages.holders == [tables.count(page) for page in range(len(pages.holders))]
    one = sum(kept[0].numel() * kept.element_size() for kept in pages.kept)
    assert pages.nbytes == one * len(set(tables)) and pages.free == len(pages.holders) - len(set(tables))
    for sequence in sequences:
        assert len(sequence.table) == -(-sequence.length // pages.page_size)


# ------------------------------------------------------------------------------------------------------- pages


@few
@given(
    page_size=st.integers(1, 5),
    n_pages=st.integers(1, 14),
    todo=st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "fork", "truncate", "free"]), st.integers(0, 9), st.integers(0, 9)
        ),
        max_size=30,
    ),
)
def test_forks_writes_and_truncations_equal_separate_caches(page_size, n_pages, todo):
    pages = Pages(SHAPES, n_pages, page_size, dtype=torch.float64)
    pairs = [(PagedCache(pages), FactorCache(SHAPES, 1, 400, dtype=torch.float64))]
    for what, which, n in todo:
        paged, separate = pairs[which % len(pairs)]
        if what == "append":
            new, before = rows(n), list(paged.table)
            try:
                paged.append(*new)
            except ValueError as error:
                assert "free" in str(error) and paged.table == before
            else:
                separate.append(*new)
        elif what == "fork" and len(pairs) < 4:
            twin = FactorCache(SHAPES, 1, 400, dtype=torch.float64)
            if separate.length:
                twin.append(*separate.view(0, separate.length))
            pairs.append((paged.fork(), twin))
        elif what in ("truncate", "free"):
            length = 0 if what == "free" else min(n, paged.length)
            paged.truncate(length)
            separate.truncate(length)
        for pair in pairs:  # nobody's past is touched by what another does
            same(*pair)
        counted(pages, [paged for paged, _ in pairs])


def test_a_shared_page_is_copied_once_and_only_when_it_is_written_to():
    pages = Pages(SHAPES, 10, 4, dtype=torch.float64)
    first = PagedCache(pages)
    first.append(*rows(6))  # one page full, one half full
    second, third = first.fork(), first.fork()
    assert pages.free == 8 and pages.holders[:2] == [3, 3]
    second.append(*rows(1))
    assert second.table == [0, 2] and pages.holders[:3] == [3, 2, 1]
    second.append(*rows(1))
    assert second.table == [0, 2]  # its own by now
    third.append(*rows(3))
    assert third.table == [0, 3, 4]
    first.append(*rows(1))
    assert first.table == [0, 1] and pages.holders[:5] == [3, 1, 1, 1, 1]  # the last holder need not copy
    full = first.fork()
    first.append(*rows(1)), first.append(*rows(1))
    full.truncate(4)
    full.append(*rows(1))  # starts a page: nothing to copy
    assert full.table[0] == 0 and pages.holders[0] == 4


def test_pages_run_out_in_one_clear_line_and_nothing_is_lost():
    pages = Pages(SHAPES, 3, 4, dtype=torch.float64)
    first = PagedCache(pages)
    first.append(*rows(6))
    second, before = first.fork(), [x.clone() for x in first.view(0, 6)]
    with pytest.raises(ValueError, match=r"5 more positions need 2 free pages, and 1 are free; truncate\(0\)") as error:
        second.append(*rows(5))  # a copy of the half-full page, and one more
    assert "\n" not in str(error.value)
    assert second.length == 6 and second.table == first.table == [0, 1] and pages.holders == [2, 2, 0]
    second.append(*rows(2))
    with pytest.raises(ValueError, match="1 more positions need 1 free pages, and 0 are free"):
        second.append(*rows(1))
    assert all(map(torch.equal, first.view(0, 6), before))
    second.truncate(0)
    assert pages.free == 1 and second.append(*rows(4))


def test_wrong_shapes_and_sizes_are_refused():
    pages = Pages(SHAPES, 3, 4)
    cache = PagedCache(pages)
    good = [torch.randn(1, 2, *shape) for shape in SHAPES]
    for new in (
        good[:3],
        [x.repeat(2, 1, 1, 1) for x in good],
        [x[..., :1] for x in good],
        [good[0][:, :1], *good[1:]],
    ):
        with pytest.raises(ValueError, match="expects tensors of shapes"):
            cache.append(*new)
        assert cache.length == 0 and cache.table == [] and pages.free == 3
    cache.append(*good)
    for length in (-1, 3):
        with pytest.raises(ValueError, match="0 to 2 work"):
            cache.truncate(length)
    for sizes in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match="1 or more"):
            Pages(SHAPES, *sizes)


@each_mechanism
@torch.no_grad()
def test_a_model_with_a_shared_prefix_gives_what_it_gives_without(attention):
    model = small_model(attention)
    prefix, texts = torch.randint(31, (1, 21)), torch.randint(31, (3, 1, 30))
    pools = new_pools(model, n_pages=40, page_size=8)
    system = paged_cache(pools)
    model(prefix, system)
    caches = [fork(system) for _ in texts]
    for i, chunk in enumerate((2, 1, 17, 1, 9)):
        done = (0, 2, 3, 20, 21)[i]
        for text, cache in zip(texts, caches):
            got = model(text[:, done : done + chunk], cache)
            exactly(got, model(torch.cat((prefix, text[:, : done + chunk]), dim=1))[:, -chunk:])
    # 51 positions are 7 pages; the first 2 hold nothing but the prefix and are shared, its third has been copied.
    assert [pool.holders.count(4) for pool in pools] == [2, 2]
    assert [len(pool.holders) - pool.free for pool in pools] == [2 + 1 + 3 * 5] * 2


# ------------------------------------------------------------------------------------------ batches that change


@each_mechanism
@pytest.mark.parametrize("paged", [False, True])
@torch.no_grad()
def test_one_step_of_sequences_of_any_lengths_equals_each_alone(attention, paged):
    model = small_model(attention)
    pools = new_pools(model, n_pages=60, page_size=4)
    texts = [torch.randint(31, (n + 5,)) for n in (1, 30, 8, 0)]
    caches = [paged_cache(pools) if paged else model.new_cache(1) for _ in texts]
    for text, cache in zip(texts, caches):
        if len(text) > 5:
            model(text[None, :-5], cache)
    for i in range(-5, 0):
        got = decode(model, torch.stack([text[i] for text in texts]), caches)
        for text, logits in zip(texts, got):
            exactly(logits, model(text[None, : len(text) + i + 1])[0, -1])


@torch.no_grad()
def test_a_step_that_one_cache_has_no_room_for_loses_nothing():
    model = small_model()
    caches = [model.new_cache(1, 9), model.new_cache(1, 6)]
    for cache in caches:
        model(torch.randint(31, (1, 5)), cache)
    tokens = torch.tensor([3, 4])
    decode(model, tokens, caches)
    with pytest.raises(ValueError, match="holds 6 of 6"):
        decode(model, tokens, caches)
    assert [layer.length for cache in caches for layer in cache] == [6] * 4
    with pytest.raises(ValueError, match="expects"):
        Ragged([cache[0] for cache in caches]).append(torch.randn(2, 1, 1, 1))


def requests(seed=0, sizes=((5, 3), (1, 10), (20, 1), (7, 6), (3, 12), (2, 2))):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(31, (n,), generator=generator), n_new) for n, n_new in sizes]


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
@pytest.mark.parametrize("static", [False, True])
def test_whoever_runs_beside_it_each_request_gets_its_own_text(slots, static):
    model = small_model()
    pools = new_pools(model, n_pages=40, page_size=4)
    texts, steps = serve(model, requests(), slots, lambda: paged_cache(pools), static)
    for text, (prompt, n_new) in zip(texts, requests()):
        assert text == model.generate(prompt[None], n_new, temperature=0)[0].tolist()
    assert all(pool.free == 40 for pool in pools)
    new = [n_new for _, n_new in requests()]
    if static:
        assert steps == sum(max(new[i : i + slots]) for i in range(0, len(new), slots))
    else:
        busy = [0] * slots  # each slot takes the next request as soon as it is free
        for n in new:
            busy[busy.index(min(busy))] += n
        assert steps == max(busy)


@torch.no_grad()
def test_serving_from_a_shared_prefix():
    model, prefix = small_model(), torch.randint(31, (1, 13))
    pools = new_pools(model, n_pages=40, page_size=4)
    system = paged_cache(pools)
    model(prefix, system)
    texts, _ = serve(model, requests(), 3, lambda: fork(system))
    for text, (prompt, n_new) in zip(texts, requests()):
        whole = torch.cat((prefix, prompt[None]), dim=1)
        assert text == model.generate(whole, n_new, temperature=0)[0, 13:].tolist()
    assert all(pool.free == 40 - 4 for pool in pools)  # what is left is the prefix


@pytest.mark.parametrize("slots, sizes", [(0, [(2, 2)]), (2, [(2, 2), (0, 3)]), (2, [(2, 0)])])
def test_requests_that_cannot_be_served(slots, sizes):
    with pytest.raises(ValueError, match="all must be 1 or more"):
        serve(small_model(), requests(sizes=sizes), slots, lambda: Cache())


# ------------------------------------------------------------------------------------------------- speculation


class Noisy(torch.nn.Module):
    """A draft that is the model itself, but wrong at every n-th position."""

    def __init__(self, model, every):
        super().__init__()
        self.model, self.every = model, every
        self.new_cache = model.new_cache

    def forward(self, tokens, cache):
        first = cache.length
        logits = self.model(tokens, cache)
        wrong = (torch.arange(first, first + tokens.shape[1]) % self.every == 0)[:, None]
        return torch.where(wrong, -logits, logits)


@each_mechanism
@pytest.mark.parametrize("n_draft", [0, 1, 4, 30])
@pytest.mark.parametrize("n_prompt, n_new", [(1, 1), (1, 40), (7, 23), (30, 0)])
def test_speculation_writes_what_plain_greedy_decoding_writes(attention, n_draft, n_prompt, n_new):
    model, prompt = small_model(attention), torch.randint(31, (1, n_prompt))
    expected = model.generate(prompt, n_new, temperature=0)
    for draft in (small_model(seed=1, n_layer=1), model, Noisy(model, 3)):
        tokens, accepted = speculate(model, draft, prompt, n_new, n_draft)
        assert torch.equal(tokens, expected)
        assert sum(accepted) + len(accepted) == n_new and max(accepted, default=0) <= n_draft


def test_how_many_proposals_are_accepted():
    model, prompt = small_model(), torch.randint(31, (1, 6))
    _, accepted = speculate(model, model, prompt, 25, n_draft=4)
    assert accepted == [4] * 5  # a draft that is the model: 5 tokens for each check
    opposite = Noisy(model, 1)
    _, accepted = speculate(model, opposite, prompt, 25, n_draft=4)
    assert accepted == [0] * 25
    _, accepted = speculate(model, Noisy(model, 3), prompt, 25, n_draft=4)
    assert set(accepted[:-1]) <= {0, 1, 2} and sum(accepted) > 10  # two right ones between two wrong ones


@pytest.mark.parametrize("shape, n_new, n_draft", [((2, 3), 4, 4), ((1, 0), 4, 4), ((1, 3), -1, 4), ((1, 3), 4, -1)])
def test_speculation_refuses_what_cannot_work(shape, n_new, n_draft):
    model = small_model()
    with pytest.raises(ValueError, match="need one prompt"):
        speculate(model, model, torch.zeros(shape, dtype=torch.long), n_new, n_draft)
