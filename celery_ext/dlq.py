"""The store of dead letters: what is in ``<ns>_dlq``, read and removed.

What a letter records is in `kombu_jetstream.deadletter`; putting letters back into queues is in
`celery_ext.replay`.  A letter's id is its sequence in the stream, as text.

The store may hold a hundred thousand letters and more, each with a payload of up to a megabyte, so
nothing here holds more than a page of them: lists, groups and filters read headers alone, a page at
a time, newest first by walking back in windows of sequences.

Subjects below ``<ns>.dlq.`` with more than one token are not letters but the claims of a replay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from kombu_jetstream.deadletter import DeadLetter, read_fields
from kombu_jetstream.errors import ApiError, JetStreamTransportError
from kombu_jetstream.topology import decode_token

from .broker import Broker, Stored, gather

__all__ = ["DeadLetters", "Letter", "LetterFilter", "LetterMissing", "Stats"]

#: Letters in memory at once while many are replayed or deleted.
PAGE = 1000

#: Sequences looked at in one step back; more where letters are sparse.
WINDOW = 1000
MAX_WINDOW = 32_000

#: Seconds by which a worker's clock may differ from the server's: letters are found by when the
#: server stored them, and shown by when the worker says they died.
CLOCK_MARGIN = 300.0

# Codes of nats-server's errors.json: the message is gone already.
_GONE = frozenset({10037, 10043, 10057})


class LetterMissing(JetStreamTransportError):
    """There is no dead letter with this id.

    Cause: it was replayed, deleted or aged out meanwhile, or never was.
    Remedy: ``celery jetstream dlq list`` shows those there are.
    """

    def __init__(self, letter_id: str) -> None:
        self.letter_id = letter_id
        super().__init__(f"no dead letter {letter_id!r}", letter_id)


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter."""

    id: str
    record: DeadLetter
    #: Nanoseconds since the epoch; with `id` it names this letter for ever.
    stored_ns: int
    #: Bytes of the payload, the original message.
    size: int
    #: Empty in lists.
    payload: bytes = b""

    @property
    def seq(self) -> int:
        return int(self.id)

    @property
    def stored_at(self) -> float:
        return self.stored_ns / 1e9

    @property
    def token(self) -> str:
        """A name as one subject token, also unique if the stream is made anew."""
        return f"{self.id}-{self.stored_ns}"

    @property
    def died_at(self) -> float:
        return self.record.died_at or self.stored_at

    def as_json(self) -> dict[str, Any]:
        """Return what lists show; moments are seconds since the epoch."""
        record = self.record
        return {
            "id": self.id,
            "reason": record.reason,
            "task": record.task,
            "task_id": record.task_id,
            "queue": record.queue,
            "error": record.error,
            "message": record.message,
            "attempts": record.attempts,
            "worker": record.worker,
            "published_at": record.published_at,
            "died_at": self.died_at,
            "replayed": record.replayed,
        }

    def details(self) -> dict[str, Any]:
        """Return all there is, the original message included."""
        try:
            message = json.loads(self.payload)
        except ValueError:
            message = self.payload.decode("utf-8", "backslashreplace")
        return {
            **self.as_json(),
            "level": self.record.level,
            "traceback": self.record.traceback,
            "stored_at": self.stored_at,
            "size": self.size,
            "original": message,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterFilter:
    """Which letters are meant; None is any."""

    queue: str | None = None
    #: Glob of the task name, as ``billing.*``.
    task: str | None = None
    #: Exception class, with or without its module.
    error: str | None = None
    reason: str | None = None
    #: Seconds since the epoch: those that died from then on.
    since: float | None = None

    @property
    def is_empty(self) -> bool:
        return self == LetterFilter()

    def matches(self, letter: Letter) -> bool:
        record = letter.record
        return (
            self.queue in (None, record.queue)
            and self.reason in (None, record.reason)
            and (self.since is None or letter.died_at >= self.since)
            and (self.task is None or fnmatchcase(record.task or "", self.task))
            and (self.error is None or _is_error(record.error or "", self.error))
        )


def _is_error(recorded: str, wanted: str) -> bool:
    """Tell whether two names of an exception agree as far as the shorter one goes."""
    short, long = sorted((recorded, wanted), key=len)
    return bool(short) and (short == long or long.endswith("." + short))


@dataclass(slots=True)
class Stats:
    """Letters counted and grouped."""

    count: int = 0
    #: Bytes of the payloads.
    size: int = 0
    oldest_at: float | None = None
    newest_at: float | None = None
    queues: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)

    def add(self, letter: Letter) -> None:
        record = letter.record
        self.count += 1
        self.size += letter.size
        died_at = letter.died_at
        self.oldest_at = died_at if self.oldest_at is None else min(self.oldest_at, died_at)
        self.newest_at = died_at if self.newest_at is None else max(self.newest_at, died_at)
        self.queues[record.queue] += 1
        self.reasons[record.reason] += 1
        self.errors[record.error or ""] += 1
        self.tasks[record.task or ""] += 1

    def as_json(self) -> dict[str, Any]:
        """Return the numbers; what has no error or task is grouped under the empty name."""
        return {
            "count": self.count,
            "bytes": self.size,
            "oldest_at": self.oldest_at,
            "newest_at": self.newest_at,
            "queues": dict(self.queues.most_common()),
            "reasons": dict(self.reasons.most_common()),
            "errors": dict(self.errors.most_common()),
            "tasks": dict(self.tasks.most_common()),
        }


class DeadLetters:
    """The dead letters of one namespace.  A stream that does not exist yet has none."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.stream = broker.names.dead_letter_stream

    # -- reading -----------------------------------------------------------------------------------

    async def newest(
        self,
        which: LetterFilter | None = None,
        *,
        limit: int | None = None,
        before: str | None = None,
    ) -> AsyncIterator[Letter]:
        """Yield letters from the newest back, at most *limit*, those older than *before* (an id).

        The id of the last one is the *before* of the next page.
        """
        which = which if which is not None else LetterFilter()
        first, last = await self.bounds()
        stop = last + 1 if before is None else min(_seq(before), last + 1)
        left = limit
        window = WINDOW
        while stop > first and left != 0:
            start = max(first, stop - window)
            page = [letter async for letter in self._between(which, start, stop)]
            for letter in reversed(page):
                if which.matches(letter):
                    yield letter
                    left = left - 1 if left is not None else None
                    if left == 0:
                        return
            if which.since is not None and page and page[0].stored_at < which.since - CLOCK_MARGIN:
                return
            stop = start
            if len(page) < WINDOW // 4:
                window = min(window * 4, MAX_WINDOW)

    async def oldest(
        self,
        which: LetterFilter | None = None,
        *,
        after: str | None = None,
        until: int | None = None,
    ) -> AsyncIterator[Letter]:
        """Yield letters from the oldest on, those newer than *after* (an id), up to and with
        sequence *until*."""
        which = which if which is not None else LetterFilter()
        start = _seq(after) + 1 if after is not None else 1
        stop = until + 1 if until is not None else None
        async for letter in self._between(which, start, stop):
            if which.matches(letter):
                yield letter

    async def pages(self, which: LetterFilter, size: int = PAGE) -> AsyncIterator[list[Letter]]:
        """Yield the letters there are now, oldest first, in pages.

        A caller may take its time with a page and remove what is in it; what dies meanwhile is
        left for another time.
        """
        _, until = await self.bounds()
        after: str | None = None
        while True:
            page: list[Letter] = []
            reading = self.oldest(which, after=after, until=until)
            async for letter in reading:
                page.append(letter)
                if len(page) == size:
                    break
            await reading.aclose()  # type: ignore[attr-defined]  # it is a generator
            if page:
                yield page
            if len(page) < size:
                return
            after = page[-1].id

    async def _between(
        self, which: LetterFilter, start: int, stop: int | None
    ) -> AsyncIterator[Letter]:
        names = self.broker.names
        subject = f"{names.namespace}.dlq.*"
        if which.queue is not None:
            subject = names.dead_letter_subject(which.queue)
        # Either a sequence or a moment; with a sequence the moment is left to the filter.
        since = which.since if start <= 1 else None
        reading = self.broker.headers(
            self.stream,
            subject,
            start_seq=start,
            stop_seq=stop,
            start_time=since - CLOCK_MARGIN if since is not None else None,
        )
        async for stored in reading:
            yield _letter(stored)

    async def get(self, letter_id: str) -> Letter:
        """Return one letter with its payload, or raise `LetterMissing`."""
        found = await self.find(letter_id)
        if found is None:
            raise LetterMissing(letter_id)
        return found

    async def find(self, letter_id: str) -> Letter | None:
        """Return one letter with its payload, or None; also right after others were deleted."""
        stored = await self.broker.get_from_leader(self.stream, _seq(letter_id))
        if stored is None or stored.subject.count(".") != 2:
            return None
        return _letter(stored)

    async def bounds(self) -> tuple[int, int]:
        """Return the first and the last sequence of the stream; (1, 0) when it is empty."""
        info = await self.broker.find(f"STREAM.INFO.{self.stream}")
        if info is None or not info["state"]["messages"]:
            return 1, 0
        return int(info["state"]["first_seq"]), int(info["state"]["last_seq"])

    async def counts(self) -> dict[str, int]:
        """Return the number of letters of each queue, without reading any."""
        subject = f"{self.broker.names.namespace}.dlq.*"
        found = await self.broker.subjects(self.stream, subject)
        return {decode_token(name.rpartition(".")[2]): count for name, count in found.items()}

    async def oldest_at(self) -> float | None:
        """Return when the oldest letter was stored, in seconds since the epoch."""
        subject = f"{self.broker.names.namespace}.dlq.*"
        stored = await self.broker.get(self.stream, seq=1, next_by_subj=subject)
        return stored.stored_at if stored is not None else None

    async def count_since(self, moment: float) -> int:
        """Return how many letters were stored since *moment*, without reading any."""
        subject = f"{self.broker.names.namespace}.dlq.*"
        return await self.broker.count(self.stream, subject, start_time=moment)

    async def stats(self, which: LetterFilter | None = None) -> Stats:
        """Count and group the letters; reads the headers of all that may match."""
        stats = Stats()
        async for letter in self.oldest(which):
            stats.add(letter)
        return stats

    # -- removing ----------------------------------------------------------------------------------

    async def delete(self, letter_ids: Iterable[str]) -> int:
        """Remove letters and return how many there were; missing ones are no error."""
        return sum(await gather(self._delete, letter_ids))

    async def _delete(self, letter_id: str) -> bool:
        body = {"seq": _seq(letter_id), "no_erase": True}
        try:
            await self.broker.api(f"STREAM.MSG.DELETE.{self.stream}", body)
        except ApiError as exc:
            if exc.err_code in _GONE:
                return False
            raise
        return True

    async def delete_matching(self, which: LetterFilter) -> int:
        """Remove the letters that match and return their number."""
        removed = 0
        async for page in self.pages(which):
            removed += await self.delete(letter.id for letter in page)
        return removed

    async def purge(self, queue: str | None = None) -> int:
        """Remove all letters at once, of one queue if named, and return their number."""
        names = self.broker.names
        subject = f"{names.namespace}.dlq.*"
        if queue is not None:
            subject = names.dead_letter_subject(queue)
        answer = await self.broker.find(f"STREAM.PURGE.{self.stream}", {"filter": subject})
        return int(answer["purged"]) if answer is not None else 0


def _seq(letter_id: str) -> int:
    if not letter_id.isascii() or not letter_id.isdecimal() or len(letter_id) > 18:
        raise LetterMissing(letter_id)
    return int(letter_id)


def _letter(stored: Stored) -> Letter:
    return Letter(
        id=str(stored.seq),
        record=read_fields(stored.headers),
        stored_ns=stored.stored_ns,
        size=stored.size,
        payload=stored.payload,
    )
