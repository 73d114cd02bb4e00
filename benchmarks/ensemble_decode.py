"""What an ensemble costs: two experts of one base, with adapters everywhere and in the upper third, two full models,
int8, and the heads' share of a step, each against one float32 model in the same engine at batch 1 and 8.

    python -m benchmarks ensemble_decode

All take turns in every round. Late experts run with and without the gate: by the linear mix, where it is exact, and at a
dial near an end, where it has something to skip.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.decoding import (
    SHARP,
    THREADS,
    VOCABULARY,
    decode,
    engine_of,
    in_turn,
    left_out,
    ratio_row,
    stop,
    write_base,
    write_heads,
    write_pair,
)
from benchmarks.harness import Row, bootstrap
from tigerbot.models import PRESETS
from tigerbot.spec import Lora

DIAL, GATED_DIAL = 0.5, 0.1

# measure, ours, stock, target at batch 1, target at batch 8
RATIOS = (
    ("two LoRA experts / one model", "full", "one", "≥ 0.90", "≥ 0.80"),
    ("two late LoRA experts / one model", "late", "one", "≥ 0.90", "≥ 0.80"),
    (f"two late LoRA experts, linear mix, dial {GATED_DIAL} / one model", "linear", "one", "≥ 0.90", "≥ 0.80"),
    (f"the same with the gate / one model, dial {GATED_DIAL}", "gated", "one", "≥ 0.90", "≥ 0.80"),
    ("two full models / one model", "two", "one", "≥ 0.52", "≥ 0.52"),
    ("int8 experts / one float32 model", "int8", "one", "≥ 1.0", "≥ 1.0"),
    ("int8 late experts / one float32 model", "int8 late", "one", "≥ 1.0", "≥ 1.0"),
)


def main(presets: tuple[str, ...] = tuple(VOCABULARY), batches: tuple[int, ...] = (1, 8)) -> list[Row]:
    torch.set_num_threads(THREADS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for preset in presets:
            rows += _preset_rows(preset, Path(name) / preset, batches)
    return rows


def _preset_rows(preset: str, folder: Path, batches: tuple[int, ...]) -> list[Row]:
    write_base(preset, folder, sharp=SHARP)
    full = write_pair(folder, "full", Lora(rank=16))
    late = write_pair(folder, "late", Lora(rank=16, layers="upper third"))
    two = write_pair(folder, "merged", Lora(rank=16), merged=True)
    heads = write_heads(folder / "heads", late, PRESETS[preset].hidden)
    engines = {
        "one": engine_of({"creative": two["creative"]}),
        "full": engine_of(full),
        "late": engine_of(late),
        "late with heads": engine_of(late, heads=heads),
        "linear": engine_of(late, dial={"mix": "linear"}),
        "gated": engine_of(late, dial={"mix": "linear"}, engine={"gate": {}}),
        "two": engine_of(two),
        "int8": engine_of(full, dtype="int8"),
        "int8 late": engine_of(late, dtype="int8"),
    }
    rows = []
    try:
        for batch in batches:
            dials = {"linear": GATED_DIAL, "gated": GATED_DIAL}
            sides = {
                name: partial(decode, engine, batch, dial=dials.get(name, DIAL)) for name, engine in engines.items()
            }
            before = engines["gated"].stats()
            found = in_turn(sides, f"{preset} batch {batch}")
            for measure, ours, stock, *targets in RATIOS:
                label = f"{measure}, `{preset}`, batch {batch}"
                note = left_out(engines[ours], before) if ours == "gated" else ""
                rows.append(ratio_row(label, found, ours, stock, targets[batch > 1], note=note))
            rows.append(_share_row(preset, batch, found))
    finally:
        stop(engines)
    return rows


def _share_row(preset: str, batch: int, found: dict[str, list[float]]) -> Row:
    """Of a step with heads, what goes away without them: both heads, and the factual states in the output product."""
    shares = [1 - a / b for a, b in zip(found["late with heads"], found["late"], strict=True)]
    low, high = bootstrap(shares)
    measure = f"heads' share of a step, `{preset}`, batch {batch}"
    return Row(measure, statistics.median(shares), low, high, "lower", "≤ 0.05", len(shares))
