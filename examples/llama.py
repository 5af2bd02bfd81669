"""The LLaMA of a run, its loss, and its sharding."""

from __future__ import annotations

import torch
from ranks import Ranks
from settings import Settings
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional


def build_model(settings: Settings) -> nn.Module:
    """The model on the CPU; the same weights on every rank and world size."""
    # Imported late: it takes seconds, and the caller may first forbid the network.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.sequence,
        rms_norm_eps=1e-6,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def shard(model: nn.Module, settings: Settings, ranks: Ranks) -> None:
    """Shards each decoder layer, then what is left, over all ranks; in place."""
    policy = MixedPrecisionPolicy()
    if settings.precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for layer in model.model.layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)


def token_loss(model: nn.Module, tokens: Tensor, *, reduction: str) -> Tensor:
    """Cross-entropy of each token of tokens [batch, sequence + 1] but the first."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction
    )


def backward(model: nn.Module, tokens: Tensor, *, micro_batch: int) -> float:
    """Leaves the gradient of the mean loss in the model; returns that loss."""
    total = torch.zeros((), device=tokens.device)
    chunks = tokens.split(micro_batch)
    for i, chunk in enumerate(chunks):
        model.set_requires_gradient_sync(i == len(chunks) - 1)
        loss = token_loss(model, chunk, reduction="mean") * (len(chunk) / len(tokens))
        loss.backward()
        total += loss.detach()
    return total.item()


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: list[Tensor], *, micro_batch: int, ranks: Ranks
) -> float:
    """The mean loss over all tokens of all ranks' validation batches."""
    model.eval()
    total, count = 0.0, 0
    for tokens in batches:
        for chunk in tokens.to(ranks.device).split(micro_batch):
            total += token_loss(model, chunk, reduction="sum").item()
            count += chunk[:, 1:].numel()
    model.train()
    total, count = ranks.sum(total, count)
    return total / count
