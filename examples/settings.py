"""The settings of `pretrain_llama.py`: named model sizes, flags and their defaults.

Needs the standard library alone: launchers run this file on the flags, before they
install or start anything, so that help and mistakes are told at once and once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shape of a LLaMA and the run that goes with it."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int
    sequence: int
    batch: int
    micro_batch: int
    steps: int
    refresh_every: int


# The paper's sizes: batch 512 x 256 tokens, steps and shapes as in its LLaMA table.
# micro_batch only bounds memory: the logits of one are micro_batch x 256 x 32000.
# A run of a few hundred steps changes fast and wants fresher bases than the paper's.
PRESETS = {
    "tiny": Preset(32, 88, 2, 2, 512, 32, 8, 8, 20, 20),
    "small": Preset(128, 344, 4, 4, 2048, 128, 32, 32, 300, 20),
    "60m": Preset(512, 1376, 8, 8, 32000, 256, 512, 64, 10_000, 200),
    "130m": Preset(768, 2048, 12, 12, 32000, 256, 512, 64, 20_000, 200),
    "350m": Preset(1024, 2736, 24, 16, 32000, 256, 512, 32, 60_000, 200),
    "1.3b": Preset(2048, 5461, 24, 32, 32000, 256, 512, 16, 100_000, 200),
}

DEFAULT_LR = {
    "adamw": 3e-3,
    "adam": 3e-3,
    "adadiag": 3e-3,
    "adadiag++": 3e-3,
    "adafactor": 3e-3,
    "adafacdiag": 3e-3,
    "adafacdiag++": 3e-3,
    "hfac": 3e-3,
    "hfacdiag": 3e-3,
}

# torch.optim.AdamW knows nothing of a basis: these flags would be ignored with it.
ROTATION_FLAGS = (
    "refresh_every",
    "refresh_slots",
    "refresh_lag",
    "distribution",
    "basis",
    "on_refresh",
)


def _slots(text: str) -> int | str:
    return text if text == "auto" else int(text)


# What may differ between a run and its continuation without changing the numbers.
# The data is compared by the key of its tokens: the same files may have moved.
_FREE_ON_RESUME = {
    "data",
    "cache_dir",
    "run_dir",
    "resume",
    "compare",
    "save_every",
    "keep_last",
    "log_every",
    "val_every",
    "val_batches",
    "timeout_s",
}


def _default_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "sharded_adadiag")


def _option(default: Any, text: str, **arguments: Any) -> Any:
    """A dataclass field that is also a flag; `arguments` go to add_argument."""
    arguments["help"] = text
    metadata = {"arguments": arguments}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _preset_option(text: str) -> Any:
    return _option(None, text + " (default: the model's)", type=int)


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str = _option("small", "size of the model", choices=tuple(PRESETS))
    hidden: int = _preset_option("width of the model")
    ffn: int = _preset_option("width of the SwiGLU layer")
    layers: int = _preset_option("number of decoder layers")
    heads: int = _preset_option("number of attention heads")
    vocab: int = _preset_option("vocabulary of the model and of the tokenizer")
    sequence: int = _preset_option("tokens in a sequence")
    batch: int = _preset_option("sequences in a step, over all ranks")
    micro_batch: int = _preset_option("sequences in one forward pass of a rank")
    steps: int = _preset_option("steps in the run")

    optimizer: str = _option("adadiag", "the optimizer", choices=tuple(DEFAULT_LR))
    compare: str | None = _option(
        None,
        "another optimizer, trained afterwards on the same data from the same weights:"
        " then there is a plot and a table of both",
        choices=tuple(DEFAULT_LR),
    )
    lr: float = _option(None, "peak learning rate (default: 3e-3)", type=float)
    plain_lr: float | None = _option(
        None,
        "peak learning rate of embeddings, head and 1-D parameters (default: --lr)",
        type=float,
    )
    betas: tuple[float, float] | None = _option(
        None, "decay of the moments (default: the optimizer's)", type=float, nargs=2
    )
    eps: float | None = _option(None, "default: the optimizer's", type=float)
    weight_decay: float = _option(0.0, "decoupled weight decay", type=float)
    refresh_every: int | None = _option(
        None, "steps between two bases (default: the model's)", type=int
    )
    refresh_slots: int | str | None = _option(
        None, "portions of the bases of a period, or auto", type=_slots
    )
    refresh_lag: int | None = _option(
        None, "steps in which a basis is computed", type=int
    )
    distribution: str | None = _option(
        None, "who applies the rotations", choices=("auto", "owner", "broadcast")
    )
    basis: str | None = _option(None, "how it is computed", choices=("svd", "eigh"))
    on_refresh: str | None = _option(
        None, "what happens to the moments", choices=("carry", "reproject")
    )
    warmup: int = _option(None, "steps of warm-up (default: a tenth)", type=int)
    grad_clip: float = _option(0.0, "largest gradient norm; 0 is none", type=float)
    precision: str = _option(
        "fp32", "dtype of the forward and backward pass", choices=("fp32", "bf16")
    )
    device: str = _option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    timeout_s: float = _option(
        600.0, "longest wait for the other ranks, then the run ends", type=float
    )
    seed: int = _option(0, "of the weights and of the order of the data", type=int)

    data: str = _option(
        "stdlib",
        "'stdlib' (the source of Python's standard library), 'c4' (streamed), or a"
        " file or folder of text (plain, .gz, .xz)",
    )
    max_mb: int | None = _option(
        None, "read at most this much text (default: 16 for stdlib)", type=int
    )
    cache_dir: str = _option(_default_cache, "where tokens are kept")

    run_dir: str | None = _option(None, "default: runs/MODEL-OPTIMIZER-TIME")
    log_every: int = _option(1, "steps between two lines of metrics", type=int)
    val_every: int = _option(50, "steps between two validations", type=int)
    val_batches: int = _option(10, "global batches in a validation", type=int)
    save_every: int = _option(0, "steps between checkpoints; 0: at the end", type=int)
    keep_last: int = _option(2, "checkpoints to keep; 0 keeps all", type=int)
    resume: bool = _option(
        False,
        "continue from the newest checkpoint of --run-dir; start if it has none",
        action="store_true",
    )

    def __post_init__(self) -> None:
        for name in ("log_every", "val_every", "val_batches", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError("--timeout-s must be positive")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"--warmup {self.warmup} is not between 0 and --steps {self.steps}"
            )
        if self.resume and self.run_dir is None:
            raise ValueError("--resume needs the --run-dir of the run to continue")
        # Each head rotates pairs of its dimensions (RoPE).
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"--hidden {self.hidden} is not a multiple of twice --heads"
                f" {self.heads}"
            )
        given = [name for name in ROTATION_FLAGS if getattr(self, name) is not None]
        if self.optimizer == "adamw" and given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{flags}: no meaning for torch's AdamW (adamw)")
        if self.compare == self.optimizer:
            raise ValueError(f"--compare {self.compare}: that is the --optimizer")

    @property
    def rotates(self) -> bool:
        """Whether the optimizer works in a rotated basis."""
        return "diag" in self.optimizer

    def compared(self, run_dir: Path) -> Settings:
        """The settings of the other optimizer; its run is a folder in `run_dir`."""
        assert self.compare is not None
        changed: dict[str, Any] = {
            "optimizer": self.compare,
            "compare": None,
            "run_dir": str(run_dir / self.compare),
        }
        if self.compare == "adamw":
            changed |= dict.fromkeys(ROTATION_FLAGS)
        elif self.refresh_every is None:
            changed["refresh_every"] = PRESETS[self.model].refresh_every
        return dataclasses.replace(self, **changed)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """The settings that would make a continuation differ from the saved run."""
        current = dataclasses.asdict(self)
        return [
            f"--{name.replace('_', '-')} was {saved.get(name)}, is {current[name]}"
            for name in current
            if name not in _FREE_ON_RESUME and saved.get(name) != current[name]
        ]


def parse(
    argv: Sequence[str] | None = None,
    *,
    without: Collection[str] = (),
    parents: Sequence[argparse.ArgumentParser] = (),
) -> Settings:
    """The settings of a command line; what it leaves out comes from the preset.

    `without` names settings that are no flags of the program, `parents` have flags
    that are not settings.
    """
    parser = argparse.ArgumentParser(
        prog="pretrain_llama.py",
        description="Pretrains a LLaMA with an optimizer of sharded_adadiag.",
        parents=parents,
    )
    fields = [f for f in dataclasses.fields(Settings) if f.name not in without]
    for field in fields:
        flag = "--" + field.name.replace("_", "-")
        # SUPPRESS leaves the default to the dataclass, so that it is said once.
        parser.add_argument(
            flag, default=argparse.SUPPRESS, **field.metadata["arguments"]
        )
    arguments = vars(parser.parse_args(argv))
    given = {f.name: arguments[f.name] for f in fields if f.name in arguments}
    preset = PRESETS[given.get("model", "small")]
    values = {**dataclasses.asdict(preset), **given}
    if values.get("optimizer") == "adamw" and "refresh_every" not in given:
        values["refresh_every"] = None
    values.setdefault("lr", DEFAULT_LR[values.get("optimizer", "adadiag")])
    values.setdefault("warmup", values["steps"] // 10)
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return Settings(**values)


HELP_SHOWN = 64  # exit code: there is nothing to start


def check(read: Callable[[], Any]) -> int:
    """Reads flags with `read`; returns an exit code: 0, 2 or `HELP_SHOWN`."""
    try:
        read()
    except ValueError as error:
        print(f"pretrain_llama.py: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # argparse has printed the help, or what is wrong
        return HELP_SHOWN if ended.code == 0 else 2
    return 0


if __name__ == "__main__":
    sys.exit(check(parse))
