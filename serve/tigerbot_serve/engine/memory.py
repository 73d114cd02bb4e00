"""Telling "no memory left" from other failures: torch says it in one way on a GPU and in another on a CPU."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means that less work would have fitted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
