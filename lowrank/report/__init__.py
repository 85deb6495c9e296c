"""Quantizers compared on one model: `lowrank.quant.report(...)`, and `lowrank report`."""

from .measure import report as report
from .result import Report as Report
from .result import Row as Row
