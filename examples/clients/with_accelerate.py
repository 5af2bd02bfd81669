"""A loop of one's own with accelerate, which shards the model when it prepares it.

python with_accelerate.py FOLDER EPOCHS [EPOCH to go on from]
accelerate launch --use_fsdp --fsdp_version 2 with_accelerate.py FOLDER EPOCHS
"""

import sys

import tiny
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from sharded_adadiag import AdaDiag, param_groups


def train(folder: str, epochs: int, resume: int = 0) -> tuple[nn.Module, AdaDiag]:
    accelerator, model = Accelerator(), tiny.llama()
    groups = param_groups(model, exclude=["*.k_proj.*"])
    optimizer = AdaDiag(groups, lr=1e-2, refresh_every=10)
    rows = DataLoader(tiny.Counting(), batch_size=8)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    if resume:
        accelerator.load_state(f"{folder}/{resume}")
    for epoch in range(resume, epochs):
        for batch in rows:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
        accelerator.save_state(f"{folder}/{epoch + 1}")
    return model, optimizer.optimizer


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:]))
