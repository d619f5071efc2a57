"""What can go wrong, as a tree; every message says where, what was expected, what was found, and one thing to do.

OnnxpressError
  UserError              exit 2, no traceback: the input or an option is at fault
    UnknownPassError       a pass or recipe of that name does not exist
    OptionError            an option is unknown, ill-typed, out of range, or has no effect here
    UnsupportedModelError  the model is whole, but of a kind that this command cannot serve
    BadModelFileError      a model file is missing, truncated, or points outside its own directory
    CalibrationError       calibration or evaluation text is missing or too short
    OutputError            the output directory cannot be written or replaced
    ProviderError          the execution provider asked for does not work on this machine
  PassError              exit 1, with traceback: a pass broke its contract
    PreconditionError      the model a pass received is not what it needs
    VerificationError      the outputs after a pass differ from those before by more than it promised
    NumericalError         a matrix was not finite, not positive definite, ...
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxpressWarning(UserWarning):
    """Base of the warnings that onnxpress raises."""


class OnnxpressError(Exception):
    """Base of all errors raised on purpose. `hint` is one action the reader can take."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UserError(OnnxpressError):
    """The input or an option is at fault; reported in one line, without a traceback."""

    exit_code = 2


class UnknownPassError(UserError):
    """A pass or recipe of that name does not exist."""


class OptionError(UserError):
    """An option is unknown, ill-typed, out of range, contradictory, or without effect on this model."""


class UnsupportedModelError(UserError):
    """The model is whole, but of a kind that this command cannot serve."""


class BadModelFileError(UserError):
    """A model file is missing, truncated, or points outside its own directory."""


class CalibrationError(UserError):
    """Calibration or evaluation text is missing or too short."""


class StreamingError(CalibrationError):
    """Text cannot be streamed through the model: it reads something else, or does not run on the windows."""


class OutputError(UserError):
    """The output directory cannot be written or replaced."""


class ProviderError(UserError):
    """The execution provider asked for does not work on this machine."""


class PassError(OnnxpressError):
    """A pass broke its contract."""


class PreconditionError(PassError):
    """The model a pass received is not what it needs."""


class VerificationError(PassError):
    """The outputs after a pass differ from those before by more than it promised."""


class NumericalError(PassError):
    """A matrix was not finite, not positive definite, or a fit did not converge."""


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """The hint for a mistyped `name`: the closest of `known`, or the whole list when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else None
