"""The stock run that ours is compared with does recover, so that the comparison is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.stock_train import measure_recovery


@pytest.mark.soak
def test_stock_ray_train_goes_on_from_its_checkpoint_after_each_kill(tmp_path: Path) -> None:
    found = measure_recovery(tmp_path, kills=2)

    assert len(found) == 2 and all(0.5 < one.seconds <= one.seconds_to_new < 120 for one in found)
