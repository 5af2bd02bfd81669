"""Binds the parameters of an optimizer to an engine, at the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_adadiag.algorithm.state import Method
from sharded_adadiag.comm.collectives import communicator
from sharded_adadiag.engine import Engine, Entry
from sharded_adadiag.integrations.parameters import Holding, find_group, local
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.planning import Facts
from sharded_adadiag.publication import is_trained, names, publish, raise_on_mismatch


class Binding:
    """An optimizer's engine, and which of its entries is which parameter.

    The plan is made when it is first needed, because until then parameters may be
    sharded, moved or given storage. Parameters that appear later join it.

    Args:
        optimizer: Whose parameters and states they are.
        method: Its method.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
        process_group: What the user passed, or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        method: Method,
        distribution: str,
        process_group: Any,
    ) -> None:
        self.optimizer = optimizer
        self.method = method
        self.distribution = distribution
        self.process_group = process_group
        self.forget()

    def forget(self) -> None:
        """Drop the plan; the states stay where they are, in the optimizer."""
        self._engine: Engine | None = None
        self._planned: dict[Tensor, Entry] = {}

    @property
    def skipped_steps(self) -> int:
        """Steps that the engine skipped for a non-finite gradient."""
        return 0 if self._engine is None else self._engine.agreement.skipped_steps

    def prepared(self) -> Engine:
        """Plan what is new, which is a collective if anything is.

        Returns:
            The engine, with a plan and states for every parameter that is trained.

        Raises:
            ValueError: On every rank, if the ranks' parameters do not match.
        """
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        if self._engine is None:
            comm = communicator(find_group(params, self.process_group))
            self._engine = Engine(self.method, comm, self.distribution)
        if all(p in self._planned for p in params if is_trained(p)):
            return self._engine
        new: list[tuple[str, Tensor, dict[str, Any]]] = [
            (name, param, group)
            for group in groups
            for name, param in zip(names(groups, group), group["params"])
            if is_trained(param) and param not in self._planned
        ]
        published = self._engine.comm.all_gather_object(publish(new))
        raise_on_mismatch(published)
        holdings = [[h.region for _, h in described] for _, described in published]
        layouts = list(zip(*holdings))
        facts, own = zip(*published[self._engine.comm.rank][1])
        entries = [
            self._entry(fact, mine, layout, param, group)
            for fact, mine, layout, (_, param, group) in zip(facts, own, layouts, new)
        ]
        self._engine.extend(entries, holdings)
        self._planned.update(zip((param for _, param, _ in new), entries))
        self._engine.allocate()
        return self._engine

    def save_state(self) -> dict[Tensor, dict[str, Any]]:
        """The logical state of every parameter; a collective."""
        engine = self.prepared()
        params = {id(entry): param for param, entry in self._planned.items()}
        return {
            params[id(engine.entries[i])]: state
            for i, state in engine.save_state().items()
        }

    def load_state(self, saved: dict[int, dict[str, Any]]) -> None:
        """Put a logical state where the plan wants it; a collective.

        Args:
            saved: By position of the parameter in the optimizer.
        """
        engine = self.prepared()
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        place = {id(entry): i for i, entry in enumerate(engine.entries)}
        engine.load_state({
            place[id(self._planned[param])]: saved[i]
            for i, param in enumerate(params)
            if i in saved and param in self._planned
        })

    def _entry(
        self,
        facts: Facts,
        mine: Holding,
        layout: Layout,
        param: Tensor,
        group: dict[str, Any],
    ) -> Entry:
        return Entry(
            facts=facts,
            layout=layout,
            region=mine.region,
            find_param=lambda: local(param),
            grad=lambda: None if param.grad is None else local(param.grad),
            state=lambda: self.optimizer.state[param],
            group=group,
            zeros_like=lambda dtype: torch.zeros_like(
                param, dtype=dtype, memory_format=torch.preserve_format
            ).detach(),
        )
