"""JetStream through one connection: its API, provisioning, queues, pulls and settling.

The answers and configurations are `nats.js.api`'s dataclasses; the numbers are the server's
``errors.json``.  Nanoseconds exist only here and in `topology`'s dataclasses.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from nats.js import api

from . import deadletter, topology
from .backend import Counts, Delivery, Outcome
from .connection import NatsConnection
from .deadletter import DeadLetter
from .errors import (
    ApiError,
    ConnectionLost,
    JetStreamTransportError,
    JetStreamUnavailable,
    NoResponders,
    PermissionDenied,
    RequestTimeout,
    TopologyMismatch,
)
from .options import Options
from .protocol import Msg, encode_pub, status_code
from .publishing import outcome_of
from .pulls import IDLE_HEARTBEAT, PULL_EXPIRES
from .topology import Difference, Level, Names

if TYPE_CHECKING:
    from .leases import Ledger

__all__ = ["JetStream"]

logger = logging.getLogger(__name__)

#: Seconds one API request may take.
API_TIMEOUT = 5.0

#: Seconds to wait for a cluster that has no leader yet (about 3 s after boot, facts 11).
SETTLE_TIME = 15.0

# Codes of nats-server's errors.json.
CLUSTER_NOT_AVAILABLE = 10008
CONSUMER_NOT_FOUND = 10014
NOT_ENABLED_FOR_ACCOUNT = 10039
NOT_ENABLED = 10076
INSUFFICIENT_STORAGE = 10047
STREAM_NOT_FOUND = 10059
STREAM_NAME_EXIST = 10058
STREAM_SUBJECT_OVERLAP = 10065

#: Differences that `provision` "auto" mends, because an older server could not do it then.
_UPGRADES = frozenset({"allow_atomic", "allow_direct", "allow_msg_schedules", "allow_msg_ttl"})
#: Differences with which the transport's promises do not hold.
_FATAL = frozenset({"subjects", "retention", "storage", "max_msgs_per_subject"})

#: What a consumer is brought up to: visibility_timeout and x-expires may change.
_CHANGEABLE = frozenset({"ack_wait", "inactive_threshold"})

_SETTLE: dict[Outcome, bytes] = {
    "ack": b"+ACK",
    "nak": b"-NAK",
    "term": b"+TERM",
    "progress": b"+WPI",
}

_WAIT = b'{"batch":%%d,"expires":%d,"idle_heartbeat":%d}' % (
    PULL_EXPIRES * 1e9,
    IDLE_HEARTBEAT * 1e9,
)
_NO_WAIT = b'{"batch":%d,"no_wait":true}'
#: No message is that small: nothing is delivered, and the consumer was used.
_TOUCH = b'{"batch":1,"no_wait":true,"max_bytes":1}'

#: An offset no page of subjects has: of STREAM.INFO only the total is of interest.
_BEYOND = 10**9

Answer: TypeAlias = "dict[str, Any] | JetStreamTransportError"


class JetStream:
    """JetStream as seen through one connection, for one namespace."""

    def __init__(self, connection: NatsConnection, options: Options, ledger: Ledger) -> None:
        self.connection = connection
        self.options = options
        self.ledger = ledger
        self.names = Names(options.namespace)
        self.levels = topology.levels(options)
        domain = options.jetstream_domain
        self._prefix = f"$JS.{domain}.API." if domain else "$JS.API."
        #: what the subjects of all pulls begin with
        self.pull_prefix = f"{self._prefix}CONSUMER.MSG.NEXT.".encode()
        self._provisioned = False
        self._known_consumers: set[str] = set()
        #: what the level streams can do, known after `provision`
        self.has_schedules = False
        self.has_ttl = False

    # -- the API -----------------------------------------------------------------------------

    def request(self, operation: str, body: Any = None) -> dict[str, Any]:
        """Return the answer to one API request, or raise what its error means."""
        return _unwrap(self.request_many([(operation, body)])[0])

    def request_many(self, requests: Sequence[tuple[str, Any]]) -> list[Answer]:
        """Return the answers to *requests*, sent together; an error stands where it came."""
        deadline = time.monotonic() + SETTLE_TIME
        delay = 0.1
        while True:
            answers = self._exchange(requests)
            retry = any(
                isinstance(answer, ApiError) and answer.err_code == CLUSTER_NOT_AVAILABLE
                for answer in answers
            )
            if not retry or time.monotonic() > deadline:
                return answers
            # No leader yet: it will be elected, and asking at once would only keep it busy.
            self.connection.wait(lambda: False, delay)
            delay = min(delay * 2, 1.0)

    def _exchange(self, requests: Sequence[tuple[str, Any]]) -> list[Answer]:
        connection = self.connection
        replies: dict[int, Msg | JetStreamTransportError] = {}
        tokens = []
        with connection.corked():
            for index, (operation, body) in enumerate(requests):
                tokens.append(
                    connection.request_nowait(
                        (self._prefix + operation).encode(),
                        json.dumps(body).encode() if body is not None else b"",
                        b"",
                        partial(replies.__setitem__, index),
                    )
                )
        try:
            if not connection.wait(lambda: len(replies) == len(requests), API_TIMEOUT):
                missing = next(i for i in range(len(requests)) if i not in replies)
                raise RequestTimeout(self._prefix + requests[missing][0], API_TIMEOUT)
        finally:
            for token in tokens:
                connection.cancel(token)
        return [self._answer(requests[i][0], replies[i]) for i in range(len(requests))]

    def _answer(self, operation: str, msg: Msg | Exception) -> Answer:
        if isinstance(msg, JetStreamTransportError):
            return msg
        assert isinstance(msg, Msg)
        if status_code(msg.headers) == 503:
            if not self.connection.info.jetstream and not self.options.jetstream_domain:
                return JetStreamUnavailable(self._where())
            return NoResponders(self._prefix + operation)
        answer: dict[str, Any] = json.loads(msg.payload)
        error = answer.get("error")
        if error is None:
            return answer
        code, err_code = error.get("code", 0), error.get("err_code", 0)
        if err_code in (NOT_ENABLED_FOR_ACCOUNT, NOT_ENABLED):
            return JetStreamUnavailable(self._where(), error.get("description", ""))
        return ApiError(code, err_code, error.get("description", ""))

    def _where(self) -> str:
        return str(self.connection.server)

    # -- streams -----------------------------------------------------------------------------

    def provision(self, *, again: bool = False) -> None:
        """Make sure of the streams as the option ``provision`` says.

        Cheap after the first time, unless *again*: one may have been deleted since.

        Raises `TopologyMismatch` if one exists with settings this transport cannot work with, or,
        for "verify", with any other setting than expected; `JetStreamUnavailable` without
        JetStream.
        """
        if self._provisioned and not again:
            return
        if not self.connection.info.jetstream and not (
            self.options.jetstream_domain or self.connection.info.cluster
        ):
            raise JetStreamUnavailable(self._where())
        api_level = self.connection.info.api_level
        if self.options.provision == "off":
            self.has_ttl = api_level >= topology.API_LEVEL_TTL
            self.has_schedules = (
                api_level >= topology.API_LEVEL_SCHEDULES and self.options.stream_max_bytes is None
            )
            self._provisioned = True
            return
        expected = self.expected_streams()
        found = self._stream_configs([str(config.name) for config in expected])
        for config in expected:
            self._provision_stream(config, found.get(str(config.name)))
        self._provisioned = True

    def expected_streams(self) -> list[api.StreamConfig]:
        """Return the configurations `provision` wants, for this server."""
        level = self.connection.info.api_level
        return [
            *(topology.level_stream(self.options, name, level) for name in self.levels),
            topology.dead_letter_stream(self.options, level),
            topology.registry_stream(self.options, level),
        ]

    def _stream_configs(self, stream_names: list[str]) -> dict[str, api.StreamConfig]:
        answers = self.request_many([(f"STREAM.INFO.{name}", None) for name in stream_names])
        found = {}
        for name, answer in zip(stream_names, answers, strict=True):
            if isinstance(answer, ApiError) and answer.err_code == STREAM_NOT_FOUND:
                continue
            found[name] = api.StreamConfig.from_response(_unwrap(answer)["config"])
        return found

    def _provision_stream(self, expected: api.StreamConfig, found: api.StreamConfig | None) -> None:
        name = str(expected.name)
        if found is None:
            if self.options.provision == "verify":
                raise TopologyMismatch(f"stream {name!r}", [("existence", "missing", "present")])
            found = self._create_stream(expected)
        differences = topology.differences(found, expected)
        if differences and self.options.provision == "auto":
            differences = self._mend(found, expected, differences)
        fatal = [
            difference
            for difference in differences
            if self.options.provision == "verify" or difference.field in _FATAL
        ]
        if fatal:
            raise TopologyMismatch(
                f"stream {name!r}", [(d.field, d.found, d.expected) for d in fatal]
            )
        for difference in differences:
            if (name, difference.field) in self.ledger.told:
                continue  # once for each process, not for each of its connections
            self.ledger.told.add((name, difference.field))
            logger.warning(
                "stream %r has %s %r, the options say %r; "
                "`celery jetstream provision` shows and applies the difference",
                name,
                difference.field,
                difference.found,
                difference.expected,
            )
        if name == self.names.stream("medium"):
            self.has_ttl = bool(found.allow_msg_ttl)
            self.has_schedules = bool(found.allow_msg_schedules)

    def _create_stream(self, config: api.StreamConfig) -> api.StreamConfig:
        try:
            answer = self.request(f"STREAM.CREATE.{config.name}", config.as_dict())
        except ApiError as exc:
            if exc.err_code == STREAM_NAME_EXIST:  # somebody else was faster, with other options
                answer = self.request(f"STREAM.INFO.{config.name}")
            elif exc.err_code == STREAM_SUBJECT_OVERLAP:
                raise TopologyMismatch(
                    f"stream {config.name!r} cannot be made, as another stream",
                    [("subjects", "the same", config.subjects)],
                ) from exc
            elif exc.err_code == INSUFFICIENT_STORAGE and config.name == (
                self.names.dead_letter_stream
            ):
                # A limit is reserved when the stream is made, and this server is small.  Without
                # one the letters still go by age.
                logger.warning(
                    "no room to reserve %d bytes for stream %r, it gets no limit; "
                    "set dead_letter_max_bytes to what this server can spare",
                    config.max_bytes,
                    config.name,
                )
                unlimited = config.evolve(max_bytes=-1)
                answer = self.request(f"STREAM.CREATE.{config.name}", unlimited.as_dict())
            else:
                raise
        else:
            logger.info("created stream %r", config.name)
        created: api.StreamConfig = api.StreamConfig.from_response(answer["config"])
        return created

    def _mend(
        self, found: api.StreamConfig, expected: api.StreamConfig, differences: list[Difference]
    ) -> list[Difference]:
        """Switch on what the server could not do when the stream was made."""
        upgrades = {d.field: d.expected for d in differences if d.field in _UPGRADES}
        if not upgrades:
            return differences
        answer = self.request(f"STREAM.UPDATE.{found.name}", found.evolve(**upgrades).as_dict())
        for field, value in upgrades.items():
            setattr(found, field, value)
        logger.info("updated stream %r: %s", found.name, ", ".join(upgrades))
        return topology.differences(api.StreamConfig.from_response(answer["config"]), expected)

    # -- queues ------------------------------------------------------------------------------

    def queue_levels(self, auto_delete: bool) -> tuple[Level, ...]:
        """Return the levels a queue has: auto-delete queues carry replies, one is enough."""
        return ("medium",) if auto_delete else self.levels

    def ensure_queue(
        self, queue_name: str, *, auto_delete: bool = False, inactive_after: float = 0.0
    ) -> Counts:
        """Make sure of the consumers of a durable queue and return what is in it.

        *inactive_after*: seconds without a pull after which the server removes them, 0 for never.
        With ``provision`` "off" nothing is asked and the counts are 0.
        """
        self.provision()
        if self.options.provision == "off":
            return Counts(0, 0)
        levels = self.queue_levels(auto_delete)
        infos = self._consumer_infos(queue_name, levels)
        for level in levels:
            infos[level] = self._ensure_consumer(queue_name, level, infos[level], inactive_after)
        return _counts(infos.values())

    def _ensure_consumer(
        self, queue_name: str, level: Level, info: api.ConsumerInfo | None, inactive_after: float
    ) -> api.ConsumerInfo:
        expected = topology.consumer_config(
            self.options, level, queue_name, inactive_after=inactive_after
        )
        if info is None:
            if self.options.provision == "verify":
                raise TopologyMismatch(
                    f"consumer {expected.name!r} of stream {self.names.stream(level)!r}",
                    [("existence", "missing", "present")],
                )
            return self._write_consumer(level, expected)
        assert info.config is not None
        differences = topology.differences(info.config, expected)
        if not differences:
            return info
        changed = {d.field: getattr(expected, d.field) for d in differences}
        if self.options.provision == "verify" or not changed.keys() <= _CHANGEABLE:
            raise TopologyMismatch(
                f"consumer {expected.name!r} of stream {self.names.stream(level)!r}",
                [(d.field, d.found, d.expected) for d in differences],
            )
        # Start from what is there: a pause must survive.
        return self._write_consumer(level, info.config.evolve(**changed))

    def _write_consumer(self, level: Level, config: api.ConsumerConfig) -> api.ConsumerInfo:
        stream = self.names.stream(level)
        answer = self.request(
            f"CONSUMER.CREATE.{stream}.{config.name}.{config.filter_subject}",
            {"stream_name": stream, "config": config.as_dict()},
        )
        info: api.ConsumerInfo = api.ConsumerInfo.from_response(answer)
        return info

    def _consumer_infos(
        self, queue_name: str, levels: Sequence[Level]
    ) -> dict[Level, api.ConsumerInfo | None]:
        token = topology.queue_token(queue_name)
        answers = self.request_many(
            [(f"CONSUMER.INFO.{self.names.stream(level)}.{token}", None) for level in levels]
        )
        infos: dict[Level, api.ConsumerInfo | None] = {}
        for level, answer in zip(levels, answers, strict=True):
            if isinstance(answer, ApiError) and answer.err_code in (
                CONSUMER_NOT_FOUND,
                STREAM_NOT_FOUND,
            ):
                infos[level] = None
            else:
                infos[level] = api.ConsumerInfo.from_response(_unwrap(answer))
        return infos

    def direct_get(self, stream_name: str) -> bytes:
        """Return the subject that reads messages of a stream, open to restricted users, too."""
        return f"{self._prefix}DIRECT.GET.{stream_name}".encode()

    def counts(self, queue_name: str, *, auto_delete: bool = False) -> Counts | None:
        """Return what is in a queue, or None if it has no consumers."""
        infos = self._consumer_infos(queue_name, self.queue_levels(auto_delete)).values()
        return _counts(infos) if any(infos) else None

    def purge(self, queue_name: str, *, auto_delete: bool = False) -> int:
        """Remove the messages of a queue that nobody holds, and return their number.

        Those that wait for their time are among them: whoever purges a queue wants nothing more
        of what was sent to it.

        Messages in flight stay, as in AMQP: were they purged, a worker that dies would lose its
        task.  The server can only purge both, so while something is in flight the ready messages
        are pulled and acknowledged.
        """
        removed = self._purge_delayed(queue_name)
        for level in self.queue_levels(auto_delete):
            info = self._consumer_infos(queue_name, [level])[level]
            if info is not None and info.num_ack_pending:
                removed += self._discard(queue_name, level)
                continue
            answer = self.request(
                f"STREAM.PURGE.{self.names.stream(level)}",
                {"filter": self.names.subject(level, queue_name)},
            )
            removed += int(answer["purged"])
        return removed

    def _discard(self, queue_name: str, level: Level) -> int:
        """Pull what is ready in one queue and level, acknowledge it, and return the number."""
        connection = self.connection
        inbox = connection.new_inbox()
        subject = self.pull_subject(queue_name, level)
        removed = wanted = 0
        ended = False

        def arrived(msg: Msg) -> None:
            nonlocal removed, ended
            if msg.reply:
                connection.publish(msg.reply, b"+ACK")
                removed += 1
            else:
                ended = True

        def is_over() -> bool:
            return ended or removed == wanted

        sid = connection.subscribe(inbox, arrived)
        try:
            while True:
                ended, wanted = False, removed + 1000
                self.pull(subject, 1000, False, inbox)
                if not self.wait_answered(is_over, subject, API_TIMEOUT):
                    raise RequestTimeout(subject.decode(), API_TIMEOUT)
                if ended:
                    return removed
        finally:
            connection.unsubscribe(sid)

    def _purge_delayed(self, queue_name: str) -> int:
        """Remove what waits for its time, before it comes to the queue; return the number."""
        answers = self.request_many(
            [
                (
                    f"STREAM.PURGE.{self.names.stream(level)}",
                    {"filter": self.names.delayed(level, queue_name)},
                )
                for level in self.levels
            ]
        )
        return sum(int(_unwrap(answer)["purged"]) for answer in answers)

    def delayed(self, queue_name: str) -> int:
        """Return how many messages of a queue wait for their time."""
        answers = self.request_many(
            [
                (
                    f"STREAM.INFO.{self.names.stream(level)}",
                    {
                        "subjects_filter": self.names.delayed(level, queue_name),
                        "offset": _BEYOND,
                    },
                )
                for level in self.levels
            ]
        )
        return sum(int(_unwrap(answer).get("total") or 0) for answer in answers)

    def delete_queue(self, queue_name: str, *, auto_delete: bool = False) -> None:
        """Remove a queue's messages and consumers; one that is gone already is no error."""
        self._purge_delayed(queue_name)
        for level in self.queue_levels(auto_delete):
            self.request(
                f"STREAM.PURGE.{self.names.stream(level)}",
                {"filter": self.names.subject(level, queue_name)},
            )
        token = topology.queue_token(queue_name)
        answers = self.request_many(
            [
                (f"CONSUMER.DELETE.{self.names.stream(level)}.{token}", None)
                for level in self.queue_levels(auto_delete)
            ]
        )
        for answer in answers:
            if not (isinstance(answer, ApiError) and answer.err_code == CONSUMER_NOT_FOUND):
                _unwrap(answer)

    # -- pulls and settling ------------------------------------------------------------------

    def wait_answered(self, ready: Callable[[], bool], subject: bytes, timeout: float) -> bool:
        """Wait until *ready*, at most *timeout* seconds, for what was published to *subject*.

        Returns whether it is; raises `PermissionDenied` if the server refused the subject.
        """
        denials: list[PermissionDenied] = []

        def is_over() -> bool:
            denied = self.connection.denial(subject)
            if denied is not None:
                denials.append(denied)
            return bool(denials) or ready()

        is_ready = self.connection.wait(is_over, timeout)
        if denials:
            raise denials[0]
        return is_ready

    def pull_subject(self, queue_name: str, level: Level) -> bytes:
        """Return the subject to which pulls of one queue and level go."""
        stream, token = self.names.stream(level), topology.queue_token(queue_name)
        return f"{self._prefix}CONSUMER.MSG.NEXT.{stream}.{token}".encode()

    def consumer_key(self, queue_name: str, level: Level) -> bytes:
        """Return what `parse_reply` will say of deliveries of one queue and level."""
        return f"{self.names.stream(level)}.{topology.queue_token(queue_name)}".encode()

    def pull(self, subject: bytes, batch: int, wait: bool, reply: bytes) -> None:
        """Ask for *batch* messages: those there are, or *wait* on the server for them."""
        self.connection.write(encode_pub(subject, (_WAIT if wait else _NO_WAIT) % batch, reply))

    def touch(self, subject: bytes) -> None:
        """Tell the server that a consumer is in use, although nothing is asked of it now."""
        self.connection.publish(subject, _TOUCH, self.connection.new_inbox())

    def drop_withdrawn(self, consumers: Iterable[bytes]) -> None:
        """Have an old server notice the pulls that are withdrawn, before anything is handed back.

        A withdrawn pull stays in line until it is looked at.  What is handed back meanwhile is
        forgotten until its lease ends, and another message is delivered twice (seen with 2.9.10,
        not with 2.11).  *consumers* are `consumer_key`'s; asking for their state looks at the line.
        """
        if self.connection.info.version >= (2, 11):
            return
        operations = [(f"CONSUMER.INFO.{key.decode()}", None) for key in set(consumers)]
        try:
            self.request_many(operations)
        except JetStreamTransportError as exc:
            logger.debug("withdrawn pulls may still be in line: %s", exc)

    def settle(self, delivery: Delivery, outcome: Outcome, delay: float | None = None) -> None:
        """Tell the server what became of *delivery*, through this or a later connection.

        Never raises for a lost connection: the ledger sends the outcome when there is one again.
        """
        payload = _SETTLE[outcome]
        if delay:
            payload += b' {"delay":%d}' % (delay * 1e9)
        if outcome == "ack" and self.options.ack_confirm:
            self._confirmed(delivery.token, payload)
            return
        try:
            # Unchecked: as the server sent it, and each once, in vain for a cache of checks.
            self.connection.write(encode_pub(delivery.token, payload))
        except ConnectionLost:
            if outcome != "progress":
                self.ledger.forward(self, delivery.token, payload)
        else:
            if outcome == "ack":
                self.ledger.note_ack(self, delivery.token)

    def _confirmed(self, token: bytes, payload: bytes) -> None:
        try:
            self.connection.request(token, payload, timeout=API_TIMEOUT)
        except (ConnectionLost, NoResponders):
            self.ledger.forward(self, token, payload)
        else:
            self.ledger.note_ack(self, token)

    def dead_letter(
        self,
        delivery: Delivery,
        letter: DeadLetter,
        then: Callable[[JetStreamTransportError | None], None],
    ) -> None:
        """Write one dead letter; *then* is called with why it is not stored, or None.

        The id names this death of this message, so that writing it again after a crash between
        the write and the settle stores it once.
        """

        def confirmed(answer: Msg | JetStreamTransportError) -> None:
            then(outcome_of(subject, answer) if isinstance(answer, Msg) else answer)

        death = deadletter.death_id(delivery.token, delivery.payload)
        subject, headers = self.address_dead_letter(letter, delivery.payload, death)
        self.connection.request_nowait(subject, delivery.payload, headers, confirmed)

    def address_dead_letter(
        self, letter: DeadLetter, payload: bytes, death: str
    ) -> tuple[bytes, bytes]:
        """Return subject and headers with which *payload* becomes the dead letter *letter*.

        *death* names the death, see `deadletter.death_id`.
        """
        subject = self.names.dead_letter_subject(letter.queue).encode()
        room = self.connection.max_payload - len(payload)
        return subject, deadletter.headers_of(letter, death, room)


def parse_reply(reply: bytes) -> tuple[bytes, int, int, float]:
    """Return consumer key, attempt, messages left and time stored of a delivery's reply subject.

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<stored ns>.<pending>``,
    with ``<domain>.<account hash>`` before the stream and a random token at the end in the newer
    form (ADR-15).
    """
    words = reply.split(b".")
    at = 2 if len(words) == 9 else 4
    return (
        words[at] + b"." + words[at + 1],
        int(words[at + 2]),
        int(words[at + 6]),
        int(words[at + 5]) / 1e9,
    )


def _counts(infos: Iterable[api.ConsumerInfo | None]) -> Counts:
    present = [info for info in infos if info is not None]
    return Counts(
        ready=sum(info.num_pending or 0 for info in present),
        in_flight=sum(info.num_ack_pending or 0 for info in present),
        waiting_pulls=sum(info.num_waiting or 0 for info in present),
    )


def _unwrap(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, JetStreamTransportError):
        raise answer
    return answer
