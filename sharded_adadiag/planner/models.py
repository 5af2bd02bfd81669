"""Models by name, as the shapes of their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a model.

    Attributes:
        name: The name in ``model.named_parameters()``.
        shape: Its logical shape.
        rotate: Whether it is in the rotated param group.
        unit: The decoder layer it is in, or "" for the rest of the model: what FSDP1
            wraps, and so lays end to end.
        batch_dims: Leading dimensions that count matrices (its group's option).
    """

    name: str
    shape: tuple[int, ...]
    rotate: bool
    unit: str = ""
    batch_dims: int = 0

    @property
    def group(self) -> tuple[bool, int]:
        """What tells its param group: ``rotate`` and ``batch_dims``."""
        return self.rotate, self.batch_dims

    @property
    def numel(self) -> int:
        """Entries of it."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A model, as far as a plan needs it.

    Attributes:
        name: What to call it.
        weights: Every trained parameter, in the order of ``named_parameters()``.
        notes: What a reader of the plan must know, a sentence each.
    """

    name: str
    weights: tuple[Weight, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a LLaMA-like decoder.

    Attributes:
        hidden: Width of the residual stream.
        ffn: Width of the feed-forward layers.
        layers: Number of decoder layers.
        queries: Width of all query heads together.
        keys: Width of all key heads together; values have the same.
        vocab: Number of tokens.
        tied: The output head is the embedding.
        experts: Feed-forward networks of a layer; 0 for one without a router.
        qkv_bias: Queries, keys and values have a bias.
        out_bias: The projection of the heads' outputs has a bias.
        mlp_bias: The feed-forward layers have biases.
        head_norm: Width of a norm of each query and key head; 0 for none.
    """

    hidden: int
    ffn: int
    layers: int
    queries: int
    keys: int
    vocab: int = 32000
    tied: bool = False
    experts: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norm: int = 0

    def weights(self) -> tuple[Weight, ...]:
        """Every parameter, in the order of ``named_parameters()``."""
        table = (self.vocab, self.hidden)
        found = [Weight("model.embed_tokens.weight", table, False)]
        for i in range(self.layers):
            unit = f"model.layers.{i}"
            for name, shape in (*self._attention(), *self._mlp(), *self._norms()):
                rotate = len(shape) > 1 and name != "mlp.gate.weight"
                stack = int(len(shape) > 2)
                found.append(Weight(f"{unit}.{name}", shape, rotate, unit, stack))
        found.append(Weight("model.norm.weight", (self.hidden,), False))
        if not self.tied:
            found.append(Weight("lm_head.weight", table, False))
        return tuple(found)

    def _attention(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, heads = self.hidden, self.queries
        for name, width in (("q", heads), ("k", self.keys), ("v", self.keys)):
            yield f"self_attn.{name}_proj.weight", (width, hidden)
            if self.qkv_bias:
                yield f"self_attn.{name}_proj.bias", (width,)
        yield "self_attn.o_proj.weight", (hidden, heads)
        if self.out_bias:
            yield "self_attn.o_proj.bias", (hidden,)
        if self.head_norm:
            yield "self_attn.q_norm.weight", (self.head_norm,)
            yield "self_attn.k_norm.weight", (self.head_norm,)

    def _mlp(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.experts:  # stacked, as transformers 5 has them
            sizes = self.experts, 2 * self.ffn, self.hidden
            yield "mlp.gate.weight", (self.experts, self.hidden)
            yield "mlp.experts.gate_up_proj", sizes
            yield "mlp.experts.down_proj", (self.experts, self.hidden, self.ffn)
            return
        for name in ("gate_proj", "up_proj"):
            yield f"mlp.{name}.weight", (self.ffn, self.hidden)
            if self.mlp_bias:
                yield f"mlp.{name}.bias", (self.ffn,)
        yield "mlp.down_proj.weight", (self.hidden, self.ffn)
        if self.mlp_bias:
            yield "mlp.down_proj.bias", (self.hidden,)

    def _norms(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "input_layernorm.weight", (self.hidden,)
        yield "post_attention_layernorm.weight", (self.hidden,)


DECODERS = {
    "llama-60m": Decoder(512, 1376, 8, 512, 512),
    "llama-130m": Decoder(768, 2048, 12, 768, 768),
    "llama-350m": Decoder(1024, 2736, 24, 1024, 1024),
    "llama-1.3b": Decoder(2048, 5461, 24, 2048, 2048),
    "llama-7b": Decoder(4096, 11008, 32, 4096, 4096),
    "llama-70b": Decoder(8192, 28672, 80, 8192, 1024),
    "mixtral-8x7b": Decoder(4096, 14336, 32, 4096, 1024, experts=8),
}


def named_model(name: str) -> Model:
    """A model of `DECODERS`.

    Args:
        name: The name on the command line.

    Returns:
        The model.
    """
    return decoder_model(name, DECODERS[name])


def decoder_model(name: str, decoder: Decoder) -> Model:
    """The model of these sizes.

    Args:
        name: What to call it.
        decoder: Sizes of the model.

    Returns:
        The model.
    """
    return Model(name, decoder.weights())
