"""Lightning; where there are several ranks the model is sharded with FSDP2.

python with_lightning.py FOLDER EPOCHS RANKS [CHECKPOINT to go on from]
"""

import sys
from typing import Any

import tiny
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from sharded_adadiag import AdaDiag, param_groups


class Counter(LightningModule):
    def configure_model(self):
        self.model = tiny.llama()
        if self.device_mesh is not None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return AdaDiag(param_groups(self), lr=1e-2, refresh_every=10)


def train(folder: str, epochs: int, ranks: int = 1, resume: Any = None, **flags: Any):
    strategy = ModelParallelStrategy() if ranks > 1 else "auto"
    flags = {"devices": ranks, "strategy": strategy, "logger": False, **flags}
    trainer = Trainer(default_root_dir=folder, max_epochs=epochs, **flags)
    trainer.fit(Counter(), DataLoader(tiny.Counting(), batch_size=8), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
