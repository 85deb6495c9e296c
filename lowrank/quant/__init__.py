"""Quantizers: a protocol, a registry, one scheme a file."""

from . import nf4 as nf4
from .codebook import CodebookQuantizer as CodebookQuantizer
from .generic import linear as linear
from .registry import Quantizer as Quantizer
from .registry import get as get
from .registry import names as names
from .registry import register as register
from .storage import Storage as Storage
