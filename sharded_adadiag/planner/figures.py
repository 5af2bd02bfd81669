"""What a plan means for its ranks, in numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.quiet import no_collections
from sharded_adadiag.plan.report import refreshes_of, state_bytes, step_work
from sharded_adadiag.plan.rounds import Round
from sharded_adadiag.plan.schedule import When

# Traffic is listed message by message for this many ranks; of more, for a sample.
RANKS_LISTED = 32
SPREAD = 6
BUSIEST = 2


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of a plan. Sizes are bytes, work is multiply-adds.

    Attributes:
        rounds: Rounds of a step.
        team_sizes: How many matrices are worked on by a team of each size.
        kinds: How many matrices take each kind of route.
        step_efficiency: Mean over ranks of the work of a step, divided by the sum over
            rounds of the busiest rank's work in the round: 1 if no rank ever waits.
        work_max_over_mean: The busiest rank's work of a step, over the mean.
        refresh_max_over_mean: The busiest rank's work for the bases that are due in
            one step, over the mean.
        work_max: The busiest rank's work of a step.
        refresh_max: The busiest rank's work for the bases that are due in one step.
        busiest: The rank with most work in a step.
        state_bytes_mean: State of a rank.
        state_bytes_max: State of the rank with most.
        sent_bytes_step_max: What a rank sends in an ordinary step, all-reduces
            included; of the rank that sends most.
        sent_bytes_refresh_max: What it sends on top if all bases are refreshed.
        messages_step_max: Messages that a rank sends in an ordinary step.
        collectives_step: Collectives of an ordinary step.
        buffer_bytes_max: Memory for exchanges, with one round arriving while another
            is worked on and a third leaves.
        sampled: The ranks whose traffic and buffers were looked at.
    """

    rounds: int
    team_sizes: dict[int, int]
    kinds: dict[str, int]
    step_efficiency: float
    work_max_over_mean: float
    refresh_max_over_mean: float
    work_max: int
    refresh_max: int
    busiest: int
    state_bytes_mean: float
    state_bytes_max: int
    sent_bytes_step_max: int
    sent_bytes_refresh_max: int
    messages_step_max: int
    collectives_step: int
    buffer_bytes_max: int
    sampled: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one rank sends and holds for it.

    Attributes:
        sent: Bytes in an ordinary step.
        messages: Messages in an ordinary step.
        refresh: Bytes on top in a refresh of all bases.
        buffers: Bytes for rounds in flight.
    """

    sent: int
    messages: int
    refresh: int
    buffers: int


@no_collections()
def figures_of(plan: Plan, sums: Sequence[Sequence[int]] = ()) -> Figures:
    """The figures of a plan.

    Args:
        plan: The plan.
        sums: For each round, the bytes of each all-reduce of sums over blocks.

    Returns:
        Exact figures of work and state; traffic is that of the ranks in `sampled`.
    """
    work, state, refresh = step_work(plan), state_bytes(plan), refresh_work(plan)
    sampled = sample(work, state)
    refreshes = refreshes_of(plan)
    seen = [traffic(plan, rank, refreshes) for rank in sampled]
    summed = sum(map(sum, sums))
    sizes = Counter(len(m.route.team) for m in plan.members)
    mean = sum(work) / len(work)
    waited = sum(map(_most_work, plan.rounds))
    return Figures(
        rounds=len(plan.rounds),
        team_sizes=dict(sorted(sizes.items())),
        kinds=dict(Counter(m.route.kind for m in plan.members)),
        step_efficiency=mean / waited if waited else 1.0,
        work_max_over_mean=_max_over_mean(work),
        refresh_max_over_mean=_max_over_mean(refresh),
        work_max=max(work),
        refresh_max=max(refresh),
        busiest=work.index(max(work)),
        state_bytes_mean=sum(state) / len(state),
        state_bytes_max=max(state),
        sent_bytes_step_max=max(t.sent for t in seen) + plan.agreement_bytes + summed,
        sent_bytes_refresh_max=max(t.refresh for t in seen),
        messages_step_max=max(t.messages for t in seen),
        collectives_step=int(plan.agreement_bytes > 0)
        + sum(some.num_collectives for some in plan.rounds)
        + sum(map(len, sums)),
        buffer_bytes_max=max(t.buffers for t in seen),
        sampled=tuple(sampled),
    )


def refresh_work(plan: Plan) -> list[int]:
    """Multiply-adds of the bases that each rank computes when they are due.

    Args:
        plan: The plan.

    Returns:
        By rank; of the slot with the busiest rank, if not all are due in one step.
    """
    then: dict[When, list[int]] = {(1, 0): [0] * plan.world_size}
    for matrix in plan.members:
        for when, part in matrix.cost.slots.shares(matrix.cost.refresh):
            loads = then.setdefault(when, [0] * plan.world_size)
            loads[matrix.route.owner] += part
    return max(then.values(), key=max)


def sample(work: Sequence[int], state: Sequence[int]) -> list[int]:
    """The ranks whose traffic is listed.

    Args:
        work: Each rank's work in a step.
        state: Bytes, by rank.

    Returns:
        All ranks if they are few. Else some evenly spread, the busiest, those with
        most state, and the idlest.
    """
    ranks = range(len(work))
    if len(work) <= RANKS_LISTED:
        return list(ranks)
    spread = {i * (len(work) - 1) // (SPREAD - 1) for i in range(SPREAD)}
    by_work = sorted(ranks, key=lambda rank: (-work[rank], rank))
    by_state = sorted(ranks, key=lambda rank: (-state[rank], rank))
    return sorted(spread.union(by_work[:BUSIEST], by_state[:BUSIEST], by_work[-1:]))


def traffic(plan: Plan, rank: int, refreshes: Sequence[ExchangePlan] = ()) -> Traffic:
    """What a rank sends, and the memory it needs to do so.

    Args:
        plan: The plan.
        rank: The rank.
        refreshes: The exchanges of a refresh of all bases.

    Returns:
        Exact bytes and messages.
    """
    sent = messages = 0
    arriving, working, leaving = [], [], []
    for some in plan.rounds:
        ways = [0, 0]
        for pair in some.moves:
            for back, exchange in enumerate(pair):
                if exchange.is_local:
                    continue
                sizes = exchange.sizes_sent(rank)
                out = sum(sizes.values())
                sent += out
                messages += len(sizes)
                ways[back] += out + sum(exchange.sizes_received(rank).values())
        arriving.append(ways[0])
        working.append(_held(some, rank) if any(ways) else 0)
        leaving.append(ways[1])
    return Traffic(
        sent,
        messages,
        sum(exchange.bytes_sent(rank) for exchange in refreshes),
        _in_flight(arriving, working, leaving),
    )


def _in_flight(
    arriving: Sequence[int], working: Sequence[int], leaving: Sequence[int]
) -> int:
    """The most bytes at a time: k + 1 arrives, k is worked on, k - 1 leaves."""
    # What leaves does so with the results that it is made of.
    leaving = [a + b for a, b in zip(leaving, working)]
    now = zip([*arriving, 0, 0], [0, *working, 0], [0, 0, *leaving])
    return max(map(sum, now))


def _held(some: Round, rank: int) -> int:
    """Bytes of what a rank works on in a round, in the dtype of the computation."""
    return sum(
        part.layouts[-1][rank].numel * part.matrix.view.work_itemsize
        for part in some.parts
    )


def _most_work(some: Round) -> int:
    """Multiply-adds of the busiest rank in a round."""
    alike = Counter(
        (part.layouts[-1], part.matrix.cost.step, part.matrix.view.numel)
        for part in some.parts
    )
    total: Counter[int] = Counter()
    for (layout, step, numel), count in alike.items():
        for region, ranks in layout.pieces:
            share = count * (step * region.numel // numel)
            for rank in ranks:
                total[rank] += share
    return max(total.values(), default=0)


def _max_over_mean(loads: Sequence[int]) -> float:
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
