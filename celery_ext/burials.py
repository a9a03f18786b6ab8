"""Storing dead letters from a worker, now, or as soon as the broker is back.

Over a connection of its own from kombu's pool: the consumer's may be in the middle of something,
or be another one by now.  Each write is confirmed, and has an id made of the message's place in its
stream, so that writing it again stores it once.

A dead letter whose message was acknowledged long ago is all that is left of its task.  If it cannot
be stored it waits here, and a thread tries again until it can be.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

from celery import Celery
from kombu import pools
from kombu.messaging import Producer

from kombu_jetstream.deadletter import RETRY_INTERVAL, DeadLetter

__all__ = ["Burials", "Remains"]

logger = logging.getLogger(__name__)

#: Retries of one write after a lost connection; each one connects anew first.
WRITE_RETRIES = {"max_retries": 3, "interval_start": 0.2, "interval_step": 0.3, "interval_max": 1}

#: Dead letters that wait at most; each has its payload in memory.
MAX_WAITING = 10_000


@dataclass(frozen=True, slots=True)
class Remains:
    """A dead letter, the payload it is about, and the id of the death."""

    letter: DeadLetter
    payload: bytes
    death: str


class Burials:
    """Writes the dead letters of one worker.  Callable from any thread."""

    def __init__(self, app: Celery, retry_interval: float = RETRY_INTERVAL) -> None:
        self.app = app
        self.retry_interval = retry_interval
        self._waiting: deque[Remains] = deque()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Return how many dead letters wait."""
        return len(self._waiting)

    def store(self, remains: Remains) -> None:
        """Store a dead letter and wait for the confirm; tries for some seconds, then raises."""
        with pools.producers[self.app.connection_for_read()].acquire(block=True) as producer:
            write = producer.connection.ensure(producer, _write, **WRITE_RETRIES)
            write(producer, remains)

    def store_later(self, remains: Remains) -> None:
        """Store a dead letter as soon as that is possible."""
        with self._lock:
            if len(self._waiting) >= MAX_WAITING:
                lost = self._waiting.popleft()
                logger.error("too many dead letters wait, lost that of %s", _told(lost))
            self._waiting.append(remains)
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(
                    target=self._run, name="celery-ext-dead-letters", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """Try once more to store what waits, and say what is lost."""
        self._ended.set()
        thread = self._thread
        if thread is not None:
            thread.join()
        if self._waiting:
            self._try_all()
        for lost in self._waiting:
            logger.error("the dead letter of %s could not be stored and is lost", _told(lost))

    def _run(self) -> None:
        while not self._ended.wait(self.retry_interval):
            self._try_all()
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return

    def _try_all(self) -> None:
        """Store what waits, in order, up to the first that fails."""
        stored = 0
        while self._waiting:
            try:
                self.store(self._waiting[0])
            except Exception as exc:
                logger.warning("%d dead letters wait for the broker: %s", len(self._waiting), exc)
                break
            self._waiting.popleft()
            stored += 1
        if stored:
            logger.info("stored %d dead letters that had waited", stored)


def _write(producer: Producer, remains: Remains) -> None:
    session = producer.channel.connection
    session.write_dead_letter(remains.letter, remains.payload, remains.death)


def _told(remains: Remains) -> str:
    return f"{remains.letter.task}[{remains.letter.task_id}]"
