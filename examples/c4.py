"""C4, streamed: tokens made while training, so nothing but validation is on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from corpus import (
    Corpus,
    cache_folder,
    check_vocab,
    encode,
    train_tokenizer,
    write_tokens,
    written_at_once,
)

TOKENIZER_DOCUMENTS = 10_000  # about 20 MB of text


class Texts(Protocol):
    """Documents one after the other, from a position that can be saved."""

    def __iter__(self) -> Iterator[str]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DatasetTexts:
    """The "text" column of a streamed dataset of `datasets`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in self._dataset)

    def state_dict(self) -> dict[str, Any]:
        return self._dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._dataset.load_state_dict(state)


def open_c4(split: str) -> Texts:
    """The "train" or "validation" split of the English C4, from Hugging Face."""
    # Imported late: it is slow, and no other data needs it.
    from datasets import load_dataset

    return DatasetTexts(load_dataset("allenai/c4", "en", split=split, streaming=True))


def prepare_c4(
    *,
    vocab: int,
    cache_dir: str,
    val_tokens: int,
    build: bool,
    open_split: Callable[[str], Texts] = open_c4,
    name: str = "allenai/c4/en",
) -> Corpus:
    """The tokenizer and `val_tokens` tokens for validation; training is streamed.

    Call it with build=True on one process of a machine, then on the others.
    """
    check_vocab(vocab)
    source = [name, TOKENIZER_DOCUMENTS, val_tokens]
    folder = cache_folder(cache_dir, source, vocab)
    if not build or folder.is_dir():
        return Corpus(folder)
    with written_at_once(folder) as temporary:
        first = itertools.islice(open_split("train"), TOKENIZER_DOCUMENTS)
        tokenizer = train_tokenizer(first, vocab)
        tokenizer.save(str(temporary / "tokenizer.json"))
        pieces = ((text, True) for text in open_split("validation"))
        chunks = _first(encode(pieces, tokenizer), val_tokens)
        write_tokens(temporary / "val.bin", chunks)
    return Corpus(folder)


def _first(chunks: Iterator[np.ndarray], num_tokens: int) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield chunk[:num_tokens]
        num_tokens -= len(chunk)
        if num_tokens <= 0:
            return
