"""The options of the param groups, which users and schedulers edit between steps."""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sharded_adadiag.options import OPTION_NAMES, PLANNED, STEERING, Options
from sharded_adadiag.params.local import LocalParam
from sharded_adadiag.plan.matrices import MatrixPlan

_planned = operator.attrgetter(*PLANNED)
_steering = operator.attrgetter(*STEERING)
# Of each parameter: its name, a number for its group, and what steers collectives;
# the latter two are None for one that is in no group.
Membership = list[tuple[str, int | None, tuple[Any, ...] | None]]


class Reading(NamedTuple):
    """The options of one step.

    Attributes:
        options: The options of each param group, by the group's ``id``.
        complaint: What is wrong with them on this rank; empty if nothing is.
        fingerprint: Equal on two ranks if they have the same parameters in each group
            and the same of what steers collectives; 31 bits.
    """

    options: dict[int, Options]
    complaint: str
    fingerprint: int


class GroupOptions:
    """Reads the options of the param groups, at every step.

    Args:
        entries: The parameters, which say what groups there are; the list grows as
            more are planned.
    """

    def __init__(self, entries: Sequence[LocalParam]) -> None:
        self.entries = entries
        self.follow(())

    def follow(
        self, matrices: Sequence[MatrixPlan], cut: Collection[tuple[int, int]] = ()
    ) -> None:
        """Look anew: parameters came, left or changed groups.

        Args:
            matrices: The plan of those that are seen as matrices.
            cut: Keys of those that are worked on in several rounds.
        """
        self.matrices = matrices
        self.cut = cut
        self._known: list[tuple[Any, ...]] | None = None
        self._last: dict[int, tuple[list[Any], Options | None]] = {}
        self._fingerprint = 0
        self._groups = {id(e.group): e.group for e in self.entries if e.member}

    def read(self) -> Reading:
        """The options as they are now; no collective."""
        options: dict[int, Options] = {}
        try:
            for key, group in self._groups.items():
                options[key] = self._validated(key, group)
        except (TypeError, ValueError) as error:
            return Reading({}, f"{self._first_of(key)}: {error}", 0)
        known = [(*_planned(own), *_steering(own)) for own in options.values()]
        if known != self._known:
            complaint = self._complaint(options)
            if complaint:
                return Reading(options, complaint, 0)
            text = repr([row[1:] for row in self.membership(options)])
            self._known, self._fingerprint = known, zlib.crc32(text.encode()) >> 1
        return Reading(options, "", self._fingerprint)

    def _validated(self, key: int, group: dict[str, Any]) -> Options:
        """The options of a group, made anew only where a value is another one."""
        values = [group.get(name) for name in OPTION_NAMES]
        last, options = self._last.get(key, ([], None))
        # A tensor may have another value though it is the same one.
        if options is None or isinstance(group["lr"], Tensor) or values != last:
            options = Options.from_group(group)
            self._last[key] = values, options
        return options

    def membership(self, options: dict[int, Options]) -> Membership:
        """What the ranks must agree on; groups are numbered as they are met.

        Args:
            options: The options of each param group, by the group's ``id``.

        Returns:
            One row for each entry.
        """
        number = {key: i for i, key in enumerate(self._groups)}
        return [
            (e.spec.name, number[id(e.group)], _steering(options[id(e.group)]))
            if e.member and id(e.group) in options
            else (e.spec.name, None, None)
            for e in self.entries
        ]

    def _first_of(self, key: int) -> str:
        return next(
            f"the param group of {e.spec.name}"
            for e in self.entries
            if e.member and id(e.group) == key
        )

    def _complaint(self, options: dict[int, Options]) -> str:
        """The first option that is not as planned."""
        matrices: dict[int, list[MatrixPlan]] = {}
        for m in self.matrices:
            matrices.setdefault(m.index, []).append(m)
        for i, entry in enumerate(self.entries):
            if not entry.member:
                continue
            now = options[id(entry.group)]
            if text := _change(entry, now):
                return text
            for m in matrices.get(i, ()):
                if text := self._needs_more(m, now):
                    return f"{m.view.name}: {text}"
        return ""

    def _needs_more(self, matrix: MatrixPlan, now: Options) -> str:
        """What of a matrix must be whole for its options, and is planned in blocks."""
        both = matrix.left and matrix.right
        if now.on_refresh == "reproject" and both and matrix.route.kind != "owner":
            return (
                "on_refresh became 'reproject', for which a matrix rotated on two "
                "sides must be whole, but it is planned in blocks; set it from the "
                'beginning, or pass distribution="owner"'
            )
        if now.noise_floor > 0 and matrix.key in self.cut:
            return (
                f"noise_floor became {now.noise_floor!r}, for which all of the matrix "
                "must be there at once, but it is planned in blocks one after the "
                "other; set it from the beginning, or pass a larger buffer_bytes"
            )
        return ""


def differences(told: Sequence[tuple[str, Membership]]) -> str:
    """What the ranks do not agree on.

    Args:
        told: By rank, its complaint and its membership.

    Returns:
        The first complaint or difference, equal on every rank.
    """
    for rank, (complaint, _) in enumerate(told):
        if complaint:
            return f"rank {rank}: {complaint}" if len(told) > 1 else complaint
    first = told[0][1]
    for rank, (_, rows) in enumerate(told):
        for (name, group, steering), (_, wanted, asked) in zip(rows, first):
            if steering is None or asked is None:
                if steering is not asked:
                    has, lacks = (0, rank) if steering is None else (rank, 0)
                    return (
                        f"{name}: the param groups of rank {has} have it, those of "
                        f"rank {lacks} do not; edit them alike on every rank"
                    )
                continue
            for option, value, other in zip(STEERING, steering, asked):
                if value != other:
                    return (
                        f"{name}: {option} is {other!r} on rank 0 and {value!r} on "
                        f"rank {rank}; it steers what ranks do together, so set it "
                        "alike on every rank"
                    )
            if group != wanted:
                return (
                    f"{name}: rank {rank} has it in another param group than rank 0; "
                    "edit them alike on every rank"
                )
    return "the param groups differ between ranks; edit them alike on every rank"


def _change(entry: LocalParam, now: Options) -> str:
    """What of a parameter's planned options has changed; empty if nothing has."""
    old, matrix = entry.spec.options, len(entry.spec.shape) > 1
    now = dataclasses.replace(now, rotate=now.rotate and entry.may_rotate)
    # The others mean nothing to what is updated in place.
    relevant = {"momentum", "state_dtype", *(["rotate"] if matrix else [])}
    for name in PLANNED:
        before, after = getattr(old, name), getattr(now, name)
        if before != after and (name in relevant or (matrix and old.rotate)):
            return (
                f"{entry.spec.name}: {name} of its param group changed from "
                f"{before!r} to {after!r}, but its state was laid out for the former; "
                "set it before the first step, or make a new optimizer and load this "
                "one's state_dict into it"
            )
    return ""
