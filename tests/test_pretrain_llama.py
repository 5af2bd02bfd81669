"""The main example: its data, its schedule, and runs of it as a user starts them."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import batches  # noqa: E402
import c4  # noqa: E402
import checkpoints  # noqa: E402
import corpus  # noqa: E402
import metrics  # noqa: E402
import optimizers  # noqa: E402
import settings  # noqa: E402

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


# ------------------------------------------------- metrics and checkpoints


def test_a_continued_run_forgets_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    metrics.drop_lines_after(path, 3)
    assert [line["step"] for line in metrics.read_lines(path)] == [1, 2, 3]


def test_half_written_checkpoints_are_not_picked_up(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-11.writing"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoints.newest(tmp_path).name == "step-10"
    assert checkpoints.newest(tmp_path / "nothing") is None


def test_a_checkpoint_of_another_world_size_is_refused(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"rank-{rank}.pt").touch()
    with pytest.raises(ValueError, match="written by 3 ranks, this run has 2"):
        checkpoints.load(tmp_path, ranks=types.SimpleNamespace(rank=0, world_size=2))


# -------------------------------------------------------------------- runs

STEPS = 6


def command(num_ranks: int, run_dir: Path, *flags: str) -> list[str]:
    """A tiny run; on one rank without torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone"]
    start.append(f"--nproc-per-node={num_ranks}")
    package = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    return [
        sys.executable,
        *(start if num_ranks > 1 else []),
        str(EXAMPLES / "pretrain_llama.py"),
        *("--model", "tiny", "--steps", str(STEPS), "--data", str(package)),
        *("--val-batches", "2", "--val-every", "3", "--save-every", "3"),
        *("--cache-dir", str(run_dir.parent / "cache"), "--run-dir", str(run_dir)),
        *("--device", "cpu", *flags),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(num_ranks: int, run_dir: Path, *flags: str) -> str:
    done = subprocess.run(
        command(num_ranks, run_dir, *flags),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_results(run_dir: Path) -> list[dict]:
    """The metrics without the times."""
    lines = metrics.read_lines(run_dir / "metrics.jsonl")
    timed = ("tokens_per_s", "optimizer_share")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def read_weights(run_dir: Path, num_ranks: int) -> list[dict]:
    folder = run_dir / "checkpoints" / f"step-{STEPS}"
    files = [folder / f"rank-{rank}.pt" for rank in range(num_ranks)]
    states = [torch.load(file, weights_only=True) for file in files]
    return [
        {name: value["__shard__"] for name, value in state["model"].items()}
        for state in states
    ]


@pytest.fixture(scope="module")
def adamw_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("adamw") / "whole"
    output = run(2, folder, "--optimizer", "adamw")
    assert str(folder / "loss.png") in output
    return folder


def check_resumed(whole: Path, *flags: str) -> None:
    """Compares a run with what its checkpoint of step 3 becomes when continued."""
    resumed = whole.parent / "resumed"
    shutil.copytree(whole, resumed)
    folder = resumed / "checkpoints"
    (folder / f"step-{STEPS}").rename(folder / "step-5.writing")  # as after a crash
    assert "continuing from" in run(2, resumed, *flags, "--resume")

    assert read_results(resumed) == read_results(whole)
    for expected, got in zip(read_weights(whole, 2), read_weights(resumed, 2)):
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name


@pytest.mark.multiprocess
def test_a_run_leaves_metrics_and_a_plot(adamw_run: Path) -> None:
    results = read_results(adamw_run)
    assert [line["step"] for line in results] == list(range(1, STEPS + 1))
    assert [line["val_loss"] is not None for line in results] == [
        False,
        False,
        True,
    ] * 2
    assert results[-1]["loss"] < results[0]["loss"]
    assert results[-1]["tokens"] == STEPS * 8 * 32
    assert (adamw_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((adamw_run / "tensorboard").glob("events.*"))


@pytest.mark.multiprocess
def test_a_resumed_run_repeats_the_uninterrupted_one(adamw_run: Path) -> None:
    check_resumed(adamw_run, "--optimizer", "adamw")


@pytest.mark.multiprocess
def test_a_resumed_run_repeats_its_rotations(tmp_path: Path) -> None:
    """The bases of step 3 serve step 4; step 5 makes new ones."""
    flags = ["--optimizer", "adadiag", "--refresh-every", "2"]
    run(2, tmp_path / "whole", *flags)
    check_resumed(tmp_path / "whole", *flags)


@pytest.mark.multiprocess
def test_one_and_two_ranks_train_alike(adamw_run: Path, tmp_path: Path) -> None:
    """The same weights and batches; only the order of sums differs."""
    run(1, tmp_path / "one", "--optimizer", "adamw", "--micro-batch", "3")
    losses = [
        [[line["loss"], line["val_loss"] or 0.0] for line in read_results(folder)]
        for folder in (adamw_run, tmp_path / "one")
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0.0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_leaves_a_checkpoint(num_ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--optimizer", "adamw", "--steps", "1000000", "--save-every", "0"]
    process = subprocess.Popen(
        command(num_ranks, folder, *flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        give_up = time.monotonic() + 90
        while len(metrics.read_lines(folder / "metrics.jsonl")) < 3:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    # torchrun has an exit code of its own.
    assert process.returncode == (130 if num_ranks == 1 else 1)
    last = metrics.read_lines(folder / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}; continue with" in output
    checkpoint = checkpoints.newest(folder)
    assert checkpoints.step_of(checkpoint) == last
    assert len(list(checkpoint.iterdir())) == num_ranks
    assert torch.load(checkpoint / "rank-0.pt", weights_only=True)["settings"]
