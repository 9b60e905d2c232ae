"""What a trained model does: text, and the bytes of its cache. `python -m tpa_minimal generate RUN --prompt "..."`."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.experiments import data
from tpa_minimal.experiments.checkpoint import SettingError
from tpa_minimal.experiments.models import load_checkpoint
from tpa_minimal.experiments.options import finish, parse
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


def main(arguments: list[str] | None = None) -> int:
    """`generate RUN`: prints the prompt and its continuation. Status 2 for a wrong value."""
    prog = "python -m tpa_minimal generate"
    c = parse(GenerateConfig, arguments, prog)
    try:
        loaded = load_checkpoint(c.run)
        options = dict(temperature=c.temperature, top_k=c.top_k, seed=c.seed)
        text = generate_text(loaded.model, loaded.tokenizer, c.prompt, c.max_new_tokens, **options)
    except (SettingError, data.DataError, ValueError, OSError) as error:
        return finish(prog, 2, str(error))
    except RuntimeError as error:  # of drawing from probabilities that are none
        return finish(prog, 1, f"{c.run}: its logits are not finite ({error}); train it again with a lower --lr")
    print(c.prompt + text)
    return 0
