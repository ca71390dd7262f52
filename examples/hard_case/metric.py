"""What this example is scored by."""

from examples.classes import METRICS, RELATIVE, against

__all__ = ["METRICS", "RELATIVE", "against"]
