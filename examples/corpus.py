"""Text to tokens: finds the text, trains a byte-level BPE on it, caches the tokens.

A corpus is a folder of the cache with `tokenizer.json`, `val.bin` and, unless the
training text is streamed, `train.bin`: flat arrays of uint16 tokens, an end-of-text
token after each file. The folder's name is a hash of all that determines it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import os
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 20  # one file in so many is for validation
MAX_VOCAB = 65535  # tokens are kept as uint16
STDLIB_MB = 16
TOKENIZER_MB = 16  # text the tokenizer is trained on; more changes it little
PIECE_CHARACTERS = 4096
_FORMAT = 1  # counted up when the folder's content changes, so that old ones rest

# Tests and what is installed on top are not the library's own prose.
_STDLIB_SKIPPED = frozenset({
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
})
_OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}

# A piece of a document, and whether the document ends with it.
Piece = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class TextFile:
    name: str  # its path relative to the corpus: the split hangs on it
    path: Path

    def pieces(self) -> Iterator[str]:
        """The text in pieces of whole lines, so that a large file fits in memory."""
        opener = _OPENERS.get(self.path.suffix, open)
        with opener(self.path, "rt", encoding="utf-8", errors="replace") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece + file.readline(PIECE_CHARACTERS)

    def signature(self) -> list:
        status = self.path.stat()
        return [self.name, status.st_size, status.st_mtime_ns]


@dataclasses.dataclass(frozen=True)
class Corpus:
    folder: Path

    @property
    def key(self) -> str:
        return self.folder.name

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def tokens(self, split: str) -> np.ndarray:
        """The tokens of "train" or "val", [n] uint16, read from disk as needed."""
        path = self.folder / f"{split}.bin"
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint16)  # an empty file cannot be mapped
        return np.memmap(path, dtype=np.uint16, mode="r")


# ---------------------------------------------------------------- finding text


def find_files(data: str) -> list[TextFile]:
    """The files of "stdlib", of a folder, or the one file of that path."""
    if data == "stdlib":
        return _find_stdlib()
    path = Path(data)
    if path.is_file():
        return [TextFile(path.name, path)]
    if not path.is_dir():
        raise ValueError(f"--data {data}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.is_file())
    found = [
        p for p in found if not any(n[0] == "." for n in p.relative_to(path).parts)
    ]
    files = [TextFile(p.relative_to(path).as_posix(), p) for p in found]
    texts = [file for file in files if _looks_like_text(file)]
    if skipped := len(files) - len(texts):
        warnings.warn(f"--data {data}: skipped {skipped} binary files", stacklevel=2)
    if not texts:
        raise ValueError(f"--data {data}: no text files in this folder")
    return texts


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _find_stdlib() -> list[TextFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _STDLIB_SKIPPED)
        paths = [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        files += [TextFile(p.relative_to(root).as_posix(), p) for p in paths]
    if not files:
        raise ValueError(
            f"--data stdlib: no Python source under {root}; give --data a text file"
        )
    return files


def _looks_like_text(file: TextFile) -> bool:
    opener = _OPENERS.get(file.path.suffix, open)
    with opener(file.path, "rb") as content:
        return b"\0" not in content.read(8192)


def split_files(
    files: list[TextFile], max_mb: int | None = None
) -> tuple[list[TextFile], list[TextFile]]:
    """Training and validation files, in an order fixed by a hash of their names.

    The cap counts bytes on disk and drops whole files from the end of that order.
    """
    order = sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
    if max_mb is not None:
        sizes = itertools.accumulate(f.path.stat().st_size for f in order)
        kept = sum(size <= max_mb * 2**20 for size in sizes)
        order = order[: max(kept, 1)]
    if len(order) < VALIDATION_SHARE:
        return order, []
    validation = order[::VALIDATION_SHARE]
    return [f for f in order if f not in set(validation)], validation


def documents(files: list[TextFile]) -> Iterator[Piece]:
    for file in files:
        yield from mark_last(file.pieces())


def mark_last(pieces: Iterable[str]) -> Iterator[Piece]:
    """Pairs each piece of a document with whether it is the last."""
    iterator = iter(pieces)
    piece = next(iterator, None)
    while piece is not None:
        following = next(iterator, None)
        yield piece, following is None
        piece = following


def split_pieces(pieces: Iterable[Piece], *, validation: bool) -> Iterator[Piece]:
    """Every 20th piece, or all the others: the split when files are few."""
    for i, piece in enumerate(pieces):
        if (i % VALIDATION_SHARE == VALIDATION_SHARE - 1) == validation:
            yield piece


# ------------------------------------------------------------ text to tokens


def check_vocab(vocab: int) -> None:
    if vocab > MAX_VOCAB:
        raise ValueError(
            f"--vocab {vocab}: tokens are kept in 16 bits, at most {MAX_VOCAB}"
        )
    # The 256 bytes and the end-of-text token are always in it.
    if vocab < 257:
        raise ValueError(f"--vocab {vocab}: a byte-level vocabulary has 257 or more")


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` tokens; end-of-text is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_up_to(texts, TOKENIZER_MB * 2**20), trainer)
    return tokenizer


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of the pieces, [n] uint16, some hundred pieces at a time."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    iterator = iter(pieces)
    while batch := list(itertools.islice(iterator, 256)):
        # A batch is tokenized on all cores.
        encodings = tokenizer.encode_batch(
            [text for text, _ in batch], add_special_tokens=False
        )
        tokens = [
            encoding.ids + [end] * ends
            for encoding, (_, ends) in zip(encodings, batch, strict=True)
        ]
        yield np.fromiter(itertools.chain.from_iterable(tokens), dtype=np.uint16)


def write_tokens(path: Path, chunks: Iterable[np.ndarray]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            chunk.tofile(file)


# ------------------------------------------------------------------- the cache


def cache_folder(cache_dir: str, source: object, vocab: int) -> Path:
    """The folder for tokens of this source; equal sources share one."""
    content = json.dumps([_FORMAT, source, vocab, tokenizers.__version__])
    return Path(cache_dir) / hashlib.sha256(content.encode()).hexdigest()[:16]


@contextlib.contextmanager
def written_at_once(folder: Path) -> Generator[Path]:
    """A temporary folder that becomes `folder` at the end, or vanishes on an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="writing-"))
    try:
        yield temporary
        # Another run may have been faster with the same content: then keep its.
        with contextlib.suppress(OSError):
            temporary.rename(folder)
        if not folder.is_dir():
            raise OSError(f"could not create {folder}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_files(
    data: str, *, vocab: int, cache_dir: str, max_mb: int | None, build: bool
) -> Corpus:
    """The corpus of "stdlib" or of the user's files.

    Call it with build=True on one process of a machine, then on the others.
    """
    check_vocab(vocab)
    if data == "stdlib" and max_mb is None:
        max_mb = STDLIB_MB
    train, validation = split_files(find_files(data), max_mb)
    source = [[f.signature() for f in part] for part in (train, validation)]
    folder = cache_folder(cache_dir, source, vocab)
    if not build or folder.is_dir():
        return Corpus(folder)
    with written_at_once(folder) as temporary:
        texts = (text for text, _ in _pieces_of("train", train, validation))
        tokenizer = train_tokenizer(texts, vocab)
        tokenizer.save(str(temporary / "tokenizer.json"))
        for split in ("train", "val"):
            pieces = _pieces_of(split, train, validation)
            write_tokens(temporary / f"{split}.bin", encode(pieces, tokenizer))
    return Corpus(folder)


def _pieces_of(
    split: str, train: list[TextFile], validation: list[TextFile]
) -> Iterator[Piece]:
    if validation:
        return documents(train if split == "train" else validation)
    return split_pieces(documents(train), validation=split == "val")
