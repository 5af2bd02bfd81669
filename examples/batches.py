"""Which tokens each rank sees at each step.

Every global batch is the same whatever the world size; a rank takes its contiguous
part of the rows. A batch is int64 [rows, sequence + 1]: inputs and targets overlap.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from c4 import Texts, open_c4, prepare_c4
from corpus import Corpus, encode, prepare_files
from ranks import Ranks
from settings import Settings
from tokenizers import Tokenizer
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BatchShape:
    batch: int  # sequences in a global batch
    sequence: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch % self.world_size:
            raise ValueError(
                f"--batch {self.batch} cannot be split evenly over {self.world_size}"
                " ranks; choose a multiple of the number of ranks"
            )

    @property
    def rows(self) -> slice:
        """The rows of the global batch that this rank takes."""
        share = self.batch // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)


class Batches(Protocol):
    def get(self, step: int) -> Tensor:
        """This rank's rows of the batch of a step, counted from 0."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WindowBatches:
    """Windows of a token array, shuffled anew each epoch by (seed, epoch) alone."""

    def __init__(self, tokens: np.ndarray, shape: BatchShape, *, seed: int) -> None:
        self._tokens = tokens
        self._shape = shape
        self._num_windows = (len(tokens) - 1) // shape.sequence
        if self._num_windows < 1:
            raise ValueError(
                f"the training text has {len(tokens)} tokens, less than one sequence"
                f" of {shape.sequence}; give --data more text"
            )
        # A batch meets at most a few epochs; large corpora have large permutations.
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(
                self._num_windows
            )
        )

    def get(self, step: int) -> Tensor:
        shape = self._shape
        first = step * shape.batch
        rows = []
        for position in range(first + shape.rows.start, first + shape.rows.stop):
            epoch, within = divmod(position, self._num_windows)
            start = int(self._permutation(epoch)[within]) * shape.sequence
            rows.append(self._tokens[start : start + shape.sequence + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the step says it all."""


class StreamBatches:
    """Consecutive tokens of a stream, read on rank 0 and sent to the others.

    Only rank 0 tokenizes: all ranks then see the same order at any world size, and
    the stream is fetched once.
    """

    def __init__(
        self, texts: Texts, tokenizer: Tokenizer, shape: BatchShape, ranks: Ranks
    ) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._shape = shape
        self._ranks = ranks
        self._chunks: Iterator[np.ndarray] | None = None
        self._leftover = np.empty(0, dtype=np.uint16)

    def get(self, step: int) -> Tensor:
        shape = self._shape
        batch = torch.empty(shape.batch, shape.sequence + 1, dtype=torch.int64)
        if self._ranks.rank == 0:
            flat = self._take(batch.numel()).astype(np.int64)
            batch = torch.from_numpy(flat).view_as(batch)
        return self._ranks.broadcast(batch)[shape.rows]

    def _take(self, num_tokens: int) -> np.ndarray:
        if self._chunks is None:
            pieces = ((text, True) for text in self._texts)
            self._chunks = encode(pieces, self._tokenizer)
        parts = [self._leftover]
        missing = num_tokens - len(self._leftover)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ValueError("the stream of training text ended; use fewer --steps")
            parts.append(chunk)
            missing -= len(chunk)
        tokens = np.concatenate(parts)
        self._leftover = tokens[num_tokens:]
        return tokens[:num_tokens]

    def state_dict(self) -> dict[str, Any]:
        if self._ranks.rank != 0:
            return {}
        # encode() holds no text between two chunks, so the stream's own position
        # and the tokens not used yet are the whole state.
        return {
            "texts": self._texts.state_dict(),
            "leftover": torch.from_numpy(self._leftover.astype(np.int64)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ranks.rank != 0:
            return
        self._texts.load_state_dict(state["texts"])
        self._leftover = state["leftover"].numpy().astype(np.uint16)
        self._chunks = None


def prepare_data(
    settings: Settings, here: Ranks, shape: BatchShape
) -> tuple[Corpus, Batches]:
    """The corpus, tokenized by the first process of each machine if need be."""

    def prepare(*, build: bool) -> Corpus:
        if settings.data == "c4":
            windows = settings.val_batches * settings.batch
            return prepare_c4(
                vocab=settings.vocab,
                cache_dir=settings.cache_dir,
                val_tokens=windows * settings.sequence + 1,
                build=build,
            )
        return prepare_files(
            settings.data,
            vocab=settings.vocab,
            cache_dir=settings.cache_dir,
            max_mb=settings.max_mb,
            build=build,
        )

    failure = None
    if here.local_rank == 0:
        try:
            prepare(build=True)
        except ValueError as error:
            failure = error
    # What is wrong with --data ends every rank, with one message and no lost contact.
    (failures,) = here.sum(failure is not None)
    if failures:
        raise failure or ValueError("--data: another machine could not prepare it")
    corpus = prepare(build=False)
    if settings.data == "c4":
        texts = open_c4("train")
        return corpus, StreamBatches(texts, corpus.tokenizer(), shape, here)
    return corpus, WindowBatches(corpus.tokens("train"), shape, seed=settings.seed)


def validation_batches(
    tokens: np.ndarray, shape: BatchShape, num_batches: int
) -> list[Tensor]:
    """This rank's rows of up to `num_batches` batches, spread evenly over the text."""
    num_windows = (len(tokens) - 1) // shape.sequence
    num_batches = min(num_batches, num_windows // shape.batch)
    if num_batches < 1:
        raise ValueError(
            f"the validation text has {len(tokens)} tokens, less than one batch of"
            f" {shape.batch} x {shape.sequence}; give --data more text"
        )
    chosen = np.linspace(0, num_windows - 1, num_batches * shape.batch).astype(int)
    batches = []
    for windows in chosen.reshape(num_batches, shape.batch):
        starts = windows[shape.rows] * shape.sequence
        rows = [tokens[start : start + shape.sequence + 1] for start in starts]
        batches.append(torch.from_numpy(np.stack(rows).astype(np.int64)))
    return batches
