"""kombu over NATS JetStream: a reader starts here.

Features
========
* Type: Native
* Supports Direct: Yes
* Supports Topic: Yes
* Supports Fanout: Yes
* Supports Priority: Yes
* Supports TTL: Yes

Connection String
=================
::

    jetstream://[USER:PASSWORD@|TOKEN@]HOST[:4222][,HOST2...][/NAMESPACE][?OPTION=VALUE]
    jetstreams://...                                              (TLS or no connection)

Transport Options
=================
See docs/reference/options.md; the same names work in the URL's query.

A `Transport` opens and closes connections for kombu and tells it which errors mean what.  What it
opens is a `Session`, which makes `Channel`s.  There is no reconnecting here: a lost connection
raises one of `Transport.connection_errors`, and kombu and Celery reconnect and fail over.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from kombu.transport import base

from . import errors, extensions, options, tls
from .channel import Channel as _Channel
from .connection import ConnectionSettings
from .session import Session, connection_settings

__all__ = ["SecureTransport", "Transport"]


class Transport(base.Transport):
    """The ``jetstream://`` transport."""

    Channel = _Channel

    #: kombu hands the URL over as it is: it has commas, a query and two kinds of user info.
    can_parse_url = True
    default_port = options.DEFAULT_PORT
    driver_type = "jetstream"
    driver_name = "kombu_jetstream"

    connection_errors = errors.CONNECTION_ERRORS
    channel_errors = errors.CHANNEL_ERRORS
    recoverable_connection_errors = errors.RECOVERABLE_CONNECTION_ERRORS
    recoverable_channel_errors = errors.RECOVERABLE_CHANNEL_ERRORS

    implements = base.Transport.implements.extend(
        asynchronous=True,
        exchange_type=frozenset({"direct", "topic", "fanout"}),
        heartbeats=False,
    )

    #: Scheme to assume for a host without one.
    scheme = "jetstream"

    def __init__(self, client: Any, **kwargs: Any) -> None:
        extensions.load()  # if Celery was imported after this module
        super().__init__(client, **kwargs)
        self._hide_secret()

    def _hide_secret(self) -> None:
        """Move the password or token out of the URL to where kombu expects it.

        ``celery inspect stats`` sends the URL to whoever asks, without the password only if it
        is where other transports have it.
        """
        client = self.client
        hostname = client.hostname
        if client.password is None and isinstance(hostname, str) and "://" in hostname:
            client.hostname, client.password = options.without_secret(hostname)

    def establish_connection(self) -> Session:
        """Connect to the first server that answers.

        Raises `OptionsError` for a bad URL or option, `NoServers` if none answers, or what a
        server has against us: `AuthenticationFailed`, `TLSNotOffered`, `CertificateRejected`.
        """
        parsed, settings = self.settings()
        if parsed.fallback_url is not None:
            session: Session = _fallback().open_session(self.client, parsed, settings)
            return session
        return Session(self.client, parsed, settings)

    def settings(self) -> tuple[options.Options, ConnectionSettings]:
        """Return what the URL, the transport options and ``broker_use_ssl`` say, checked."""
        client = self.client
        parsed = options.Options.parse(self._url(), client.transport_options or {})
        context = tls.ssl_context(client.ssl, parsed.tls)
        name = tls.server_hostname(client.ssl, parsed.tls_hostname)
        return parsed, connection_settings(parsed, context, name, client.connect_timeout)

    def _url(self) -> str:
        """Return the broker URL, also when it was given to kombu in pieces."""
        client = self.client
        password = client.password() if callable(client.password) else client.password
        if password is not None and "://" in (client.hostname or ""):
            return options.with_secret(client.hostname, password)
        return options.url_from_parts(
            client.hostname,
            port=client.port,
            userid=client.userid,
            password=password,
            virtual_host=client.virtual_host,
            transport=self.scheme,
        )

    def create_channel(self, connection: Session) -> _Channel:
        channel = (connection.channel_class or self.Channel)(connection)
        connection.channels.append(channel)
        return channel

    def close_channel(self, channel: _Channel) -> None:
        channel.close()

    def close_connection(self, connection: Session) -> None:
        """Close in order; a lost connection's deliveries go to the ledger."""
        connection.close()

    def _collect(self, connection: Session | None) -> None:
        """Drop a connection without a word: it is lost, or another process's (kombu's hook)."""
        if connection is not None:
            connection.abandon()

    def qos_semantics_matches_spec(self, connection: Session) -> bool:
        """Tell Celery that a prefetch limit covers the channel (RabbitMQ's ``global``).

        It may then lower the limit after a reconnect, while tasks from before still run.
        """
        return False

    def verify_connection(self, connection: Session) -> bool:
        return connection.connected

    def drain_events(self, connection: Session, timeout: float | None = None) -> None:
        """Hand on one message; `socket.timeout` if none came within *timeout* seconds."""
        connection.drain_events(timeout)

    def register_with_event_loop(self, connection: Session, loop: Any) -> None:
        connection.register(loop)

    def unregister_from_event_loop(self, connection: Session, loop: Any) -> None:
        connection.unregister()

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        # The host alone after a failover, and the URL without its password: ask the client.
        client = self.client
        whole = self._url() if client is not None and uri == client.hostname else uri
        return options.as_uri(whole, include_password, mask)

    def driver_version(self) -> str:
        return version("kombu-jetstream")

    def get_manager(self, *args: Any, **kwargs: Any) -> Management:
        return Management(self)

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {"port": self.default_port, "hostname": "localhost"}


def _fallback() -> Any:
    """Return the module that needs ``redis``, which nobody else does."""
    try:
        from . import fallback
    except ModuleNotFoundError as exc:
        raise errors.OptionsError(
            f"'fallback_url' needs the package {exc.name!r}: pip install 'kombu-jetstream[redis]'",
            "fallback_url",
        ) from exc
    return fallback


class SecureTransport(Transport):
    """The ``jetstreams://`` transport: the scheme alone demands TLS."""

    scheme = "jetstreams"


class Management(base.Management):
    """What kombu asks of a broker's management API."""

    def get_bindings(self) -> list[dict[str, str]]:
        with self.transport.client.channel() as channel:
            return list(channel.get_bindings())


# kombu imports this module when it constructs a connection, before it is used: early enough for
# the first publish of a producer, and for a worker's ``worker_init``.
extensions.load()
