"""From Redis lists to JetStream: the mirror of ``dual-write``, and draining the lists.

*Mirror.*  With ``migration_phase`` "dual-write" every message goes to Redis, and a copy to the
stream ``<ns>_mirror``, which nobody consumes.  Redis counts what was written, number and checksum
by queue and half-minute (`BUCKET_SECONDS`), in the same transaction; the copy says its half-minute.
Reading the mirror gives the same numbers if it has the same messages, in whatever order; and what
is written while it is read is in the last half-minute.

*Drain.*  A message moves from its list to the hash ``_kombu_jetstream.drain`` in one step, is
written to JetStream, and is deleted from the hash when the stream has confirmed it.  Workers leave
the hash alone, so whatever interrupts a drain, the next one finds the message there, and has to
know whether JetStream has it:

- With atomic batches (nats-server 2.12) the message and a *mark* are one write to the level's
  stream, and the mark demands that there is none yet: the message is there **exactly once**.
  Marks are on ``<ns>.<level>.@drained.<id>``, which no consumer covers, and expire in a week.
- Without them the message id says it, for ``dedup_window``.  The time of the first try is in
  Redis, and a message that was tried longer ago is *in doubt*: it stays in the hash and is
  reported, until somebody decides.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kombu.utils.uuid import uuid
from nats.js import api

from . import envelope
from .errors import (
    ApiError,
    ConnectionLost,
    JetStreamTransportError,
    MalformedMessage,
    NoResponders,
    PublishTimeout,
    RequestTimeout,
)
from .jetstream import STREAM_NOT_FOUND
from .options import Options
from .outgoing import Outgoing
from .protocol import encode_headers, parse_headers
from .publishing import outcome_of
from .redis_lists import SEPARATOR, RedisLists, checksum
from .registry import Queue
from .topology import Names, decode_token, encode_token

if TYPE_CHECKING:
    from .fallback import DualSession

__all__ = ["Comparison", "Drain", "DrainReport", "InDoubt", "compare", "mirror", "reset_mirror"]

logger = logging.getLogger(__name__)

#: Seconds a copy stays in the mirror: comparing is a matter of days.
MIRROR_MAX_AGE = 7 * 24 * 60 * 60.0

#: Seconds of one bucket of counts.
BUCKET_SECONDS = 30

#: Seconds after the end of a bucket in which its copies may be under way.
SETTLE_SECONDS = 15.0

#: Header of a copy: its bucket.
BUCKET_HEADER = "Mirror-Bucket"

#: Seconds a mark stays: an interrupted drain is finished by then.
MARK_TTL = 7 * 24 * 60 * 60

#: Messages moved in one step.
BATCH = 100

#: Seconds a drain that died keeps others out.
LOCK_SECONDS = 30

#: Seconds before the end of the dedup window from which an id is not trusted any more.
WINDOW_MARGIN = 10.0

# Codes of nats-server's errors.json: the mark is there, or the message id is.
_ALREADY_THERE = frozenset({10070, 10071, 10164, 10201})

#: What to do with messages of which nobody knows whether JetStream has them.
InDoubt = Literal["keep", "publish", "drop"]


# -- the mirror ------------------------------------------------------------------------------------


def mirror_stream(options: Options) -> api.StreamConfig:
    """Return the configuration of the stream of copies."""
    return api.StreamConfig(
        name=Names(options.namespace).mirror_stream,
        subjects=[f"{options.namespace}.mirror.>"],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType(options.stream_storage),
        num_replicas=options.stream_replicas,
        max_age=MIRROR_MAX_AGE,
        allow_direct=True,
        duplicate_window=options.dedup_window,
    )


def mirror_subject(options: Options, queue: str) -> str:
    return f"{options.namespace}.mirror.{encode_token(queue)}"


def bucket_of(moment: float) -> int:
    """Return the bucket in which a message written at *moment* (seconds since the epoch) counts."""
    return int(moment // BUCKET_SECONDS)


def mirror(
    session: DualSession,
    queue: str,
    message: envelope.Envelope,
    payload: bytes,
    bucket: int,
    timeout: float,
) -> None:
    """Store a copy of a message that was written to Redis.

    Raises what a publish raises; the stream is made when it is missing and ``provision`` allows.
    """
    subject = mirror_subject(session.options, queue).encode()
    message_id = f"{message['properties']['delivery_tag']}.{encode_token(queue)}"
    headers = encode_headers([("Nats-Msg-Id", message_id), (BUCKET_HEADER, str(bucket))])
    if not session.mirror_is_made:
        _make_mirror(session)
        session.mirror_is_made = True
    session.publisher.publish(subject, payload, headers, timeout)


def _make_mirror(session: DualSession) -> None:
    if session.options.provision == "off":
        return
    config = mirror_stream(session.options)
    try:
        session.jetstream.request(f"STREAM.INFO.{config.name}")
    except ApiError as exc:
        if exc.err_code != STREAM_NOT_FOUND or session.options.provision != "auto":
            raise
        session.jetstream.request(f"STREAM.CREATE.{config.name}", config.as_dict())
        logger.info("created stream %r", config.name)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What Redis took of one queue since ``dual-write`` began, and what the mirror has."""

    queue: str
    written: int
    mirrored: int
    #: messages of the last moments, whose copies may be under way; not in the other two
    under_way: int
    #: whether they are the same messages, and not only as many
    is_same: bool


#: Number and sum of checksums, by queue and bucket.
_Counts: TypeAlias = dict[tuple[str, int], list[int]]


def compare(session: DualSession, lists: RedisLists, now: float) -> list[Comparison]:
    """Compare, queue by queue, what ``dual-write`` wrote to Redis with the mirror.

    What is older than the mirror keeps copies is left out, and forgotten.
    """
    oldest = bucket_of(now - MIRROR_MAX_AGE) + 2
    settled = bucket_of(now - BUCKET_SECONDS - SETTLE_SECONDS)
    written = _written(lists, oldest)
    found: _Counts = {}
    for queue, bucket, payload in _mirrored(session):
        if bucket >= oldest:
            numbers = found.setdefault((queue, bucket), [0, 0])
            numbers[0] += 1
            numbers[1] += checksum(payload)
    totals: dict[str, list[int]] = {}
    for queue, bucket in sorted(written.keys() | found.keys()):
        ours, copies = written.get((queue, bucket), [0, 0]), found.get((queue, bucket), [0, 0])
        total = totals.setdefault(queue, [0, 0, 0, 0])
        if ours == copies or bucket <= settled:
            total[0] += ours[0]
            total[1] += copies[0]
            total[3] += ours != copies
        else:
            total[2] += max(ours[0], copies[0])
    return [
        Comparison(queue, ours, copies, under_way, not differences)
        for queue, (ours, copies, under_way, differences) in totals.items()
    ]


def _written(lists: RedisLists, oldest: int) -> _Counts:
    raw = lists.call(lambda client: client.hgetall(lists.written_key))
    counts: _Counts = {}
    old = []
    for name, value in raw.items():
        kind, bucket, queue = name.decode().split(":", 2)
        if int(bucket) < oldest:
            old.append(name)
            continue
        counts.setdefault((queue, int(bucket)), [0, 0])[kind == "sum"] = int(value)
    if old:
        lists.call(lambda client: client.hdel(lists.written_key, *old))
    return counts


def _mirrored(session: DualSession) -> Iterator[tuple[str, int, bytes]]:
    """Yield queue, bucket and payload of each copy."""
    stream = Names(session.options.namespace).mirror_stream
    subject = session.jetstream.direct_get(stream)
    wanted = f"{session.options.namespace}.mirror.>"
    seq = 0
    while True:
        body = json.dumps({"seq": seq + 1, "next_by_subj": wanted}).encode()
        try:
            msg = session.nats.request(subject, body, timeout=session.options.publish_timeout)
        except NoResponders:  # there is no mirror
            return
        headers = parse_headers(msg.headers)
        if headers.status:
            return
        seq = int(headers.fields["Nats-Sequence"])
        queue = decode_token(headers.fields["Nats-Subject"].split(".")[2])
        yield queue, int(headers.fields.get(BUCKET_HEADER, 0)), msg.payload


def reset_mirror(session: DualSession, lists: RedisLists) -> None:
    """Begin anew: forget what was written, and empty the mirror."""
    stream = Names(session.options.namespace).mirror_stream
    try:
        session.jetstream.request(f"STREAM.PURGE.{stream}")
    except ApiError as exc:
        if exc.err_code != STREAM_NOT_FOUND:
            raise
    lists.call(lambda client: client.delete(lists.written_key))


# -- draining --------------------------------------------------------------------------------------


@dataclass(slots=True)
class DrainReport:
    """What a drain did, by queue."""

    moved: dict[str, int] = field(default_factory=dict)
    #: messages an earlier drain had written already
    known: int = 0
    #: messages nobody knows of whether JetStream has them; they stay where they are
    in_doubt: int = 0
    #: messages that are none, and stay where they are
    malformed: int = 0


class Busy(JetStreamTransportError):
    """Another drain runs, or one died less than half a minute ago.

    Cause: two drains at once would only be in each other's way.
    Remedy: wait for the other one.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        super().__init__(f"another drain runs ({owner}); wait for it, or half a minute", owner)


def drain_key(lists: RedisLists) -> str:
    """Return the key of what a drain took and JetStream has not confirmed."""
    return f"{lists.prefix}_kombu_jetstream.drain"


class Drain:
    """Moves what waits in Redis lists into JetStream."""

    def __init__(self, session: DualSession, lists: RedisLists) -> None:
        self._session = session
        self._lists = lists
        self.way = drain_key(lists)
        self._tried = f"{lists.prefix}_kombu_jetstream.drain_tried"
        self._lock = f"{lists.prefix}_kombu_jetstream.drain_lock"
        self._myself = f"{lists.worker}:{uuid()[:8]}"
        self._drain = lists.script("drain")
        self._adopt = lists.script("adopt")
        self.report = DrainReport()
        self._batches = self._has_batches()
        writer = SimpleNamespace(publish=self._write, pipeline=self._write)
        self._outgoing = Outgoing(
            SimpleNamespace(  # type: ignore[arg-type]
                options=session.options,
                registry=session.registry,
                jetstream=session.jetstream,
                degraded=session.degraded,
                publisher=writer,
            )
        )

    def _has_batches(self) -> bool:
        session = self._session
        session.registry.load()
        for level in session.jetstream.levels:
            info = session.jetstream.request(f"STREAM.INFO.{session.jetstream.names.stream(level)}")
            if not info["config"].get("allow_atomic"):
                return False
        return session.jetstream.has_ttl

    @property
    def is_exact(self) -> bool:
        """Whether an interruption can leave nothing in doubt."""
        return self._batches

    def waiting(self, queues: Iterable[str]) -> dict[str, int]:
        """Return what a drain of *queues* would move, without what is on its way already."""
        return {queue: self._lists.size(queue) for queue in queues}

    def run(
        self,
        queues: Iterable[str],
        *,
        in_doubt: InDoubt = "keep",
        unacked: bool = False,
        progress: Callable[[int], None] = lambda moved: None,
    ) -> DrainReport:
        """Move all that waits in *queues*, after what an interrupted drain left on its way.

        With *unacked*, also what plain ``redis://`` workers took and never acknowledged: only
        when none of them runs any more.  *progress* gets the number of messages moved so far.
        """
        self._take_lock()
        try:
            self._resume(in_doubt)
            progress(self._total())
            if unacked:
                self._move_unacked()
                progress(self._total())
            for queue in queues:
                while self._move(queue):
                    progress(self._total())
        finally:
            self._drop_lock()
        return self.report

    def _total(self) -> int:
        return sum(self.report.moved.values())

    # -- steps ---------------------------------------------------------------------------------

    def _resume(self, in_doubt: InDoubt) -> None:
        """Finish what an interrupted drain had begun."""
        entries = self._lists.call(lambda client: client.hgetall(self.way))
        tried = self._lists.call(lambda client: client.hgetall(self._tried))
        for name, payload in sorted(entries.items(), key=lambda entry: _order(entry[0])):
            since = float(tried.get(name, 0))
            known = self._batches or not since or time.time() - since < self._trusted
            if known or in_doubt == "publish":
                self._deliver(name, payload)
            elif in_doubt == "drop":
                self._done(name)
            else:
                self.report.in_doubt += 1

    @property
    def _trusted(self) -> float:
        """Seconds for which the stream surely knows a message id."""
        return self._session.options.dedup_window - WINDOW_MARGIN

    def _move(self, queue: str) -> bool:
        """Move some messages of *queue*; return whether there were any."""
        keys = [self.way, *self._lists.lists_of(queue)]
        flat = self._lists.call(lambda client: self._drain(keys, [BATCH, time.time_ns()]))
        for name, payload in zip(flat[::2], flat[1::2], strict=True):
            self._deliver(name, payload)
        return bool(flat)

    def _move_unacked(self) -> None:
        lists = self._lists
        keys = [lists.key("unacked"), lists.key("unacked_index"), self.way]
        entries = lists.call(lambda client: client.hgetall(keys[0]))
        for number, (tag, raw) in enumerate(entries.items()):
            try:
                message, exchange, routing_key = json.loads(raw)
                kind = self._session.fallback.exchange_types.get(exchange, "direct")
                queues = lists.route(exchange, kind, routing_key) if exchange else (routing_key,)
                payload = envelope.encode(message)
            except (ValueError, TypeError):
                self.report.malformed += 1
                continue
            if len(queues) != 1:
                self.report.malformed += 1
                continue
            name = f"{time.time_ns()}:{number}:{lists.key(queues[0])}".encode()
            if self._adopted(keys, [tag, name, payload]):
                self._deliver(name, payload)

    def _adopted(self, keys: list[str], args: list[Any]) -> bool:
        return bool(self._lists.call(lambda client: self._adopt(keys, args)))

    def _deliver(self, name: bytes, payload: bytes) -> None:
        """Write one message on its way to JetStream, and take it off the way."""
        self._keep_lock()
        key = name.split(b":", 2)[2].decode()[len(self._lists.prefix) :]
        queue = key.partition(SEPARATOR)[0]
        try:
            message = envelope.decode(payload)
        except MalformedMessage as exc:
            logger.error("a message of queue %r is none and stays in Redis: %s", queue, exc)
            self.report.malformed += 1
            return
        if not self._batches:
            now = time.time()
            self._lists.call(lambda client: client.hsetnx(self._tried, name, now))
        self._ensure_queue(queue)
        self._outgoing._store(queue, message, payload, False, None)
        self._done(name)
        self.report.moved[queue] = self.report.moved.get(queue, 0) + 1

    def _ensure_queue(self, queue: str) -> None:
        session = self._session
        if queue not in session.registry.queues:
            session.jetstream.ensure_queue(queue)
            session.registry.add_queue(Queue(queue))

    def _done(self, name: bytes) -> None:
        def forget(client: Any) -> None:
            with client.pipeline(transaction=True) as pipe:
                pipe.hdel(self.way, name)
                pipe.hdel(self._tried, name)
                pipe.execute()

        self._lists.call(forget)

    # -- writing -------------------------------------------------------------------------------

    def _write(
        self, subject: bytes, payload: bytes, headers: bytes, timeout: float | None = None
    ) -> None:
        """Store one message exactly once; what `Outgoing` writes with."""
        session = self._session
        if not self._batches:
            session.publisher.publish(subject, payload, headers, timeout)
            return
        deadline = time.monotonic() + session.options.publish_timeout
        while True:
            try:
                self._write_batch(subject, payload, headers)
                return
            except (NoResponders, RequestTimeout) as exc:
                # The mark tells the next try whether this one arrived.
                if time.monotonic() > deadline:
                    raise PublishTimeout(subject.decode(), session.options.publish_timeout) from exc
                session.nats.wait(lambda: False, 0.25)

    def _write_batch(self, subject: bytes, payload: bytes, headers: bytes) -> None:
        fields = list(parse_headers(headers).fields.items())
        namespace, level = subject.decode().split(".")[:2]
        mark = f"{namespace}.{level}.@drained.{encode_token(dict(fields)['Nats-Msg-Id'])}"
        batch = [("Nats-Batch-Id", uuid())]
        first = [
            *batch,
            ("Nats-Batch-Sequence", "1"),
            ("Nats-Expected-Last-Subject-Sequence", "0"),
            ("Nats-TTL", f"{MARK_TTL}s"),
        ]
        last = [*fields, *batch, ("Nats-Batch-Sequence", "2"), ("Nats-Batch-Commit", "1")]
        timeout = self._session.options.publish_timeout / 2
        request = self._session.nats.request
        answer = request(mark.encode(), b"", encode_headers(first), timeout=timeout)
        error = outcome_of(mark.encode(), answer) if answer.payload else None
        if error is None:
            answer = request(subject, payload, encode_headers(last), timeout=timeout)
            error = outcome_of(subject, answer)
        if error is None:
            return
        if getattr(error, "err_code", None) not in _ALREADY_THERE:
            raise error
        self.report.known += 1

    # -- one at a time -------------------------------------------------------------------------

    def _take_lock(self) -> None:
        taken = self._lists.call(
            lambda client: client.set(self._lock, self._myself, nx=True, ex=LOCK_SECONDS)
        )
        if not taken:
            owner = self._lists.call(lambda client: client.get(self._lock)) or b"?"
            raise Busy(owner.decode())

    def _keep_lock(self) -> None:
        """Renew the lock; ConnectionLost if it was lost, as to a drain that began meanwhile."""
        owner = self._lists.call(lambda client: client.get(self._lock))
        if owner != self._myself.encode():
            raise ConnectionLost("the drain was too slow, another one may have begun")
        self._lists.call(lambda client: client.expire(self._lock, LOCK_SECONDS))

    def _drop_lock(self) -> None:
        try:
            owner = self._lists.call(lambda client: client.get(self._lock))
            if owner == self._myself.encode():
                self._lists.call(lambda client: client.delete(self._lock))
        except JetStreamTransportError as exc:
            logger.debug("the lock of the drain expires by itself: %s", exc)


def _order(name: bytes) -> tuple[int, int]:
    take, number, _ = name.split(b":", 2)
    return int(take), int(number)
