"""Binds the parameters of an optimizer to an engine, at the first step."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.checkpoint.logical import LogicalState
from sharded_adadiag.checkpoint.saved_state import SavedState
from sharded_adadiag.comm.collectives import communicator
from sharded_adadiag.params.exclusion import Exclusion
from sharded_adadiag.params.holding import find_group
from sharded_adadiag.params.local import LocalParam, device_of, local_param
from sharded_adadiag.params.naming import is_trained
from sharded_adadiag.step.consensus import agree_on_parameters
from sharded_adadiag.step.engine import Engine
from sharded_adadiag.zero import partitions as zero
from sharded_adadiag.zero.flat import FlatStates


class _Found(NamedTuple):
    """A tensor of a group: a parameter, or the flat one that DeepSpeed made of many."""

    name: str
    param: Tensor
    group: dict[str, Any]
    rotate: bool
    flat: bool


class Binding:
    """An optimizer's engine, and which of its entries is which parameter.

    The plan is made when it is first needed, because until then parameters may be
    sharded, moved or given storage. Parameters that appear later join it.

    Args:
        optimizer: The optimizer, whose groups and states are read at every step.
        rule: What it does with a matrix.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        buffer_bytes: Bytes that a step's exchanges may take on a rank; None: a share of
            the state.
        process_group: The ranks that share the parameters; None: as the parameters
            tell.
        exclusion: Tells which parameters are not rotated because of their names.

    Attributes:
        kept: The saved form of the states of parameters that were frozen when it was
            loaded.
        skipped_steps: Steps skipped for a non-finite gradient.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        distribution: str,
        buffer_bytes: int | None,
        process_group: Any,
        exclusion: Exclusion,
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.distribution = distribution
        self.buffer_bytes = buffer_bytes
        self.process_group = process_group
        self.exclusion = exclusion
        self.originals = zero.OriginalParams()
        self.kept: dict[Tensor, dict[str, Any]] = {}
        self.skipped_steps = 0
        self.forget()

    def forget(self) -> None:
        """Drop the plan; the states stay where they are, in the optimizer."""
        self._engine: Engine | None = None
        self._planned: dict[Tensor, list[LocalParam]] = {}
        self._waiting: list[Tensor] = []  # in the groups, and not planned
        self._left: list[Tensor] = []  # planned, and no longer in the groups
        self._groups: list[dict[str, Any]] = []  # as last seen, and what was in them
        self._sizes: list[int] = []
        self._params: list[Tensor] = []
        self.flats = FlatStates(self.optimizer)
        self.has_flats = False

    def finish(self) -> None:
        """Put this rank's bases that are computed beside training into the states."""
        if self._engine is not None:
            self._engine.put_own_bases()

    def states(self) -> list[dict[str, Any]]:
        """The states of all parameters, as they are held; users may add other keys."""
        live = self.optimizer.state.items()
        return [
            *(state for key, state in live if isinstance(key, Tensor)),
            *self.kept.values(),
        ]

    def prepared(self, *, together: bool = False) -> Engine:
        """Plan what is new, which is a collective if anything is.

        Args:
            together: This is a step, so what is new will always come together.
                Otherwise DeepSpeed may step with one flat tensor at a time, and
                they are planned one by one.

        Returns:
            The engine, with a plan and states for every parameter that is trained.

        Raises:
            ValueError: On every rank, if the ranks' parameters do not match.
            RuntimeError: If DeepSpeed has not handed over any parameter yet.
        """
        self._follow_edits()
        engine = self._engine
        if engine is None or self._has_new():
            engine = self._plan_new(together=together)
        if together and self.has_flats:
            self.flats.verify(engine.comm)
        if self.has_flats:
            self.flats.absorb(engine)
        return engine

    def step(self) -> None:
        """One step; what is new to any rank is planned before it.

        Raises:
            ValueError: On every rank, if the ranks' parameters or options do not match.
        """
        engine = self._engine
        if engine is None or engine.comm.size == 1 or self.has_flats:
            engine = self.prepared(together=True)
            engine.step()
        else:
            self._follow_edits()
            if not engine.step(new=self._has_new()):
                self._plan_new(together=True).step()
        # Counted here, because a load makes a new engine.
        self.skipped_steps += engine.agreement.skipped_steps
        engine.agreement.skipped_steps = 0

    def save_state(self) -> dict[Tensor, dict[str, Any]]:
        """The saved form of the state of every tensor in the groups; a collective."""
        engine = self.prepared()
        engine.put_bases()
        if self.has_flats:
            return self.flats.save(engine)
        params = {
            id(entry): param
            for param, entries in self._planned.items()
            for entry in entries
        }
        planned = {
            params[id(engine.entries[i])]: state
            for i, state in _saved_state(engine).save().items()
        }
        return {**planned, **self.kept}

    def load_state(
        self, saved: dict[Tensor, dict[str, Any]], held: Iterable[Tensor] = ()
    ) -> None:
        """Put a saved state where the plan wants it; a collective unless it is empty.

        Args:
            saved: The saved form of the state of each tensor in the groups.
            held: The tensors that had a state before.
        """
        lost = {*held, *self.kept} - set(saved)
        self.kept = {}
        if not saved:
            return
        engine = self.prepared()
        if self.has_flats:
            self.flats.load(engine, saved)
            return
        _saved_state(engine).load(self._by_place(engine, saved))
        engine.mark_loaded()
        logical = LogicalState(engine.comm, device_of(engine.entries))
        self.kept = {
            param: {key: logical.keep(value) for key, value in state.items()}
            for param, state in saved.items()
            if param not in self._planned
        }
        for group in self.optimizer.param_groups:
            for name, param, _ in self.originals.current(group):
                if param in lost and param not in self._planned:
                    warnings.warn(
                        f"{name}: it is frozen and the loaded state has nothing of it "
                        "(torch's set_optimizer_state_dict leaves frozen parameters "
                        "out); its state was dropped",
                        UserWarning,
                        stacklevel=2,
                    )

    def _by_place(
        self, engine: Engine, saved: dict[Tensor, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """The states of planned parameters by position in the engine."""
        place = {id(entry): i for i, entry in enumerate(engine.entries)}
        return {
            place[id(entry)]: state
            for param, state in saved.items()
            for entry in self._planned.get(param, ())
        }

    def _use_kept(self, engine: Engine) -> None:
        """Load what was kept of parameters that are trained by now; a collective."""
        thawed = {p: self.kept.pop(p) for p in list(self.kept) if p in self._planned}
        if thawed:
            engine.put_bases()
            _saved_state(engine).load(self._by_place(engine, thawed), partial=True)
            engine.mark_loaded()

    def _has_new(self) -> bool:
        return any(is_trained(param) for param in self._waiting)

    def _follow_edits(self) -> None:
        """See which group each parameter is in now: users edit groups, as in torch."""
        groups = self.optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        params = [p for group in groups for p in group["params"]]
        if not (
            _same(self._groups, groups)
            and self._sizes == sizes
            and _same(self._params, params)
        ):
            self.originals.follow(self._groups, groups)
            self._groups, self._sizes, self._params = [*groups], sizes, params
            self._waiting = [p for p in params if p not in self._planned]
            self._regroup()
        # As in torch, the state of what has left stays until the user drops it.
        for param in [p for p in self._left if p not in self.optimizer.state]:
            for entry in self._planned.pop(param):
                entry.release()
        self._left = [p for p in self._left if p in self._planned]

    def _regroup(self) -> None:
        """Bring what is planned into the groups it is in now."""
        place = {p: group for group in self._groups for p in group["params"]}
        edited = False
        for param, entries in self._planned.items():
            # At stage 3 DeepSpeed shows its flat tensors one at a time.
            member = param in place or bool(self.flats)
            for entry in entries:
                group = place.get(param, entry.group)
                edited |= entry.group is not group or entry.member != member
                entry.group, entry.member = group, member
        if not edited or self._engine is None:
            return
        self._engine.regroup()
        self._left = [p for p in self._planned if p not in place and not self.has_flats]
        for group in [] if self.has_flats else self._groups:
            known = [self._planned.get(p, []) for p in group["params"]]
            # Saved forms tell states by name, so names go where the parameters go.
            if "param_names" in group and all(known):
                group["param_names"] = [entries[0].spec.name for entries in known]

    def _plan_new(self, *, together: bool) -> Engine:
        """Plan every parameter that is new; a collective."""
        new, error = [], ""
        try:
            new = self._found()
        except ValueError as problem:
            error = str(problem)
        engine = self._engine or self._start(new)
        one_by_one = not together and any(f.flat for f in new)
        for batch in [[f] for f in new] if one_by_one else [new]:
            self._plan(engine, batch, error)
        self._waiting = [p for p in self._params if p not in self._planned]
        engine.allocate()
        self._use_kept(engine)
        return engine

    def _found(self) -> list[_Found]:
        """Every tensor in the groups that is trained and not planned."""
        found = []
        waiting = set(self._waiting)
        names = self.originals.names(self._groups)
        for group in self._groups:
            if waiting.isdisjoint(group["params"]):
                continue
            for name, param, usual in self.originals.current(group):
                if param in waiting and is_trained(param):
                    flat = self.originals.is_flat(param, group)
                    rotate = self.exclusion.rotates(
                        name, param.shape, names, guess=usual
                    )
                    found.append(_Found(name, param, group, rotate, flat))
        return found

    def _start(self, found: list[_Found]) -> Engine:
        """An engine over the ranks that hold the parameters between them."""
        if not self._params and any(p.requires_grad for p in self.originals.all()):
            raise RuntimeError(
                "DeepSpeed hands its parameters to the optimizer when it steps; make a "
                "step first"
            )
        groups = [self.originals.process_group(f.group) for f in found if f.flat]
        if any(group is not groups[0] for group in groups):
            raise NotImplementedError(
                "the param groups are divided among different ranks (experts of their "
                "own); give each such group an optimizer of its own"
            )
        group = groups[0] if groups else find_group(self._params, self.process_group)
        self._engine = Engine(
            self.rule, communicator(group), self.distribution, self.buffer_bytes
        )
        return self._engine

    def _plan(self, engine: Engine, new: list[_Found], error: str) -> None:
        """Tell the other ranks of new parameters and plan them."""
        parts: dict[Tensor, list[zero.Fragment]] = {}
        counts: list[int] = []

        def find() -> list[LocalParam]:
            if error:
                raise ValueError(error)
            self.exclusion.check(self.originals.names(self._groups))
            params: list[LocalParam] = []
            for found in new:
                some = self._local_params(found, parts)
                counts.append(len(some))
                params.extend(some)
            return params

        plan = engine.plan
        entries, ranks_per_node = agree_on_parameters(
            engine.comm,
            find,
            {"distribution": plan.distribution, "buffer_bytes": plan.buffer_bytes},
            kind="trainable new" if engine.entries else "trainable",
        )
        first = len(engine.entries)
        engine.extend(entries, ranks_per_node)
        for found, count in zip(new, counts):
            last = first + count
            self._planned[found.param] = engine.entries[first:last]
            if found.flat:
                self.has_flats = True
                self.flats.add(found.param, parts[found.param], range(first, last))
            first = last

    def _local_params(
        self, found: _Found, parts: dict[Tensor, list[zero.Fragment]]
    ) -> list[LocalParam]:
        name, param, group, rotate, flat = found
        if not flat:
            return [local_param(param, name, group, self.optimizer, may_rotate=rotate)]
        parts[param] = zero.fragments(self.originals, param, group)
        guessed = {name: known for name, _, known in self.originals.named(group)}
        names = self.originals.names(self._groups)
        rotates = {
            part.name: self.exclusion.rotates(
                part.name, part.shape, names, guess=guessed[part.name]
            )
            for part in parts[param]
        }
        return zero.local_params(parts[param], param, group, self.optimizer, rotates)


def _saved_state(engine: Engine) -> SavedState:
    return SavedState(engine.entries, engine.plan.matrices, engine.comm)


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
