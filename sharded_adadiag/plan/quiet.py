"""Without collections of garbage: a plan makes a million objects, and no cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def no_collections() -> Generator[None, None, None]:
    """Hold back the garbage collector, which would look at every object many times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
