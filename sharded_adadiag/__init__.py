"""AdaDiag, AdafacDiag and HfacDiag, sharded over ranks."""

from sharded_adadiag.checkpoint.named import named_state_dict
from sharded_adadiag.optimizer import (
    AdaDiag,
    AdafacDiag,
    HfacDiag,
    RotatedOptimizer,
)
from sharded_adadiag.params.factory import model_factory
from sharded_adadiag.params.grouping import param_groups
from sharded_adadiag.plan.report import Report
from sharded_adadiag.zero.portable import (
    load_portable_state_dict,
    portable_state_dict,
)
from sharded_adadiag.zero.registration import register

__version__ = "0.2.0.dev0"  # the only place that says it

__all__ = [
    "AdaDiag",
    "AdafacDiag",
    "HfacDiag",
    "Report",
    "RotatedOptimizer",
    "load_portable_state_dict",
    "model_factory",
    "named_state_dict",
    "param_groups",
    "portable_state_dict",
]

register(AdaDiag, AdafacDiag, HfacDiag)
