"""Every error this transport raises, by who can do something about it.

| branch | what happened | who acts | kombu and Celery |
| --- | --- | --- | --- |
| `OptionsError` | an option or the URL is wrong | you | raise it at once |
| `ConnectionLost` | the broker is away, or did not answer | nobody, wait | reconnect, try again |
| `ConnectionRejected` | credentials or TLS do not fit | you or the operator | raise it at once |
| `ChannelFailed` | the broker said no to one operation | the docstring says | raise it at once |
| `MalformedMessage` | a stored message is no kombu message | nobody | never see it |

The tuples at the end are what `Transport` shows to kombu.  They follow py-amqp: a refused login
is in none of the recoverable ones, so that a worker with a wrong password stops with a clear
message, where a lost connection is retried with kombu's back-off.  `ConnectionRejected` is kept
out of `CONNECTION_ERRORS` too: Celery's consumer restarts on those without any pause, which would
be several refused logins a second for ever.

An instance carries its facts as attributes and as `args`, in the order of its constructor, so
that it survives pickle (between processes) and Celery's JSON result format, which rebuilds an
exception as ``cls(*args)``.  No error holds a password, a token or a message body.
"""

from __future__ import annotations

import difflib
import pickle
import reprlib
from collections.abc import Iterable
from typing import Any

from amqp.exceptions import RecoverableConnectionError
from kombu.exceptions import (
    ChannelError,
    ConnectionError,
    DecodeError,
    KombuError,
    OperationalError,
)

__all__ = [
    "CHANNEL_ERRORS",
    "CONNECTION_ERRORS",
    "RECOVERABLE_CHANNEL_ERRORS",
    "RECOVERABLE_CONNECTION_ERRORS",
    "ApiError",
    "AuthenticationFailed",
    "CertificateRejected",
    "ChannelFailed",
    "ConnectionLost",
    "ConnectionRejected",
    "ConsumerGone",
    "ExchangeMissing",
    "FallbackLost",
    "JetStreamTransportError",
    "JetStreamUnavailable",
    "MalformedMessage",
    "MessageTooLarge",
    "NoResponders",
    "NoRoute",
    "NoServers",
    "NotSupported",
    "OptionsError",
    "PermissionDenied",
    "PreconditionFailed",
    "ProtocolError",
    "PublishRejected",
    "PublishTimeout",
    "QueueMissing",
    "QueueNameInvalid",
    "RequestTimeout",
    "ResourceLocked",
    "TLSNotOffered",
    "TopologyMismatch",
    "shortened",
]


class JetStreamTransportError(KombuError):
    """Root of every error of this transport; never raised itself.

    Cause: see the class that was raised.
    Remedy: catch this one to catch them all, or one of the branches to decide what to do.
    """

    def __init__(self, sentence: str, *facts: object) -> None:
        #: What `str()` gives: what happened, and what to do if that is known.
        self.sentence = sentence
        self.args = facts

    def __str__(self) -> str:
        return self.sentence


class OptionsError(JetStreamTransportError, ValueError):
    """An option or a part of the broker URL is wrong.

    Cause: a name nobody knows, a value out of range, the same thing said twice, or a URL that
    cannot be read.  `option` is the name of the option or of the part of the URL.
    Remedy: correct ``broker_url``, ``broker_transport_options`` or ``broker_use_ssl`` as the
    message says.
    """

    def __init__(self, problem: str, option: str | None = None) -> None:
        self.problem = problem
        self.option = option
        super().__init__(problem, problem, option)

    @classmethod
    def unknown(
        cls, kind: str, name: object, known: Iterable[str], where: str = ""
    ) -> OptionsError:
        """Return "unknown *kind* 'name'" with the nearest of the *known* names, if one is near."""
        close = difflib.get_close_matches(str(name)[:64], sorted(known), n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        return cls(f"unknown {kind} {shortened(name)}{where}{hint}", str(name))

    @classmethod
    def bad_value(cls, option: str, where: str, expected: str, got: str) -> OptionsError:
        """Return "expected 'option' to be …, got …"; *got* is shown as it is, so no secrets."""
        return cls(f"expected {option!r}{where} to be {expected}, got {got}", option)


class ConnectionLost(JetStreamTransportError, RecoverableConnectionError):
    """The connection to the server broke, or an answer did not come.

    Cause: the server stopped, the network failed, or the server closed the connection.
    Remedy: none needed, kombu and Celery connect again and repeat the operation.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self._set(f"connection lost: {reason}", reason)

    def _set(self, sentence: str, *facts: object) -> None:
        # py-amqp's constructor sets what readers of AMQP errors look at (reply_code, reply_text,
        # method_name) and, as any exception's, `args`; so ours comes last.
        RecoverableConnectionError.__init__(self, sentence)
        JetStreamTransportError.__init__(self, sentence, *facts)


class NoServers(ConnectionLost):
    """None of the servers could be reached.

    Cause: the server does not run, another host or port is meant, or a firewall is between;
    `causes` has a pair of server and exception for each attempt.
    Remedy: start the server (``python -m kombu_jetstream.server`` for development) or correct the
    host and port in ``broker_url``; kombu keeps trying as its retry settings say.
    """

    def __init__(self, causes: Iterable[tuple[str, BaseException | str]] = ()) -> None:
        self.causes = [(_without_credentials(server), cause) for server, cause in causes]
        told = "; ".join(f"{server}: {_told(cause)}" for server, cause in self.causes)
        self.reason = told or "no server is known"
        self._set(
            f"no NATS server could be reached ({self.reason})",
            [(server, _told(cause)) for server, cause in self.causes],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The exception of a driver or of OpenSSL may refuse to be pickled; its text does not.
        causes = [
            (server, cause if _is_picklable(cause) else _told(cause))
            for server, cause in self.causes
        ]
        return type(self), self.args, {**self.__dict__, "causes": causes}


class ProtocolError(ConnectionLost):
    """What the server sent is not the NATS protocol.

    Cause: the port belongs to another service (the monitoring port 8222, HTTP, AMQP), or
    something on the way changes the bytes.
    Remedy: correct the port in ``broker_url``; a TLS-first server needs
    ``tls_handshake_first``.
    """

    def __init__(self, problem: str) -> None:
        self.reason = problem
        self.problem = problem
        self._set(f"the server does not speak the NATS protocol: {problem}", problem)


class JetStreamUnavailable(ConnectionLost):
    """The server answers, but JetStream is not there.

    Cause: JetStream is not enabled on the server or for the account, or the server shut it down
    because its disk is full.  `detail` is the server's description, if it gave one.
    Remedy: start ``nats-server -js`` or add a ``jetstream {}`` block to its configuration; for an
    account add ``jetstream: enabled`` to it.  Retried, as another server may have it.
    """

    def __init__(self, server: str, detail: str = "") -> None:
        self.server = _without_credentials(server)
        self.detail = detail
        self.reason = f"server {self.server} has no JetStream"
        if detail:
            self.reason += f" ({detail})"
        self._set(
            f"{self.reason}; start it with -js or add `jetstream {{}}` to its configuration, and "
            "`jetstream: enabled` to the account if it has accounts",
            self.server,
            detail,
        )


class RequestTimeout(ConnectionLost):
    """The server did not answer a request in time.

    Cause: the server is overloaded or choosing a leader, or a permission for the reply subject
    is missing.
    Remedy: none needed if it is rare; otherwise look at the server's log and load.
    """

    def __init__(self, subject: str, timeout: float) -> None:
        self.subject = subject
        self.timeout = timeout
        self.reason = f"no answer to {subject!r} within {timeout:g} s"
        self._set(self.reason, subject, timeout)


class NoResponders(ConnectionLost):
    """Nobody listens on the subject of a request or a confirmed publish.

    Cause: the stream does not exist, or its replicas are choosing a leader (seconds).
    Remedy: wait; if it stays, let the transport create the stream (``provision``) or create it
    with ``celery jetstream provision``.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.reason = f"nobody listens on {subject!r}: no stream, or it has no leader now"
        if subject.startswith("$JS.") and not subject.startswith("$JS.API."):
            self.reason += "; or another jetstream_domain than the servers'"
        self._set(self.reason, subject)


class PublishTimeout(ConnectionLost):
    """No confirm came for a publish within ``publish_timeout``.

    Cause: the stream had no leader, or the server was away.  The message may be stored or not.
    Remedy: publish again; kombu and Celery do.  The same message id within ``dedup_window``
    is stored once.
    """

    def __init__(self, subject: str, timeout: float) -> None:
        self.subject = subject
        self.timeout = timeout
        self.reason = f"no confirm for a message to {subject!r} within {timeout:g} s"
        self._set(f"{self.reason}, it may be stored or not", subject, timeout)


class ConsumerGone(ConnectionLost):
    """The consumer or the stream of a queue was deleted while it was in use.

    Cause: somebody deleted the queue, or an operator the stream or the consumer.
    Remedy: none needed, the worker reconnects and declares its queues again.
    """

    def __init__(self, queue: str, detail: str = "") -> None:
        self.queue = queue
        self.detail = detail
        self.reason = f"the consumer of queue {queue!r} is gone"
        if detail:
            self.reason += f": {detail}"
        self._set(self.reason, queue, detail)


class FallbackLost(ConnectionLost):
    """The fallback Redis cannot be reached either, did not confirm, or refused.

    Cause: `problem` is what Redis or the way to it said, `jetstream` why JetStream is away, empty
    when only Redis is.
    Remedy: bring one of the two back; kombu and Celery keep trying as their retry settings say.
    """

    def __init__(self, problem: str, jetstream: str = "", *, refused: bool = False) -> None:
        self.problem = problem
        self.jetstream = jetstream
        if jetstream:
            either = "can be used" if refused else "can be reached"
            self.reason = (
                f"neither JetStream nor the fallback Redis {either} "
                f"(JetStream: {jetstream}; Redis: {problem})"
            )
        else:
            what = "refuses" if refused else "cannot be reached"
            self.reason = f"the fallback Redis {what} ({problem})"
        self._set(self.reason, problem, jetstream)


class ConnectionRejected(JetStreamTransportError, OperationalError):
    """The server is there, but the two ends do not accept each other; a branch, never raised.

    Cause: wrong credentials, or TLS settings that do not fit.
    Remedy: see the class.  Not retried.  It is kombu's `OperationalError`, as any other failure
    to reach the broker is for the caller of ``delay()``.
    """


class AuthenticationFailed(ConnectionRejected):
    """The server refused the credentials, or asked for some and none are set.

    Cause: a wrong or missing user, password, token, nkey seed or credentials file, or an expired
    one.  Raised while connecting only; a server that drops a live connection because its
    credentials expired gives `ConnectionLost`, and this one if they are refused again.
    Remedy: correct the URL, ``credentials_file`` or ``nkey_seed_file``.
    """

    def __init__(self, server: str, reason: str = "") -> None:
        self.server = _without_credentials(server)
        self.reason = reason
        if reason.startswith("cannot read"):
            told = f"cannot log in to server {self.server}: {reason}"
        else:
            why = f" ({reason})" if reason else ""
            told = (
                f"server {self.server} refused the credentials{why}; look at the user, password or "
                "token of the URL, at credentials_file and at nkey_seed_file"
            )
        super().__init__(told, self.server, reason)


class TLSNotOffered(ConnectionRejected):
    """TLS is demanded, and the server does not offer it.

    Cause: a ``jetstreams://`` URL or ``broker_use_ssl``, and a server without a ``tls`` block, or
    somebody in the middle who removed the offer.  No credential was sent.
    Remedy: turn on TLS in the server; or ``jetstream://`` without ``broker_use_ssl``, if the
    network may be trusted.
    """

    def __init__(self, server: str) -> None:
        self.server = _without_credentials(server)
        super().__init__(
            f"TLS is demanded and server {self.server} does not offer it, so no credential was "
            "sent; turn on TLS in the server, or use jetstream:// without broker_use_ssl",
            self.server,
        )


class CertificateRejected(ConnectionRejected):
    """A certificate was not accepted, the server's by us or ours by the server.

    Cause: an unknown authority, another host name, an expired certificate, or a server that
    demands a client certificate.
    Remedy: ``ca_certs``, ``certfile`` and ``keyfile`` in ``broker_use_ssl``; ``tls_hostname`` if
    the certificate names another host than the URL.
    """

    def __init__(self, server: str, reason: str) -> None:
        self.server = _without_credentials(server)
        self.reason = reason
        super().__init__(
            f"the TLS handshake with {self.server} failed: {reason}; look at ca_certs, certfile "
            "and keyfile of broker_use_ssl, and at tls_hostname",
            self.server,
            reason,
        )


class ChannelFailed(JetStreamTransportError, ChannelError):
    """The broker refused one operation, the connection goes on; a branch, never raised.

    Cause: see the class.  `reply_code` is the code AMQP has for the same case.
    Remedy: see the class.  Not retried, as the answer would be the same.
    """

    def __init__(self, sentence: str, *facts: object) -> None:
        ChannelError.__init__(self, sentence, reply_code=self.code)
        JetStreamTransportError.__init__(self, sentence, *facts)


class PermissionDenied(ChannelFailed):
    """The server's permissions forbid a subject to this user.

    Cause: the account's ``permissions`` lack the subject; `operation` is ``publish`` or
    ``subscribe``.
    Remedy: ``celery jetstream permissions`` prints what producers, workers and operators need.
    """

    code = 403

    def __init__(self, operation: str, subject: str) -> None:
        self.operation = operation
        self.subject = subject
        super().__init__(
            f"this user may not {operation} to {subject!r}; "
            "`celery jetstream permissions` prints what the server must allow",
            operation,
            subject,
        )


class QueueMissing(ChannelFailed):
    """The queue does not exist.

    Cause: a passive declare, a consumer or a ``get`` for a queue nobody declared, or one that was
    deleted meanwhile.
    Remedy: declare it first, or correct the name.
    """

    code = 404

    def __init__(self, queue: str) -> None:
        self.queue = queue
        super().__init__(f"no queue {queue!r}", queue)


class ExchangeMissing(ChannelFailed):
    """The exchange does not exist.

    Cause: a passive declare, or a publish to an exchange nobody declared.
    Remedy: declare it first, or correct the name.
    """

    code = 404

    def __init__(self, exchange: str) -> None:
        self.exchange = exchange
        super().__init__(f"no exchange {exchange!r}", exchange)


class NoRoute(ChannelFailed):
    """No queue takes a message that was published with ``mandatory=True``.

    Cause: nothing is bound to the exchange with a matching key.  It is not raised, but handed to
    the ``basic_return`` callbacks, as AMQP does.
    Remedy: declare the queue with its binding before publishing.
    """

    code = 312

    def __init__(self, exchange: str, routing_key: str) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        super().__init__(
            f"no queue takes a message to exchange {exchange!r} with routing key {routing_key!r}",
            exchange,
            routing_key,
        )


class ResourceLocked(ChannelFailed):
    """The queue is exclusive to another connection, or to another consumer.

    Cause: ``exclusive=True`` and a second user of the same queue.
    Remedy: another queue name for each user, or a queue that is not exclusive.
    """

    code = 405

    def __init__(self, queue: str) -> None:
        self.queue = queue
        super().__init__(f"queue {queue!r} is exclusive to another connection or consumer", queue)


class PreconditionFailed(ChannelFailed):
    """What is asked for contradicts what exists.

    Cause: an exchange declared again with another type, a delete with ``if_empty`` or
    ``if_unused`` of a queue that is not, or an unknown delivery tag.
    Remedy: use the same declaration everywhere, or delete the old one first.
    """

    code = 406

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(problem, problem)


class QueueNameInvalid(ChannelFailed):
    """The queue's name cannot become a NATS subject and consumer name.

    Cause: it is empty, or too long once its odd characters are encoded.
    Remedy: a shorter name.
    """

    code = 406

    def __init__(self, queue: str, problem: str) -> None:
        self.queue = queue
        self.problem = problem
        super().__init__(f"queue name {queue!r} cannot be used: {problem}", queue, problem)


class TopologyMismatch(ChannelFailed):
    """A stream or consumer exists with other settings than this transport would give it.

    Cause: an operator or an older version made it, or two programs use one namespace with
    different options.  `differences` has field, found and expected.
    Remedy: ``celery jetstream doctor`` shows and explains them; give all programs the same
    options, or a ``namespace`` of their own.
    """

    code = 406

    def __init__(self, what: str, differences: Iterable[tuple[str, object, object]]) -> None:
        self.what = what
        self.differences = [(field, found, expected) for field, found, expected in differences]
        told = " and ".join(
            f"{field} {found!r}, expected {expected!r}"
            for field, found, expected in self.differences
        )
        super().__init__(
            f"{what} has {told or 'other settings'}; run `celery jetstream doctor`",
            what,
            self.differences,
        )


class MessageTooLarge(ChannelFailed):
    """The message is larger than the server takes; nothing was sent.

    Cause: body, envelope and headers together exceed the server's ``max_payload`` (1 MiB unless
    configured) or the stream's ``max_msg_size``.  The server would close the connection, so the
    transport checks first.
    Remedy: pass a reference instead of the data, compress (``task_compression``), or raise
    ``max_payload`` in the server (8 MiB at most is advised by NATS).
    """

    code = 311

    def __init__(self, size: int, limit: int, limit_name: str = "max_payload") -> None:
        #: Bytes.
        self.size = size
        #: Bytes.
        self.limit = limit
        self.limit_name = limit_name
        super().__init__(
            f"message is {_grouped(size)} bytes, the server takes at most {_grouped(limit)} "
            f"({limit_name})",
            size,
            limit,
            limit_name,
        )


class PublishRejected(ChannelFailed, OperationalError):
    """The stream refused to store a message.

    Cause: a limit is reached (10077: ``stream_max_bytes`` or ``x-max-length``; 10023, 10047: the
    server's disk; 10002: the account's quota).  `err_code` is JetStream's number.
    Remedy: consume, purge or enlarge.  Not retried here, as a full stream stays full; it is
    kombu's `OperationalError`, as any other failure to hand a task over.
    """

    code = 506

    def __init__(self, subject: str, err_code: int, description: str) -> None:
        self.subject = subject
        self.err_code = err_code
        self.description = description
        super().__init__(
            f"the stream refused a message to {subject!r}: {description} ({err_code})",
            subject,
            err_code,
            description,
        )


class ApiError(ChannelFailed):
    """JetStream answered a request with an error this transport has no class for.

    Cause: `description` is the server's; `err_code` is JetStream's number, `code` the HTTP-like
    class (400, 404, 500, 503).
    Remedy: look up `err_code` in the server's ``errors.json``; 10026 and 10027 are limits of the
    account (consumers, streams).
    """

    def __init__(self, code: int, err_code: int, description: str) -> None:
        self.code = code
        self.err_code = err_code
        self.description = description
        super().__init__(
            f"JetStream refused: {description} ({code}, {err_code})", code, err_code, description
        )


class NotSupported(ChannelFailed):
    """What is asked for does not exist here.

    Cause: a feature JetStream, this server's version or this transport lacks.
    Remedy: `remedy` says what to use instead.
    """

    code = 540

    def __init__(self, feature: str, remedy: str = "") -> None:
        self.feature = feature
        self.remedy = remedy
        told = f"; {remedy}" if remedy else ""
        super().__init__(f"{feature} is not supported{told}", feature, remedy)


class MalformedMessage(JetStreamTransportError, DecodeError):
    """A message in a queue is not a kombu message.

    Cause: another program published to the queue's subject.
    Remedy: none needed, it goes to the dead letters with the reason ``malformed``; the sender
    needs `kombu`, or the envelope of the reference.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(problem, problem)


def shortened(value: object) -> str:
    """Return the `repr` of a value for a message, cut where it gets long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _without_credentials(server: str) -> str:
    """Return *server* without scheme and user info, should a caller pass a URL."""
    return server.rpartition("@")[2].rpartition("://")[2]


def _told(cause: BaseException | str) -> str:
    return cause if isinstance(cause, str) else str(cause) or type(cause).__name__


def _is_picklable(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # whatever a foreign __reduce__ raises, the answer is no
        return False
    return True


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


#: The connection is of no use any more: kombu closes it and connects again.  `OSError` is kombu's
#: convention (py-amqp, redis) for what its own loops raise; it includes `socket.timeout` and
#: `ssl.SSLError`, which the connection translates before they get here.
CONNECTION_ERRORS: tuple[type[BaseException], ...] = (ConnectionLost, ConnectionError, OSError)

#: One operation failed, the connection is sound.
CHANNEL_ERRORS: tuple[type[BaseException], ...] = (ChannelFailed, ChannelError)

#: Worth trying again after a reconnect; `Connection.ensure` does, with kombu's back-off.
RECOVERABLE_CONNECTION_ERRORS: tuple[type[BaseException], ...] = (
    ConnectionLost,
    RecoverableConnectionError,
    OSError,
)

#: None: `Connection.ensure` repeats these at once and without a pause, and each of ours would
#: fail the same way.
RECOVERABLE_CHANNEL_ERRORS: tuple[type[BaseException], ...] = ()
