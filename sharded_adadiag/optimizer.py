"""The optimizers: glue between ``torch.optim`` and the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_adadiag.algorithm.state import ADADIAG, ADAFACDIAG, HFACDIAG, Rule
from sharded_adadiag.binding import Binding
from sharded_adadiag.checkpoint.hooks import FORMAT_VERSION, loading, saving
from sharded_adadiag.comm.collectives import communicator
from sharded_adadiag.options import (
    DEFAULTS,
    DISTRIBUTIONS,
    LATER_OPTIONS,
    OPTION_NAMES,
    Options,
    as_number,
    is_positive_int,
    name_dtypes,
)
from sharded_adadiag.params.admission import admit, warn_of_unsorted
from sharded_adadiag.params.callers import (
    backward_pass,
    refuse_in_backward,
    refuse_local_scaler,
)
from sharded_adadiag.params.exclusion import Exclusion
from sharded_adadiag.params.local import local
from sharded_adadiag.params.naming import check_parameter, names
from sharded_adadiag.plan.report import Report
from sharded_adadiag.zero.registration import admit_to_zero

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class RotatedOptimizer(Optimizer):
    """What AdaDiag, AdafacDiag and HfacDiag share; use one of those.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of them, as for any
            ``torch.optim`` optimizer. ``param_groups(model)`` makes the two
            groups that the paper uses. A group's ``rotate`` (bool, default True)
            says whether its matrices are rotated. Every option but
            ``distribution``, ``buffer_bytes`` and ``process_group`` may be set per
            group. Groups may be edited between steps, alike on all ranks: parameters
            may leave, come back and move. What the plan was made from stays as it
            was: ``rotate``, ``sides``, ``side``, ``refresh_slots``, ``refresh_lag``,
            ``basis_from``, ``first_moment``, ``momentum``, ``state_dtype``,
            ``rotation_dtype`` and ``max_rotated_dim``.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the first and the second moment.
        eps: Added to the bias-corrected square root of an unfactored second moment.
        weight_decay: Decoupled, as in ``torch.optim.AdamW``.
        sides: How many are rotated; ``"none"`` is the base method.
        side: Which one: ``"left"``, ``"right"``, or ``"auto"`` (the smaller; left).
        refresh_every: Steps between two bases (T of the paper); None keeps the first.
        refresh_slots: Portions, spread over these steps, in which the matrices get new
            bases; 1: all at once (the paper); ``"auto"``: enough for even steps.
        refresh_lag: Steps for which a basis is computed beside training; 0: the paper.
        on_refresh: ``"carry"`` the moments over (the paper), or ``"reproject"`` them.
        basis: ``"svd"`` (the paper) or ``"eigh"`` of the float64 Gram matrix.
        basis_from: What it is made of: this step's ``"gradient"`` (the paper), the
            ``"momentum"``, or ``"gram"``, moving averages of Gram matrices.
        gram_beta: Decay rate of the averages.
        gram_beta: Decay rate of the averages.
        first_moment: ``"rotated"``: carried over to a new basis (the paper), or
            ``"original"``: re-expressed in it, as if kept in the original frame.
        max_rotated_dim: Matrices whose rotated dimension is larger get plain Adam.
        noise_floor: Rotated entries below this times the gradient's norm count as 0.
        nonfinite: If a gradient has NaN or Inf entries: ``"raise"`` on every rank,
            ``"skip"`` the step on every rank, or ``"ignore"``. If all groups ignore,
            ranks agree on nothing before a step, so that groups which only some
            ranks have edited, and options made invalid on one, go unnoticed there.
        state_dtype: Dtype of the moments; None is the parameter's.
        rotation_dtype: Dtype of the rotations; None is the moments'.
        distribution: ``"owner"`` (each matrix is computed by one rank),
            ``"broadcast"`` (all ranks compute their own blocks of every matrix), or
            ``"auto"``: each matrix has the few ranks that balance the work best.
        buffer_bytes: Memory per rank for what is on its way in a step; None for 44
            MiB, or 1/32 of the mean rank's state or weights if more. Larger matrices
            travel in blocks; where they cannot, because two sides or a factored rule
            need the whole, they take what they need.
        process_group: The ranks that hold replicas of plain parameters (DDP) and
            shall share the work and the state, as ``ZeroRedundancyOptimizer`` would
            have it. DTensors need none, their mesh tells, unless they leave out
            ranks (a pipeline stage on a 2-D mesh).
        maximize: Ascend instead of descend.
        exclude: Name patterns (``fnmatch`` style) of parameters that are not rotated.
            Parameters that DeepSpeed named, because a config file did not, are told
            by name throughout: embeddings and output heads are not rotated either.
        **own: Options of the one optimizer that has them.

    Raises:
        ValueError: For an invalid option, naming it, the value and the rule.
        TypeError: For an unknown option, or parameters that are not dense, real and
            floating-point.
    """

    rule: Rule

    def __init__(  # noqa: PLR0913 - the options users set
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sides: Literal["none", "one", "two"] = "one",
        side: Literal["auto", "left", "right"] = "auto",
        refresh_every: int | None = 200,
        refresh_slots: int | Literal["auto"] = 1,
        refresh_lag: int = 0,
        on_refresh: Literal["carry", "reproject"] = "carry",
        basis: Literal["svd", "eigh"] = "svd",
        basis_from: Literal["gradient", "momentum", "gram"] = "gradient",
        gram_beta: float = 0.95,
        first_moment: Literal["rotated", "original"] = "rotated",
        max_rotated_dim: int = 8192,
        noise_floor: float = 0.0,
        nonfinite: Literal["raise", "skip", "ignore"] = "raise",
        state_dtype: torch.dtype | None = None,
        rotation_dtype: torch.dtype | None = None,
        distribution: Literal["auto", "owner", "broadcast"] = "auto",
        buffer_bytes: int | None = None,
        process_group: Any = None,
        maximize: bool = False,
        exclude: str | Iterable[str] = (),
        **own: Any,
    ) -> None:
        arguments = locals()
        admit_to_zero(type(self))
        unknown = set(own) - set(self.rule.options)
        if unknown:
            raise TypeError(f"{self.rule.name} has no option {min(unknown)!r}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"invalid distribution: got {distribution!r}, it must be one of "
                + ", ".join(map(repr, DISTRIBUTIONS))
            )
        if buffer_bytes is not None and not is_positive_int(buffer_bytes):
            raise ValueError(
                f"invalid buffer_bytes: got {buffer_bytes!r}, "
                "it must be an integer >= 1, or None"
            )
        communicator(process_group)  # validate the group eagerly
        defaults = {k: arguments[k] for k in OPTION_NAMES if k in arguments}
        defaults |= {**self.rule.options, **own}
        defaults = {name: as_number(value) for name, value in defaults.items()}
        self.rule.check(Options.from_group(defaults))
        for name in LATER_OPTIONS:
            if defaults[name] == DEFAULTS[name]:
                del defaults[name]
        name_dtypes(defaults)
        self._binding = Binding(
            self,
            self.rule,
            distribution,
            None if buffer_bytes is None else int(buffer_bytes),
            process_group,
            Exclusion(exclude),
        )
        self._told: set[str] = set()
        groups: Any = params if isinstance(params, Tensor) else list(params)
        unsorted = [not (isinstance(g, dict) and "rotate" in g) for g in groups]
        super().__init__(groups, defaults)
        warn_of_unsorted(
            [group for group, bare in zip(self.param_groups, unsorted) if bare],
            self.rule,
            self._binding.originals.is_named,
        )

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because of non-finite gradients (``nonfinite="skip"``)."""
        return self._binding.skipped_steps

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks before it steps; False: it skips steps by itself."""
        refuse_local_scaler(sys._getframe(1).f_locals.get("self"), self.param_groups)
        return False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; as in torch, with its options checked.

        Args:
            param_group: ``params`` and any option of the group. Other keys are kept;
                those that torch does not know either are logged once, at WARNING.

        Raises:
            ValueError: For an invalid option.
            TypeError: For a parameter that is not a dense real floating tensor.
        """
        if isinstance(param_group, dict):
            admit(param_group, self.defaults, self._told, self.rule)
            param_group.setdefault("rotate", True)
            param_group["format_version"] = FORMAT_VERSION
            name_dtypes(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.rule.check(Options.from_group(group))
            for name, param in zip(names(self.param_groups, group), group["params"]):
                check_parameter(name, param, self.rule)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._binding.originals.note(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        The first step plans the work and, with several ranks, compares the ranks'
        parameters. Like every later one it must be called on all of them. A
        first step whose gradients are all zero only creates the states.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: On every rank, if the ranks' parameters or groups do not
                match, or an option is invalid or no longer as planned.
            RuntimeError: On every rank, if a gradient is non-finite, sparse or not
                reduced (nothing has changed then), or if an owner failed; also
                inside a backward pass.
        """
        if backward_pass() != -1:
            refuse_in_backward(self.rule.name)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._binding.step()
        return loss

    @torch.no_grad()
    def describe(self) -> Report:
        """What each rank computes, keeps and sends; print it for the tables.

        Before the first step this makes the plan and creates the states, and
        must then be called on every rank.

        Returns:
            The report.
        """
        return self._binding.prepared().report()

    @torch.no_grad()
    def state_bytes(self) -> int:
        """Bytes of state that this rank holds, also before the first step.

        Before the first step this makes the plan and creates the states (on the
        parameters' device, so for meta tensors it costs nothing), and must
        then be called on every rank.

        Returns:
            The bytes of all state tensors.
        """
        self._binding.prepared()
        return sum(
            local(value).nbytes
            for state in self._binding.states()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state in logical form, the same for every layout and number of ranks.

        Each state tensor is a full logical tensor: with several ranks a DTensor sharded
        by rows, which ``torch.distributed.checkpoint`` writes once and reads
        anywhere. Moments have their parameter's shape. Call it on every rank.

        Returns:
            As in torch: ``state`` by position of the parameter, and ``param_groups``.
        """
        with saving(self, self._binding):
            return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, on any layout and number of ranks.

        Parameters are matched by name if both sides have the same names (string keys
        are names), however they are ordered and grouped, else by position. Tensors may
        be full ones or DTensors of any placement. No state changes its dtype, other
        than to the one this optimizer keeps. A rotation that is missing is taken for
        the identity; if another state is missing the parameter starts from zero; both,
        and keys that are unknown, are warned of. The state of a frozen parameter is
        kept, saved again, and used when it is trained. Call it on every rank.

        Args:
            state_dict: From any optimizer with the same parameters. Options that its
                groups lack stay as they are.

        Raises:
            ValueError: If groups do not match (as in torch), an option is invalid, a
                newer version wrote it (nothing has changed then), or a state tensor
                has a wrong shape (it names the parameter and both shapes).
        """
        with loading(self, self._binding):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled, and the copy makes a plan of its own.
        self._binding.finish()
        binding = {
            "_distribution": self._binding.distribution,
            "_buffer_bytes": self._binding.buffer_bytes,
            "_exclude": self._binding.exclusion.patterns,
            "_kept": self._binding.kept,
            "_skipped_steps": self._binding.skipped_steps,
        }
        return {**super().__getstate__(), **binding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        distribution = state.pop("_distribution", "")
        buffer_bytes = state.pop("_buffer_bytes", None)
        patterns = Exclusion(state.pop("_exclude", ()))
        kept, skipped = state.pop("_kept", {}), state.pop("_skipped_steps", 0)
        old = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        # torch adds it for its own optimizers; here it is no option, and a saved form
        # with one key more after a load could not be read where there was no load.
        self.defaults.pop("differentiable", None)
        self.__dict__.setdefault("_told", set())
        if "_binding" not in self.__dict__:  # unpickled or copied
            self._binding = Binding(
                self, self.rule, distribution, buffer_bytes, None, patterns
            )
            self._binding.kept, self._binding.skipped_steps = kept, skipped
            for group in self.param_groups:
                self._binding.originals.note(group)
        self._binding.originals.follow(old, self.param_groups)
        self._binding.forget()
        for group in self.param_groups:
            for key, value in {**self.defaults, "rotate": True}.items():
                group.setdefault(key, value)
            group["format_version"] = FORMAT_VERSION
            name_dtypes(group)


class AdaDiag(RotatedOptimizer):
    """Adam in a rotated basis (paper, Algorithm 1; ``sides="two"``: AdaDiag++).

    ``W = (1 - lr wd) W - lr P N Q^T`` with N Adam's update for ``P^T G Q``, where P
    (and Q) are singular vectors of the gradient, renewed every ``refresh_every``
    steps. See `RotatedOptimizer` for the arguments and errors.
    """

    rule = ADADIAG


class AdafacDiag(RotatedOptimizer):
    """Adafactor in a rotated basis (paper, Algorithm 2).

    The second moment of a matrix is kept as its row and column sums. Embeddings, the
    output head and other parameters that are not rotated keep an unfactored one.
    See `RotatedOptimizer` for the arguments and errors; two more are:

    ``momentum`` (bool, default True): keep a first moment.

    ``clip_threshold`` (float or None, default 1.0): the RMS to which the normalised
    update is clipped (d of Adafactor); None switches it off.
    """

    rule = ADAFACDIAG


class HfacDiag(RotatedOptimizer):
    """H-Fac in a rotated basis (paper, Algorithm 3): both moments are factored.

    Embeddings, the output head and other parameters that are not rotated get Adam.
    See `RotatedOptimizer` for the arguments and errors; one more is:

    ``clip_threshold`` (float or None, default 1.0): the RMS to which the normalised
    gradient is clipped (d of Adafactor); None switches it off.
    """

    rule = HFACDIAG
