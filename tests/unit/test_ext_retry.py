from __future__ import annotations

import asyncio
import concurrent.futures
import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from celery.exceptions import Retry as CeleryRetry
from hypothesis import given
from hypothesis import strategies as st

from celery_ext.retry import (
    DeadLetter,
    Decision,
    Failure,
    GiveUp,
    Retry,
    decide,
    has_own_policy,
    is_one_of,
    is_wrapped,
    retry_after,
    unwrap,
    wrap,
)
from celery_ext.settings import RetryPolicy


class PaymentError(Exception):
    pass


class DeclinedError(PaymentError):
    pass


HERE = __name__
PLAIN = RetryPolicy(max_attempts=3, backoff_base=1.0, backoff_max=60.0, jitter=False)


def policy(**values: Any) -> RetryPolicy:
    base = {"max_attempts": 3, "backoff_base": 1.0, "backoff_max": 60.0, "jitter": False}
    return RetryPolicy(**{**base, **values})


def failed(error: type[BaseException], attempt: int = 1, **facts: Any) -> Failure:
    return Failure(error=error, attempt=attempt, **facts)


# The decision

TABLE: list[tuple[str, RetryPolicy | None, Failure, Decision]] = [
    ("no policy", None, failed(ValueError), DeadLetter("task_failed")),
    ("expected, no policy", None, failed(ValueError, expected=True), GiveUp()),
    ("expected", PLAIN, failed(ValueError, expected=True), GiveUp()),
    ("first attempt", PLAIN, failed(ValueError), Retry(1.0)),
    ("second attempt waits twice as long", PLAIN, failed(ValueError, 2), Retry(2.0)),
    ("last attempt", PLAIN, failed(ValueError, 3), DeadLetter("task_failed")),
    ("beyond the last", PLAIN, failed(ValueError, 7), DeadLetter("task_failed")),
    ("one attempt", policy(max_attempts=1), failed(ValueError), DeadLetter("task_failed")),
    ("no delay", policy(backoff_base=0.0), failed(ValueError, 2), Retry(0.0)),
    ("longest delay", policy(max_attempts=99), failed(ValueError, 7), Retry(60.0)),
    ("overflow", policy(max_attempts=10**9), failed(ValueError, 10**6), Retry(60.0)),
    (
        "unrecoverable",
        policy(unrecoverable=("ValueError",)),
        failed(ValueError),
        DeadLetter("unrecoverable_error"),
    ),
    (
        "unrecoverable by a class it derives from",
        policy(unrecoverable=("ArithmeticError",)),
        failed(ZeroDivisionError),
        DeadLetter("unrecoverable_error"),
    ),
    (
        "unrecoverable by a dotted name",
        policy(unrecoverable=(f"{HERE}.PaymentError",)),
        failed(DeclinedError),
        DeadLetter("unrecoverable_error"),
    ),
    (
        "not unrecoverable: its subclass is",
        policy(unrecoverable=(f"{HERE}.DeclinedError",)),
        failed(PaymentError),
        Retry(1.0),
    ),
    ("retryable", policy(retryable=("OSError",)), failed(ConnectionError), Retry(1.0)),
    (
        "not retryable",
        policy(retryable=("OSError",)),
        failed(ValueError),
        DeadLetter("unrecoverable_error"),
    ),
    (
        "nothing is retryable",
        policy(retryable=()),
        failed(ValueError),
        DeadLetter("unrecoverable_error"),
    ),
    (
        "unrecoverable and retryable",
        policy(unrecoverable=("PermissionError",), retryable=("OSError",)),
        failed(PermissionError),
        DeadLetter("unrecoverable_error"),
    ),
    (
        "unrecoverable on the last attempt",
        policy(unrecoverable=("ValueError",)),
        failed(ValueError, 3),
        DeadLetter("unrecoverable_error"),
    ),
    ("asks to wait", PLAIN, failed(OSError, retry_after=7.5), Retry(7.5)),
    ("asks to wait longer than the back-off", PLAIN, failed(OSError, retry_after=600), Retry(600)),
    ("asks not to wait", PLAIN, failed(OSError, 2, retry_after=0.0), Retry(0.0)),
    (
        "asks to wait on the last attempt",
        PLAIN,
        failed(OSError, 3, retry_after=1.0),
        DeadLetter("task_failed"),
    ),
    (
        "asks to wait, with jitter",
        policy(jitter=True),
        failed(OSError, retry_after=7.5),
        Retry(7.5),
    ),
]


@pytest.mark.parametrize(("policy", "failure", "expected"), [row[1:] for row in TABLE],
                         ids=[row[0] for row in TABLE])  # fmt: skip
def test_decision(policy: RetryPolicy | None, failure: Failure, expected: Decision) -> None:
    assert decide(policy, failure) == expected


seconds = st.floats(min_value=0, max_value=1e6)


@given(base=seconds, limit=seconds, attempt=st.integers(1, 10**6))
def test_the_delay_with_jitter_is_between_nothing_and_the_back_off(
    base: float, limit: float, attempt: int
) -> None:
    policy = RetryPolicy(
        max_attempts=attempt + 1, backoff_base=base, backoff_max=limit, jitter=True
    )

    decision = decide(policy, failed(ValueError, attempt))

    assert isinstance(decision, Retry)
    assert 0 <= decision.delay <= limit
    assert decision.delay <= base * 2.0 ** min(attempt - 1, 64) * (1 + 1e-9)


@given(base=seconds, limit=seconds, attempt=st.integers(1, 60))
def test_the_delay_without_jitter_doubles_up_to_the_limit(
    base: float, limit: float, attempt: int
) -> None:
    policy = RetryPolicy(
        max_attempts=attempt + 1, backoff_base=base, backoff_max=limit, jitter=False
    )

    decision = decide(policy, failed(ValueError, attempt))

    assert decision == Retry(min(limit, math.ldexp(base, attempt - 1)))


@given(share=st.floats(min_value=0, max_value=1), attempt=st.integers(1, 20))
def test_jitter_takes_any_part_of_the_delay(share: float, attempt: int) -> None:
    policy = RetryPolicy(max_attempts=99, backoff_base=1.0, backoff_max=300.0, jitter=True)

    decision = decide(
        policy, failed(ValueError, attempt), uniform=lambda low, high: low + share * (high - low)
    )

    assert decision == Retry(share * min(300.0, 2.0 ** (attempt - 1)))


@given(attempt=st.integers(1, 100), attempts=st.integers(1, 100))
def test_there_are_never_more_attempts_than_allowed(attempt: int, attempts: int) -> None:
    decision = decide(RetryPolicy(max_attempts=attempts), failed(ValueError, attempt))

    assert isinstance(decision, Retry) == (attempt < attempts)


# Exceptions by name


@pytest.mark.parametrize(
    ("error", "name", "expected"),
    [
        (ValueError, "ValueError", True),
        (UnicodeDecodeError, "ValueError", True),
        (ValueError, "UnicodeDecodeError", False),
        (DeclinedError, f"{HERE}.PaymentError", True),
        (DeclinedError, "PaymentError", False),
        (DeclinedError, "elsewhere.PaymentError", False),
        (DeclinedError, "BaseException", True),
        # another name for the same class
        (OSError, "IOError", False),
        (concurrent.futures.BrokenExecutor, "concurrent.futures._base.BrokenExecutor", True),
        (concurrent.futures.BrokenExecutor, "concurrent.futures.BrokenExecutor", True),
        (asyncio.CancelledError, "asyncio.exceptions.CancelledError", True),
        (asyncio.CancelledError, "asyncio.CancelledError", True),
        # not a class, or not there
        (ValueError, "math.pi", False),
        (ValueError, "no.such.module.Error", False),
    ],
)
def test_an_exception_is_known_by_its_names_and_those_of_its_bases(
    error: type[BaseException], name: str, expected: bool
) -> None:
    assert is_one_of(error, [name]) is expected


def test_looking_up_a_name_imports_nothing() -> None:
    import sys

    assert "this" not in sys.modules
    assert not is_one_of(ValueError, ["this.d"])
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (5, 5.0),
        (0, 0.0),
        (2.5, 2.5),
        ("120", 120.0),
        (timedelta(minutes=2), 120.0),
        (-1, None),
        (math.nan, None),
        (math.inf, None),
        (True, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        (datetime(2026, 1, 1), None),
        ([], None),
    ],
    ids=repr,
)
def test_retry_after(value: Any, expected: float | None) -> None:
    error = ValueError()
    error.retry_after = value  # type: ignore[attr-defined]

    assert retry_after(error) == expected


def test_an_exception_without_retry_after() -> None:
    assert retry_after(ValueError()) is None


# Which tasks


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("retry", broker="memory://", backend="cache+memory://",
                set_as_current=False) as app:  # fmt: skip
        yield app


def own(app: Celery, **options: Any) -> Any:
    """`app.task` for this app alone: other tests have tasks of the same name."""
    return app.task(shared=False, **options)


def retried_by(task: Task) -> bool:
    return not has_own_policy(task)


def test_an_ordinary_task_has_no_policy_of_its_own(app: Celery) -> None:
    @own(app)
    def plain() -> None: ...

    @own(app, bind=True)
    def bound(self: Task) -> None:
        self.request.retries += 1

    assert retried_by(plain)
    assert retried_by(bound)


def test_a_task_with_autoretry_has_a_policy(app: Celery) -> None:
    @own(app, autoretry_for=(OSError,))
    def plain() -> None: ...

    assert not retried_by(plain)


def test_a_task_that_calls_retry_has_a_policy(app: Celery) -> None:
    @own(app, bind=True)
    def direct(self: Task) -> None:
        raise self.retry()

    @own(app, bind=True)
    def within(self: Task) -> None:
        def again() -> None:
            raise self.retry()

        again()

    @own(app)
    def by_name() -> None:
        raise direct.retry()

    class Based(app.Task):
        name = "based"
        shared = False

        def run(self) -> None:
            self.retry()

    assert not retried_by(direct)
    assert not retried_by(within)
    assert not retried_by(by_name)
    assert not retried_by(app.register_task(Based()))


def test_celerys_own_tasks_are_left_alone(app: Celery) -> None:
    celerys = [task for name, task in app.tasks.items() if name.startswith("celery.")]

    assert "celery.backend_cleanup" in [task.name for task in celerys]
    assert not any(map(retried_by, celerys))


def test_a_task_can_say_it(app: Celery) -> None:
    @own(app, jetstream_retry=False)
    def never() -> None: ...

    @own(app, bind=True, jetstream_retry=True)
    def looks_like_it(self: Task) -> None:
        self.client.retry()

    assert not retried_by(never)
    assert retried_by(looks_like_it)


# Applied: what `Task.apply` shows of it


def fails_until(app: Celery, attempts: int, error: Exception, **options: Any) -> Task:
    @own(app, bind=True, **options)
    def failing(self: Task) -> int:
        if self.request.retries + 1 < attempts:
            raise error
        return int(self.request.retries) + 1

    return failing


def test_a_failing_task_is_tried_again(app: Celery) -> None:
    task = fails_until(app, 3, ValueError("no"))
    wrap(task, PLAIN)

    assert task.apply().get() == 3


def test_more_attempts_than_the_tasks_own_max_retries(app: Celery) -> None:
    task = fails_until(app, 9, ValueError("no"))
    wrap(task, policy(max_attempts=9))

    assert task.max_retries == 3
    assert task.apply().get() == 9
    assert "override_max_retries" not in task.__dict__


def test_after_the_last_attempt_the_exception_is_the_tasks(app: Celery) -> None:
    task = fails_until(app, 4, ValueError("no"))
    wrap(task, PLAIN)

    result = task.apply()

    assert result.state == "FAILURE"
    with pytest.raises(ValueError, match="no"):
        result.get()


def test_the_delay_is_the_policys(app: Celery) -> None:
    task = fails_until(app, 2, ValueError("no"))
    wrap(task, policy(backoff_base=0.25))
    task.push_request(called_directly=False, is_eager=True, id="x", args=(), kwargs={})

    with pytest.raises(CeleryRetry) as caught:
        task.run()

    assert caught.value.when == 0.25
    assert isinstance(caught.value.exc, ValueError)


def test_an_exception_that_says_when_is_obeyed(app: Celery) -> None:
    error = ValueError("busy")
    error.retry_after = 17  # type: ignore[attr-defined]
    task = fails_until(app, 2, error)
    wrap(task, PLAIN)
    task.push_request(called_directly=False, is_eager=True, id="x", args=(), kwargs={})

    with pytest.raises(CeleryRetry) as caught:
        task.run()

    assert caught.value.when == 17.0


@pytest.mark.parametrize(
    "error", [Ignore(), Reject("no"), CeleryRetry("again"), SystemExit(3)], ids=repr
)
def test_what_is_no_failure_passes(app: Celery, error: BaseException) -> None:
    @own(app)
    def raising() -> None:
        raise error

    wrap(raising, PLAIN)
    raising.push_request(called_directly=False, is_eager=True, id="x", args=(), kwargs={})

    with pytest.raises(type(error)) as caught:
        raising.run()
    assert caught.value is error


def test_an_expected_exception_is_not_tried_again(app: Celery) -> None:
    task = fails_until(app, 2, ValueError("no"), throws=(LookupError, ValueError))
    wrap(task, PLAIN)

    assert task.apply().state == "FAILURE"


def test_a_task_called_as_a_function_raises(app: Celery) -> None:
    task = fails_until(app, 2, ValueError("no"))
    wrap(task, PLAIN)

    with pytest.raises(ValueError, match="no"):
        task()


def test_an_exception_that_came_out_of_retry_is_final(app: Celery) -> None:
    """`self.retry` out of sight, in a helper."""
    attempts = []

    @own(app, bind=True)
    def hidden(self: Task) -> None:
        attempts.append(self.request.retries)
        give_up(self)

    def give_up(task: Task) -> None:
        try:
            raise ValueError("no")
        except ValueError as exc:
            task.retry(exc=exc, max_retries=1, countdown=0)

    wrap(hidden, policy(max_attempts=9))

    assert hidden.apply().state == "FAILURE"
    assert attempts == [0, 1]


def test_a_retry_that_cannot_be_published_is_the_tasks_own_failure(app: Celery) -> None:
    task = fails_until(app, 2, ValueError("no"))
    wrap(task, PLAIN)
    unserializable = (object(),)
    task.push_request(called_directly=False, id="x", args=unserializable, kwargs={})

    with pytest.raises(ValueError, match="no") as caught:
        task.run()

    assert isinstance(caught.value.__cause__, Reject)


def test_a_bound_task_and_one_of_a_class_are_called_with_themselves(app: Celery) -> None:
    seen: list[Any] = []

    @own(app, bind=True)
    def bound(self: Task, x: int, *, y: int) -> None:
        seen.append((self.name, x, y))

    class Based(app.Task):
        name = "based"

        def run(self, x: int, *, y: int) -> None:
            seen.append((self.name, x, y))

    based = app.register_task(Based())
    for task in (bound, based):
        wrap(task, PLAIN)
        task.apply((1,), {"y": 2})

    assert seen == [(bound.name, 1, 2), ("based", 1, 2)]


def test_unwrap_leaves_the_task_as_it_was(app: Celery) -> None:
    task = fails_until(app, 2, ValueError("no"))
    before = dict(task.__dict__)

    wrap(task, PLAIN)
    assert is_wrapped(task)
    unwrap(task)

    assert not is_wrapped(task)
    assert task.__dict__ == before
    assert task.apply().state == "FAILURE"
    unwrap(task)  # again: nothing to do
