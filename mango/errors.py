"""The errors that mango raises on bad input.

Every message names the field, the value and what is legal; the command line prints it as one line and exits with code 2.
"""

from __future__ import annotations


class MangoError(Exception):
    """Base class: anything a user can mend by changing the input."""


class ConfigError(MangoError, ValueError):
    """A field has a value that is not legal."""

    @classmethod
    def of(cls, field: str, value: object, legal: str) -> ConfigError:
        """Build the house's message, e.g. ``rank = 0 is not legal: an integer >= 1``."""
        return cls(f"{field} = {value!r} is not legal: {legal}")


class DataError(MangoError):
    """A dataset is missing, damaged or not what its fingerprint says."""


class MissingExtra(MangoError, ImportError):
    """An optional dependency is absent; the message is the command that installs it."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        return cls(f"{purpose} needs {package}, which is not installed; in mango's checkout: pip install '.[{extra}]'")


class NonFinite(MangoError, ArithmeticError):
    """NaN or infinity where a finite number is required; the message names the tensor."""


class Unhealthy(MangoError, ArithmeticError):
    """A quantity that should be sound is degenerate; the message names the layer, the step and what is wrong."""
