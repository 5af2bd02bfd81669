"""``sharded-adadiag plan MODEL --ranks N``: what a run will need before it starts.

It makes the plan that the ranks of such a run would make, and prints its figures.
There is no process group and no accelerator in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sharded_adadiag.options import DISTRIBUTIONS, as_dtype
from sharded_adadiag.plan.sums import sums_of
from sharded_adadiag.planner.configs import model_of_config
from sharded_adadiag.planner.figures import figures_of
from sharded_adadiag.planner.mesh import LAYOUTS, Mesh
from sharded_adadiag.planner.models import DECODERS, Model, named_model
from sharded_adadiag.planner.plot import plot
from sharded_adadiag.planner.request import RULES, Request, answer
from sharded_adadiag.planner.table import as_json, as_text

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Options of the param groups that a plan depends on, by the name of their argument.
OPTIONS = (
    "sides",
    "side",
    "refresh_every",
    "refresh_slots",
    "refresh_lag",
    "on_refresh",
    "basis",
    "basis_from",
    "first_moment",
    "max_rotated_dim",
    "noise_floor",
    "nonfinite",
    "state_dtype",
    "rotation_dtype",
    "momentum",
)


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line's; None for those of this process.

    Returns:
        The exit code: 0, or 2 for a request that makes no sense.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        request = _request(asked)
        made = answer(request)
        figures = figures_of(made.plan, sums_of(made.plan))
        if asked.plot:
            lines = as_text(request, made, figures).splitlines()
            plot(made.plan, lines[0], asked.plot)
    except ValueError as error:
        print(f"{parser.prog} plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(as_json(request, made, figures), indent=2))
    else:
        print(as_text(request, made, figures))
    return 0


def _request(asked: argparse.Namespace) -> Request:
    given = {name: getattr(asked, name) for name in OPTIONS}
    options: dict[str, Any] = {
        k: as_dtype(v) for k, v in given.items() if v is not None
    }
    if asked.refresh_every == "never":
        options["refresh_every"] = None
    param_dtype = as_dtype(asked.param_dtype)
    return Request(
        model=_model(asked.model),
        mesh=Mesh(asked.ranks, asked.layout, asked.replicas, asked.tensor_parallel),
        rule=RULES[asked.optimizer],
        options=options,
        distribution=asked.distribution,
        buffer_bytes=asked.buffer_bytes,
        ranks_per_node=asked.ranks_per_node,
        param_dtype=param_dtype,
        grad_dtype=as_dtype(asked.grad_dtype) if asked.grad_dtype else param_dtype,
    )


def _model(name: str) -> Model:
    if name in DECODERS:
        return named_model(name)
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"unknown model {name!r}: it is none of {', '.join(DECODERS)}, and there "
            "is no such file"
        )
    return model_of_config(path)


def _parser() -> _Parser:
    parser = _Parser(prog="sharded-adadiag", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="plan")
    plan = commands.add_parser(
        "plan",
        help="what a run will need before it is launched",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = plan.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(DECODERS)}, or a config.json")
    add("--ranks", type=int, required=True, metavar="N", help="number of ranks")
    add("--json", action="store_true", help="the figures as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="draw the loads of the ranks")
    _add_mesh(plan)
    _add_optimizer(plan)
    return parser


def _add_mesh(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument_group("how ranks share the model").add_argument
    add("--layout", choices=LAYOUTS, default="fsdp2", help="who holds what")
    add("--replicas", type=int, default=1, metavar="K", help="HSDP: sharded copies")
    add("--tensor-parallel", type=int, default=1, metavar="K", help="ranks per layer")
    add("--ranks-per-node", type=int, metavar="K", help="ranks near each other")
    add("--param-dtype", choices=DTYPES, default="float32", help="of what is updated")
    add("--grad-dtype", choices=DTYPES, help="of gradients; default: the parameters'")


def _add_optimizer(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument_group("the optimizer (default: its own)").add_argument
    add("--optimizer", choices=tuple(RULES), default="AdaDiag", help="which")
    add("--distribution", choices=DISTRIBUTIONS, default="auto", help="who computes")
    add("--buffer-bytes", type=int, help="memory of exchanges")
    add("--sides", choices=("none", "one", "two"), help="sides rotated")
    add("--side", choices=("auto", "left", "right"), help="the one side")
    add("--refresh-every", type=_steps, metavar="STEPS", help="steps, or never")
    add("--refresh-slots", type=_slots, metavar="K", help="portions, or auto")
    add("--refresh-lag", type=int, metavar="L", help="steps to compute a basis in")
    add("--on-refresh", choices=("carry", "reproject"), help="what moments do then")
    add("--basis", choices=("svd", "eigh"), help="how bases are computed")
    add("--basis-from", choices=("gradient", "momentum", "gram"), help="made of what")
    add("--first-moment", choices=("rotated", "original"), help="its frame")
    add("--max-rotated-dim", type=int, metavar="N", help="largest side rotated")
    add("--noise-floor", type=float, metavar="X", help="entries below count as 0")
    add("--nonfinite", choices=("raise", "skip", "ignore"), help="NaN in a gradient")
    add("--state-dtype", choices=DTYPES, help="of moments; the parameters'")
    add("--rotation-dtype", choices=DTYPES, help="of rotations; the moments'")
    add("--momentum", action=argparse.BooleanOptionalAction, help="of AdafacDiag")


def _steps(text: str) -> int | str:
    if text == "never" or text.isdecimal():
        return text if text == "never" else int(text)
    raise argparse.ArgumentTypeError(f"a number of steps or 'never', not {text!r}")


def _slots(text: str) -> int | str:
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"a number of portions or 'auto', not {text!r}")


if __name__ == "__main__":
    sys.exit(main())
