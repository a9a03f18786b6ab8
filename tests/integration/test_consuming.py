from __future__ import annotations

import contextlib
import queue as queues
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from kombu.asynchronous import Hub
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.message import Message
from kombu.mixins import ConsumerMixin

from kombu_jetstream.errors import (
    ConsumerGone,
    MessageTooLarge,
    PreconditionFailed,
    QueueMissing,
)
from kombu_jetstream.pulls import UNLIMITED
from kombu_jetstream.server import NatsServer
from tests.messaging import Received, count, declare, drain, drain_quiet, send, take_all
from tests.proxy import TcpProxy
from tests.servers import eventually

pytestmark = pytest.mark.nats29

Connect = Callable[..., Connection]

WORK = Queue("work", Exchange("work"), "work")
#: Seconds without an event after which nothing more will come.
QUIET = 0.2


@pytest.fixture
def work(connection: Connection) -> Queue:
    """A declared queue, empty."""
    declare(connection, WORK)
    return WORK


def holding(connection: Connection, *names: Queue, prefetch: int, **options: Any) -> Received:
    """A consumer that acknowledges nothing by itself, on a channel of its own."""
    received = Received(connection.channel(), *names, ack=False, prefetch_count=prefetch, **options)
    received.consume()
    return received


def assert_left(connection: Connection, *bodies: Any) -> None:
    """Check that just these messages are in the queue, in any order.

    What was handed back is there when the server has dealt with it, which it does not confirm.
    """
    left: list[Any] = []

    def is_all() -> bool:
        left.extend(take_all(connection, WORK))
        return len(left) >= len(bodies)

    eventually(is_all, within=2)
    drain_quiet(connection, QUIET)
    assert sorted(left + take_all(connection, WORK)) == sorted(bodies)


# Prefetch


@pytest.mark.parametrize("prefetch", [1, 3, 8, 50])
def test_prefetch_is_honoured_exactly(
    connection: Connection, connect: Connect, work: Queue, prefetch: int
) -> None:
    send(connection, *range(prefetch + 5), to=work)
    received = holding(connection, work, prefetch=prefetch)

    received.wait(prefetch)
    drain_quiet(connection, QUIET)

    assert received.bodies == list(range(prefetch))
    assert count(connect(), work) == 5
    received.messages[0].ack()
    received.wait(prefetch + 1)
    drain_quiet(connection, QUIET)
    assert len(received) == prefetch + 1


def test_prefetch_with_several_queues_is_exceeded_by_less_than_their_levels(
    connection: Connection,
) -> None:
    several = [Queue(f"q{i}", Exchange("d"), f"k{i}") for i in range(3)]
    declare(connection, *several)
    received = holding(connection, *several, prefetch=4)
    drain_quiet(connection, 0.05)

    for queue in several:
        for priority in (9, 5, 1):
            send(connection, *range(10), to=queue, priority=priority)
    drain_quiet(connection, QUIET)

    assert 4 <= len(received) <= 4 + 3 * 3 - 1


def test_a_raised_prefetch_is_used_at_once(connection: Connection, work: Queue) -> None:
    send(connection, *range(20), to=work)
    received = holding(connection, work, prefetch=2)
    received.wait(2)
    drain_quiet(connection, QUIET)

    received.qos(prefetch_count=12)

    received.wait(12, within=1)
    drain_quiet(connection, QUIET)
    assert received.bodies == list(range(12))


def test_a_lowered_prefetch_holds_from_now_on(connection: Connection, work: Queue) -> None:
    received = holding(connection, work, prefetch=50)
    drain_quiet(connection, 0.05)

    received.qos(prefetch_count=3)
    send(connection, *range(20), to=work)
    received.wait(3)
    drain_quiet(connection, QUIET)
    assert received.bodies == [0, 1, 2]

    received.qos(prefetch_count=1)
    for message in received.messages[:2]:
        message.ack()
    drain_quiet(connection, QUIET)
    assert len(received) == 3
    received.messages[2].ack()
    received.wait(4)


def test_no_prefetch_limit_is_bounded(connect: Connect, work: Queue) -> None:
    publishing = connect(publish_confirms="pipelined", publish_window=1000)
    send(publishing, *[0] * (UNLIMITED + 100), to=work)
    publishing.connection.flush()
    consuming = connect()
    received = holding(consuming, work, prefetch=0)

    received.wait(UNLIMITED, within=30)
    drain_quiet(consuming, QUIET)

    assert len(received) == UNLIMITED
    received.messages[0].channel.basic_ack(received.messages[-1].delivery_tag, multiple=True)
    received.wait(UNLIMITED + 100)


def test_a_worker_busy_with_long_tasks_takes_nothing_from_a_free_one(
    connect: Connect, work: Queue
) -> None:
    busy, free = connect(), connect()
    send(busy, "long", to=work)
    stuck = holding(busy, work, prefetch=1)
    stuck.wait(1)
    drain_quiet(busy, 0.05)
    ready = holding(free, work, prefetch=8)

    send(free, *range(8), to=work)

    assert ready.wait(8, within=1) == list(range(8))
    drain_quiet(busy, 0.05)
    assert stuck.bodies == ["long"]


# Settling


def test_acknowledged_messages_are_gone(connect: Connect, work: Queue) -> None:
    connection = connect()
    send(connection, 1, 2, 3, to=work)
    received = holding(connection, work, prefetch=10)
    received.wait(3)

    for message in received.messages:
        message.ack()
    connection.close()

    assert take_all(connect(), work) == []


def test_multiple_acknowledges_all_before(connect: Connect, work: Queue) -> None:
    connection = connect()
    send(connection, *range(5), to=work)
    received = holding(connection, work, prefetch=10)
    received.wait(5)

    received.messages[2].ack(multiple=True)
    connection.close()

    assert_left(connect(), 3, 4)


def test_requeued_messages_come_again_before_the_others(
    connection: Connection, work: Queue
) -> None:
    send(connection, 1, 2, to=work)
    channel = connection.channel()
    first = channel.basic_get("work")
    assert not first.delivery_info["redelivered"]

    first.requeue()

    again = channel.basic_get("work")
    assert again.decode() == 1
    assert again.delivery_info["redelivered"]
    again.ack()
    assert take_all(connection, work) == [2]


def test_a_requeued_message_comes_again_to_a_consumer(connection: Connection, work: Queue) -> None:
    received = holding(connection, work, prefetch=1)
    send(connection, 1, to=work)
    received.wait(1)

    for attempt in range(2, 5):
        received.messages[-1].requeue()
        received.wait(attempt)

    assert received.bodies == [1] * 4
    assert [m.delivery_info["redelivered"] for m in received.messages] == [False, *[True] * 3]


def test_rejected_messages_leave_the_queue(connect: Connect, work: Queue) -> None:
    connection = connect()
    send(connection, 1, 2, to=work)
    received = holding(connection, work, prefetch=10)
    received.wait(2)

    received.messages[0].reject()
    drain_quiet(connection, QUIET)
    connection.close()

    assert_left(connect(), 2)


def test_recover_puts_back_everything_held(connection: Connection, work: Queue) -> None:
    send(connection, 1, 2, 3, to=work)
    channel = connection.channel()
    held = [channel.basic_get("work") for _ in range(3)]
    held[1].ack()

    channel.basic_recover(requeue=True)

    assert take_all(connection, work) == [1, 3]


def test_kombu_consumer_recover(connection: Connection, work: Queue) -> None:
    received = holding(connection, work, prefetch=2)
    send(connection, 1, 2, to=work)
    received.wait(2)

    received.recover(requeue=True)

    assert sorted(received.wait(4)) == [1, 1, 2, 2]


@pytest.mark.parametrize("tag", [99, 0])
def test_an_unknown_tag_is_an_error(connection: Connection, work: Queue, tag: int) -> None:
    channel = connection.channel()

    with pytest.raises(PreconditionFailed, match="unknown delivery tag") as caught:
        channel.basic_ack(tag)

    assert caught.value.reply_code == 406
    assert isinstance(caught.value, connection.channel_errors)
    send(connection, 1, to=work)
    assert take_all(connection, work) == [1]


def test_a_message_is_settled_once(connection: Connection, work: Queue) -> None:
    send(connection, 1, to=work)
    channel = connection.channel()
    message = channel.basic_get("work")
    message.ack()

    with pytest.raises(message.MessageStateError):
        message.ack()
    with pytest.raises(PreconditionFailed):
        channel.basic_ack(message.delivery_tag)


def test_acks_may_come_from_another_thread(connection: Connection, work: Queue) -> None:
    """Celery's threads pool settles late-ack messages in the thread that ran the task."""
    total, done = 300, 0
    todo: queues.Queue[Any] = queues.Queue()

    def settle() -> None:
        nonlocal done
        while (message := todo.get()) is not None:
            message.ack()
            done += 1

    channel = connection.channel()
    consumer = connection.Consumer(
        [work], channel, on_message=todo.put, prefetch_count=5, accept=["json"]
    )
    thread = threading.Thread(target=settle)
    thread.start()
    try:
        with consumer:
            send(connection, *range(total), to=work)
            drain(connection, lambda: done == total, within=15)
    finally:
        todo.put(None)
        thread.join()

    assert count(connection, work) == 0


def test_no_ack_messages_are_gone_when_they_are_handed_out(connect: Connect, work: Queue) -> None:
    connection = connect()
    send(connection, *range(5), to=work)
    received = holding(connection, work, prefetch=1, no_ack=True)
    received.wait(5)
    connection.close()

    assert take_all(connect(), work) == []


# Getting one at a time


def test_get_takes_messages_in_order_and_by_priority(connection: Connection, work: Queue) -> None:
    for body, priority in [("m1", 5), ("l1", 1), ("h1", 9), ("m2", None), ("h2", 7), ("l2", 3)]:
        send(connection, body, to=work, priority=priority)

    assert take_all(connection, work) == ["h1", "h2", "m1", "m2", "l1", "l2"]


def test_get_does_not_wait(connection: Connection, work: Queue) -> None:
    channel = connection.channel()
    channel.basic_get("work")

    start = time.monotonic()
    assert channel.basic_get("work") is None
    assert time.monotonic() - start < 0.1


def test_get_without_ack(connect: Connect, work: Queue) -> None:
    connection = connect()
    send(connection, 1, 2, to=work)

    assert connection.channel().basic_get("work", no_ack=True).decode() == 1
    connection.close()

    assert take_all(connect(), work) == [2]


def test_get_from_a_queue_that_does_not_exist(connection: Connection) -> None:
    channel = connection.channel()

    with pytest.raises(QueueMissing, match="no queue 'nowhere'"):
        channel.basic_get("nowhere")
    with pytest.raises(QueueMissing, match="no queue 'nowhere'"):
        channel.basic_consume("nowhere", callback=print)


def test_get_beside_a_consumer_of_another_queue(connection: Connection, work: Queue) -> None:
    other = Queue("other", Exchange("work"), "other")
    received = Received(connection.channel(), other)
    received.consume()
    send(connection, "got", to=work)
    send(connection, "consumed", to=other)

    assert take_all(connection, work) == ["got"]
    assert received.wait(1) == ["consumed"]


# Priorities


@pytest.mark.parametrize("prefetch", [1, 4, 16])
def test_urgent_messages_overtake_a_backlog(connect: Connect, work: Queue, prefetch: int) -> None:
    connection, sending = connect(), connect(publish_confirms="pipelined")
    send(sending, *["low"] * 1500, to=work, priority=1)
    sending.connection.flush()
    received = Received(connection.channel(), work, prefetch_count=prefetch)
    received.consume()
    received.wait(100)

    send(sending, *["high"] * 30, to=work, priority=9)
    sending.connection.flush()
    sent_at = len(received)
    drain(connection, lambda: received.bodies.count("high") == 30)

    last_high = len(received) - 1 - received.bodies[::-1].index("high")
    # What was under way, what runs until the next look, and the guard's share for the low ones.
    assert last_high - sent_at < 300
    received.channel.close()


def test_a_lower_level_moves_at_the_rate_of_the_guard(connect: Connect, work: Queue) -> None:
    connection = connect(starvation_guard=10)
    sending = connect(publish_confirms="pipelined")
    for body, priority in (("high", 9), ("medium", 5), ("low", 1)):
        send(sending, *[body] * 800, to=work, priority=priority)
    sending.connection.flush()
    received = Received(connection.channel(), work, prefetch_count=4)
    received.consume()

    received.wait(600)

    served = Counter(received.bodies[100:600])
    assert served["low"] >= 45
    assert served["medium"] >= 45
    assert served["high"] >= 350
    received.channel.close()


def test_one_level_keeps_the_order_of_all(connect: Connect) -> None:
    connection = connect(priority_levels=1)
    declare(connection, WORK)

    for number, priority in enumerate([1, 9, 5, None, 0, 7]):
        send(connection, number, to=WORK, priority=priority)

    assert take_all(connection, WORK) == list(range(6))


# Consumers


def test_first_in_first_out_for_one_worker(connection: Connection, work: Queue) -> None:
    received = Received(connection.channel(), work, prefetch_count=7)
    received.consume()

    send(connection, *range(200), to=work)

    assert received.wait(200) == list(range(200))


def test_a_cancelled_consumer_hands_back_what_nobody_has_seen(
    connect: Connect, work: Queue
) -> None:
    connection, other = connect(), connect()
    send(connection, *range(10), to=work)
    received = holding(connection, work, prefetch=10)
    received.wait(3)
    eventually(lambda: count(other, work) == 0)

    received.cancel()

    assert_left(other, *range(3, 10))
    received.messages[0].requeue()
    assert_left(other, 0)


def test_a_cancelled_consumer_gets_nothing_more(connection: Connection, work: Queue) -> None:
    received = Received(connection.channel(), work)
    received.consume()
    send(connection, 1, to=work)
    received.wait(1)

    received.cancel()
    send(connection, 2, to=work)
    drain_quiet(connection, QUIET)

    assert received.bodies == [1]
    received.consume()
    assert received.wait(2) == [1, 2]


def test_a_closed_channel_hands_back_what_it_held(connect: Connect, work: Queue) -> None:
    connection, other = connect(), connect()
    send(connection, *range(10), to=work)
    received = holding(connection, work, prefetch=5)
    received.wait(5)

    received.channel.close()

    assert_left(other, *range(10))


def test_a_closed_connection_hands_back_what_it_held(connect: Connect, work: Queue) -> None:
    connection, other = connect(), connect()
    send(connection, *range(10), to=work)
    received = holding(connection, work, prefetch=5)
    received.wait(5)

    connection.close()

    assert_left(other, *range(10))


def test_two_channels_share_a_queue(connection: Connection, work: Queue) -> None:
    pair = [holding(connection, work, prefetch=4) for _ in range(2)]

    send(connection, *range(6), to=work)
    drain(connection, lambda: sum(map(len, pair)) == 6)
    send(connection, *range(6, 20), to=work)
    drain(connection, lambda: all(len(received) == 4 for received in pair))
    drain_quiet(connection, QUIET)

    taken = [body for received in pair for body in received.bodies]
    assert sorted(taken) == list(range(8))
    for received in pair:
        received.messages[0].channel.basic_ack(received.messages[-1].delivery_tag, multiple=True)
    drain(connection, lambda: sum(map(len, pair)) == 16)


def test_two_connections_share_a_queue(connect: Connect, work: Queue) -> None:
    first, second = connect(), connect()
    pair = [Received(c.channel(), work, prefetch_count=2) for c in (first, second)]
    for received in pair:
        received.consume()

    send(first, *range(100), to=work)
    while sum(map(len, pair)) < 100:
        for connection in (first, second):
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.02)

    assert sorted(pair[0].bodies + pair[1].bodies) == list(range(100))
    assert min(map(len, pair)) >= 20


def test_two_consumers_on_one_channel_take_turns(connection: Connection, work: Queue) -> None:
    channel = connection.channel()
    got: list[str] = []
    for tag in ("a", "b"):
        channel.basic_consume(
            "work",
            callback=lambda message: got.append(message.delivery_info["consumer_tag"]),
            consumer_tag=tag,
        )

    send(connection, *range(10), to=work)
    drain(connection, lambda: len(got) == 10)

    assert Counter(got) == {"a": 5, "b": 5}
    channel.basic_cancel("a")
    send(connection, *range(4), to=work)
    drain(connection, lambda: len(got) == 14)
    assert got[10:] == ["b"] * 4
    with pytest.raises(PreconditionFailed, match="consumer tag 'b' is in use"):
        channel.basic_consume("work", callback=print, consumer_tag="b")


def test_one_consumer_on_several_queues(connection: Connection) -> None:
    several = [Queue(f"q{i}", Exchange("d"), f"k{i}") for i in range(5)]
    received = Received(connection.channel(), *several, prefetch_count=2)
    received.consume()

    for i, queue in enumerate(several):
        send(connection, *[i] * 20, to=queue)
    received.wait(100)

    assert Counter(received.bodies) == dict.fromkeys(range(5), 20)


def test_many_channels(connection: Connection, work: Queue) -> None:
    many = [Received(connection.channel(), work, prefetch_count=1) for _ in range(40)]
    for received in many:
        received.consume()

    send(connection, *range(400), to=work)
    drain(connection, lambda: sum(map(len, many)) == 400, within=20)

    assert sorted(body for received in many for body in received.bodies) == list(range(400))
    assert sum(1 for received in many if len(received)) >= 30
    for received in many[:39]:
        received.channel.close()
    send(connection, "last", to=work)
    many[39].wait(len(many[39]) + 1)


def test_a_consumer_without_on_cancel_learns_of_its_queues_end(
    connect: Connect, work: Queue
) -> None:
    """kombu and Celery treat it as a lost connection, and declare the queue again."""
    connection, other = connect(), connect()
    received = Received(connection.channel(), work)
    received.consume()
    drain_quiet(connection, 0.05)

    other.channel().queue_delete("work")

    with pytest.raises(ConsumerGone, match="'work' is gone") as caught:
        drain_quiet(connection, 5)
    assert isinstance(caught.value, connection.recoverable_connection_errors)


def test_a_consumer_with_on_cancel_is_told_of_its_queues_end(connect: Connect, work: Queue) -> None:
    connection, other = connect(), connect()
    declare(connection, Queue("kept", Exchange("work"), "kept"))
    cancelled: list[str] = []
    channel = connection.channel()
    channel.basic_consume("work", callback=print, consumer_tag="mine", on_cancel=cancelled.append)
    kept = Received(channel, "kept")
    kept.consume()
    drain_quiet(connection, 0.05)

    other.channel().queue_delete("work")
    drain(connection, lambda: bool(cancelled))
    send(other, 1, to="kept")

    assert cancelled == ["mine"]
    assert kept.wait(1) == [1]


# Time


@pytest.mark.parametrize("timeout", [0.05, 0.3, 1.2])
def test_drain_events_ends_in_time_on_an_idle_queue(
    connection: Connection, work: Queue, timeout: float
) -> None:
    Received(connection.channel(), work).consume()
    drain_quiet(connection, 0.05)

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=timeout)

    assert timeout <= time.monotonic() - start < timeout + 0.05


def test_drain_events_without_waiting(connection: Connection, work: Queue) -> None:
    received = Received(connection.channel(), work)
    received.consume()
    drain_quiet(connection, 0.05)

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    assert time.monotonic() - start < 0.05

    send(connection, 1, to=work)

    def got() -> bool:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0)
        return received.bodies == [1]

    eventually(got, within=1)


def test_drain_events_hands_out_one_message_at_a_time(connection: Connection, work: Queue) -> None:
    send(connection, *range(5), to=work)
    received = Received(connection.channel(), work, prefetch_count=5)
    received.consume()

    for expected in range(1, 6):
        connection.drain_events(timeout=1)
        assert len(received) == expected


def test_drain_events_ends_in_time_between_a_busy_and_an_idle_queue(
    connect: Connect, work: Queue
) -> None:
    """Whatever the busy queue does, no call takes longer than its timeout."""
    connection, sending = connect(), connect()
    idle = Queue("idle", Exchange("work"), "idle")
    received = Received(connection.channel(), work, idle, prefetch_count=4)
    received.consume()
    stop = threading.Event()

    def publish() -> None:
        while not stop.wait(0.02):
            send(sending, 1, to=work)

    thread = threading.Thread(target=publish)
    thread.start()
    longest = 0.0
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            start = time.monotonic()
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            longest = max(longest, time.monotonic() - start)
    finally:
        stop.set()
        thread.join()

    assert len(received) > 20
    assert longest < 0.15


def test_an_idle_worker_gets_a_message_within_milliseconds(connect: Connect, work: Queue) -> None:
    connection, sending = connect(), connect()
    received = Received(connection.channel(), work, prefetch_count=4)
    received.consume()
    drain_quiet(connection, 0.1)
    delays = []

    for i in range(20):
        send(sending, i, to=work)
        start = time.monotonic()
        received.wait(i + 1)
        delays.append(time.monotonic() - start)

    # The median, as the machine may be busy with something else once.
    assert sorted(delays)[10] < 0.01


def test_a_busy_queue_is_not_slowed_by_idle_ones(connect: Connect, work: Queue) -> None:
    """The other NATS transports wait on each queue in turn."""

    def seconds(*others: Queue) -> float:
        connection = connect()
        received = Received(connection.channel(), work, *others, prefetch_count=8)
        send(connection, *range(500), to=work)
        received.consume()
        start = time.monotonic()
        received.wait(500, within=20)
        taken = time.monotonic() - start
        received.channel.close()
        return taken

    alone = min(seconds() for _ in range(2))
    idle = [Queue(f"idle{i}", Exchange("work"), f"idle{i}") for i in range(10)]
    beside = min(seconds(*idle) for _ in range(2))

    assert beside < 2 * alone + 0.2


@pytest.mark.parametrize("prefetch", [1, 4])
def test_messages_of_another_queue_do_not_wait_for_a_busy_one(
    connect: Connect, work: Queue, prefetch: int
) -> None:
    connection, sending = connect(), connect()
    other = Queue("other", Exchange("work"), "other")
    received = Received(connection.channel(), work, other, prefetch_count=prefetch)
    send(sending, *["busy"] * 2000, to=work)
    received.consume()
    received.wait(50)

    send(sending, "other", to=other)
    sent_at = len(received)
    drain(connection, lambda: "other" in received.bodies)

    assert received.bodies.index("other") - sent_at < 400
    received.channel.close()


def test_an_idle_worker_asks_the_server_for_nothing(
    shared_nats_server: NatsServer,
    connect: Connect,
    proxy_to: Callable[[int], TcpProxy],
) -> None:
    proxy = proxy_to(shared_nats_server.port)
    connection = connect(proxy.broker_url)
    several = [Queue(f"q{i}", Exchange("d"), f"k{i}") for i in range(3)]
    declare(connection, *several)
    received = Received(connection.channel(), *several, prefetch_count=8)
    received.consume()
    drain_quiet(connection, 0.5)

    before = proxy.bytes_up
    drain_quiet(connection, 3)

    assert proxy.bytes_up - before <= 2 * len(b"PONG\r\n")


def test_a_message_that_came_while_something_waited_for_a_reply_is_handed_out(
    connect: Connect, work: Queue
) -> None:
    connection, sending = connect(), connect()
    received = Received(connection.channel(), work)
    received.consume()
    drain_quiet(connection, 0.05)
    channel = connection.channel()
    send(sending, 1, to=work)

    for _ in range(20):  # each waits for an answer, and reads what comes before it
        channel.queue_declare("work", passive=True)
    assert received.bodies == []
    start = time.monotonic()
    connection.drain_events(timeout=2)

    assert received.bodies == [1]
    assert time.monotonic() - start < 0.05


# The event loop


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


def run_hub(hub: Hub, until: Callable[[], Any], within: float = 5.0) -> None:
    timer = hub.call_repeatedly(0.01, lambda: None)  # so that a turn of the loop ends
    loop = hub.create_loop()
    deadline = time.monotonic() + within
    while not until():
        assert time.monotonic() < deadline, "not within the time"
        next(loop)
    timer.cancel()


def test_an_event_loop_hands_out_what_comes(connect: Connect, work: Queue, hub: Hub) -> None:
    connection, sending = connect(), connect()
    received = Received(connection.channel(), work, prefetch_count=4)
    received.consume()
    connection.transport.register_with_event_loop(connection.connection, hub)

    send(sending, *range(50), to=work)
    run_hub(hub, lambda: len(received) == 50)

    assert received.bodies == list(range(50))
    connection.transport.unregister_from_event_loop(connection.connection, hub)


def test_an_event_loop_hands_out_what_came_during_a_request(
    connect: Connect, work: Queue, hub: Hub
) -> None:
    connection, sending = connect(), connect()
    received = Received(connection.channel(), work)
    received.consume()
    channel = connection.channel()
    connection.transport.register_with_event_loop(connection.connection, hub)
    run_hub(hub, lambda: True)
    send(sending, 1, to=work)
    for _ in range(20):
        channel.queue_declare("work", passive=True)

    start = time.monotonic()
    run_hub(hub, lambda: received.bodies == [1])

    assert time.monotonic() - start < 0.2
    connection.transport.unregister_from_event_loop(connection.connection, hub)


def test_an_event_loop_goes_on_when_the_last_pull_ends_during_a_request(
    connect: Connect, hub: Hub
) -> None:
    """What comes is not always a message: the word that a queue is empty has to be acted on."""
    connection, sending = connect(), connect()
    pair = [Queue(f"q{i}", Exchange("d"), f"k{i}") for i in range(2)]
    received = holding(connection, *pair, prefetch=1)
    connection.transport.register_with_event_loop(connection.connection, hub)
    send(sending, *range(30), to="q0")
    channel = connection.channel()

    for done in range(1, 31):
        run_hub(hub, partial(received.has, done))
        received.messages[-1].ack()
        for _ in range(5):
            channel.queue_declare("q1", passive=True)
    start = time.monotonic()
    send(sending, "last", to="q1")
    run_hub(hub, lambda: "last" in received.bodies)

    assert time.monotonic() - start < 0.2
    connection.transport.unregister_from_event_loop(connection.connection, hub)


# What kombu builds on it


def test_simple_queue(connection: Connection) -> None:
    with connection.SimpleQueue("simple") as simple:
        for i in range(3):
            simple.put({"i": i})
        assert simple.qsize() == 3

        got = [simple.get(timeout=2) for _ in range(3)]

        assert [message.payload for message in got] == [{"i": 0}, {"i": 1}, {"i": 2}]
        for message in got:
            message.ack()
        with pytest.raises(simple.Empty):
            simple.get(timeout=0.1)
        with pytest.raises(simple.Empty):
            simple.get_nowait()
    with connection.SimpleQueue("simple") as simple:
        simple.put("to be cleared")
        assert simple.clear() == 1


def test_simple_buffer(connection: Connection) -> None:
    with connection.SimpleBuffer("buffer") as buffer:
        buffer.put("x")
        assert buffer.get(timeout=2).payload == "x"


def test_consumer_mixin(connect: Connect, work: Queue) -> None:
    class Worker(ConsumerMixin):
        def __init__(self, connection: Connection) -> None:
            self.connection = connection
            self.got: list[Any] = []

        def get_consumers(self, consumer_class: Any, channel: Any) -> list[Any]:
            return [consumer_class([work], callbacks=[self.on_task], prefetch_count=3)]

        def on_task(self, body: Any, message: Any) -> None:
            self.got.append(body)
            message.ack()
            self.should_stop = len(self.got) == 10

    sending = connect()
    send(sending, *range(10), to=work)

    worker = Worker(connect())
    worker.run()

    assert worker.got == list(range(10))
    assert count(sending, work) == 0


BODY = {"text": "grüße", "numbers": [1, 2.5, None], "deep": {"a": [{}]}}


@pytest.mark.parametrize("compression", [None, "zlib", "bzip2", "zstd"])
@pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
def test_serializers_and_compression(
    connection: Connection, work: Queue, serializer: str, compression: str | None
) -> None:
    received = Received(connection.channel(), work)
    received.consume()

    send(connection, BODY, to=work, serializer=serializer, compression=compression)

    assert received.wait(1) == [BODY]


def test_binary_bodies(connection: Connection, work: Queue) -> None:
    body = bytes(range(256)) * 100
    received = Received(connection.channel(), work)
    received.consume()

    with connection.channel() as channel:
        producer = connection.Producer(channel)
        producer.publish(
            body,
            routing_key="work",
            content_type="application/data",
            content_encoding="binary",
        )

    assert received.wait(1) == [body]


def test_message_attributes_arrive(connection: Connection, work: Queue) -> None:
    received = Received(connection.channel(), work)
    received.consume()

    send(
        connection,
        "x",
        exchange=WORK.exchange,
        key="work",
        headers={"h": [1, {"deep": True}]},
        correlation_id="c-1",
        reply_to="r",
        message_id="m-1",
        app_id="a",
        priority=8,
    )
    received.wait(1)

    (message,) = received.messages
    assert message.headers == {"h": [1, {"deep": True}]}
    assert message.delivery_info["exchange"] == "work"
    assert message.delivery_info["routing_key"] == "work"
    assert message.delivery_info["priority"] == 8
    assert message.delivery_info["consumer_tag"] in received._active_tags.values()
    assert {
        name: message.properties[name]
        for name in ("correlation_id", "reply_to", "message_id", "app_id", "priority")
    } == {
        "correlation_id": "c-1",
        "reply_to": "r",
        "message_id": "m-1",
        "app_id": "a",
        "priority": 8,
    }


def test_a_message_near_the_limit_passes_and_a_larger_one_is_refused(
    connection: Connection, work: Queue
) -> None:
    """Headers and envelope are counted: the server would close the connection otherwise."""
    limit = connection.default_channel.connection.client.connection.nats.max_payload
    headers = {"id": "i" * 150, "task": "t" * 150, "large": "l" * 500}

    def fits(size: int) -> bool:
        try:
            send(connection, "x" * size, to=work, headers=headers)
        except MessageTooLarge:
            return False
        return True

    low, high = limit - 10_000, limit
    assert fits(low)
    assert not fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)

    assert limit - low < 2000
    with pytest.raises(MessageTooLarge) as caught:
        send(connection, "x" * high, to=work, headers=headers)
    assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
    assert isinstance(caught.value, connection.channel_errors)
    bodies = take_all(connection, work)
    assert max(map(len, bodies)) == low
    send(connection, "still here", to=work)
    assert take_all(connection, work) == ["still here"]


def test_big_messages_pass_whole_and_in_order(connection: Connection, work: Queue) -> None:
    received = Received(connection.channel(), work, prefetch_count=3)
    received.consume()
    bodies = [str(i) * 900_000 for i in range(8)]

    send(connection, *bodies, to=work)

    assert received.wait(8) == bodies


def test_every_message_is_handed_out_once_among_threads(connect: Connect, work: Queue) -> None:
    total = 2000
    got: queues.Queue[int] = queues.Queue()
    stop = threading.Event()

    def take(body: int, message: Message) -> None:
        got.put(body)
        message.ack()

    def consume() -> None:
        connection = connect()
        with connection.Consumer(
            [work],
            connection.channel(),
            callbacks=[take],
            prefetch_count=7,
        ):
            while not stop.is_set():
                try:
                    connection.drain_events(timeout=0.1)
                except TimeoutError:
                    continue
        connection.close()

    threads = [threading.Thread(target=consume) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        sending = connect(publish_confirms="pipelined")
        send(sending, *range(total), to=work)
        sending.connection.flush()
        eventually(lambda: got.qsize() >= total, within=20)
        # One that came twice would come now.
        eventually(lambda: count(sending, work) == 0, within=5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert Counter(got.queue) == dict.fromkeys(range(total), 1)
