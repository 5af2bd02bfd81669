"""Models by their Hugging Face ``config.json``.

With transformers at hand any causal language model is built on the meta device, which
takes no memory, and sorted by `param_groups`. Without it a formula knows the
decoders that are built like LLaMA.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch

from sharded_adadiag.params.grouping import param_groups
from sharded_adadiag.planner.models import Decoder, Model, Weight, decoder_model

# Of a model type: whether queries, keys and values have a bias whatever the config
# says, and whether each of their heads has a norm.
LIKE_LLAMA = {
    "llama": (False, False),
    "mistral": (False, False),
    "mixtral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
_LAYER = re.compile(r"^(.*?\b(?:layers|layer|blocks|block|h)\.\d+)\.")


def model_of_config(path: Path) -> Model:
    """The model that a config file describes.

    Args:
        path: A ``config.json``, or the folder that has one.

    Returns:
        The model, called by its file's name.

    Raises:
        ValueError: If there is no such file, it is no config, or the model's shapes
            cannot be told from it.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: a config.json is an object, this is not")
    name = str(path)
    if importlib.util.find_spec("transformers") is not None:
        weights = _built(config, file)
        stacks = sum(len(w.shape) > 2 and not w.rotate for w in weights)
        note = f"{stacks} stacks of matrices are not rotated: plain Adam"
        return Model(name, weights, (note,) if stacks else ())
    return decoder_model(name, decoder_of(config, name=str(file)))


def decoder_of(config: dict[str, Any], *, name: str) -> Decoder:
    """The sizes of a decoder built like LLaMA.

    Args:
        config: A Hugging Face model's configuration.
        name: For messages.

    Returns:
        Its sizes.

    Raises:
        ValueError: If it is of another kind, or a size is missing or makes no sense.
    """
    kind = config.get("model_type")
    if kind not in LIKE_LLAMA:
        raise ValueError(
            f"{name}: the shapes of a model of type {kind!r} are not known without "
            "transformers (known are " + ", ".join(LIKE_LLAMA) + "); install it"
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {key} must be an integer >= 1, got {value!r}")
        return value

    bias, norms = LIKE_LLAMA[kind]
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    # transformers' own defaults of these types, where a config leaves them out.
    width = size("head_dim", {"qwen3": 128}.get(kind, hidden // heads))
    grouped = size("num_key_value_heads", {"mistral": 8, "mixtral": 8}.get(kind, heads))
    everywhere = bool(config.get("attention_bias")) and kind in {"llama", "qwen3"}
    return Decoder(
        hidden=hidden,
        ffn=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        queries=heads * width,
        keys=grouped * width,
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=size("num_local_experts", 8) if kind == "mixtral" else 0,
        qkv_bias=bias or everywhere,
        out_bias=everywhere,
        mlp_bias=bool(config.get("mlp_bias")) and kind == "llama",
        head_norm=width if norms else 0,
    )


def _built(config: dict[str, Any], file: Path) -> tuple[Weight, ...]:
    """The parameters of the model that transformers builds of a config."""
    import transformers

    try:
        known = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(known)
    except Exception as error:  # transformers raises whatever the config led to
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file}: transformers builds no model: {first}") from error
    groups = {
        name: (group["rotate"], group.get("batch_dims", 0))
        for group in param_groups(model)
        for name, _ in group["params"]
    }
    found = []
    for name, param in model.named_parameters():
        rotate, stack = groups[name]
        found.append(Weight(name, tuple(param.shape), rotate, _unit(name), stack))
    return tuple(found)


def _unit(name: str) -> str:
    """The decoder layer that a parameter is in."""
    found = _LAYER.match(name)
    return found.group(1) if found else ""
