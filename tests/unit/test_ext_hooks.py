"""The hooks without a broker: which app, which settings, and that they can be undone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, Task, signals
from celery.app.trace import build_tracer
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from celery.worker.control import Panel
from celery.worker.request import Request
from kombu.entity import Queue

import celery_ext
from celery_ext.hooks import Hooks
from celery_ext.retry import is_wrapped
from kombu_jetstream.deadletter import DeadLetter

BROKER = "jetstream://127.0.0.1:1"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    """Hooks of this test alone, connected; those of the process are put back."""
    before = celery_ext._hooks_of_process()
    was_off = before._off
    celery_ext.uninstall()
    gc.collect()  # apps of other tests
    own = Hooks()
    monkeypatch.setattr(celery_ext, "_hooks", own)
    own.connect()
    yield own
    own.uninstall_all()
    before._off = was_off
    before.connect()


def make_app(broker: str = BROKER, **conf: Any) -> Celery:
    app = Celery("hooks", broker=broker, set_as_current=False)
    app.conf.update(conf)

    @app.task(name="shop.pay", shared=False)
    def pay() -> None: ...

    @app.task(name="shop.mail", shared=False, autoretry_for=(OSError,))
    def mail() -> None: ...

    app.finalize()
    return app


def publish(
    app: Celery, name: str, queue: Any = None, priority: int | None = None, **headers: Any
) -> dict[str, Any]:
    """Send the signal as `celery.app.amqp` does; return the properties it leaves."""
    queue = queue if queue is not None else app.amqp.queues["celery"]
    properties: dict[str, Any] = {"correlation_id": "x", "priority": priority}
    signals.before_task_publish.send(
        sender=name,
        body=((), {}, {}),
        exchange="",
        routing_key=queue.name,
        declare=[queue],
        headers=headers,
        properties=properties,
        retry_policy={},
    )
    return properties


PRIORITIES = {"shop.*": "high", "reports": "low"}


# Priorities


def test_a_task_gets_the_priority_of_its_level(hooks: Hooks) -> None:
    app = make_app(jetstream_priorities=PRIORITIES)

    assert publish(app, "shop.pay")["priority"] == 8
    assert publish(app, "reports")["priority"] == 2
    assert publish(app, "other")["priority"] is None


@pytest.mark.parametrize("explicit", [0, 1, 9])
def test_an_explicit_priority_wins(hooks: Hooks, explicit: int) -> None:
    app = make_app(jetstream_priorities=PRIORITIES)

    assert publish(app, "shop.pay", priority=explicit)["priority"] == explicit


def test_levels_in_the_order_of_redis(hooks: Hooks) -> None:
    app = make_app(
        jetstream_priorities=PRIORITIES, broker_transport_options={"priority_order": "redis"}
    )

    assert publish(app, "shop.pay")["priority"] == 1


@pytest.mark.parametrize(
    "conf",
    [{}, {"jetstream_priorities": PRIORITIES, "jetstream_hooks": False}],
    ids=["no setting", "hooks off"],
)
def test_without_the_setting_nothing_is_touched(hooks: Hooks, conf: dict[str, Any]) -> None:
    assert publish(make_app(**conf), "shop.pay") == {"correlation_id": "x", "priority": None}


def test_apps_with_another_broker_are_left_alone(hooks: Hooks) -> None:
    app = make_app("memory://", jetstream_priorities=PRIORITIES)

    assert publish(app, "shop.pay")["priority"] is None


def test_uninstall_and_install_again(hooks: Hooks) -> None:
    app = make_app(jetstream_priorities=PRIORITIES)

    celery_ext.uninstall(app)
    assert publish(app, "shop.pay")["priority"] is None
    celery_ext.install(app)
    assert publish(app, "shop.pay")["priority"] == 8
    celery_ext.uninstall()
    assert publish(app, "shop.pay")["priority"] is None
    celery_ext.extension()
    assert publish(app, "shop.pay")["priority"] is None
    celery_ext.install(app)
    assert publish(app, "shop.pay")["priority"] == 8


def test_install_reads_the_settings_again(hooks: Hooks) -> None:
    app = make_app()
    assert publish(app, "shop.pay")["priority"] is None

    app.conf.jetstream_priorities = {"shop.pay": "low"}
    celery_ext.install(app)

    assert publish(app, "shop.pay")["priority"] == 2


def test_of_several_apps_the_one_whose_queue_is_declared_is_meant(hooks: Hooks) -> None:
    first = make_app(jetstream_priorities={"shop.*": "high"})
    second = make_app(jetstream_priorities={"shop.*": "low"})
    third = make_app("memory://", jetstream_priorities={"shop.*": "high"})

    assert publish(first, "shop.pay")["priority"] == 8
    assert publish(second, "shop.pay")["priority"] == 2
    assert publish(third, "shop.pay")["priority"] is None


def test_of_several_apps_the_only_one_with_the_task_is_meant(hooks: Hooks) -> None:
    first = make_app(jetstream_priorities={"only.*": "high"})
    make_app(jetstream_priorities={"only.*": "low"}).amqp  # noqa: B018

    @first.task(name="only.here", shared=False)
    def here() -> None: ...

    assert here.name == "only.here"
    assert publish(first, "only.here", Queue("elsewhere"))["priority"] == 8


def test_when_nobody_knows_which_app_it_is_nothing_is_touched(hooks: Hooks) -> None:
    apps = [make_app(jetstream_priorities={"*": "high"}) for _ in range(2)]

    assert publish(apps[0], "unheard.of", Queue("elsewhere"))["priority"] is None


def test_bad_settings_are_logged_once_and_publishing_goes_on(
    hooks: Hooks, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(jetstream_priorities={"shop.*": "urgent"})

    for _ in range(3):
        assert publish(app, "shop.pay")["priority"] is None

    assert [record.getMessage() for record in caplog.records] == [
        "publishing without the settings of app 'hooks': expected 'shop.*' of jetstream_priorities "
        "to be one of 'high', 'medium', 'low', got 'urgent'"
    ]


# Workers


class Controller:
    """What `worker_init` has as its sender."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.hostname = "celery@test"


@pytest.fixture
def worker(hooks: Hooks) -> Callable[..., Any]:
    """Announce a worker as Celery does; return it."""

    def start(app: Celery) -> Any:
        controller = Controller(app)
        signals.worker_init.send(sender=controller)
        return controller

    return start


def test_a_worker_takes_over_the_tasks_that_have_no_policy(worker: Any) -> None:
    app = make_app(jetstream_retry={})

    worker(app)

    assert is_wrapped(app.tasks["shop.pay"])
    assert not is_wrapped(app.tasks["shop.mail"])
    assert not is_wrapped(app.tasks["celery.chunks"])
    assert all(issubclass(task.Request, Request) for task in app.tasks.values())


def test_without_the_setting_no_task_is_wrapped(worker: Any) -> None:
    app = make_app()

    worker(app)

    assert not any(map(is_wrapped, app.tasks.values()))


def test_retries_for_some_tasks_only(worker: Any) -> None:
    app = make_app(jetstream_retry={"tasks": {"shop.*": None}})

    @app.task(name="other", shared=False)
    def other() -> None: ...

    worker(app)

    assert is_wrapped(app.tasks["other"])
    assert not is_wrapped(app.tasks["shop.pay"])


@pytest.mark.parametrize("later", [signals.worker_process_init, signals.worker_ready])
def test_tasks_registered_later_are_taken_over_too(worker: Any, later: Any) -> None:
    app = make_app(jetstream_retry={"max_attempts": 2, "backoff_base": 0})
    worker(app)

    @app.task(name="late", shared=False)
    def late() -> None:
        raise ValueError

    late.__trace__ = build_tracer(late.name, late, app=app)  # as the pool did before the signal
    later.send(sender="celery@test")

    assert is_wrapped(late)
    # The tracer runs the wrapped function: it asked for another attempt.
    ended = late.__trace__("id", (), {}, {"is_eager": True, "delivery_info": {}})
    assert ended.info.state == "RETRY"


class OwnRequest(Request):
    pass


def test_a_tasks_own_request_class_stays_one(worker: Any) -> None:
    app = make_app()

    class Based(Task):
        name = "based"
        Request = OwnRequest

        def run(self) -> None: ...

    task = app.register_task(Based())
    worker(app)

    assert issubclass(task.Request, OwnRequest)
    assert task.Request is not OwnRequest


def test_shutdown_leaves_everything_as_it_was(worker: Any) -> None:
    app = make_app(jetstream_retry={})
    before = {task.name: dict(task.__dict__) for task in app.tasks.values()}
    transports = Mingle.compatible_transports, Gossip.compatible_transports
    commands = {name: Panel.data[name] for name in ("scheduled", "dump_schedule", "stats")}

    started = worker(app)
    assert "jetstream" in Mingle.compatible_transports
    assert "jetstream" in Gossip.compatible_transports
    assert Panel.data["scheduled"] is not commands["scheduled"]
    signals.worker_shutdown.send(sender=started)

    assert {task.name: dict(task.__dict__) for task in app.tasks.values()} == before
    assert (Mingle.compatible_transports, Gossip.compatible_transports) == transports
    assert {name: Panel.data[name] for name in commands} == commands


def test_a_second_worker_of_the_app_starts_from_a_clean_state(worker: Any) -> None:
    app = make_app(jetstream_retry={})
    own = app.tasks["shop.pay"].run

    worker(app)
    second = worker(app)
    signals.worker_shutdown.send(sender=second)

    assert app.tasks["shop.pay"].run == own


def test_uninstall_in_a_running_worker(worker: Any) -> None:
    app = make_app(jetstream_retry={})
    worker(app)

    celery_ext.uninstall(app)

    assert not is_wrapped(app.tasks["shop.pay"])
    assert "jetstream" not in Mingle.compatible_transports


def test_requests_of_before_an_uninstall_do_nothing(
    hooks: Hooks, worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    worker(app)
    taken = hooks._workers[app]
    request = SimpleNamespace(task=app.tasks["shop.pay"], message=SimpleNamespace(queue="q"))
    taken.ended(request, "succeeded")
    try:
        raise ValueError
    except ValueError:
        einfo = ExceptionInfo()

    celery_ext.uninstall(app)
    taken.ended(request, "succeeded")

    assert taken.death_of(request, einfo) is None
    assert taken.stats.report()["tasks"]["shop.pay"]["q"]["processed"] == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("broker", "conf"),
    [("memory://", {}), (BROKER, {"jetstream_hooks": False})],
    ids=["another broker", "hooks off"],
)
def test_other_workers_are_left_alone(worker: Any, broker: str, conf: dict[str, Any]) -> None:
    app = make_app(broker, jetstream_retry={}, **conf)

    worker(app)

    assert not is_wrapped(app.tasks["shop.pay"])
    assert "Request" not in app.tasks["shop.pay"].__dict__
    assert "jetstream" not in Mingle.compatible_transports


def test_a_worker_with_bad_settings_does_not_start(worker: Any) -> None:
    app = make_app(jetstream_retry={"max_atempts": 5})

    for _ in range(2):
        with pytest.raises(SystemExit, match="did you mean 'max_attempts'"):
            worker(app)


def test_a_worker_with_bad_settings_does_not_start_after_a_publish_either(worker: Any) -> None:
    app = make_app(jetstream_retry={"max_atempts": 5})
    publish(app, "shop.pay")

    with pytest.raises(SystemExit, match="did you mean 'max_attempts'"):
        worker(app)


# What the transport asks


def test_a_rejected_message_of_a_task_the_worker_does_not_have(hooks: Hooks, worker: Any) -> None:
    assert hooks.reject_reason("unheard.of") is None  # no worker, so nobody knows

    worker(make_app())

    assert hooks.reject_reason("unheard.of") == "unknown_task"
    assert hooks.reject_reason("shop.pay") is None
    assert hooks.reject_reason(None) is None


def test_dead_letters_of_the_transport_are_counted(hooks: Hooks, worker: Any) -> None:
    app = make_app()
    worker(app)

    hooks.dead_lettered(DeadLetter(reason="malformed", queue="q"))
    hooks.dead_lettered(DeadLetter(reason="rejected", queue="q", task="shop.pay"))

    report = Panel.data["jetstream_stats"](SimpleNamespace(app=app))
    assert report["dead_letters"] == {"malformed": 1, "rejected": 1}
    assert report["tasks"]["shop.pay"]["q"]["dead_lettered"] == 1


def test_stats_of_a_worker_without_hooks(hooks: Hooks, worker: Any) -> None:
    worker(make_app())

    answer = Panel.data["jetstream_stats"](SimpleNamespace(app=make_app()))

    assert answer == {"error": "the hooks of celery_ext are off in this worker"}


def test_a_failing_hook_is_counted_and_logged(
    hooks: Hooks, worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    worker(app)
    request = SimpleNamespace(task=app.tasks["shop.pay"], message=object())

    with caplog.at_level(logging.ERROR):
        hooks._workers[app].ended(request, "succeeded")

    assert Panel.data["jetstream_stats"](SimpleNamespace(app=app))["hook_errors"] == 1
    assert "celery_ext failed in counting a task" in caplog.text
