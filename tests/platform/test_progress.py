"""What a stage says while it works, off a terminal."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from tigerbot import progress


def test_time_left_is_of_this_process_also_when_a_stage_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    with progress.stage("training", total=1000, unit="tokens") as shown:
        for now[0], done in ((5.0, 900), (16.0, 910), (27.0, 920)):  # 900 were done before
            shown.update(done)

    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert [re.findall(r"(\d+) s left", line) for line in lines] == [["99"], ["88"]]
