"""Functions that stand for those of packages that are not at hand."""

import types
from collections.abc import Callable
from typing import Any


def as_if_of(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with globals that call themselves another module."""
    known = {**function.__globals__, "__name__": module}
    return types.FunctionType(
        function.__code__,
        known,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
