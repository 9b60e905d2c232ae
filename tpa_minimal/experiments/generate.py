"""What a trained model does: text, and the bytes of its cache. `python -m tpa_minimal generate RUN --prompt "..."`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import tyro

from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.experiments import data
from tpa_minimal.tpa import T6, Cache


def generate_text(
    model: T6, tokenizer, prompt: str, max_new_tokens: int = 100, *, temperature=0.8, top_k=50, seed=0
) -> str:
    """Continue `prompt` through the factor cache, up to the end of the document; returns the continuation alone.

    An empty prompt starts a new document. Raises ValueError if prompt and continuation exceed the model's max_len.
    """
    device = next(model.parameters()).device
    end = tokenizer.eot_token
    tokens = torch.tensor([[end, *tokenizer.encode_ordinary(prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    out = model.generate(tokens, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator)
    new = out[0, tokens.shape[1] :].tolist()
    new = new[: new.index(end)] if end in new else new
    return tokenizer.decode([t for t in new if t < tokenizer.n_vocab])  # the vocabulary is padded beyond n_vocab


@torch.no_grad()
def measure_caches(model: T6, length: int) -> tuple[int, int]:
    """Bytes of the model's own cache and of an MHA cache of equal n_head and d_head, each filled with `length` tokens.

    Both are real caches that went through their layers' forward pass, in the model's dtype, for one sequence.
    """
    c, weight = model.config, model.embedding.weight
    own = model.new_cache(1, length)
    model.hidden(torch.zeros(1, length, dtype=torch.long, device=weight.device), own)
    mha = MultiHeadAttention(c).to(weight.device, weight.dtype)
    cache = Cache(mha.new_cache(1, length) for _ in range(c.n_layer))
    for layer in cache:
        mha(torch.zeros(1, length, c.d_model, device=weight.device, dtype=weight.dtype), layer)
    return own.nbytes, cache.nbytes


def report(result) -> Iterator[str]:
    """The lines that end a training run: losses, curve, speed, samples, and the bytes of the caches."""
    evaluated = [row["val_loss"] for row in result.metrics if "val_loss" in row]
    yield (
        f"Validation loss: {evaluated[0]:.3f} before training, {evaluated[-1]:.3f} after {result.step:,} steps "
        f"(nats per token)."
    )
    yield f"Loss curve: {result.out / 'loss.png'}"
    trained = result.step * result.settings.batch_size * result.settings.seq_len
    yield f"Speed: {trained:,} tokens at {result.tokens_per_second:,.0f} tokens per second."

    model, tokenizer = result.model, result.data.tokenizer
    held_out = result.data.val[:20_000]
    ends = np.append(np.flatnonzero(held_out == tokenizer.eot_token), len(held_out))
    starts = np.append(0, ends[:-1] + 1)
    longest = np.argsort(starts - ends, kind="stable")[:3]
    yield "Samples, continuing the first words of long held-out documents (which are in brackets):"
    for start in starts[longest]:
        prompt = tokenizer.decode(held_out[start : start + 16].tolist()).split(data.END_OF_TEXT)[0]
        yield f"    [{prompt}]{generate_text(model, tokenizer, prompt)}".replace("\n", "\n    ")

    length, c = model.config.max_len, model.config
    own, mha = measure_caches(model, length)
    yield f"Cache of one sequence of {length:,} tokens, measured: {own:,} bytes with {result.settings.attention};"
    yield f"    {mha:,} bytes with MHA of the same {c.n_head} heads of width {c.d_head}: {mha / own:.1f} times as many."


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained run's model."""

    run: Annotated[str, tyro.conf.Positional]
    """a run's folder, or one of its checkpoints"""
    prompt: str = ""
    """the text to continue; empty: a new document"""
    max_new_tokens: int = 100
    """tokens to write at most"""
    temperature: float = 0.8
    """0: always the most likely token"""
    top_k: int | None = 50
    """draw from so many of the most likely tokens"""
    seed: int = 0
    """of the draws"""
