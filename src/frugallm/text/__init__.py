"""Text that calibrates and judges: where it comes from, and the token windows cut from it."""

from frugallm.text.source import Text, open_text
from frugallm.text.windows import calibration_windows, evaluation_windows, leading_bos

__all__ = ["Text", "calibration_windows", "evaluation_windows", "leading_bos", "open_text"]
