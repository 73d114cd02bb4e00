"""Telling "no memory left" from other failures: torch says it in one way on a GPU and in another on a CPU."""

from __future__ import annotations

import torch

from tigerbot.errors import ServeError
from tigerbot_serve.engine.request import FinishReason


class NoMemory(ServeError):
    """There was none for this: another moment, or another replica, has some."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means that less work would have fitted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def reason_of(error: BaseException) -> FinishReason:
    """Why a request ends that an error was about."""
    return "memory" if out_of_memory(error) else "error"
