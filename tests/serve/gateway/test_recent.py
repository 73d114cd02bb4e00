"""What answers came to of late: creative weights and verdicts, for Prometheus and for the live panel."""

from __future__ import annotations

import re

import httpx
import pytest

from tigerbot_serve.gateway.recent import Recent, Weights

ASK = {"model": "tiger", "messages": [{"role": "user", "content": "The fox sings."}], "max_tokens": 6}


def weights_of(*values: float) -> Weights:
    weights = Weights()
    for value in values:
        weights.add(value)
    return weights


def test_a_weight_is_counted_up_to_its_tenth_and_both_ends_of_the_dial_have_a_place() -> None:
    weights = weights_of(0.0, 0.05, 0.1, 0.11, 0.5, 0.95, 1.0)

    assert weights.counts == [3, 1, 0, 0, 1, 0, 0, 0, 0, 2]
    assert weights.total == pytest.approx(2.71)


def test_what_is_older_than_the_window_is_forgotten_and_a_busy_past_takes_no_more_room() -> None:
    now = [0.0]
    recent = Recent(60.0, clock=lambda: now[0])
    for second in range(200):
        now[0] = float(second)
        recent.count(weights_of(0.3), ["ok" if second % 2 else "rewritten"], second % 2)

    found = recent.reading()

    assert 50 <= sum(found.w_tenths) <= 70 and found.w_mean == pytest.approx(0.3)
    assert sum(found.verdicts.values()) == sum(found.w_tenths) == 2 * found.rewrites
    assert len(recent._slices) <= 8
    now[0] = 1000.0
    assert recent.reading().w_mean is None and recent.reading().verdicts == {}


def test_every_given_token_is_in_the_histogram_and_every_held_answer_in_the_verdicts(serve_engine, heads) -> None:
    url = serve_engine(heads=str(heads(p_dev=3.0))).url
    asked = [{"creativity": 0.0}, {"creativity": 1.0}, {"creativity": 0.5, "verify": True, "max_rewrites": 0}]
    answers = [
        httpx.post(f"{url}/v1/chat/completions", json=ASK | {"verify": False} | more, timeout=60).json()
        for more in asked
    ]
    spent = [answer["usage"]["completion_tokens"] for answer in answers]

    live = httpx.get(f"{url}/v1/live").json()
    text = httpx.get(f"{url}/metrics").text

    assert live["w_tenths"][0] >= spent[0] and live["w_tenths"][9] >= spent[1] and sum(live["w_tenths"]) == sum(spent)
    assert live["verdicts"] == {"flagged": 1} and live["rewrites"] == 0
    buckets = [int(float(count)) for count in re.findall(r'tiger_token_w_bucket\{le="[^"]+"\} (\S+)', text)]
    assert [one - before for one, before in zip(buckets[:10], [0, *buckets], strict=False)] == live["w_tenths"]
    assert len(buckets) == 11 and f"tiger_token_w_count {float(sum(spent))}" in text
    assert float(re.findall(r"tiger_token_w_sum (\S+)", text)[0]) == pytest.approx(live["w_mean"] * sum(spent))
    assert 'tiger_verdicts_total{verdict="flagged"} 1.0' in text
