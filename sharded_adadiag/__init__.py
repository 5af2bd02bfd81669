"""AdaDiag, AdafacDiag and HfacDiag, sharded over ranks."""

from sharded_adadiag.grouping import param_groups
from sharded_adadiag.integrations.registration import register
from sharded_adadiag.optimizer import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.report import Report

__all__ = ["AdaDiag", "AdafacDiag", "HfacDiag", "Report", "param_groups"]

register(AdaDiag, AdafacDiag, HfacDiag)
