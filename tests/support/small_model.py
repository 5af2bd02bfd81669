"""Three named parameters on ranks, and what they are before and after a step."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.cases import Case, gradients
from support.training import groups, sharded_model

NAMED = (Case("a_weight", (8, 6)), Case("b_weight", (6, 8)), Case("c_bias", (5,)))


def set_gradients(model, cases, step, dtype):
    named = dict(model.named_parameters())
    for case, grad in zip(cases, gradients(cases, step, dtype)):
        param = named[case.name]
        if case.frozen or case.without_gradient:
            continue
        if isinstance(param, DTensor):
            grad = distribute_tensor(
                grad, param.device_mesh, param.placements, src_data_rank=None
            )
        param.grad = grad


def fresh(layout="fsdp2", **options):
    model, extra = sharded_model(layout, NAMED, torch.float32)
    return model, AdaDiag(groups(model, NAMED), **options, **extra)


def snapshot(model, opt):
    tensors = [p.detach() for p in model.parameters()]
    tensors += [v for s in opt.state.values() for v in s.values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).clone() for t in tensors]
