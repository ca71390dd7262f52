"""Every error a user can cause: a stable code, where it happened, what was seen, what to change.

The codes are listed with their cure in ``docs/errors.md``. Each class also derives from the builtin that a
caller would expect to catch.
"""

from __future__ import annotations


class QatError(Exception):
    """Base of all user-facing errors.

    Args:
        code: stable identifier such as ``"QAT121"``.
        where: file, key, module or tensor at fault.
        seen: what was found there, with what was expected.
        fix: what the user can change.
    """

    def __init__(self, code: str, where: str, seen: str, fix: str) -> None:
        self.code, self.where, self.seen, self.fix = code, where, seen, fix
        super().__init__(f"{code} {where}: {_sentence(seen)} {_sentence(fix)}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.code, self.where, self.seen, self.fix)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


class ConfigError(QatError, ValueError):
    """params.yaml or an entry point is wrong (QAT10x)."""


class DataError(QatError, ValueError):
    """The user's data is unusable: empty, NaN, labels out of range (QAT11x)."""


class CheckpointError(QatError, ValueError):
    """A weights file is missing, truncated, unsafe or of another model (QAT12x)."""


class GraphError(QatError, TypeError):
    """The model cannot be traced, or a pass broke the graph (QAT13x)."""


class QConfigError(QatError, ValueError):
    """A quantization setting cannot be honoured (QAT14x)."""


class StateError(QatError, RuntimeError):
    """The fake-quant model is in a state in which the request makes no sense (QAT15x)."""


class TrainingError(QatError, ArithmeticError):
    """Calibration or training met a value it must not go on with (QAT16x, QAT193, QAT196)."""


class ProgramError(QatError, ValueError):
    """A Program cannot be built, loaded (QAT17x) or run (QAT180 to QAT182)."""


class CompileError(QatError, ValueError):
    """A target description or a Program for that target is not acceptable (QAT183 to QAT189, QAT250)."""


class StageError(QatError, RuntimeError):
    """A pipeline stage could not run (QAT19x), or git or DVC does not know what was asked for (QAT219)."""


class OutputError(QatError, OSError):
    """A folder cannot be written, or holds something else that would be lost (QAT225, QAT226)."""
