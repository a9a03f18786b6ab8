"""Names, subjects and configurations: what this transport keeps on a NATS server.

A namespace (the URL path, default ``celery``) owns five streams::

    <ns>_high  <ns>_medium  <ns>_low   work queues, subjects <ns>.<level>.>
    <ns>_dlq                           dead letters, subjects <ns>.dlq.>
    <ns>_registry                      queues, exchanges and bindings, last value per subject

A durable queue is one subject and one durable pull consumer in each level's stream.
Delayed messages wait in the same stream on
``<ns>.<level>.@delay.<queue>.<task id>.<message id>``, which no consumer filter (three tokens)
covers.

Everything transient is plain NATS: ``<ns>.x.<exchange>.<routing key>`` for exchanges and
``<ns>.q.<queue>`` for the default exchange.

kombu allows any text as a queue name; NATS subject tokens, stream and consumer names allow no
space, ``.``, ``*``, ``>``, ``/`` and ``\\`` (ADR-6).  `encode_token` maps one onto the other,
reversibly.  Everything here is pure: no server is asked.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nats.js import api

from .errors import PreconditionFailed, QueueNameInvalid, shortened
from .options import Options

__all__ = [
    "LEVELS",
    "Difference",
    "Level",
    "Names",
    "consumer_config",
    "dead_letter_stream",
    "decode_token",
    "differences",
    "encode_token",
    "level_of",
    "level_stream",
    "levels",
    "registry_stream",
]

Level = Literal["high", "medium", "low"]

#: From the most to the least urgent.
LEVELS: tuple[Level, ...] = get_args(Level)

#: Server API levels (ADR-44) from which a stream may ask for these.
API_LEVEL_TTL = 1
API_LEVEL_SCHEDULES = 2
API_LEVEL_ATOMIC = 2

#: A consumer name becomes a directory of the file store, 255 bytes at most.
MAX_TOKEN_BYTES = 200

#: Bytes of any subject.  A line of the protocol has 4096 (``max_control_line``), with a reply
#: subject and numbers in it.  AMQP's own limit of 255 bytes for a name or key needs less.
MAX_SUBJECT_BYTES = 3000

#: Bytes of a task or message id in the subject of a delayed message.
MAX_ID_BYTES = 200

#: Least seconds for which an unused queue with ``x-expires`` stays: its workers, when they have no
#: room for more, tell the server that it is in use from time to time.
MIN_EXPIRES = 10.0

#: Seconds in which the dead-letter stream knows a death again, at least: a server that was killed
#: between the write of a dead letter and the end of its message may be away for that long.
DEATH_WINDOW = 3600.0

#: Seconds a consumer of an auto-delete queue survives without a pull: long enough for a client's
#: reconnect, short enough that a crashed client leaves nothing behind.
AUTO_DELETE_THRESHOLD = 60.0

_PLAIN = re.compile(r"[A-Za-z0-9_-]+\Z")
_ESCAPED = re.compile(r"=([0-9A-F]{2})")


def encode_token(name: str) -> str:
    """Return *name* as one NATS subject token, also valid as a consumer name.

    Letters, digits, ``_`` and ``-`` stay; every other byte of the UTF-8 form becomes ``=XX``;
    the empty string becomes ``=``.  `decode_token` is the inverse.
    """
    if _PLAIN.match(name):
        return name
    if not name:
        return "="
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in b"_-" else f"={byte:02X}"
        for byte in name.encode("utf-8", "surrogatepass")
    )


def decode_token(token: str) -> str:
    """Return the name that `encode_token` made *token* from."""
    if token == "=":
        return ""
    raw = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), token)
    return raw.encode("latin-1").decode("utf-8", "surrogatepass")


def _short_token(text: str) -> str:
    """Return *text* as a token of at most `MAX_ID_BYTES`, a digest of it if need be."""
    token = encode_token(text)
    if len(token) <= MAX_ID_BYTES:
        return token
    return hashlib.sha256(token.encode()).hexdigest()


def queue_token(queue_name: str) -> str:
    """Return the token of a durable queue, or raise `QueueNameInvalid` if it has no room."""
    token = encode_token(queue_name)
    if len(token) > MAX_TOKEN_BYTES:
        raise QueueNameInvalid(
            queue_name, f"it takes {len(token)} bytes encoded, a consumer name {MAX_TOKEN_BYTES}"
        )
    return token


def level_of(priority: float | None, options: Options, max_priority: int | None = None) -> Level:
    """Return the level of a message with AMQP *priority* 0 to 9 (None: not given).

    7-9 high, 4-6 and 0 or unset medium, 1-3 low.  ``priority_order="redis"`` reverses the
    sense, for programs written for kombu's Redis transport, where 0 is the most urgent; there
    0 means high.  With one level everything is medium.

    *max_priority* is the queue's ``x-max-priority``: its priorities go from 0, the least urgent
    and what a message without one has, to that number, in three parts.

    Raises `PreconditionFailed` for a *priority* that is no number.
    """
    if options.priority_levels == 1:
        return "medium"
    if priority is not None and not (isinstance(priority, (int, float)) and priority == priority):
        raise PreconditionFailed(f"expected a message's priority to be a number, got {priority!r}")
    if max_priority is not None and options.priority_order == "amqp":
        priority = min(max(priority or 0, 0), max_priority)
        return LEVELS[2 - int(priority * 3 // (max_priority + 1))]
    if priority is None:
        return "medium"
    if options.priority_order == "redis":
        priority = 9 - priority
    elif priority <= 0:
        return "medium"
    if priority >= 7:
        return "high"
    return "medium" if priority >= 4 else "low"


def levels(options: Options) -> tuple[Level, ...]:
    """Return the levels in use, the most urgent first."""
    return LEVELS if options.priority_levels > 1 else ("medium",)


@dataclass(frozen=True, slots=True)
class Names:
    """Every name of one namespace."""

    namespace: str

    def stream(self, level: Level) -> str:
        return f"{self.namespace}_{level}"

    @property
    def dead_letter_stream(self) -> str:
        return f"{self.namespace}_dlq"

    @property
    def registry_stream(self) -> str:
        return f"{self.namespace}_registry"

    @property
    def mirror_stream(self) -> str:
        return f"{self.namespace}_mirror"

    def subject(self, level: Level, queue_name: str) -> str:
        return f"{self.namespace}.{level}.{queue_token(queue_name)}"

    def delay_subject(self, level: Level, queue_name: str, task_id: str, message_id: str) -> str:
        """Subject on which one delayed message waits: one schedule per subject, so the message
        id is in it; the queue and the task id are there to be found by them.  Ids that make no
        fit token are digested."""
        tokens = ".".join(_short_token(part) for part in (queue_name, task_id, message_id))
        return f"{self.namespace}.{level}.@delay.{tokens}"

    def delayed(self, level: Level, queue_name: str | None = None) -> str:
        """Filter for the delayed messages of one level, of one queue if named."""
        rest = f"{encode_token(queue_name)}.>" if queue_name is not None else ">"
        return f"{self.namespace}.{level}.@delay.{rest}"

    def dead_letter_subject(self, queue_name: str) -> str:
        return f"{self.namespace}.dlq.{encode_token(queue_name)}"

    @property
    def registry(self) -> str:
        return f"{self.namespace}.registry"

    def registry_queue(self, queue_name: str) -> str:
        return _checked(f"{self.registry}.queue.{encode_token(queue_name)}", queue_name)

    def registry_exchange(self, exchange: str) -> str:
        return _checked(f"{self.registry}.exchange.{encode_token(exchange)}", exchange)

    def registry_binding(self, exchange: str, queue_name: str, key: str) -> str:
        tokens = ".".join(encode_token(part) for part in (exchange, queue_name, key))
        return _checked(f"{self.registry}.binding.{tokens}", exchange, queue_name, key)

    def transient_queue(self, queue_name: str) -> str:
        """Subject on which a transient queue hears the default exchange."""
        return _checked(f"{self.namespace}.q.{encode_token(queue_name)}", queue_name)

    def exchange(self, exchange: str, suffix: str) -> str:
        """Subject of an exchange; *suffix* comes from `routing`, and may be empty."""
        base = f"{self.namespace}.x.{encode_token(exchange)}"
        return _checked(f"{base}.{suffix}" if suffix else base, exchange, suffix)


def _checked(subject: str, *names: str) -> str:
    """Return *subject*, or raise `PreconditionFailed`: the server would close the connection."""
    if len(subject) > MAX_SUBJECT_BYTES:
        told = " and ".join(shortened(name) for name in names if name)
        raise PreconditionFailed(
            f"{told} is too long for a NATS subject: it takes {len(subject)} bytes encoded, "
            f"of at most {MAX_SUBJECT_BYTES}"
        )
    return subject


def level_stream(options: Options, level: Level, api_level: int) -> api.StreamConfig:
    """Return the configuration of one level's work queue.

    *api_level* is the server's (ADR-44): message TTL needs 1, schedules need 2.  Asking an older
    server is no error there, it drops the field silently, so it is not asked.
    """
    names = Names(options.namespace)
    limited = options.stream_max_bytes is not None
    return api.StreamConfig(
        name=names.stream(level),
        subjects=[f"{options.namespace}.{level}.>"],
        retention=api.RetentionPolicy.WORK_QUEUE,
        # A full stream refuses messages; dropping the oldest would lose what was confirmed.
        # The server has no schedules in such a stream (10052), so a limit costs them.
        discard=api.DiscardPolicy.NEW if limited else api.DiscardPolicy.OLD,
        allow_msg_ttl=True if api_level >= API_LEVEL_TTL else None,
        allow_msg_schedules=True if api_level >= API_LEVEL_SCHEDULES and not limited else None,
        # A replayed dead letter and the mark that it was replayed are one write (celery_ext.dlq).
        allow_atomic=True if api_level >= API_LEVEL_ATOMIC else None,
        duplicate_window=options.dedup_window,
        **_shared(options, options.stream_max_bytes, options.stream_max_age),
    )


def dead_letter_stream(options: Options, api_level: int) -> api.StreamConfig:
    """Return the configuration of the dead-letter stream: kept by age and size, oldest go first."""
    names = Names(options.namespace)
    return api.StreamConfig(
        name=names.dead_letter_stream,
        subjects=[f"{options.namespace}.dlq.>"],
        retention=api.RetentionPolicy.LIMITS,
        duplicate_window=_death_window(options),
        **_shared(options, options.dead_letter_max_bytes, options.dead_letter_max_age),
    )


def _death_window(options: Options) -> float:
    """Return for how long a death is known again: past the redelivery of its message."""
    window = max(options.dedup_window, DEATH_WINDOW, 2 * options.visibility_timeout)
    oldest = options.dead_letter_max_age
    return window if oldest is None else min(window, oldest)


def registry_stream(options: Options, api_level: int) -> api.StreamConfig:
    """Return the configuration of the registry: one message per subject, never aged out."""
    names = Names(options.namespace)
    return api.StreamConfig(
        name=names.registry_stream,
        subjects=[f"{names.registry}.>"],
        retention=api.RetentionPolicy.LIMITS,
        max_msgs_per_subject=1,
        allow_msg_ttl=True if api_level >= API_LEVEL_TTL else None,
        duplicate_window=1.0,
        **_shared(options, None, None),
    )


def _shared(options: Options, max_bytes: int | None, max_age: float | None) -> dict[str, Any]:
    """Return the fields every stream has; limits of None mean unlimited."""
    return {
        "storage": api.StorageType(options.stream_storage),
        "num_replicas": options.stream_replicas,
        "max_bytes": max_bytes if max_bytes is not None else -1,
        "max_age": max_age if max_age is not None else 0,
        "allow_direct": True,
        "max_consumers": -1,
        "max_msgs": -1,
    }


def consumer_config(
    options: Options, level: Level, queue_name: str, *, inactive_after: float | None = None
) -> api.ConsumerConfig:
    """Return the configuration of the pull consumer of one queue and level.

    *inactive_after*: seconds without a pull after which the server removes the consumer, 0 for
    never, None for what a consumer that is there already has.

    ``max_deliver`` stays -1: a message at the server's limit would stay in the stream for ever
    without being delivered (nats-server#5564); the transport counts and dead-letters instead.
    ``max_ack_pending`` is -1: reaching a limit is a silent stall (nats-server#2488), and prefetch
    bounds what each worker holds.
    """
    token = queue_token(queue_name)
    return api.ConsumerConfig(
        name=token,
        durable_name=token,
        filter_subject=f"{options.namespace}.{level}.{token}",
        ack_policy=api.AckPolicy.EXPLICIT,
        deliver_policy=api.DeliverPolicy.ALL,
        replay_policy=api.ReplayPolicy.INSTANT,
        ack_wait=options.visibility_timeout,
        max_deliver=-1,
        max_ack_pending=-1,
        inactive_threshold=inactive_after,
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of a stream or consumer that is not as this transport would make it."""

    field: str
    found: Any
    expected: Any


#: What makes a stream ours; any other field is the operator's to choose.
STREAM_FIELDS = (
    "subjects",
    "retention",
    "discard",
    "storage",
    "num_replicas",
    "max_age",
    "max_bytes",
    "max_msgs_per_subject",
    "duplicate_window",
    "allow_direct",
    "allow_msg_ttl",
    "allow_msg_schedules",
    "allow_atomic",
)
CONSUMER_FIELDS = (
    "filter_subject",
    "ack_policy",
    "ack_wait",
    "max_deliver",
    "max_ack_pending",
    "inactive_threshold",
)


def differences(found: api.Base, expected: api.Base) -> list[Difference]:
    """Return the fields in which a server's answer is not what was asked for.

    A field that is not asked for (None) matches anything; 2.9 drops unknown fields silently, so
    a comparison with the answer is the only proof.
    """
    fields = STREAM_FIELDS if isinstance(expected, api.StreamConfig) else CONSUMER_FIELDS
    result = []
    for field in fields:
        want, have = getattr(expected, field), getattr(found, field)
        if want is None or _plain(want) == _plain(have):
            continue
        result.append(Difference(field, _plain(have), _plain(want)))
    return result


def _plain(value: Any) -> Any:
    """Return *value* as the JSON API shows it: enums by value, no difference between 0 and 0.0."""
    value = getattr(value, "value", value)
    return None if value in (0, 0.0, False, None) else value
