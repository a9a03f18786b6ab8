from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kombu_jetstream.failover import TRANSITIONS, Event, Failover, State

PATIENCE = 2.0


def machine(state: State) -> Failover:
    """A machine brought into *state* by events alone, at time 0."""
    failover = Failover(PATIENCE)
    path = {
        State.JETSTREAM: [],
        State.DEGRADED: [Event.GAVE_UP],
        State.RECOVERING: [Event.GAVE_UP, Event.ANSWERED],
    }[state]
    for event in path:
        failover.happened(event, 0.0)
    assert failover.state is state
    return failover


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_each_event_in_each_state_does_what_the_table_says(state: State, event: Event) -> None:
    failover = machine(state)

    after = failover.happened(event, 0.0)

    assert after is TRANSITIONS.get((state, event), state)
    assert failover.state is after


def test_a_short_failure_changes_nothing() -> None:
    failover = Failover(PATIENCE)

    failover.happened(Event.FAILED, 10.0)
    failover.happened(Event.FAILED, 11.9)

    assert failover.state is State.JETSTREAM
    assert failover.patience_left(11.9) == pytest.approx(0.1)


def test_a_failure_that_lasts_for_the_patience_hands_over_to_redis() -> None:
    failover = Failover(PATIENCE)

    failover.happened(Event.FAILED, 10.0)
    failover.happened(Event.FAILED, 12.0)

    assert failover.is_degraded
    assert failover.failovers == 1
    assert failover.patience_left(12.0) == 0


def test_success_in_between_starts_the_patience_again() -> None:
    failover = Failover(PATIENCE)

    failover.happened(Event.FAILED, 10.0)
    failover.happened(Event.WORKED, 11.0)
    failover.happened(Event.FAILED, 12.5)

    assert failover.state is State.JETSTREAM
    assert failover.patience_left(12.5) == PATIENCE


def test_no_patience_hands_over_at_the_first_failure() -> None:
    failover = Failover(0.0)

    failover.happened(Event.FAILED, 10.0)

    assert failover.is_degraded


def test_a_relapse_while_recovering_costs_no_patience_again() -> None:
    failover = machine(State.RECOVERING)

    failover.happened(Event.FAILED, 100.0)

    assert failover.is_degraded
    assert failover.failovers == 1, "the same outage"


def test_the_next_outage_has_all_the_patience() -> None:
    failover = machine(State.RECOVERING)

    failover.happened(Event.WORKED, 5.0)

    assert failover.patience_left(5.0) == PATIENCE


def test_an_outage_is_one_line_and_its_end_another(caplog: pytest.LogCaptureFixture) -> None:
    failover = Failover(PATIENCE)

    with caplog.at_level(logging.INFO, "kombu_jetstream.failover"):
        for at in (10.0, 11.0, 12.0, 13.0):
            failover.happened(Event.FAILED, at, "connection refused")
        failover.happened(Event.ANSWERED, 20.0)
        failover.happened(Event.FAILED, 20.1)
        failover.happened(Event.ANSWERED, 21.0)
        failover.happened(Event.WORKED, 22.5)
        failover.happened(Event.WORKED, 23.0)

    assert [record.getMessage() for record in caplog.records] == [
        "JetStream is away (connection refused), Redis takes over",
        "JetStream is back, it was away for 12.5 s",
    ]


@given(st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 5)), max_size=60))
def test_redis_never_takes_over_before_the_patience_is_spent(
    steps: list[tuple[Event, float]],
) -> None:
    failover = Failover(PATIENCE)
    now, failing_since = 0.0, None
    for event, pause in steps:
        now += pause
        before = failover.state
        if before is State.JETSTREAM:
            if event is Event.WORKED:
                failing_since = None
            elif event is Event.FAILED and failing_since is None:
                failing_since = now
        else:
            failing_since = None

        after = failover.happened(event, now)

        if before is State.JETSTREAM and after is State.DEGRADED and event is Event.FAILED:
            assert failing_since is not None
            assert now - failing_since >= PATIENCE
        assert (before, after) != (State.DEGRADED, State.JETSTREAM), "never without a probe"
