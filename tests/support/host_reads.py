"""How often the host reads a tensor, whatever device that is on."""

import torch
from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu"}


class Host(TorchFunctionMode):
    """Counts reads of tensors, and numbers of the host that are made into tensors."""

    def __init__(self):
        super().__init__()
        self.reads, self.made = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and isinstance(args[0], torch.Tensor):
            self.reads.append(func.__name__)
        self.made += func in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))
