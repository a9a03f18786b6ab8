"""The half of a channel that declares: exchanges, queues and bindings, AMQP's verbs for them.

Here it is decided of which kind a queue is.  One that belongs to a connection is transient, a core
NATS subscription (`transient`); every other lives in JetStream and is known to all (`registry`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from amqp.protocol import queue_declare_ok_t
from kombu.transport import base
from kombu.utils.uuid import uuid

from .arguments import QueueArguments
from .errors import (
    ConnectionLost,
    ExchangeMissing,
    NotSupported,
    PreconditionFailed,
    QueueMissing,
)
from .registry import Queue
from .routing import Binding, Exchange

if TYPE_CHECKING:
    from .session import Session

__all__ = ["DEFAULT_EXCHANGES", "Declaring"]

#: Exchanges every AMQP broker has.
DEFAULT_EXCHANGES = {
    "amq.direct": Exchange("amq.direct"),
    "amq.fanout": Exchange("amq.fanout", "fanout"),
    "amq.topic": Exchange("amq.topic", "topic"),
}


class Declaring(base.StdChannel):
    """Declares, binds, purges and deletes."""

    def __init__(self, session: Session) -> None:
        #: None once closed, as kombu's virtual channels have it
        self.connection: Session | None = session
        self.closed = False
        self._session = session
        #: auto-delete queues that may yet become transient, see `queue_declare`; of the whole
        #: connection, as another channel may be the next to use one
        self._undecided = session.undecided

    def _open(self) -> Session:
        """Return the session, or raise `ConnectionLost` if the channel was closed."""
        if self.closed or self.connection is None:
            raise ConnectionLost("the channel is closed")
        return self._session

    # -- exchanges -----------------------------------------------------------------------------

    def exchange_declare(
        self,
        exchange: str = "",
        type: str = "direct",
        durable: bool = False,
        auto_delete: bool = False,
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        passive: bool = False,
        **kwargs: Any,
    ) -> None:
        """Declare *exchange*; with *passive*, `ExchangeMissing` if it is not there."""
        session = self._open()
        if not exchange or exchange in DEFAULT_EXCHANGES:
            return
        if passive:
            self._known_exchange(exchange)
            return
        session.registry.add_exchange(
            Exchange(exchange, type or "direct", durable, auto_delete, arguments or {})
        )

    def _known_exchange(self, exchange: str) -> Exchange:
        registry = self._open().registry
        registry.refresh()
        known = registry.table.exchanges.get(exchange) or DEFAULT_EXCHANGES.get(exchange)
        if known is None:
            self._session.nats.round_trip(self._session.options.publish_timeout)
            known = registry.table.exchanges.get(exchange)
        if known is None:
            raise ExchangeMissing(exchange)
        return known

    def exchange_delete(
        self, exchange: str, if_unused: bool = False, nowait: bool = False, **kwargs: Any
    ) -> None:
        """Delete *exchange* and its bindings; the queues stay."""
        registry = self._open().registry
        registry.refresh()
        if if_unused and registry.table.bindings(exchange=exchange):
            raise PreconditionFailed(f"exchange {exchange!r} is in use")
        registry.delete_exchange(exchange)

    def exchange_bind(self, *args: Any, **kwargs: Any) -> None:
        raise NotSupported("binding an exchange to an exchange", "bind the queues to both")

    exchange_unbind = exchange_bind

    # -- queues --------------------------------------------------------------------------------

    def prepare_queue_arguments(
        self, arguments: dict[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Turn kombu's ``expires``, ``message_ttl`` … into RabbitMQ's arguments."""
        prepared: dict[str, Any] = base.to_rabbitmq_queue_arguments(arguments or {}, **kwargs)
        return prepared

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> queue_declare_ok_t:
        """Declare *queue* and return its name, ready messages and consumers.

        A queue of one connection is transient, a core NATS subscription: exclusive ones, and those
        that are not durable and expire.  All others live in JetStream.  An auto-delete queue
        becomes transient, too, if the next thing done is to bind it to a fanout exchange
        (Broadcast); in JetStream it would be one queue that all share.
        """
        session = self._open()
        queue = queue or f"amq.gen-{uuid()}"
        if passive:
            return self._declared(queue)
        if auto_delete and durable and self._is_waited_for(queue, arguments or {}):
            return queue_declare_ok_t(queue, 0, 1)
        parsed = QueueArguments.parse(queue, arguments)
        self._decide(but=queue)
        if queue in session.transient:
            session.transient[queue].touch()
            return queue_declare_ok_t(queue, len(session.transient[queue]), 0)
        if exclusive or (not durable and parsed.expires is not None):
            self._make_transient(queue, auto_delete, parsed)
            return queue_declare_ok_t(queue, 0, 0)
        if auto_delete:
            session.registry.load()
            if queue not in session.registry.queues:
                self._undecided[queue] = {"arguments": arguments, "parsed": parsed}
                return queue_declare_ok_t(queue, 0, 0)
        return self._make_durable(queue, auto_delete, arguments)

    def _make_transient(self, queue: str, auto_delete: bool, parsed: QueueArguments) -> None:
        if parsed.dead_letter_exchange is not None:
            raise NotSupported(
                f"'x-dead-letter-exchange' of queue {queue!r}, which is one connection's",
                "what such a queue refuses is dropped; make it durable",
            )
        self._session.add_transient(
            queue,
            auto_delete=auto_delete,
            expires=parsed.expires,
            message_ttl=parsed.message_ttl,
        )

    def _make_durable(
        self, queue: str, auto_delete: bool, arguments: dict[str, Any] | None
    ) -> queue_declare_ok_t:
        session = self._session
        record = Queue(queue, auto_delete, dict(arguments or {}))
        if auto_delete and session.options.provision == "off":
            raise NotSupported(
                f"queue {queue!r}, which comes and goes with its clients, with provision='off'",
                "nobody can make it beforehand; for results use another backend than rpc://",
            )
        if auto_delete and record.wants.max_priority is not None:
            raise NotSupported(
                f"'x-max-priority' of queue {queue!r}, which is auto-delete",
                "such a queue has one level; leave out auto_delete, or the priorities",
            )
        counts = session.jetstream.ensure_queue(
            queue, auto_delete=auto_delete, inactive_after=record.inactive_after
        )
        session.registry.add_queue(record)
        return queue_declare_ok_t(queue, counts.ready, counts.waiting_pulls)

    def _is_waited_for(self, queue: str, arguments: dict[str, Any]) -> bool:
        """Tell whether a consumer of this process shows that *queue* is there, and empty.

        Celery declares the queue of ``rpc://`` results with each task it sends, because another
        client might have deleted it: that is in the registry's news, which are read first.
        """
        session = self._session
        if not session.ledger.is_waited_for(queue, time.monotonic()):
            return False
        session.registry.refresh()
        known = session.registry.queues.get(queue)
        return known is not None and known.auto_delete and known.arguments == arguments

    def _decide(self, but: str | None = None) -> None:
        """Make auto-delete queues JetStream ones that were not bound to a fanout exchange."""
        for queue in [name for name in self._undecided if name != but]:
            self._make_durable(queue, True, self._undecided.pop(queue)["arguments"])

    def _declared(self, queue: str) -> queue_declare_ok_t:
        """Answer a passive declare."""
        session = self._session
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            self._take_in()
            return queue_declare_ok_t(queue, len(transient), transient.consumers)
        if not session.durable_routes("", queue):
            raise QueueMissing(queue)
        counts = session.jetstream.counts(queue, auto_delete=self._is_auto_delete(queue))
        if counts is None:
            raise QueueMissing(queue)
        return queue_declare_ok_t(queue, counts.ready, counts.waiting_pulls)

    def _take_in(self) -> None:
        """Read what is on its way to transient queues."""
        session = self._session
        if session.nats.is_open:
            session.nats.round_trip(session.answer_timeout)

    def _is_auto_delete(self, queue: str) -> bool:
        record = self._session.registry.queues.get(queue)
        return record is not None and record.auto_delete

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Bind *queue* to *exchange*, so that *routing_key* reaches it."""
        session = self._open()
        if not exchange:  # every queue is bound to the default exchange by its name
            return
        known = self._known_exchange(exchange)
        undecided = self._undecided.get(queue)
        if undecided is not None and known.type == "fanout":
            del self._undecided[queue]
            self._make_transient(queue, True, undecided["parsed"])
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            transient.bind(exchange, known.type, routing_key)
            return
        if not session.durable_routes("", queue):
            raise QueueMissing(queue)
        session.registry.add_binding(Binding(exchange, routing_key, queue, known.type))

    def queue_unbind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        **kwargs: Any,
    ) -> None:
        """Undo `queue_bind`; no error if there is no such binding."""
        session = self._open()
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            transient.unbind(exchange, routing_key)
        else:
            session.registry.remove_binding(exchange, queue, routing_key)

    def queue_purge(self, queue: str, nowait: bool = False, **kwargs: Any) -> int:
        """Remove the messages of *queue* that are ready or delayed, and return their number."""
        session = self._open()
        self._decide()
        transient = session.transient.get(queue)
        if transient is not None:
            self._take_in()
            return transient.purge()
        if not session.durable_routes("", queue):
            raise QueueMissing(queue)
        return session.jetstream.purge(queue, auto_delete=self._is_auto_delete(queue))

    def queue_delete(
        self,
        queue: str,
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        **kwargs: Any,
    ) -> int:
        """Delete *queue* with its messages and bindings, and return how many messages it had.

        `PreconditionFailed` if it is not as *if_unused* or *if_empty* demand.  A queue that does
        not exist is no error, as in RabbitMQ.
        """
        session = self._open()
        self._undecided.pop(queue, None)
        transient = session.transient.get(queue)
        if transient is not None:
            if if_unused and transient.consumers:
                raise PreconditionFailed(f"queue {queue!r} is in use")
            if if_empty and len(transient):
                raise PreconditionFailed(f"queue {queue!r} is not empty")
            session.forget_transient(transient)
            return 0
        if not session.durable_routes("", queue):
            return 0
        auto_delete = self._is_auto_delete(queue)
        counts = session.jetstream.counts(queue, auto_delete=auto_delete)
        if counts is not None:
            if if_unused and counts.waiting_pulls:
                raise PreconditionFailed(f"queue {queue!r} is in use")
            if if_empty and (counts.ready or counts.in_flight or session.jetstream.delayed(queue)):
                raise PreconditionFailed(f"queue {queue!r} is not empty")
        session.registry.delete_queue(queue)
        session.jetstream.delete_queue(queue, auto_delete=auto_delete)
        return counts.ready if counts is not None else 0

    def get_bindings(self) -> list[dict[str, str]]:
        """Return the bindings of durable queues, as kombu's management API has them."""
        registry = self._open().registry
        registry.refresh()
        return [
            {"destination": b.queue, "source": b.exchange, "routing_key": b.key}
            for b in registry.table.bindings()
        ]
