"""What the examples of this folder train: a tiny LLaMA that learns to count."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 64, 16


class Counting(Dataset):
    """Row i counts from i modulo the size of the vocabulary, in steps of 1 to 3."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (index + torch.arange(LENGTH) * (index % 3 + 1)) % VOCABULARY
        return {"input_ids": row, "labels": row}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, optimizer: Optimizer, epochs: int) -> None:
    for _ in range(epochs):
        for batch in DataLoader(Counting(), batch_size=8):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")


def save(file: str, model: nn.Module, optimizer: Optimizer) -> None:
    torch.save((model.state_dict(), optimizer.state_dict()), file)


def load(file: str, model: nn.Module, optimizer: Optimizer) -> None:
    for part, state in zip((model, optimizer), torch.load(file)):
        part.load_state_dict(state)
