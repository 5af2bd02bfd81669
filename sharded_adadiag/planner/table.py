"""Figures as text, with a warning where one is bad and what mends it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.view import needs_matrix
from sharded_adadiag.planner.figures import Figures
from sharded_adadiag.planner.request import Answer, Request

# A step that takes longer than it would if no rank ever waited by more than this.
EFFICIENCY = 0.85
# The most loaded rank over the mean.
WORK, STATE, REFRESH = 1.15, 1.15, 4.0
# All ranks' state over that of one process.
COPIES = 2.0
# Many messages of fewer bytes than this cost more than their bytes.
MESSAGES, MESSAGE_BYTES = 1024, 16384
# So many that what each of them waits for adds up.
ROUNDS = 200


def as_json(request: Request, made: Answer, figures: Figures) -> dict[str, Any]:
    """The figures by name, for programs.

    Args:
        request: What was planned.
        made: The plan.
        figures: Its figures.

    Returns:
        Numbers, texts, lists and dicts of them.
    """
    plan = made.plan
    return {
        "model": request.model.name,
        "ranks": request.mesh.ranks,
        "layout": request.mesh.layout,
        "replicas": request.mesh.replicas,
        "tensor_parallel": request.mesh.tensor_parallel,
        "optimizer": request.rule.name,
        "distribution": request.distribution,
        "buffer_bytes": plan.budget,
        "matrices": len(plan.matrices),
        "updated_in_place": len(plan.plain),
        "plan_seconds": round(made.seconds, 4),
        "peak_rss_mb": round(made.peak_rss_mb, 1),
        "rounds": figures.rounds,
        "team_sizes": {str(k): v for k, v in figures.team_sizes.items()},
        "routes": figures.kinds,
        "step_efficiency": round(figures.step_efficiency, 4),
        "work_max_over_mean": round(figures.work_max_over_mean, 4),
        "work_max": figures.work_max,
        "busiest_rank": figures.busiest,
        "refresh_slots": plan.specs[0].options.refresh_slots if plan.specs else 1,
        "refresh_max_over_mean": round(figures.refresh_max_over_mean, 4),
        "refresh_max": figures.refresh_max,
        "state_bytes_mean": round(figures.state_bytes_mean),
        "state_bytes_max": figures.state_bytes_max,
        "sent_bytes_step_max": figures.sent_bytes_step_max,
        "sent_bytes_refresh_max": figures.sent_bytes_refresh_max,
        "messages_step_max": figures.messages_step_max,
        "collectives_step": figures.collectives_step,
        "buffer_bytes_max": figures.buffer_bytes_max,
        "ranks_sampled": len(figures.sampled),
        "notes": [*request.model.notes],
        "warnings": list(warnings(request, made, figures)),
    }


def as_text(request: Request, made: Answer, figures: Figures) -> str:
    """The figures as a table of under a screen.

    Args:
        request: What was planned.
        made: The plan.
        figures: Its figures.

    Returns:
        Lines.
    """
    rows = [*_rows(request, made, figures)]
    width = max(len(name) for name, _ in rows)
    lines = [_title(request, made.plan), ""]
    lines += [f"{name.ljust(width)}  {text}" for name, text in rows]
    notes = [f"note: {note}" for note in request.model.notes]
    some = [f"warning: {text}" for text in warnings(request, made, figures)]
    return "\n".join([*lines, *([""] if notes or some else []), *notes, *some])


def _title(request: Request, plan: Plan) -> str:
    mesh = request.mesh
    how = [mesh.layout]
    if mesh.replicas > 1:
        how.append(f"{mesh.replicas} replicas of {mesh.ranks // mesh.replicas} ranks")
    if mesh.tensor_parallel > 1:
        how.append(f"tensor-parallel by {mesh.tensor_parallel}")
    ranks = "1 rank" if mesh.ranks == 1 else f"{mesh.ranks:,} ranks"
    return (
        f"{request.model.name} on {ranks} ({', '.join(how)}): {request.rule.name}, "
        f"distribution {request.distribution}, buffers {size(plan.budget)}"
    )


def _rows(
    request: Request, made: Answer, figures: Figures
) -> Iterator[tuple[str, str]]:
    plan = made.plan
    rotated = [m for m in plan.matrices if m.rotated]
    entries = sum(m.view.numel for m in rotated)
    total = sum(weight.numel for weight in request.model.weights)
    yield (
        "rotated",
        f"{len(rotated):,} matrices, {number(entries)} of {number(total)} entries; "
        f"{len(plan.plain):,} parameters are updated where they lie",
    )
    teams = ", ".join(
        f"{count:,} by {many} rank" + ("s" if many > 1 else "")
        for many, count in figures.team_sizes.items()
    )
    yield "teams", f"worked on {teams}" if teams else "none"
    yield (
        "work",
        f"{number(figures.work_max)} multiply-adds a step on rank {figures.busiest}, "
        f"the most loaded: {figures.work_max_over_mean:.2f} x the mean",
    )
    yield (
        "rounds",
        f"{figures.rounds:,} a step; the ranks work {figures.step_efficiency:.0%} of "
        "it, and wait for others the rest",
    )
    yield (
        "state",
        f"{size(figures.state_bytes_mean)} a rank, {size(figures.state_bytes_max)} on "
        f"the fullest: {figures.state_bytes_max / figures.state_bytes_mean:.2f} x",
    )
    yield (
        "traffic",
        f"a rank sends up to {size(figures.sent_bytes_step_max)} a step in "
        f"{figures.messages_step_max:,} messages and "
        f"{figures.collectives_step:,} collectives",
    )
    yield "buffers", f"up to {size(figures.buffer_bytes_max)} a rank for exchanges"
    yield (
        "refresh",
        _when(plan) + f": up to {number(figures.refresh_max)} multiply-adds a rank, "
        f"{figures.refresh_max_over_mean:.2f} x the mean; "
        f"up to {size(figures.sent_bytes_refresh_max)} sent on top",
    )
    yield (
        "planned",
        f"in {made.seconds:.2f} s, with {made.peak_rss_mb:,.0f} MB of memory"
        + _sampled(request, figures),
    )


def _when(plan: Plan) -> str:
    """When bases are computed, as the first group says."""
    options = plan.specs[0].options if plan.specs else None
    if options is None or options.refresh_every is None:
        return "once"
    slots = options.refresh_slots
    portions = "" if slots == 1 else f" in {slots} portions"
    return f"every {options.refresh_every:,} steps{portions}"


def _sampled(request: Request, figures: Figures) -> str:
    count, ranks = len(figures.sampled), request.mesh.ranks
    if count == ranks:
        return ""
    return f"; traffic and buffers are of {count} of {ranks:,} ranks"


def warnings(request: Request, made: Answer, figures: Figures) -> Iterator[str]:
    """What is bad about a plan, and the option that mends it.

    Args:
        request: What was planned.
        made: The plan.
        figures: Its figures.

    Yields:
        A sentence each.
    """
    plan = made.plan
    over = _over_max_dim(request)
    if over:
        yield (
            f"{over} matrices are not rotated because their side is over "
            f"--max-rotated-dim {plan.specs[0].options.max_rotated_dim}: raise it"
        )
    own = request.distribution != "auto"
    if figures.work_max_over_mean > WORK:
        remedy = "--distribution auto" if own else "--sides one"
        yield (
            f"rank {figures.busiest} works {figures.work_max_over_mean:.1f} x the "
            f"mean: {remedy} lets ranks divide matrices"
        )
    if figures.step_efficiency < EFFICIENCY:
        yield (
            f"ranks wait {1 - figures.step_efficiency:.0%} of a step: "
            + ("--distribution auto, or " if own else "")
            + f"--buffer-bytes over {plan.budget} gives a round more work"
        )
    yield from _waits_for_bases(plan, figures)
    fullest = figures.state_bytes_max / max(figures.state_bytes_mean, 1)
    if fullest > STATE:
        yield (
            f"the fullest rank keeps {fullest:.1f} x the mean of state: "
            + ("--distribution auto, or " if own else "")
            + "--state-dtype bfloat16 if it does not fit"
        )
    copies = figures.state_bytes_mean * plan.world_size / max(_state_once(plan), 1)
    if own and copies > COPIES:
        yield (
            f"all ranks together keep {copies:.1f} x the state of one process, in "
            "copies of rotations: --distribution auto"
        )
    if figures.buffer_bytes_max > plan.budget:
        yield (
            f"exchanges take {size(figures.buffer_bytes_max)}, over --buffer-bytes "
            f"{plan.budget}: some matrices do not travel in blocks"
            + _mended_blocks(request)
        )
    each = figures.sent_bytes_step_max / max(figures.messages_step_max, 1)
    if figures.messages_step_max > MESSAGES and each < MESSAGE_BYTES:
        remedy = (
            "--replicas makes shards fewer and larger"
            if request.mesh.layout == "fsdp2"
            else f"--buffer-bytes over {plan.budget} makes larger ones"
        )
        yield f"{figures.messages_step_max:,} messages a step of {size(each)}: {remedy}"
    if figures.rounds > ROUNDS:
        yield (
            f"{figures.rounds:,} rounds a step, each a wait for the network: "
            f"--buffer-bytes over {plan.budget} makes fewer"
        )


def _waits_for_bases(plan: Plan, figures: Figures) -> Iterator[str]:
    """What is bad about a refresh."""
    every = plan.specs[0].options.refresh_every if plan.specs else None
    ratio = figures.refresh_max_over_mean
    if every is not None and ratio > REFRESH:
        yield (
            f"a basis is one rank's work, there are {len(plan.matrices):,} matrices: "
            f"at a refresh all wait for a rank that computes {ratio:.1f} x the mean; "
            f"--refresh-every over {every} makes that rarer"
        )


def _over_max_dim(request: Request) -> int:
    """Matrices that would be rotated but for their size."""
    if request.group_options(rotate=True).sides == "none":
        return 0
    return sum(
        weight.rotate
        and len(weight.shape) > 1
        and not needs_matrix(
            request.rule,
            weight.shape,
            request.group_options(rotate=True, batch_dims=weight.batch_dims),
        )
        for weight in request.model.weights
    )


def _state_once(plan: Plan) -> int:
    """Bytes of all state if there were one copy of each."""
    plain = sum(
        plan.plain_bytes(i) * math.prod(plan.specs[i].shape) for i in plan.plain
    )
    return plain + sum(matrix.cost.state_bytes for matrix in plan.members)


def _mended_blocks(request: Request) -> str:
    """With what options the matrices of a request would travel in blocks."""
    options = request.group_options(rotate=True)
    ways = [
        (options.sides == "two", "--sides one"),
        (request.rule.factored, "--optimizer AdaDiag"),
        (options.noise_floor > 0.0, "--noise-floor 0"),
    ]
    needed = [way for needs, way in ways if needs]
    return f" ({' '.join(needed)} makes them)" if needed else ""


def size(count: float) -> str:
    """Bytes with three digits, in the largest unit that leaves a number over 1."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000.0, units[1:]
    return f"{count:.3g} {units[0]}"


def number(count: float) -> str:
    """A number with three digits and a letter for thousands, millions, ..."""
    letters = ["", " k", " M", " G", " T", " P"]
    while count >= 999.5 and len(letters) > 1:
        count, letters = count / 1000.0, letters[1:]
    return f"{count:.3g}{letters[0]}"
