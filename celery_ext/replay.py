"""Dead letters back into a queue: each once, whatever interrupts the command.

A replay moves a message from one stream to another, the dead letters to a level's stream, and no
server does that in one step.  Whoever publishes first and deletes the letter then may be killed
in between; run again, it would publish twice.  The stream's dedup window is no answer: it ends,
and a restarted server forgets the ids of what was consumed already (facts 4).

**With atomic batches** (nats-server 2.12): the task and a *mark* are one write to the level's
stream, on ``<ns>.<level>.@replayed.<letter>``, which no consumer covers.

1. *Fence.*  The command writes its name to ``<ns>.<level>.@replaying``.  Each of its batches
   demands that this is still the last message there, so a command that was frozen while another
   one ran can write nothing any more.
2. It reads the marks there are, after 1 all of them.  A letter with a mark was replayed: what is
   left to do is 4.
3. One batch of tasks and marks.
4. The letters are deleted, then their marks.

Killed before 3 is stored: nothing happened.  Killed after it: the task is in its queue, and the
mark says so for as long as the letter is there.  So a letter is replayed **exactly once**, and the
task then runs as any other task does.

**Without them** a *claim* comes first, on ``<ns>.dlq.@claim.<letter>``, then the task under an id
made of the letter's, then both are deleted.  A claim found from before means that the task may be
in its queue or not.  While the dedup window is open and the server is the same process, publishing
again under the same id tells, and is safe.  Afterwards the letter is *in doubt*: it is left alone
and reported, **at most once**, until somebody decides (``--in-doubt``).

The replayed message is the same task: id, arguments, headers, and so its chain and chord.  Changed
are the delivery tag, ``retries`` (0, it gets all its attempts again), ``jetstream_replayed``
(counted up) and, for another queue, its routing.  An ``eta`` in the past is no obstacle; a task
whose ``expires`` is over is replayed too, and dropped by the worker, as Celery does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from kombu.utils.uuid import uuid

from kombu_jetstream import envelope
from kombu_jetstream.arguments import QueueArguments
from kombu_jetstream.deadletter import REPLAYED_HEADER
from kombu_jetstream.delays import ttl_header
from kombu_jetstream.errors import (
    JetStreamTransportError,
    MalformedMessage,
    MessageTooLarge,
    PublishRejected,
    QueueMissing,
)
from kombu_jetstream.registry import Queue
from kombu_jetstream.topology import LEVELS, Level

from .broker import Broker, gather
from .dlq import DeadLetters, Letter, LetterFilter
from .queues import registered_queues

__all__ = ["Replay", "Report", "Superseded", "replayed"]

logger = logging.getLogger(__name__)

#: Letters in one batch; the server takes 1000 messages, and each letter is two.
BATCH = 100

#: Bytes of payloads in one batch.
BATCH_BYTES = 4 * 1024 * 1024

#: With a rate, seconds' worth of letters in one batch.
BATCH_SECONDS = 0.25

# Codes of nats-server's errors.json.
WRONG_LAST_SEQUENCE = frozenset({10070, 10071, 10164})


class Superseded(JetStreamTransportError):
    """Another replay began in this namespace while this one ran.

    Cause: two commands at once.  What this one had replayed is replayed.
    Remedy: run one at a time; this one again when the other has ended.
    """

    def __init__(self) -> None:
        super().__init__("another replay began meanwhile; run this one again when it has ended")


@dataclass(slots=True)
class Report:
    """What a replay did."""

    replayed: int = 0
    #: Replayed before an interruption; only their letters had been left.
    already: int = 0
    #: Of the replayed ones, those whose ``expires`` is over: workers drop them.
    expired: int = 0
    #: Letter id and why it stays a letter.
    failed: list[tuple[str, str]] = field(default_factory=list)
    #: Ids of letters that an interrupted command replayed or not.
    in_doubt: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "replayed": self.replayed,
            "already_replayed": self.already,
            "expired": self.expired,
            "failed": [{"id": letter_id, "reason": reason} for letter_id, reason in self.failed],
            "in_doubt": self.in_doubt,
        }


@dataclass(frozen=True, slots=True)
class _Ready:
    """A letter as it will be published."""

    letter: Letter
    level: Level
    subject: str
    payload: bytes
    headers: dict[str, str]
    expired: bool


class Replay:
    """One run of the command.

    Parameters:
        to_queue: Where all letters go, instead of the queue each died in.
        rate: Letters a second at most.
        in_doubt: Replay letters, too, that an earlier command may have replayed.
        progress: Called with the `Report` so far, after each batch.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        to_queue: str | None = None,
        rate: float | None = None,
        in_doubt: bool = False,
        progress: Callable[[Report], None] | None = None,
    ) -> None:
        self.report = Report()
        self._broker = broker
        self._letters = DeadLetters(broker)
        self._to_queue = to_queue
        self._rate = rate
        self._in_doubt = in_doubt
        self._progress = progress
        self._queues: dict[str, Queue] = {}
        self._begun = False
        self._fences: dict[str, int] = {}
        self._marks: set[str] = set()
        self._claims: dict[str, tuple[int, float, dict[str, Any]]] = {}

    async def run(
        self,
        letter_ids: Iterable[str] = (),
        which: LetterFilter | None = None,
        *,
        limit: int | None = None,
    ) -> Report:
        """Replay the letters named, or if *which* is given those that match now; the oldest first,
        at most *limit*.

        Raises `LetterMissing` or `QueueMissing` before anything is done, `Superseded` when
        another replay began.  A letter that cannot be replayed is in the report, and stays.
        """
        self._queues = await registered_queues(self._broker)
        if self._to_queue is not None and self._to_queue not in self._queues:
            raise QueueMissing(self._to_queue)
        pages = self._named(letter_ids) if which is None else self._letters.pages(which)
        began = time.monotonic()
        done = 0
        try:
            async for page in pages:
                if limit is not None:
                    page = page[: limit - done]
                    if not page:
                        break
                for batch in self._batches(page):
                    if not self._begun:
                        await self._begin()
                    await self._replay(batch)
                    done += len(batch)
                    if self._progress is not None:
                        self._progress(self.report)
                    if self._rate:
                        ahead = done / self._rate - (time.monotonic() - began)
                        await asyncio.sleep(max(0.0, ahead))
        finally:
            await self._end()
        return self.report

    async def _named(self, letter_ids: Iterable[str]) -> AsyncIterator[list[Letter]]:
        found = await gather(self._letters.get, dict.fromkeys(letter_ids))
        yield sorted(found, key=lambda letter: letter.seq)

    def _batches(self, page: list[Letter]) -> list[list[Letter]]:
        """Cut a page into what is in memory and on its way at once."""
        most = BATCH
        if self._rate:
            most = max(1, min(BATCH, int(self._rate * BATCH_SECONDS)))
        batches: list[list[Letter]] = []
        room = size = 0
        for letter in page:
            if room == 0 or size + letter.size > BATCH_BYTES:
                batches.append([])
                room, size = most, 0
            batches[-1].append(letter)
            room -= 1
            size += letter.size
        return batches

    async def _replay(self, batch: list[Letter]) -> None:
        whole = await gather(self._letters.find, [letter.id for letter in batch])
        letters = [letter for letter in whole if letter is not None]
        marked = [letter for letter in letters if letter.token in self._marks]
        await self._settle_marked(marked)
        ready: dict[Level, list[_Ready]] = {}
        for letter in letters:
            if letter.token in self._marks:
                continue
            try:
                prepared = self._prepare(letter)
            except (MalformedMessage, QueueMissing, MessageTooLarge) as exc:
                self.report.failed.append((letter.id, str(exc)))
            except Exception as exc:  # anybody may have written it; the others are not to wait
                logger.exception("dead letter %s cannot be replayed", letter.id)
                self.report.failed.append((letter.id, f"{type(exc).__name__}: {exc}"))
            else:
                ready.setdefault(prepared.level, []).append(prepared)
        for level, group in ready.items():
            fenced = self._broker.names.stream(level) in self._fences
            claimed = [e for e in group if not fenced or e.letter.token in self._claims]
            await gather(self._write_claimed, claimed)
            others = [e for e in group if fenced and e.letter.token not in self._claims]
            if others:
                await self._write_batch(level, others)

    def _prepare(self, letter: Letter) -> _Ready:
        record = letter.record
        queue_name = self._to_queue if self._to_queue is not None else record.queue
        queue = self._queues.get(queue_name)
        if queue is None:
            raise QueueMissing(queue_name)
        message = replayed(letter.payload, to_queue=self._to_queue)
        payload = envelope.encode(message)
        level: Level = "medium"
        if not queue.auto_delete and self._broker.options.priority_levels > 1:
            level = next((name for name in LEVELS if name == record.level), "medium")
        headers = dict(envelope.headers_of(f"replay.{letter.token}", message))
        ttl = QueueArguments.parse(queue_name, queue.arguments).message_ttl
        if ttl is not None and self._broker.info.api_level >= 1:
            headers["Nats-TTL"] = ttl_header(ttl)
        self._broker.check_size(payload, {**headers, "Nats-Batch-Id": "-" * 200})
        subject = self._broker.names.subject(level, queue_name)
        return _Ready(letter, level, subject, payload, headers, _is_expired(message))

    # -- with atomic batches -----------------------------------------------------------------------

    async def _begin(self) -> None:
        """Put up the fences, then read the marks and claims there are."""
        self._begun = True
        broker = self._broker
        for level in LEVELS:
            stream = broker.names.stream(level)
            info = await broker.find(f"STREAM.INFO.{stream}")
            if info is None or not info["config"].get("allow_atomic"):
                continue
            fence = self._fence(level)
            ack = await broker.publish(fence, _myself(), {})
            self._fences[stream] = ack.seq
            await broker.api(f"STREAM.PURGE.{stream}", {"filter": fence, "keep": 1})
            marks = await broker.subjects(stream, self._mark(level, "*"))
            self._marks.update(subject.rpartition(".")[2] for subject in marks)
        # With batches, too: the server may have been upgraded since.
        async for page in broker.pages(self._letters.stream, self._claim("*"), 500):
            for stored in page:
                token = stored.subject.rpartition(".")[2]
                self._claims[token] = (stored.seq, stored.stored_at, json.loads(stored.payload))

    async def _end(self) -> None:
        """Take the fences away, if the connection still stands."""
        if not self._broker.client.is_connected:
            return
        for stream, seq in self._fences.items():
            await self._forget(stream, [seq])

    def _fence(self, level: Level) -> str:
        return f"{self._broker.names.namespace}.{level}.@replaying"

    def _mark(self, level: Level, token: str) -> str:
        return f"{self._broker.names.namespace}.{level}.@replayed.{token}"

    async def _write_batch(self, level: Level, group: list[_Ready]) -> None:
        stream = self._broker.names.stream(level)
        behind_fence = {
            "Nats-Expected-Last-Subject-Sequence": str(self._fences[stream]),
            "Nats-Expected-Last-Subject-Sequence-Subject": self._fence(level),
        }
        messages: list[tuple[str, bytes, dict[str, str]]] = []
        for each in group:
            # 2.12 takes no message ids in a batch; the mark is what tells here.
            headers = {k: v for k, v in each.headers.items() if k != "Nats-Msg-Id"}
            messages.append((each.subject, each.payload, {**headers, **behind_fence}))
            behind_fence = {}  # once in a batch is enough
            messages.append((self._mark(level, each.letter.token), b"", {}))
        try:
            last = await self._broker.publish_batch(messages)
        except PublishRejected as exc:
            if exc.err_code in WRONG_LAST_SEQUENCE and not await self._is_fenced(level):
                raise Superseded from exc
            raise
        first = last - len(messages) + 1
        await self._letters.delete(each.letter.id for each in group)
        await self._forget(stream, range(first + 1, last + 1, 2))
        self._count(group)

    async def _is_fenced(self, level: Level) -> bool:
        """Tell whether our fence is still the one that stands."""
        stream = self._broker.names.stream(level)
        fence = await self._broker.get(stream, last_by_subj=self._fence(level))
        return fence is not None and fence.seq == self._fences[stream]

    async def _settle_marked(self, letters: list[Letter]) -> None:
        """Remove letters that were replayed before, and then their marks."""
        if not letters:
            return
        self.report.already += await self._letters.delete(letter.id for letter in letters)
        for letter in letters:
            for level in LEVELS:
                stream = self._broker.names.stream(level)
                if stream in self._fences:
                    mark = {"filter": self._mark(level, letter.token)}
                    await self._broker.api(f"STREAM.PURGE.{stream}", mark)

    async def _forget(self, stream: str, sequences: Iterable[int]) -> None:
        """Remove messages by sequence; one that is gone is no error."""

        async def forget(seq: int) -> None:
            subject = f"{self._broker.prefix}STREAM.MSG.DELETE.{stream}"
            await self._broker.request(subject, json.dumps({"seq": seq, "no_erase": True}).encode())

        await gather(forget, sequences)

    def _count(self, group: list[_Ready]) -> None:
        self.report.replayed += len(group)
        self.report.expired += sum(each.expired for each in group)

    # -- without -----------------------------------------------------------------------------------

    def _claim(self, token: str) -> str:
        return f"{self._broker.names.namespace}.dlq.@claim.{token}"

    async def _write_claimed(self, ready: _Ready) -> None:
        letter = ready.letter
        claim = self._claims.get(letter.token)
        if claim is None:
            try:
                ack = await self._broker.publish(
                    self._claim(letter.token),
                    _myself(self._broker.info.server_id),
                    {"Nats-Expected-Last-Subject-Sequence": "0"},
                )
            except PublishRejected as exc:
                if exc.err_code not in WRONG_LAST_SEQUENCE:
                    raise
                self.report.failed.append((letter.id, "another replay works on it"))
                return
            claim_seq = ack.seq
        elif self._in_doubt or self._can_tell(claim):
            claim_seq = claim[0]
        else:
            self.report.in_doubt.append(letter.id)
            return
        ack = await self._broker.publish(ready.subject, ready.payload, ready.headers)
        await self._letters.delete([letter.id])
        await self._forget(self._letters.stream, [claim_seq])
        if ack.duplicate:
            self.report.already += 1
        else:
            self._count([ready])

    def _can_tell(self, claim: tuple[int, float, dict[str, Any]]) -> bool:
        """Tell whether the stream would still know the id of a task published after *claim*.

        Half the window is left as a margin between the server's clock and ours.
        """
        _, stored_at, by = claim
        info = self._broker.info
        age = time.time() - min(stored_at, float(by.get("at", 0)))
        same_process = by.get("server_id") == info.server_id and info.cluster is None
        return same_process and age < self._broker.options.dedup_window / 2


def _myself(server_id: str = "") -> bytes:
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "at": time.time(),
        "server_id": server_id,
    }
    return json.dumps(facts).encode()


def replayed(payload: bytes, *, to_queue: str | None = None) -> envelope.Envelope:
    """Return the message of a dead letter as it is to be published again.

    Raises `MalformedMessage` for what never was a message.
    """
    envelope.decode(payload)
    # Taken apart without kombu's types, so that what is tagged stays as it was written.
    message: envelope.Envelope = json.loads(payload)
    headers = message["headers"] = message.get("headers") or {}
    properties = message["properties"]
    times = headers.get(REPLAYED_HEADER)
    headers[REPLAYED_HEADER] = (times if isinstance(times, int) else 0) + 1
    if headers.get("retries"):
        headers["retries"] = 0
    properties["delivery_tag"] = uuid()
    if to_queue is not None:
        properties["delivery_info"] = {"exchange": "", "routing_key": to_queue}
    return message


def _is_expired(message: envelope.Envelope) -> bool:
    expires = message["headers"].get("expires")
    try:
        moment = datetime.fromisoformat(str(expires).replace("Z", "+00:00"))
        if moment.tzinfo is None:  # as Celery's workers take it
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.timestamp() < time.time()
    except (ValueError, OverflowError):  # none, or one no clock can show
        return False
