from __future__ import annotations

import inspect
import json
import pickle
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import RecoverableConnectionError
from kombu.connection import Connection
from kombu.exceptions import ChannelError, DecodeError, KombuError, OperationalError
from kombu.exceptions import ConnectionError as KombuConnectionError
from kombu.transport import memory

from kombu_jetstream import errors

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}
BRANCHES = {"JetStreamTransportError", "ConnectionRejected", "ChannelFailed"}

INSTANCES = [
    (errors.OptionsError("unknown option 'x'", "x"), "unknown option 'x'"),
    (errors.ConnectionLost("end of file"), "connection lost: end of file"),
    (
        errors.NoServers([("a:4222", OSError(111, "Connection refused")), ("b:1", "timed out")]),
        "no NATS server could be reached (a:4222: [Errno 111] Connection refused; b:1: timed out)",
    ),
    (
        errors.ProtocolError("unknown operation b'HTTP/1.1'"),
        "the server does not speak the NATS protocol: unknown operation b'HTTP/1.1'",
    ),
    (
        errors.JetStreamUnavailable("a:4222"),
        "server a:4222 has no JetStream; start it with -js or add `jetstream {}` to its "
        "configuration, and `jetstream: enabled` to the account if it has accounts",
    ),
    (
        errors.JetStreamUnavailable("a:4222", "JetStream not enabled for account"),
        "server a:4222 has no JetStream (JetStream not enabled for account); start it with -js "
        "or add `jetstream {}` to its configuration, and `jetstream: enabled` to the account if "
        "it has accounts",
    ),
    (errors.RequestTimeout("$JS.API.INFO", 5.0), "no answer to '$JS.API.INFO' within 5 s"),
    (
        errors.NoResponders("celery.low.q"),
        "nobody listens on 'celery.low.q': no stream, or it has no leader now",
    ),
    (
        errors.PublishTimeout("celery.low.q", 10.0),
        "no confirm for a message to 'celery.low.q' within 10 s, it may be stored or not",
    ),
    (errors.ConsumerGone("q"), "the consumer of queue 'q' is gone"),
    (
        errors.FallbackLost("Connection refused"),
        "the fallback Redis cannot be reached (Connection refused)",
    ),
    (
        errors.FallbackLost("Connection refused", "a:4222: timed out"),
        "neither JetStream nor the fallback Redis can be reached "
        "(JetStream: a:4222: timed out; Redis: Connection refused)",
    ),
    (errors.ConsumerGone("q", "deleted"), "the consumer of queue 'q' is gone: deleted"),
    (
        errors.AuthenticationFailed("a:4222", "Authorization Violation"),
        "server a:4222 refused the credentials (Authorization Violation); look at the user, "
        "password or token of the URL, at credentials_file and at nkey_seed_file",
    ),
    (
        errors.TLSNotOffered("a:4222"),
        "TLS is demanded and server a:4222 does not offer it, so no credential was sent; "
        "turn on TLS in the server, or use jetstream:// without broker_use_ssl",
    ),
    (
        errors.CertificateRejected("a:4222", "certificate has expired"),
        "the TLS handshake with a:4222 failed: certificate has expired; look at ca_certs, "
        "certfile and keyfile of broker_use_ssl, and at tls_hostname",
    ),
    (
        errors.PermissionDenied("publish", "celery.low.q"),
        "this user may not publish to 'celery.low.q'; "
        "`celery jetstream permissions` prints what the server must allow",
    ),
    (errors.QueueMissing("q"), "no queue 'q'"),
    (errors.ExchangeMissing("x"), "no exchange 'x'"),
    (
        errors.NoRoute("x", "k"),
        "no queue takes a message to exchange 'x' with routing key 'k'",
    ),
    (errors.ResourceLocked("q"), "queue 'q' is exclusive to another connection or consumer"),
    (errors.PreconditionFailed("queue 'q' is not empty"), "queue 'q' is not empty"),
    (errors.QueueNameInvalid("", "it is empty"), "queue name '' cannot be used: it is empty"),
    (
        errors.TopologyMismatch(
            "stream 'celery_low'",
            [("retention", "limits", "workqueue"), ("num_replicas", 1, 3)],
        ),
        "stream 'celery_low' has retention 'limits', expected 'workqueue' and num_replicas 1, "
        "expected 3; run `celery jetstream doctor`",
    ),
    (
        errors.MessageTooLarge(1_400_000, 1_048_576),
        "message is 1 400 000 bytes, the server takes at most 1 048 576 (max_payload)",
    ),
    (
        errors.PublishRejected("celery.low.q", 10077, "maximum bytes exceeded"),
        "the stream refused a message to 'celery.low.q': maximum bytes exceeded (10077)",
    ),
    (
        errors.ApiError(400, 10027, "maximum number of streams reached"),
        "JetStream refused: maximum number of streams reached (400, 10027)",
    ),
    (
        errors.NotSupported("x-max-length", "use stream_max_bytes"),
        "x-max-length is not supported; use stream_max_bytes",
    ),
    (errors.MalformedMessage("not JSON"), "not JSON"),
]

every_error = pytest.mark.parametrize(
    "error", [error for error, _ in INSTANCES], ids=lambda error: type(error).__name__
)


def facts(error: Exception) -> dict[str, Any]:
    """Return the attributes, exceptions among them as something that can be compared."""
    return {
        name: [(server, repr(cause)) for server, cause in value] if name == "causes" else value
        for name, value in vars(error).items()
    }


def test_every_class_but_the_branches_is_tried_here() -> None:
    assert {type(error).__name__ for error, _ in INSTANCES} == CLASSES.keys() - BRANCHES
    assert CLASSES.keys() <= set(errors.__all__)


@pytest.mark.parametrize(("error", "sentence"), INSTANCES, ids=lambda value: type(value).__name__)
def test_error_says_what_happened(error: Exception, sentence: str) -> None:
    assert str(error) == sentence


@every_error
def test_error_survives_pickle_with_its_facts(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert facts(copy) == facts(error)


@every_error
def test_error_is_rebuilt_from_args_as_celery_s_json_results_do(error: Exception) -> None:
    copy = type(error)(*json.loads(json.dumps(error.args)))

    assert str(copy) == str(error)


def test_cause_that_cannot_be_pickled_is_kept_as_text() -> None:
    class Local(Exception):
        pass

    copy = pickle.loads(pickle.dumps(errors.NoServers([("a:1", Local("no route"))])))

    assert copy.causes == [("a:1", "no route")]
    assert str(copy) == "no NATS server could be reached (a:1: no route)"


@pytest.mark.parametrize(
    "error",
    [
        errors.NoServers([("nats://ann:geheim@a:1", OSError("x"))]),
        errors.AuthenticationFailed("nats://ann:geheim@a:1"),
        errors.TLSNotOffered("ann:geheim@a:1"),
        errors.CertificateRejected("geheim@a:1", "x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_credentials_in_the_name_of_a_server_are_not_shown(error: Exception) -> None:
    assert "geheim" not in f"{error} {error!r} {vars(error)}"
    assert "a:1" in str(error)


@every_error
def test_every_error_is_ours_and_kombu_s(error: Exception) -> None:
    assert isinstance(error, errors.JetStreamTransportError)
    assert isinstance(error, KombuError)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MessageTooLarge(2, 1), 311),
        (errors.NoRoute("x", "k"), 312),
        (errors.PermissionDenied("publish", "s"), 403),
        (errors.QueueMissing("q"), 404),
        (errors.ExchangeMissing("x"), 404),
        (errors.ResourceLocked("q"), 405),
        (errors.PreconditionFailed("p"), 406),
        (errors.PublishRejected("s", 10077, "full"), 506),
        (errors.NotSupported("f"), 540),
        (errors.ApiError(503, 10008, "d"), 503),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channel_errors_have_the_reply_code_of_amqp(error: ChannelError, code: int) -> None:
    assert isinstance(error, ChannelError)
    assert error.reply_code == code
    assert error.reply_text == str(error)


def test_options_error_is_a_value_error() -> None:
    assert issubclass(errors.OptionsError, ValueError)


def test_malformed_message_is_a_decode_error() -> None:
    assert issubclass(errors.MalformedMessage, DecodeError)


@pytest.mark.parametrize(
    "error",
    [
        errors.ConnectionLost("x"),
        errors.NoServers(),
        errors.ProtocolError("x"),
        errors.JetStreamUnavailable("a:1"),
        errors.RequestTimeout("s", 1.0),
        errors.NoResponders("s"),
        errors.PublishTimeout("s", 1.0),
        errors.ConsumerGone("q"),
        errors.FallbackLost("x", "y"),
        RecoverableConnectionError("kombu's own"),
        TimeoutError("of a socket"),
        ssl.SSLError("eof"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lost_connection_is_recoverable(error: Exception) -> None:
    assert isinstance(error, errors.CONNECTION_ERRORS)
    assert isinstance(error, errors.RECOVERABLE_CONNECTION_ERRORS)
    assert not isinstance(error, errors.CHANNEL_ERRORS)


@pytest.mark.parametrize(
    "error",
    [
        errors.AuthenticationFailed("a:1"),
        errors.TLSNotOffered("a:1"),
        errors.CertificateRejected("a:1", "x"),
        errors.OptionsError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_setting_has_to_change_is_never_retried(error: Exception) -> None:
    assert not isinstance(
        error,
        errors.CONNECTION_ERRORS
        + errors.CHANNEL_ERRORS
        + errors.RECOVERABLE_CONNECTION_ERRORS
        + errors.RECOVERABLE_CHANNEL_ERRORS,
    )
    assert not isinstance(error, KombuConnectionError)


@pytest.mark.parametrize(
    "error",
    [error for error, _ in INSTANCES if isinstance(error, errors.ChannelFailed)],
    ids=lambda error: type(error).__name__,
)
def test_refused_operation_is_a_channel_error_and_not_retried(error: Exception) -> None:
    assert isinstance(error, errors.CHANNEL_ERRORS)
    assert not isinstance(
        error,
        errors.CONNECTION_ERRORS
        + errors.RECOVERABLE_CONNECTION_ERRORS
        + errors.RECOVERABLE_CHANNEL_ERRORS,
    )


Transport: Any = memory.Transport


class FailingTransport(Transport):
    connection_errors = errors.CONNECTION_ERRORS
    channel_errors = errors.CHANNEL_ERRORS
    recoverable_connection_errors = errors.RECOVERABLE_CONNECTION_ERRORS
    recoverable_channel_errors = errors.RECOVERABLE_CHANNEL_ERRORS

    def establish_connection(self) -> Any:
        self.client.attempts += 1
        raise self.client.failure


def failing_connection(failure: Exception) -> Any:
    connection: Any = Connection(transport=FailingTransport)
    connection.failure = failure
    connection.attempts = 0
    return connection


def test_kombu_retries_a_lost_connection_and_gives_up_with_operational_error() -> None:
    connection = failing_connection(errors.NoServers([("a:1", "refused")]))

    with pytest.raises(OperationalError, match="no NATS server could be reached"):
        connection.ensure_connection(max_retries=2, interval_start=0, interval_step=0)

    assert connection.attempts == 3


def test_kombu_gives_up_a_refused_login_at_once_with_our_own_error() -> None:
    connection = failing_connection(errors.AuthenticationFailed("a:1"))

    with pytest.raises(OperationalError) as raised:
        connection.ensure_connection(max_retries=2, interval_start=0, interval_step=0)

    assert raised.value is connection.failure
    assert connection.attempts == 1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_docstring_has_cause_and_remedy(name: str) -> None:
    assert re.search(r"(?s)\nCause: .*\nRemedy: ", inspect.getdoc(CLASSES[name]) or "")


def test_reference_has_cause_and_remedy_of_every_class() -> None:
    sections = dict(re.findall(r"(?ms)^##+ (\w+)$(.*?)(?=^##|\Z)", REFERENCE.read_text("utf-8")))

    assert sections.keys() == CLASSES.keys() - {"JetStreamTransportError"}
    for name, text in sections.items():
        if name not in BRANCHES:
            assert "**Cause.**" in text, name
            assert "**Remedy.**" in text, name
