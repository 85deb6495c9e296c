"""Quantizers: a protocol, a registry, one scheme a file."""

from typing import TYPE_CHECKING, Any

from . import af4 as af4
from . import affine as affine
from . import flat as flat
from . import fp4 as fp4
from . import hqq as hqq
from . import int4 as int4
from . import int8 as int8
from . import int8_blockwise as int8_blockwise
from . import nf4 as nf4
from . import none as none
from . import normal_float as normal_float
from .codebook import CodebookQuantizer as CodebookQuantizer
from .codebook import FixedCodebook as FixedCodebook
from .double_quant import requantize_scales as requantize_scales
from .fitted import Fitted as Fitted
from .generic import linear as linear
from .refit import refit as refit
from .registry import Quantizer as Quantizer
from .registry import get as get
from .registry import names as names
from .registry import quantizer_of as quantizer_of
from .registry import register as register
from .rows import decodes_rows as decodes_rows
from .rows import dequantize_rows as dequantize_rows
from .rows import gather as gather
from .rows import has_row_parts as has_row_parts
from .storage import Storage as Storage

if TYPE_CHECKING:
    from lowrank.report import report as report


def __getattr__(name: str) -> Any:
    if name == "report":  # it compares whole models, and all of them import this package
        from lowrank.report import report

        return report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
