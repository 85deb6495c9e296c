"""Everything a caller can get wrong, in one small family.

Each message is one line: name, expected, got, remedy.
"""


class LowrankError(Exception):
    """The root of the family: `except lowrank.errors.LowrankError` takes all callers can mend."""


class ShapeError(LowrankError, ValueError):
    """A tensor's shape does not fit the operator or the layer."""


class DtypeError(LowrankError, TypeError):
    """A tensor's dtype is not one the operator computes with."""


class ConfigError(LowrankError, ValueError):
    """A configuration value is out of range, unknown, or contradicts another."""


class TargetError(LowrankError, ValueError):
    """A name of a module or an adapter matches nothing in the model."""


class WeightError(LowrankError, ValueError):
    """A weight cannot be quantized, merged or used: NaN, inf, or a shape other than its layer's."""


class FileFormatError(LowrankError, ValueError):
    """A file is damaged, truncated, of another kind, or made for another model."""


class DataError(LowrankError, ValueError):
    """A training example cannot be read or used; the message names the file and line."""


class TrainingError(LowrankError, RuntimeError):
    """Training cannot go on: a loss is not finite, or no gradient reaches what is to be trained."""


class MissingPackageError(LowrankError, ImportError):
    """An optional package is needed; the message is the pip command that installs it."""


class BackendError(LowrankError, RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""
