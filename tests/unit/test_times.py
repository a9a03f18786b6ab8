from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_ext.times import duration_of, moment_of, show_age, show_moment


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("45s", 45.0),
        ("500ms", 0.5),
        ("15m", 900.0),
        (" 2H ", 7200.0),
        ("1d", 86400.0),
        ("2w", 1209600.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("1d2h3m4s5ms", 93784.005),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert duration_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "x", "h", "1x", "1h30", "30m1", "1 h", "-3", "inf", "nan"])
def test_what_is_no_duration_says_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        duration_of(text)


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2h", NOW - 7200),
        ("90", NOW - 90),
        ("1795340000", 1795340000.0),
        ("2026-11-22T14:30:00Z", 1795357800.0),
        ("2026-11-22T14:30:00+01:00", 1795354200.0),
        ("2026-11-22T14:30:00.250+00:00", 1795357800.25),
    ],
)
def test_moments_are_read(text: str, moment: float) -> None:
    assert moment_of(text, NOW) == moment


def test_a_moment_without_an_offset_is_local_time() -> None:
    moment = moment_of("2026-11-22T14:30:15", NOW)

    assert show_moment(moment) == "2026-11-22 14:30:15"
    assert moment_of("2026-11-22", NOW) == moment_of("2026-11-22T00:00", NOW)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "22.11.2026"])
def test_what_is_no_moment_says_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected a moment"):
        moment_of(text, NOW)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, ""),
        (-1.0, "0.0s"),
        (0.25, "0.2s"),
        (9.94, "9.9s"),
        (10.0, "10s"),
        (59.9, "59s"),
        (60.0, "1m"),
        (61.0, "1m1s"),
        (3600.0, "1h"),
        (3661.0, "1h1m"),
        (86400.0, "1d"),
        (90061.0, "1d1h"),
        (86460.0, "1d"),
    ],
)
def test_ages_have_two_units_at_most(seconds: float | None, shown: str) -> None:
    assert show_age(seconds) == shown


@given(st.floats(min_value=10, max_value=1e9))
def test_a_shown_age_reads_back_as_nearly_the_same(seconds: float) -> None:
    shown = duration_of(show_age(seconds))

    assert shown <= seconds
    # What is left out is less than the smaller of the two units shown.
    assert seconds - shown < max(1.0, shown / 23) or math.isclose(seconds, shown)


def test_no_moment_is_shown_as_nothing() -> None:
    assert show_moment(None) == ""
