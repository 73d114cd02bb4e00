"""The loss behind a large vocabulary: ours in chunks beside full logits, in peak memory and in time.

Memory is what a fresh process's resident peak (VmHWM) grows by over forward and backward of the loss alone, from hidden
states and output matrix to both gradients; the gradients themselves, which both sides must make, are in it. Time is
forward and backward of whole models, ours and the plain way in turn in one process, one thread.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, ratio
from tigerbot.models import build
from tigerbot_jobs.train.loss import OutputLoss
from tigerbot_jobs.train.model import LanguageModel

LARGE, SMALL, HIDDEN, TOKENS = 65_536, 4096, 256, 2048
LENGTH = 256


def main() -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows.append(
            ratio(
                f"peak memory of the loss, vocabulary 64k, {dtype} products",
                lambda dtype=dtype: _in_a_process("ours", dtype),
                lambda dtype=dtype: _in_a_process("plain", dtype),
                unit="MiB",
                target="<= 0.25",
                better="lower",
                note=f"{TOKENS} tokens, hidden size {HIDDEN}; of each side 64 MiB are the gradient of the matrix",
            )
        )
    for vocabulary, sequences, target in ((SMALL, 8, ">= 1.0"), (LARGE, 4, ">= 1.0")):
        rows.append(
            ratio(
                f"forward and backward of `tiny`, vocabulary {vocabulary}",
                _speed(vocabulary, sequences, plain=False),
                _speed(vocabulary, sequences, plain=True),
                unit="tokens/s",
                target=target,
                pairs=10 if vocabulary == SMALL else 5,
                note=f"1 thread, bf16 products, {sequences} x {LENGTH} tokens",
            )
        )
    return rows


def _speed(vocabulary: int, sequences: int, *, plain: bool) -> Callable[[], float]:
    """Tokens a second of one pass; the first call warms up."""
    module = LanguageModel(build("tiny", vocabulary, 1), torch.bfloat16)
    if plain:
        module._output_loss = None
    ids = torch.randint(0, vocabulary, (sequences, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(sequences, LENGTH)

    def once() -> float:
        began = time.perf_counter()
        module(ids, ids, positions).backward()
        seconds = time.perf_counter() - began
        module.zero_grad()
        return ids.numel() / seconds

    once()
    return once


def _in_a_process(way: str, dtype: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loss_memory", way, dtype], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _peak_mib(way: str, dtype: str) -> float:
    """What the resident peak grows by."""
    torch.set_num_threads(1)
    _loss(way, dtype, vocabulary=100)
    drawn = _drawn(LARGE)
    # Makes the peak start again from what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    _loss(way, dtype, drawn=drawn)
    return (_status("VmHWM") - before) / 1024


def _loss(way: str, dtype: str, *, vocabulary: int = 0, drawn: Any = None) -> None:
    hidden, output, targets = drawn or _drawn(vocabulary)
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        loss = OutputLoss(output)(hidden, targets) if way == "ours" else None
        logits = output(hidden) if loss is None else None
    if logits is not None:
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        del logits
    assert loss is not None
    loss.backward()


def _drawn(vocabulary: int) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(1)
    output = nn.Linear(HIDDEN, vocabulary, bias=False)
    return torch.randn(TOKENS, HIDDEN, requires_grad=True), output, torch.randint(0, vocabulary, (TOKENS,))


def _status(field: str) -> int:
    """Kilobytes."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    print(_peak_mib(*sys.argv[1:3]))
