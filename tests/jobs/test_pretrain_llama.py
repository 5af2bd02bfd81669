"""The main example: its flags, its data and its schedule."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, runs

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import batches  # noqa: E402
import c4  # noqa: E402
import corpus  # noqa: E402
import metrics  # noqa: E402
import optimizers  # noqa: E402
import settings  # noqa: E402
import summary  # noqa: E402

PROSE = "It was the best of times,\n\tit was the worst of times \u2014 na\u00efve.\n"


# ---------------------------------------------------------------- settings


def test_the_sizes_have_the_parameters_of_their_names() -> None:
    totals = {}
    for name, preset in settings.PRESETS.items():
        width = preset.hidden
        layer = 4 * width**2 + 3 * width * preset.ffn + 2 * width
        totals[name] = preset.layers * layer + 2 * preset.vocab * width + width
    assert totals["60m"] == 58_073_600
    assert totals["130m"] == 134_105_856
    assert totals["350m"] == 367_969_280
    assert totals["1.3b"] == 1_339_082_752


def test_flags_override_the_preset() -> None:
    parsed = settings.parse(["--model", "60m", "--layers", "2", "--steps", "50"])
    assert (parsed.layers, parsed.hidden, parsed.warmup) == (2, 512, 5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--optimizer", "adamw", "--refresh-every", "5"], "--refresh-every: no mean"),
        (["--resume"], "--run-dir"),
        (["--warmup", "7", "--steps", "6"], "--warmup 7"),
        (["--hidden", "30"], "twice --heads"),
        (["--batch", "0"], "--batch"),
        (["--timeout-s", "0"], "--timeout-s"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings.parse(["--model", "tiny", *flags])


def test_a_continuation_may_differ_in_where_it_writes_only() -> None:
    saved = settings.parse(["--model", "tiny", "--lr", "0.1"])
    moved = settings.parse(["--model", "tiny", "--lr", "0.1", "--run-dir", "x"])
    other = settings.parse(["--model", "tiny", "--lr", "0.2"])
    assert moved.differences(vars(saved)) == []
    assert other.differences(vars(saved)) == ["--lr was 0.1, is 0.2"]


def test_the_schedule_warms_up_and_ends_at_a_tenth() -> None:
    factors = [optimizers.lr_factor(s, warmup=10, steps=101) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert optimizers.lr_factor(0, warmup=0, steps=1) == 1.0


# -------------------------------------------------------------------- text


def test_plain_gz_and_xz_files_are_read_alike(tmp_path: Path) -> None:
    text = PROSE * 400  # several pieces
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    with lzma.open(tmp_path / "c.txt.xz", "wt", encoding="utf-8") as file:
        file.write(text)
    files = corpus.find_files(str(tmp_path))
    assert len(files) == 3
    for file in files:
        pieces = list(file.pieces())
        assert len(pieces) > 1
        assert "".join(pieces) == text


def test_binary_files_are_skipped_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / ".hidden").write_text(PROSE, encoding="utf-8")
    (tmp_path / "b.bin").write_bytes(b"\0\1\2")
    with pytest.warns(UserWarning, match="skipped 1 binary"):
        files = corpus.find_files(str(tmp_path))
    assert [file.name for file in files] == ["a.txt"]


def test_a_missing_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such file"):
        corpus.find_files("/nowhere/at/all")


def test_the_standard_library_is_split_by_file() -> None:
    train, validation = corpus.split_files(corpus.find_files("stdlib"), max_mb=2)
    names = {file.name for file in train}
    assert len(train) > 15 * len(validation) > 0
    assert names.isdisjoint(file.name for file in validation)
    assert not any("site-packages" in name for name in names)
    assert sum(f.path.stat().st_size for f in train + validation) <= 2 * 2**20


def test_tokens_decode_to_the_text_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(PROSE * 8000, encoding="utf-8")
    made = corpus.prepare_files(
        str(tmp_path / "book.txt"),
        vocab=300,
        cache_dir=str(tmp_path / "cache"),
        max_mb=None,
        build=True,
    )
    tokenizer = made.tokenizer()
    train, val = made.tokens("train"), made.tokens("val")
    assert train.dtype == val.dtype == np.uint16
    text = tokenizer.decode(train.tolist(), skip_special_tokens=True)
    assert text.startswith(PROSE * 40)
    # One file only: every 20th piece of it is for validation.
    assert len(val) == pytest.approx((len(train) + len(val)) / 20, rel=0.2)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [made.key]


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), corpus.written_at_once(tmp_path / "key") as part:
        (part / "train.bin").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_beyond_16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="65535"):
        corpus.check_vocab(65536)


# ----------------------------------------------------------------- batches


def shape(rank: int, world_size: int) -> batches.BatchShape:
    return batches.BatchShape(12, 8, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_world_size_sees_the_same_batches(world_size: int) -> None:
    tokens = np.arange(300, dtype=np.uint16)
    whole = batches.WindowBatches(tokens, shape(0, 1), seed=5)
    parts = [
        batches.WindowBatches(tokens, shape(rank, world_size), seed=5)
        for rank in range(world_size)
    ]
    for step in (7, 0, 3):  # in any order: a batch depends on its step alone
        rows = torch.cat([part.get(step) for part in parts])
        assert torch.equal(rows, whole.get(step))
        assert rows.shape == (12, 9)
        assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)


def test_an_epoch_meets_every_window_once() -> None:
    tokens = np.arange(12 * 8 * 3 + 1, dtype=np.uint16)
    source = batches.WindowBatches(tokens, shape(0, 1), seed=0)
    starts = torch.cat([source.get(step)[:, 0] for step in range(3)])
    assert sorted(starts.tolist()) == list(range(0, 288, 8))
    assert not torch.equal(source.get(0), source.get(3))


def test_validation_is_the_same_on_every_world_size() -> None:
    tokens = np.arange(500, dtype=np.uint16)
    whole = batches.validation_batches(tokens, shape(0, 1), 3)
    parts = [batches.validation_batches(tokens, shape(r, 2), 3) for r in range(2)]
    assert len(whole) == 3
    for i, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), batch)


def test_a_batch_that_does_not_split_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch 12 .* 5 ranks"):
        shape(0, 5)


# ------------------------------------------------------------------ stream


class ListTexts:
    """A stand-in for a streamed dataset."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self._position = 0

    def __iter__(self):
        while self._position < len(self._texts):
            self._position += 1
            yield self._texts[self._position - 1]

    def state_dict(self) -> dict:
        return {"position": self._position}

    def load_state_dict(self, state: dict) -> None:
        self._position = state["position"]


def one_rank() -> types.SimpleNamespace:
    return types.SimpleNamespace(rank=0, broadcast=lambda tensor: tensor)


def stream_texts() -> list[str]:
    return [f"document {i}: {PROSE * (i % 5 + 1)}" for i in range(700)]


def prepare_stream(cache_dir: Path) -> corpus.Corpus:
    return c4.prepare_c4(
        vocab=300,
        cache_dir=str(cache_dir),
        val_tokens=1000,
        build=True,
        open_split=lambda split: ListTexts(stream_texts()),
        name="stand-in",
    )


def test_a_stream_has_a_tokenizer_and_a_fixed_validation_set(tmp_path: Path) -> None:
    made = prepare_stream(tmp_path)
    assert len(made.tokens("val")) == 1000
    text = made.tokenizer().decode(made.tokens("val").tolist())
    assert text.startswith("document 0: It was the best")


def test_a_stream_continues_from_its_state(tmp_path: Path) -> None:
    tokenizer = prepare_stream(tmp_path).tokenizer()

    def open_stream() -> batches.StreamBatches:
        texts = ListTexts(stream_texts())
        return batches.StreamBatches(texts, tokenizer, shape(0, 1), one_rank())

    whole = open_stream()
    expected = [whole.get(step) for step in range(300)]
    first, second = open_stream(), open_stream()
    for step in range(170):
        first.get(step)
    second.load_state_dict(first.state_dict())
    for step in range(170, 300):
        assert torch.equal(second.get(step), expected[step])


def test_a_stream_that_ends_is_an_error(tmp_path: Path) -> None:
    tokenizer = prepare_stream(tmp_path).tokenizer()
    texts = ListTexts(["short"])
    source = batches.StreamBatches(texts, tokenizer, shape(0, 1), one_rank())
    with pytest.raises(ValueError, match="ended"):
        source.get(0)


def test_a_streamed_dataset_continues_from_its_state(tmp_path: Path) -> None:
    """C4 is such a dataset: gzipped JSON lines in several files."""
    program = f"""
import gzip, json, sys
sys.path.insert(0, {str(EXAMPLES)!r})
from datasets import load_dataset
from c4 import DatasetTexts
names = []
for part in range(3):
    names.append({str(tmp_path)!r} + f"/part-{{part}}.json.gz")
    with gzip.open(names[-1], "wt") as file:
        for i in range(100):
            file.write(json.dumps(dict(text=f"{{part}} {{i}}", url="", x=1)) + "\\n")

def open_texts():
    return DatasetTexts(
        load_dataset("json", data_files=names, split="train", streaming=True)
    )

whole = list(open_texts())
assert len(whole) == 300, len(whole)
first, second = open_texts(), open_texts()
iterator = iter(first)
begun = [next(iterator) for _ in range(133)]
second.load_state_dict(first.state_dict())
assert begun + list(second) == whole
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, timeout=120
    )


# ----------------------------------------------------------------- metrics


def test_a_continued_run_forgets_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    metrics.drop_lines_after(path, 3)
    assert [line["step"] for line in metrics.read_lines(path)] == [1, 2, 3]


# ----------------------------------------------------------------- summary


def curve(refresh_every: int | None = None) -> summary.Curve:
    """Two tokens a second, then four; half of the time in the optimizer, then none."""
    lines = [
        {"step": 2, "loss": 5.0, "tokens": 8, "val_loss": None},
        {"step": 4, "loss": 4.0, "tokens": 16, "val_loss": 4.5},
    ]
    lines[0] |= {"tokens_per_s": 2.0, "optimizer_share": 0.5}
    lines[1] |= {"tokens_per_s": 4.0, "optimizer_share": 0.0}
    return summary.Curve("name", lines, refresh_every)


def test_a_curve_knows_its_seconds_its_optimizer_and_its_refreshes() -> None:
    assert curve().seconds() == [4.0, 6.0]
    assert curve().optimizer_share() == pytest.approx(1 / 3)
    assert curve().refreshes() == []
    assert curve(3).refreshes() == [1, 4]
    assert curve().validated() == [1]


def test_adamws_states_are_two_tensors_like_each_parameter_and_its_counters() -> None:
    model = torch.nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.weight])
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert optimizers.adamw_bytes(model) == 2 * 12 * 4
    assert optimizers.state_bytes(optimizer) == 2 * 12 * 4 + 4


def test_the_compared_settings_differ_in_the_optimizer_alone() -> None:
    first = settings.parse(["--model", "tiny", "--compare", "adamw", "--basis", "eigh"])
    other = first.compared(Path("here"))
    assert (other.optimizer, other.run_dir, other.compare) == (
        "adamw",
        "here/adamw",
        None,
    )
    assert {name.split()[0] for name in other.differences(vars(first))} == {
        "--optimizer",
        "--refresh-every",
        "--basis",
    }
    back = settings.parse(["--optimizer", "adamw", "--compare", "adadiag"])
    assert back.compared(Path("here")).refresh_every == 20


@pytest.mark.multiprocess
def test_two_optimizers_are_compared_on_the_same_data(tmp_path: Path) -> None:
    """And the same command goes on where one was interrupted."""
    run_dir = tmp_path / "run"
    flags = ["--optimizer", "adadiag", "--refresh-every", "2", "--compare", "adamw"]
    output = runs.run(1, run_dir, *flags)
    assert output.count("rotated: ") == 2  # "rotated", "not rotated": once
    assert output.index("not rotated: ") < output.index("writing to")
    assert output.count("optimizer:   ") == 2
    ours, adamw = (runs.read_results(d) for d in (run_dir, run_dir / "adamw"))
    assert ours[0]["loss"] == adamw[0]["loss"]  # the same weights, the same batch
    assert ours[-1]["loss"] != adamw[-1]["loss"]
    assert (run_dir / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in output.splitlines()[-3:-1]]
    for row, name, results in zip(table, ("adadiag,", "adamw,"), (ours, adamw)):
        assert row[:4] == [name, "lr", "0.003", f"{results[-1]['val_loss']:.4f}"]
    assert table[1][-1] == "1.00" and float(table[0][-1]) > 1.0

    shutil.rmtree(run_dir / "adamw/checkpoints" / f"step-{runs.STEPS}")
    (run_dir / "compare.png").unlink()
    output = runs.run(1, run_dir, *flags, "--resume")
    assert f"continuing from {run_dir}/adamw/checkpoints/step-3" in output
    assert (run_dir / "compare.png").exists()
    assert runs.read_results(run_dir) == ours
    assert runs.read_results(run_dir / "adamw") == adamw
