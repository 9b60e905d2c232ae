"""What a run says about itself: before it starts, and when it has ended."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from tpa_minimal.experiments import data
from tpa_minimal.experiments.generate import generate_text, measure_caches
from tpa_minimal.experiments.settings import EVAL_TOKENS


def describe_run(settings, trainer, step: int, log) -> None:
    """Hand `log` what is about to run, where, and for how long: a TrainConfig, and the Trainer that is at `step`."""
    model, device, count = trainer.model, trainer.processes.device, trainer.processes.count
    layer = sum(p.numel() for p in model.blocks[0].attention.parameters())
    log(
        f"Model: {settings.preset} with {settings.attention}, {model.num_parameters():,} parameters, "
        f"{layer:,} of them in each attention layer of {model.config.n_head} heads."
    )
    remaining = settings.steps - step
    if not remaining:
        done = f"all {settings.steps:,} steps are done. To train again, choose another --out."
        return log(f"{settings.out} is finished: {done}")
    seconds = expected_seconds(trainer, remaining)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    where = f"{device}{threads}" + (f", {count} processes" if count > 1 else "")
    log(
        f"Running on {where} in {settings.dtype}: about {duration(seconds)} for {remaining:,} steps of "
        f"{settings.batch_size * settings.seq_len:,} tokens"
        + (f", each in {trainer.parts} parts" if trainer.parts > 1 else "")
        + "."
    )


def expected_seconds(trainer, steps: int) -> float:
    """How long `steps` steps will take, from one part of a batch that is computed and thrown away."""
    s, device = trainer.settings, trainer.processes.device

    def one_part() -> float:
        inputs, targets = next(trainer.shares(trainer.data.batch("train", 0, s.batch_size, s.seq_len, s.seed)))
        started = time.monotonic()
        with trainer.autocast:
            trainer.loss(inputs, targets).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - started) * trainer.parts

    for _ in range(2):  # the first also sets up kernels and buffers
        seconds = trainer.fitting(one_part)
        trainer.optimizer.zero_grad()
    held_out = min(len(trainer.data.val), max(EVAL_TOKENS, s.batch_size * s.seq_len))
    evaluated = held_out / (s.batch_size * s.seq_len) / s.eval_every / 3  # a forward pass is a third of a step
    return seconds * steps * (1.05 + evaluated)


def duration(seconds: float) -> str:
    """Seconds in words, in the largest unit of which there are two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def report(result) -> Iterator[str]:
    """The lines that end a training run, a TrainResult: losses, curve, speed, samples, and the bytes of the caches."""
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
