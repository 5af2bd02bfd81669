"""Optimizers for trainers that hand over the model rather than its parameters."""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.params.grouping import param_groups


def model_factory(optimizer: type[Optimizer]) -> type[ModelFactory]:
    """A class whose instances make the optimizer of a model.

    ``model_factory(AdaDiag)()(model, lr=1e-3, exclude=["*.router.*"])`` is
    ``AdaDiag(param_groups(model, exclude=["*.router.*"]), lr=1e-3)``. Hugging Face's
    Trainer calls such a class when it wants the optimizer, before FSDP2 and after
    FSDP1 have wrapped the model::

        Trainer(..., optimizer_cls_and_kwargs=(model_factory(AdaDiag), {"lr": 1e-3}))

    The instance may be given the trainer's arguments behind the model, as axolotl
    does. Nothing is read from them: what is not among the options has the
    optimizer's default, the learning rate included.

    Args:
        optimizer: AdaDiag, AdafacDiag, HfacDiag or a subclass of theirs.

    Returns:
        The class, always the same one for an optimizer. It can be pickled if the
        optimizer's class can.

    Raises:
        TypeError: If `optimizer` is not one of these classes.
    """
    is_class = isinstance(optimizer, type)
    if not (is_class and isinstance(getattr(optimizer, "rule", None), Rule)):
        got = optimizer.__name__ if is_class else f"an object of {type(optimizer)}"
        raise TypeError(
            f"model_factory: got {got}, it must be the class AdaDiag, AdafacDiag, "
            "HfacDiag or a subclass; options go to the call that makes the optimizer"
        )
    if optimizer not in _made:
        _made[optimizer] = _make(optimizer)
    return _made[optimizer]


class _FactoryType(type):
    """The type of what `model_factory` returns, which is printed as the call."""

    optimizer: type[Optimizer]

    def __repr__(cls) -> str:
        if "optimizer" not in vars(cls):  # a subclass made by the user
            return super().__repr__()
        return f"model_factory({cls.optimizer.__name__})"


class ModelFactory(metaclass=_FactoryType):
    """What the classes have in common that `model_factory` returns."""

    def __call__(
        self,
        model: nn.Module,
        training_args: object = None,
        /,
        *,
        exclude: str | Iterable[str] = (),
        **options: Any,
    ) -> Optimizer:
        """Make the optimizer of a model.

        Args:
            model: The model to be trained, wrapped already or not yet.
            training_args: What some trainers pass besides; nothing is read from it.
            exclude: Name patterns (``fnmatch`` style) of parameters that shall not
                be rotated, as for ``param_groups``.
            **options: Options of the optimizer, such as ``lr``.

        Returns:
            The optimizer, its parameters named, in a rotated and a plain group.

        Raises:
            TypeError: If `model` is not an ``nn.Module``, or for an unknown option.
            ValueError: For an invalid option, or a pattern that matches nothing.
        """
        groups = param_groups(model, exclude=exclude)
        return type(self).optimizer(groups, **options)

    def __repr__(self) -> str:
        return f"{type(self)!r}()"


_made: dict[type[Optimizer], type[ModelFactory]] = {}


def _make(optimizer: type[Optimizer]) -> type[ModelFactory]:
    name = optimizer.__name__
    content = {
        "__doc__": f"Instances make the {name} of a model; see ``model_factory``.",
        "__module__": __name__,
        "optimizer": optimizer,
    }
    made = _FactoryType(f"{name}Factory", (ModelFactory,), content)
    return cast("type[ModelFactory]", made)


def _reduce(cls: _FactoryType) -> str | tuple[Any, ...]:
    """How to pickle the class: no module has it under its name."""
    if "optimizer" not in vars(cls):
        return cls.__qualname__
    return model_factory, (cls.optimizer,)


copyreg.pickle(_FactoryType, _reduce)
