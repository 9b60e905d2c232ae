"""Multi-query associative recall (MQAR), which cannot be solved without a cache (Arora et al., arXiv 2312.04927).

A sequence states pairs of a key and its value, k₁ v₁ k₂ v₂ …, and later brings each key once more, at a place of its
own. There, and nowhere else, the model is asked for the value. Between the queries stands noise. Keys and values are
drawn anew for each sequence: the weights cannot know the answer, so it has to be carried from the pair to the query.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the target where nothing is asked; torch's cross-entropy leaves it out
POWER = 0.01  # the slot of a query is drawn with p(i) ∝ i^(POWER - 1), as in the paper: most come soon, some late


@dataclass(frozen=True)
class Recall:
    """MQAR in its standard form: keys are the tokens 1 to vocab_size/2 - 1, values those from vocab_size/2 on."""

    vocab_size: int = 64

    def sequences(self, n: int, pairs: int, seq_len: int, *key: int) -> tuple[Tensor, Tensor]:
        """n sequences of `pairs` pairs: inputs and targets, both (n, seq_len) int64; a function of its arguments alone.

        After the pairs come slots of two tokens, and each key is asked for in one of them: there the target is its
        value, elsewhere IGNORED. key: whole numbers that name the draw. Raises ValueError for what does not fit.
        """
        half, slots = self.vocab_size // 2, seq_len // 2 - pairs
        if not 1 <= pairs <= min(half - 1, slots):
            rule = f"must be from 1 to {min(half - 1, slots)} in {seq_len} tokens and a vocabulary of {self.vocab_size}"
            raise ValueError(f"pairs={pairs}: {rule}")
        bits = np.random.PCG64(key)  # the raw bits are what NumPy promises never to change

        def uniform(width: int) -> np.ndarray:
            return (bits.random_raw(n * width).reshape(n, width) >> np.uint64(11)) * 2.0**-53  # (n, width) in [0, 1)

        inputs = (uniform(seq_len) * self.vocab_size).astype(np.int64)  # noise, most of it written over
        targets = np.full((n, seq_len), IGNORED)
        keys = 1 + uniform(half - 1).argsort(1)[:, :pairs]  # (n, pairs), each key at most once
        values = half + (uniform(pairs) * (self.vocab_size - half)).astype(np.int64)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        # The first of exponential waiting times at rates p are a draw without replacement.
        rates = np.arange(1.0, slots + 1) ** (POWER - 1)
        places = 2 * pairs + 2 * (-np.log1p(-uniform(slots)) / rates).argsort(1)[:, :pairs]
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


@dataclass(frozen=True)
class Curriculum:
    """Training batches of MQAR, `stages` of equal length one after the other, and held-out ones of the last three.

    stages: (pairs, tokens of a sequence) of each. All batches have about the same number of tokens.
    """

    steps: int
    stages: tuple[tuple[int, int], ...] = ((2, 8), (4, 16), (8, 32), (8, 64))
    task: Recall = Recall()

    @property
    def vocab_size(self) -> int:
        """The task's."""
        return self.task.vocab_size

    def batch(self, split: str, step: int, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """Training batch `step`: inputs and targets, of batch_size · seq_len tokens or a few less."""
        pairs, length = self.stages[min(step * len(self.stages) // self.steps, len(self.stages) - 1)]
        return self.task.sequences(max(1, batch_size * seq_len // length), pairs, length, seed, step)

    def held_out(self, quick: bool) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Batches by pairs and length, the same at every call: 32 sequences of each, or 256 if not `quick`."""
        n = 32 if quick else 256  # no training batch has a key of three numbers
        sizes = self.stages[-3:]
        return {
            f"{pairs} in {length}": [self.task.sequences(n, pairs, length, 0, pairs, length)] for pairs, length in sizes
        }
