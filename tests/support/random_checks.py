"""Random cases on several ranks beside one process."""

import torch

from sharded_adadiag.testing.ranks import run_threads
from support.random_training import differing, train_alone


def check(case, differ):
    want = train_alone(case)
    results = run_threads(case.world_size, differing, case, want, differ)
    found = [message for messages in results for message in messages]
    assert not found, "\n".join(found[:20])


def other_bits(actual, expected):
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"{actual.dtype} {actual.shape}, not {expected.dtype} {expected.shape}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return "" if bool(same.all()) else f"{actual} is not {expected}"


def far_off(actual, expected):
    close = torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    return "" if close else f"{actual} is not near {expected}"
