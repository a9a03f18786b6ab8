from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kombu_jetstream.delays import (
    LATEST,
    MAX_TTL,
    due_time,
    schedule_header,
    ttl_header,
    ttl_of,
)
from kombu_jetstream.errors import PreconditionFailed

#: 2026-11-22T05:00:00Z
NOW = 1_795_323_600.0


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        ("2026-11-22T05:00:30+00:00", NOW + 30),
        ("2026-11-22T05:00:30Z", NOW + 30),
        ("2026-11-22T07:00:30.250000+02:00", NOW + 30.25),
        ("2026-11-22T05:00:30", NOW + 30),
        ("2026-11-22T04:59:00+00:00", NOW - 60),
        (datetime(2026, 11, 22, 5, 1, tzinfo=timezone.utc), NOW + 60),
        (datetime(2026, 11, 22, 5, 1), NOW + 60),
        (None, None),
        ("", None),
        ("tomorrow", None),
        ("2026-13-45", None),
        (17, None),
        ([], None),
        ("9999-12-31T23:59:59+00:00", None),
    ],
)
def test_due_time_of_an_eta(eta: Any, expected: float | None) -> None:
    assert due_time({"eta": eta}, {}, NOW) == expected


def test_due_time_without_an_eta() -> None:
    assert due_time({}, {}, NOW) is None


@pytest.mark.parametrize("delay", [10, 10.0, "10"])
def test_due_time_of_a_delay(delay: Any) -> None:
    assert due_time({"eta": "2030-01-01T00:00:00Z"}, {"DelaySeconds": delay}, NOW) == NOW + 10


@pytest.mark.parametrize("delay", [8e9, 1e12])
def test_a_delay_beyond_what_the_server_can_count_is_refused(delay: float) -> None:
    with pytest.raises(PreconditionFailed, match="to end before 2255"):
        due_time({}, {"DelaySeconds": delay}, NOW)


@pytest.mark.parametrize("delay", ["soon", [], {}, math.nan, math.inf, -math.inf, 1e300])
def test_a_delay_that_is_no_number_is_refused(delay: Any) -> None:
    with pytest.raises(PreconditionFailed, match="expected property 'DelaySeconds' to be a number"):
        due_time({}, {"DelaySeconds": delay}, NOW)


@pytest.mark.parametrize(
    ("properties", "queue_ttl", "delay", "expected"),
    [
        ({}, None, 0, None),
        ({"expiration": "1500"}, None, 0, 1.5),
        ({"expiration": 1500}, None, 0, 1.5),
        ({"expiration": "0"}, None, 0, 0.0),
        ({"expiration": "-5"}, None, 0, 0.0),
        ({"expiration": None}, 30.0, 0, 30.0),
        ({}, 30.0, 0, 30.0),
        ({"expiration": "60000"}, 30.0, 0, 30.0),
        ({"expiration": "10000"}, 30.0, 0, 10.0),
        # What is left of it when its time has come; the queue's TTL begins then.
        ({"expiration": "60000"}, None, 50, 10.0),
        ({"expiration": "10000"}, None, 50, 0.0),
        ({"expiration": "60000"}, 5.0, 50, 5.0),
        ({}, 30.0, 50, 30.0),
    ],
)
def test_ttl(
    properties: dict[str, Any], queue_ttl: float | None, delay: float, expected: float | None
) -> None:
    assert ttl_of(properties, queue_ttl, delay) == expected


@pytest.mark.parametrize("expiration", ["soon", [], math.nan, math.inf, ""])
def test_an_expiration_that_is_no_number_is_refused(expiration: Any) -> None:
    with pytest.raises(PreconditionFailed, match="expected property 'expiration' to be a number"):
        ttl_of({"expiration": expiration}, None)


@pytest.mark.parametrize(
    ("due", "header"),
    [
        (NOW, "@at 2026-11-22T05:00:00.000000Z"),
        (NOW + 0.25, "@at 2026-11-22T05:00:00.250000Z"),
        (0.0, "@at 1970-01-01T00:00:00.000000Z"),
        (LATEST, "@at 2255-03-14T16:00:00.000000Z"),
    ],
)
def test_schedule_header(due: float, header: str) -> None:
    assert schedule_header(due) == header


@given(st.floats(0, LATEST))
def test_a_schedule_is_never_early_and_late_by_a_microsecond_at_most(due: float) -> None:
    text = schedule_header(due).removeprefix("@at ").replace("Z", "+00:00")
    at = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=timezone.utc)

    late = at / timedelta(microseconds=1) - due * 1e6
    # Half of what a float of that size can tell apart is not earliness.
    assert -math.ulp(due * 1e6) <= late <= 1 + math.ulp(due * 1e6)


@pytest.mark.parametrize(
    ("ttl", "header"),
    [
        (0.0, "1s"),
        (0.2, "1s"),
        (1.0, "1s"),
        (1.001, "2s"),
        (90.0, "90s"),
        (1e12, f"{MAX_TTL}s"),
    ],
)
def test_ttl_header_is_whole_seconds_rounded_up(ttl: float, header: str) -> None:
    assert ttl_header(ttl) == header
