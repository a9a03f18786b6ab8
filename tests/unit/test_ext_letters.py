from __future__ import annotations

import pickle
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore, Reject, TimeLimitExceeded
from celery.utils.serialization import get_pickleable_etype, get_pickleable_exception

from celery_ext.letters import Death, error_of, error_type, letter_of
from celery_ext.outcomes import DeadLettered, Nack, dead_letter, nack
from celery_ext.priority import priority_of
from kombu_jetstream.backend import Delivery, Outcome
from kombu_jetstream.deadletter import DeadLetter, death_id
from kombu_jetstream.options import Options
from kombu_jetstream.topology import LEVELS, Level, level_of


class PickyError(Exception):
    """Cannot be unpickled: its constructor wants more than `args` has."""

    def __init__(self, code: int, *, where: str) -> None:
        super().__init__(f"{code} at {where}")


def from_a_pool_process(error: BaseException) -> ExceptionInfo:
    """What the main process gets of *error*, as `celery.app.trace` and billiard make it."""
    try:
        raise error
    except type(error):
        picked = get_pickleable_exception(error)
        kind = get_pickleable_etype(type(error))
        einfo = ExceptionInfo(exc_info=(kind, picked, error.__traceback__))
    return pickle.loads(pickle.dumps(einfo))


def test_a_death_has_the_error_its_text_and_traceback() -> None:
    death = Death.of(from_a_pool_process(ValueError("no such card")), "task_failed")

    assert (death.reason, death.error, death.message) == (
        "task_failed",
        "ValueError",
        "no such card",
    )
    assert death.traceback is not None
    assert "in from_a_pool_process" in death.traceback


def test_an_exception_that_cannot_be_pickled_keeps_its_name() -> None:
    einfo = from_a_pool_process(PickyError(7, where="till"))
    death = Death.of(einfo, "task_failed")

    assert not isinstance(error_of(einfo), PickyError)
    assert error_type(einfo) is PickyError
    assert death.error == f"{__name__}.PickyError"
    assert "7 at till" in str(death.message)


def test_an_exception_whose_class_cannot_be_pickled_keeps_its_name() -> None:
    class LocalError(Exception):
        pass

    death = Death.of(from_a_pool_process(LocalError("x")), "task_failed")

    assert death.error == f"{__name__}.LocalError"


def delivery(**values: Any) -> Delivery:
    class Nobody:
        def settle(
            self, delivery: Delivery, outcome: Outcome, delay: float | None = None
        ) -> None: ...

    return Delivery("orders", 0, b"{}", b"token", Nobody(), **values)


def test_a_letter_says_what_died_where_and_when() -> None:
    letter = letter_of(
        Death(reason="task_failed", error="ValueError", message="no", traceback="…"),
        delivery(published_at=11.0, attempt=4),
        {"retries": 2, "jetstream_replayed": 1},
        task="shop.pay",
        task_id="id",
        worker="celery@host",
        now=12.5,
    )

    assert letter == DeadLetter(
        reason="task_failed",
        queue="orders",
        level="high",
        task="shop.pay",
        task_id="id",
        error="ValueError",
        message="no",
        traceback="…",
        attempts=3,
        worker="celery@host",
        published_at=11.0,
        died_at=12.5,
        replayed=1,
    )


def test_a_message_without_celerys_headers_was_tried_once() -> None:
    letter = letter_of(
        Death(reason="rejected"), delivery(), {}, task="t", task_id="i", worker="w", now=1.0
    )

    assert letter.attempts == 1
    assert letter.published_at is None


# Ids


OLD = b"$JS.ACK.ns_medium.celery.3.17.21.1700000000000000000.0"
NEW = b"$JS.ACK.hub.acchash.ns_medium.celery.3.17.21.1700000000000000000.0.rnd"


def test_the_id_of_a_death_is_that_of_the_stored_message() -> None:
    again = OLD.replace(b".3.17.21.", b".4.17.29.")

    assert death_id(OLD, b"x") == "dead.ns_medium.17.1700000000000000000"
    assert death_id(NEW, b"x") == death_id(OLD, b"x")
    assert death_id(again, b"x") == death_id(OLD, b"x")


def test_a_death_without_a_stream_is_told_by_token_and_payload() -> None:
    ids = {death_id(b"a", b"x"), death_id(b"b", b"x"), death_id(b"a", b"y")}

    assert len(ids) == 3
    assert death_id(b"a", b"x") in ids


# Priorities


@pytest.mark.parametrize("order", ["amqp", "redis"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_number_of_a_level_means_that_level(level: Level, order: Any) -> None:
    options = Options(priority_order=order)

    assert level_of(priority_of(level, order), options) == level


# Manual control


@pytest.mark.parametrize("error", [Nack(), Nack(2.5), DeadLettered("why")], ids=repr)
def test_outcomes_reach_the_main_process_and_the_result_as_they_are(error: Reject) -> None:
    pickled = pickle.loads(pickle.dumps(error))
    rebuilt = type(error)(*error.args)  # as Celery reads results in JSON

    for other in (pickled, rebuilt):
        assert type(other) is type(error)
        assert vars(other) == vars(error)
        assert str(other) == str(error)


def test_celery_takes_them_for_rejects_and_autoretry_lets_them_pass() -> None:
    assert isinstance(Nack(), Reject)
    assert Nack().requeue is True
    assert isinstance(DeadLettered("x"), Reject)
    assert DeadLettered("x").requeue is False
    assert isinstance(Nack(), Ignore)
    assert isinstance(DeadLettered("x"), Ignore)


def test_outside_of_a_task_they_raise_as_within() -> None:
    with pytest.raises(Nack, match="again in 3 s") as caught:
        nack(3)
    assert caught.value.delay == 3.0
    with pytest.raises(Nack, match="again at once"):
        nack()
    with pytest.raises(DeadLettered, match="the card was stolen"):
        dead_letter("the card was stolen")


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf")])
def test_a_delay_has_to_be_one(delay: float) -> None:
    with pytest.raises(ValueError, match="expected delay to be seconds >= 0"):
        nack(delay)


@pytest.mark.parametrize("delay", ["1", True, None], ids=repr)
def test_a_delay_is_a_number(delay: Any) -> None:
    with pytest.raises(TypeError, match="expected delay to be seconds >= 0"):
        nack(delay)


def test_time_limits_are_named_as_celery_imports_them() -> None:
    assert (
        Death.of(from_a_pool_process(TimeLimitExceeded(3.0)), "task_failed").error
        == "billiard.exceptions.TimeLimitExceeded"
    )


def test_an_exception_whose_text_cannot_be_made_has_a_letter() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    try:
        raise Odd
    except Odd:
        death = Death.of(ExceptionInfo(), "task_failed")

    assert death.message == "(its text cannot be made: RuntimeError)"
    assert death.error is not None
    assert death.error.endswith("Odd")
