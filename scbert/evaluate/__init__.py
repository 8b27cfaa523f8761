"""Is it right, and is a difference real."""

from .metrics import compare, score, score_classes, score_trainings, write_out

__all__ = ["compare", "score", "score_classes", "score_trainings", "write_out"]
