"""What may be logged about an error: its kind and where it happened. Its message may quote what a user wrote."""

from __future__ import annotations

import traceback


def without_values(error: BaseException) -> str:
    """One line: the innermost frames first."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " <- ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-8:]))
    return f"{type(error).__name__} at {places or 'an unknown place'}"
