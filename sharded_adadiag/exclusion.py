"""What is not rotated although it has two sides or more: the one list of it.

`param_groups` looks at modules first and at names where modules do not tell. A
DeepSpeed config file has no modules to look at, so there the names must do.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # of all batch and instance norms
from torch.nn.modules.conv import _ConvNd  # of all convolutions

# The report's word for what is rotated.
MATRIX = "matrix"
# A longer side than this many times the other is no weight that we have seen; LoRA of
# rank 8 on 14,336 features comes closest.
LOPSIDED = 2000


@dataclasses.dataclass(frozen=True, slots=True)
class NotRotated:
    """A kind of parameter that is left to plain Adam.

    Attributes:
        kind: What it is, for the report.
        needed_by: A model that has it.
        types: Modules whose parameters are of this kind.
        last: ``fnmatch`` patterns of the last part of a name ("a.b.weight": "weight").
        names: ``fnmatch`` patterns of whole names.
        guesses: The same, used only where there are no modules to look at.
    """

    kind: str
    needed_by: str
    types: tuple[type[nn.Module], ...] = ()
    last: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()


NOT_ROTATED = (
    NotRotated(
        "head",
        "LLaMA; ViT, BERT and GPT-2 with a classifier",
        guesses=(
            *("*lm_head*", "head.*", "*.head.*", "output.weight"),
            *("classifier.*", "*.classifier.*", "score.*", "fc.*"),
        ),
    ),
    # Two heads into one space: a rule that saw only the last would treat them unlike.
    NotRotated(
        "head",
        "CLIP",
        names=("*visual_projection.weight", "*text_projection.weight"),
    ),
    NotRotated(
        "norm",
        "GPT-2; ResNet",
        types=(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase),
    ),
    NotRotated(
        "embedding",
        "LLaMA; GPT-2; T5 (relative_attention_bias)",
        types=(nn.Embedding, nn.EmbeddingBag),
        guesses=(
            *("*embed*", "emb.*", "*.emb.*"),
            *("wte.*", "*.wte.*", "wpe.*", "*.wpe.*", "*relative_attention_bias.*"),
            *("shared.weight", "*.shared.weight"),
        ),
    ),
    # Tables that are bare parameters.
    NotRotated("embedding", "open_clip (positional_embedding)", last=("*embed*",)),
    NotRotated("embedding", "Perceiver", last=("latents", "*_token", "*_tokens")),
    NotRotated("bias", "gpt-oss (one for each expert)", last=("bias", "*_bias")),
    NotRotated("bias", "Swin; LeViT", last=("*bias_table", "*_biases")),
    NotRotated("decay", "Mamba", last=("A_log",)),
    NotRotated("decay", "RWKV", last=("time_decay", "time_first")),
    NotRotated(
        "direction of a weight norm",
        "wav2vec 2.0; Encodec",
        last=("weight_g", "weight_v"),
        names=("*parametrizations.*.original0", "*parametrizations.*.original1"),
    ),
    NotRotated("router", "gpt-oss; Jamba", names=("*.router.*", "router.*")),
)


def kind_by_module(module: nn.Module) -> str:
    """What all parameters of a module are because of its type.

    Args:
        module: Any module.

    Returns:
        The kind, or "" if its type does not say.
    """
    for entry in NOT_ROTATED:
        if entry.types and isinstance(module, entry.types):
            return entry.kind
    if isinstance(module, _ConvNd) and module.groups > 1:
        outer = module.out_channels if module.transposed else module.in_channels
        if outer == module.groups:
            return "depthwise convolution"
    return ""


def kind_by_name(
    name: str, shape: Sequence[int], names: Collection[str], *, guess: bool = False
) -> str:
    """What a parameter is because of its name and shape.

    Args:
        name: Of the parameter.
        shape: Its logical shape.
        names: Of all parameters: a gate beside experts is a router.
        guess: There are no modules to look at: heads, embeddings, depthwise
            convolutions and stacks are told by name and shape, too.

    Returns:
        The kind, or "" if they do not say.
    """
    last = name.rsplit(".", 1)[-1]
    for entry in NOT_ROTATED:
        # A convolution that embeds patches is a matrix, tables have two dimensions.
        patterns = entry.names + (entry.guesses if guess and len(shape) <= 2 else ())
        if _matches(last, entry.last) or _matches(name, patterns):
            return entry.kind
    block, gate, _ = f".{name}".rpartition(".gate.")
    if gate and any(f".{other}".startswith(f"{block}.experts.") for other in names):
        return "router"
    if guess and len(shape) > 2:
        if ".experts." in f".{name}":
            return stack(shape)
        if shape[1] == 1 < shape[0]:
            return "depthwise convolution"
    return ""


def stack(shape: Sequence[int]) -> str:
    """The kind of a stack of matrices.

    Args:
        shape: Its logical shape.

    Returns:
        The kind.
    """
    return f"stack of {shape[0]} matrices"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Exclusion:
    """Which parameters are not rotated because of their names.

    Args:
        patterns: ``fnmatch`` patterns of the user.
    """

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def rotates(
        self, name: str, shape: Sequence[int], names: Collection[str], *, guess: bool
    ) -> bool:
        """Whether a parameter may be rotated.

        Args:
            name: Of the parameter.
            shape: Its logical shape.
            names: Of all parameters.
            guess: DeepSpeed named the parameters and nobody has sorted them into
                groups, so what is not to be rotated is told by name and shape.

        Returns:
            False if a pattern of the user, or one of the list, matches.
        """
        if _matches(name, self.patterns):
            return False
        return not (guess and kind_by_name(name, shape, names, guess=True))

    def check(self, names: Sequence[str]) -> None:
        """Refuse a pattern that matches none of the names.

        Args:
            names: Of all parameters.

        Raises:
            ValueError: Naming the pattern.
        """
        for pattern in self.patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"exclude: the pattern {pattern!r} matches none of the "
                    f"{len(names)} parameters (the first is {names[0]!r}); write it "
                    "for their names, or remove it"
                )
