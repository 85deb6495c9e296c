"""Adapters: a protocol, a registry, one method a file."""

from . import dora as dora
from . import lora as lora
from . import lora_fa as lora_fa
from . import vera as vera
from .registry import Method as Method
from .registry import get as get
from .registry import names as names
from .registry import register as register
