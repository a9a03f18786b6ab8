"""What can be set, and how the broker URL and ``broker_transport_options`` become it.

Each option is one field of `Options`: its type, default and rule stand together, and nothing else
reads the URL or the dictionary.  The rules:

* A value is checked once, by the field's rule, wherever it comes from; text of the URL is only
  converted first.
* Nothing is configurable twice: an option in both places with different values is an error, and
  so is an option for what kombu has already (``connect_timeout``, ``broker_use_ssl``).
* Options that contradict each other are an error (`_TOGETHER`).
* No message, `repr` or `as_uri` shows a password, a token or a URL's user info.

All is pure.  TLS has its own setting, ``broker_use_ssl``, read by `tls.ssl_context`.
Reference for users: docs/reference/options.md, which a test compares with the fields.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, unquote

from .errors import OptionsError, shortened
from .rules import (
    BYTES,
    COUNT,
    SECONDS,
    SECONDS_OR_ZERO,
    SWITCH,
    TEXT,
    Rule,
    matching,
    one_of,
    whole,
)

__all__ = [
    "IGNORED_OPTIONS",
    "KOMBU_OPTIONS",
    "Options",
    "as_uri",
    "url_from_parts",
    "with_secret",
    "without_secret",
]

Server: TypeAlias = tuple[str, int]

DEFAULT_PORT = 4222
DEFAULT_NAMESPACE = "celery"

#: Keys of ``transport_options`` that kombu reads itself (`Connection._extract_failover_opts`), or
#: that `Producer.publish` and Celery put there from a retry policy (`Connection.ensure`).
KOMBU_OPTIONS = frozenset(
    {
        "callback",
        "connect_retries_timeout",
        "errback",
        "interval_max",
        "interval_start",
        "interval_step",
        "max_retries",
        "on_revive",
        "retry_errors",
    }
)

#: Keys of kombu's virtual, Redis and AMQP transports.  They pass without effect, so that a
#: project moves here by changing its URL alone; docs/reference/options.md says what we have
#: instead.
IGNORED_OPTIONS = frozenset(
    {
        # kombu.transport.virtual
        "body_encoding",
        "deadletter_queue",
        "polling_interval",
        # kombu.transport.redis
        "ack_emulation",
        "client_name",
        "fanout_patterns",
        "fanout_prefix",
        "health_check_interval",
        "max_connections",
        "priority_steps",
        "queue_order_strategy",
        "retry_on_timeout",
        "sep",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_keepalive_options",
        "socket_timeout",
        "unacked_index_key",
        "unacked_key",
        "unacked_mutex_expire",
        "unacked_mutex_key",
        "unacked_restore_interval",
        "unacked_restore_limit",
        "unacked_restore_throttle",
        # kombu.transport.pyamqp
        "channel_max",
        "client_properties",
        "confirm_publish",
        "frame_max",
        "read_timeout",
        "socket_settings",
        "write_timeout",
    }
)


def _path(value: Any) -> str:
    path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError
    return path


def _servers(value: Any) -> tuple[Server, ...]:
    found = tuple((host, port) for host, port in value)
    if not found or not all(
        isinstance(host, str) and host and type(port) is int and 1 <= port <= 65535
        for host, port in found
    ):
        raise ValueError
    return found


_FILE = Rule("the path of a file", _path)
#: NATS forbids blanks, '.', '*' and '>' in one token of a subject (ADR-6).
_TOKEN = Rule(r"one NATS subject token, without blanks, '.', '*' and '>'", matching(r"[^\s.*>]+"))

_NAME_PATTERN = r"[A-Za-z0-9_-]{1,64}"


def _option(default: Any, rule: Rule, *, secret: bool = False) -> Any:
    """Return a dataclass field that carries its rule; a *secret* one is shown to nobody."""
    return field(default=default, metadata={"rule": rule, "secret": secret})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Options:
    """Everything that can be set.  Durations are seconds, sizes are bytes, None means "none".

    Constructing one checks every value and raises `OptionsError` for the first bad one.
    """

    #: First part of the names of all streams and subjects; the path of the URL.
    namespace: str = _option(
        DEFAULT_NAMESPACE,
        Rule("1 to 64 letters, digits, '_' or '-'", matching(_NAME_PATTERN)),
    )

    #: Host and port of each server, in the order they are tried; from the URL.
    servers: tuple[Server, ...] = _option(
        (("localhost", DEFAULT_PORT),), Rule("pairs of host and port", _servers)
    )
    user: str | None = _option(None, TEXT.or_none())
    password: str | None = _option(None, Rule("text", matching(r"(?s).*")).or_none(), secret=True)
    token: str | None = _option(None, TEXT.or_none(), secret=True)
    #: File with a user JWT and its nkey seed (``nsc`` writes it).
    credentials_file: str | None = _option(None, _FILE.or_none())
    #: File with an nkey seed alone.
    nkey_seed_file: str | None = _option(None, _FILE.or_none())
    #: The scheme was ``jetstreams://``, or `tls_handshake_first` is on: no connection without TLS.
    tls: bool = _option(False, SWITCH)
    #: TLS before the server's first line; for servers with ``handshake_first``.
    tls_handshake_first: bool = _option(False, SWITCH)
    #: Name the server's certificate must have, if it is not the host of the URL.
    tls_hostname: str | None = _option(None, TEXT.or_none())
    #: Seconds between PINGs of our own; two without an answer mean a dead server.
    ping_interval: float = _option(30.0, SECONDS)
    #: Subject prefix of replies; must be among what the server lets this user subscribe to.
    inbox_prefix: str = _option(
        "_INBOX",
        Rule(
            "a NATS subject without blanks, '*', '>' and empty parts",
            matching(r"[^\s.*>]+(\.[^\s.*>]+)*"),
        ),
    )

    #: Seconds the server waits for an ack or a renewal before it redelivers.  kombu's Redis
    #: transport has 3600; ours is short because held deliveries are renewed each third of it.
    visibility_timeout: float = _option(30.0, SECONDS)
    #: Seconds after which a delivery is renewed no more, so that a stuck task moves on.
    lease_limit: float | None = _option(None, SECONDS.or_none())
    #: Wait for the server to confirm each ack.
    ack_confirm: bool = _option(False, SWITCH)
    #: Deliveries of one message after which it becomes a dead letter (20 as RabbitMQ's quorum
    #: queues); 0 is None.
    max_deliveries: int | None = _option(
        20, Rule("a whole number >= 0", lambda value: whole(0)(value) or None, int).or_none()
    )
    #: Messages kept for a transient queue that has no consumer yet; the oldest go first.
    transient_buffer: int = _option(10_000, COUNT)

    publish_confirms: Literal["each", "pipelined"] = _option("each", one_of("each", "pipelined"))
    #: Unconfirmed messages at most, when pipelined.
    publish_window: int = _option(256, COUNT)
    #: Seconds for one publish in all, retries included.
    publish_timeout: float = _option(10.0, SECONDS)
    #: Seconds in which the stream knows a message id again.
    dedup_window: float = _option(120.0, SECONDS)
    #: Seconds ahead from which an eta waits in the server instead of in a worker.
    delay_threshold: float = _option(1.0, SECONDS_OR_ZERO)

    #: Priority levels, each a stream; 1 switches priorities off.
    priority_levels: int = _option(3, one_of(1, 3))
    #: Whether 9 (amqp) or 0 (redis) is the most urgent.
    priority_order: Literal["amqp", "redis"] = _option("amqp", one_of("amqp", "redis"))
    #: A lower level gets at least one of this many deliveries.
    starvation_guard: int = _option(20, COUNT)

    provision: Literal["auto", "verify", "off"] = _option("auto", one_of("auto", "verify", "off"))
    jetstream_domain: str | None = _option(None, _TOKEN.or_none())
    #: Copies of each stream in a cluster (the server takes 1 to 5).
    stream_replicas: int = _option(1, Rule("a whole number from 1 to 5", whole(1, 5), int))
    stream_storage: Literal["file", "memory"] = _option("file", one_of("file", "memory"))
    #: Bytes of each level's stream; full streams refuse messages.
    stream_max_bytes: int | None = _option(None, BYTES.or_none())
    #: Seconds after which a queued message is dropped.
    stream_max_age: float | None = _option(None, SECONDS.or_none())
    #: Seconds a dead letter is kept.
    dead_letter_max_age: float | None = _option(14 * 24 * 60 * 60.0, SECONDS.or_none())
    #: Bytes of dead letters.
    dead_letter_max_bytes: int | None = _option(1024**3, BYTES.or_none())

    fallback_url: str | None = _option(
        None,
        Rule(
            "a redis://, rediss:// or unix:// URL", matching(r"(?s)(?:rediss?|unix)://.*")
        ).or_none(),
        secret=True,
    )
    #: Prefix of every key in Redis, kombu's Redis transport's name for it.
    global_keyprefix: str = _option("", Rule("text", matching(r"(?s).*")))
    #: Seconds JetStream must have failed before producers write to Redis.
    fallback_after: float = _option(2.0, SECONDS_OR_ZERO)
    #: Seconds without a sign of life after which a worker's Redis deliveries are taken back.
    fallback_liveness_timeout: float = _option(30.0, SECONDS)
    migration_phase: Literal["redis", "dual-write", "dual-read", "jetstream"] = _option(
        "jetstream", one_of("redis", "dual-write", "dual-read", "jetstream")
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        for holds, option, problem in _TOGETHER:
            if not holds(self):
                raise OptionsError(problem.format(self), option)

    def __repr__(self) -> str:
        """Return what differs from the defaults, secrets masked."""
        shown = (
            f"{each.name}={'**' if each.metadata['secret'] else repr(getattr(self, each.name))}"
            for each in fields(self)
            if getattr(self, each.name) != each.default
        )
        return f"Options({', '.join(shown)})"

    @classmethod
    def parse(cls, url: str, transport_options: Mapping[str, object] | None = None) -> Options:
        """Return the options a broker URL and ``broker_transport_options`` ask for.

        Raises `OptionsError` for anything unknown, bad, said twice or contradictory.
        """
        values = dict(_from_url(_split(url)))
        for name, value in (transport_options or {}).items():
            if name in KOMBU_OPTIONS or name in IGNORED_OPTIONS:
                continue
            each = _known(name)
            checked = _checked(each, value)
            if name in values and values[name] != checked:
                raise OptionsError(
                    f"{name!r} is {_shown(each, values[name])} in the URL and "
                    f"{_shown(each, checked)} in the transport options, say it once",
                    name,
                )
            values[name] = checked
        if values.get("fallback_url") is not None:
            _check_lists(transport_options or {})
        if values.get("tls_handshake_first"):
            values["tls"] = True
        return cls(**values)


def _check_lists(transport_options: Mapping[str, object]) -> None:
    """Refuse what names Redis lists in another way than kombu's default: none would be found."""
    for name, default in (("sep", "\x06\x16"), ("priority_steps", [0, 3, 6, 9])):
        value: Any = transport_options.get(name, default)
        if isinstance(value, (tuple, range)):
            value = list(value)
        if value != default:
            raise OptionsError(
                f"expected {name!r} to be kombu's default with 'fallback_url', got {value!r}: "
                "the lists of such messages have other names, and would not be read",
                name,
            )


def _credentials(options: Options) -> list[str]:
    kinds = ("user", "token", "credentials_file", "nkey_seed_file")
    return [kind for kind in kinds if getattr(options, kind) is not None]


#: What must hold between options: the test, the option to name, the sentence for it.
_TOGETHER: tuple[tuple[Callable[[Options], bool], str, str], ...] = (
    (
        lambda o: (o.user is None) == (o.password is None),
        "password",
        "expected 'user' and 'password' to be given together",
    ),
    (
        lambda o: len(_credentials(o)) <= 1,
        "credentials_file",
        "expected one of 'user' with 'password', 'token', 'credentials_file' and "
        "'nkey_seed_file', got more than one",
    ),
    (
        lambda o: o.lease_limit is None or o.lease_limit >= o.visibility_timeout,
        "lease_limit",
        "expected 'lease_limit' to be at least 'visibility_timeout' ({0.visibility_timeout}), "
        "got {0.lease_limit}",
    ),
    (
        # Or a repeated publish could be stored twice.
        lambda o: o.publish_timeout <= o.dedup_window,
        "publish_timeout",
        "expected 'publish_timeout' to be at most 'dedup_window' ({0.dedup_window}), "
        "got {0.publish_timeout}",
    ),
    (
        # The server refuses a duplicate window longer than the stream's age limit.
        lambda o: o.stream_max_age is None or o.dedup_window <= o.stream_max_age,
        "dedup_window",
        "expected 'dedup_window' to be at most 'stream_max_age' ({0.stream_max_age}), "
        "got {0.dedup_window}",
    ),
    (
        lambda o: o.dead_letter_max_age is None or o.dedup_window <= o.dead_letter_max_age,
        "dedup_window",
        "expected 'dedup_window' to be at most 'dead_letter_max_age' ({0.dead_letter_max_age}), "
        "got {0.dedup_window}",
    ),
    (
        lambda o: o.migration_phase == "jetstream" or o.fallback_url is not None,
        "fallback_url",
        "expected 'fallback_url' to be given, as 'migration_phase' is {0.migration_phase!r}",
    ),
)

_FIELDS: Mapping[str, Field[Any]] = {each.name: each for each in fields(Options)}

#: Options that are said by a part of the URL and nowhere else.
_URL_ONLY = {
    "servers": "the servers are the hosts of the URL: jetstream://host:4222,host2:4222",
    "tls": "TLS is demanded by a jetstreams:// URL or by broker_use_ssl",
}


def _known(name: object, *, in_url: bool = False) -> Field[Any]:
    """Return the field of an option, or say what is wrong with its name."""
    if name in _URL_ONLY:
        raise OptionsError(f"unknown option {name!r}, {_URL_ONLY[str(name)]}", str(name))
    if isinstance(name, str) and name in _FIELDS:
        return _FIELDS[name]
    if in_url and isinstance(name, str):
        if name in KOMBU_OPTIONS or name in IGNORED_OPTIONS:
            raise OptionsError(f"{name!r} belongs in the transport options, not in the URL", name)
        if name.startswith("ssl_"):
            raise OptionsError(f"{name!r} belongs in broker_use_ssl, not in the URL", name)
    raise OptionsError.unknown("option", name, (_FIELDS.keys() | KOMBU_OPTIONS) - {*_URL_ONLY})


def _checked(each: Field[Any], value: Any, *, is_text: bool = False) -> Any:
    """Return a value as it is stored; *is_text* if it has to be converted first."""
    rule: Rule = each.metadata["rule"]
    return rule.checked(value, each.name, shown=_shown(each, value), is_text=is_text)


def _shown(each: Field[Any], value: object) -> str:
    if each.metadata["secret"] and value is not None:
        return f"{type(value).__name__} (not shown)"
    return shortened(value)


@dataclass(frozen=True, slots=True)
class _Split:
    """The parts of a URL as they are written, still percent-encoded."""

    tls: bool
    user_info: str | None
    hosts: str
    path: str
    query: str | None


_URL = re.compile(
    r"(?P<scheme>jetstreams?)://(?:(?P<user_info>[^/?#]*)@)?(?P<hosts>[^/?#@]*)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?",
    re.IGNORECASE,
)


def _split(url: str) -> _Split:
    """Take a URL apart.  What is refused here may hold a password, so it is not shown."""
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise OptionsError("expected the URL to have no blanks, write %20 in a password", "url")
    if "#" in url:
        raise OptionsError("expected the URL to have no '#', write %23 in a password", "url")
    found = _URL.fullmatch(url)
    if not found:
        raise OptionsError(
            "expected a URL jetstream://[user:password@]host[:4222][,host2][/namespace], "
            "or jetstreams:// for TLS",
            "url",
        )
    if "@" in (found["path"] or "") + (found["query"] or ""):
        raise OptionsError(
            "expected no '@' after the hosts of the URL; in a password write '/' as %2F and "
            "'?' as %3F, elsewhere '@' as %40",
            "url",
        )
    return _Split(
        tls=found["scheme"].lower() == "jetstreams",
        user_info=found["user_info"],
        hosts=found["hosts"],
        path=found["path"] or "",
        query=found["query"],
    )


def _from_url(parts: _Split) -> Iterator[tuple[str, Any]]:
    """Yield the options a URL sets, checked."""
    seen: dict[str, Any] = {}
    for name, value in _url_options(parts):
        if name in seen and seen[name] != value:
            raise OptionsError(f"{name!r} is twice in the URL, say it once", name)
        seen[name] = value
        yield name, value


def _url_options(parts: _Split) -> Iterator[tuple[str, Any]]:
    yield "tls", parts.tls
    hosts = parts.hosts.split(",")
    if len(hosts) > 1 and any(host.startswith(":") or not host for host in hosts):
        raise OptionsError("expected a host on both sides of each ',' of the URL", "servers")
    yield "servers", tuple(_server(text) for text in hosts)
    if parts.user_info:
        user, colon, password = parts.user_info.partition(":")
        if colon:
            yield "user", _checked(_FIELDS["user"], unquote(user))
            yield "password", unquote(password)
        else:
            yield "token", unquote(user)
    namespace = unquote(parts.path[1:])
    if namespace not in ("", "/"):  # kombu's forms of the default virtual host
        yield "namespace", _checked(_FIELDS["namespace"], namespace)
    for item in (parts.query or "").split("&"):
        if item:
            name, _, text = item.partition("=")
            each = _known(unquote(name), in_url=True)
            yield each.name, _checked(each, unquote(text), is_text=True)


_HOST_AND_PORT = re.compile(r"(?:\[(?P<v6>[^][]*)\]|(?P<host>[\w.-]*))(?::(?P<port>[^:]*))?")


def _server(text: str) -> Server:
    """Return host and port.  The port's text is not shown: ``user:password`` looks like one."""
    found = _HOST_AND_PORT.fullmatch(text)
    if not found:
        raise OptionsError(
            "expected each host of the URL to be a name, an IPv4 address or an IPv6 address in "
            "brackets, with or without a port",
            "servers",
        )
    host = found["host"] or "localhost"
    if found["v6"] is not None:
        host = unquote(found["v6"])
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise OptionsError(
                f"expected an IPv6 address in brackets in the URL, got {shortened(host)}", "servers"
            ) from None
    port = found["port"] if found["port"] is not None else str(DEFAULT_PORT)
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise OptionsError(
            f"expected the port of host {host!r} in the URL to be a number from 1 to 65535",
            "servers",
        )
    return host, int(port)


def as_uri(url: str, include_password: bool = False, mask: str = "**") -> str:
    """Return the URL for people to read: password, token and secret options masked.

    Never raises: it is called for log lines.  Of a URL that cannot be read only the scheme is
    shown, and what follows the last '@' of its user info.
    """
    if include_password:
        return url
    try:
        parts = _split(url)
        dict(_from_url(parts))
    except OptionsError:
        return _masked_blindly(url, mask)
    scheme = url.partition("://")[0]
    user, colon, _ = (parts.user_info or "").partition(":")
    user_info = f"{user}:{mask}@" if colon else f"{mask}@" if user else ""
    query = "&".join(_masked_item(item, mask) for item in (parts.query or "").split("&"))
    return f"{scheme}://{user_info}{parts.hosts}{parts.path}{'?' + query if query else ''}"


def without_secret(url: str) -> tuple[str, str | None]:
    """Return *url* without the password or token of its user info, and that (None: it has none).

    `with_secret` is the inverse.  A URL that cannot be read comes back as it is.
    """
    match = _URL.fullmatch(url)
    user_info = match["user_info"] if match else None
    if not user_info:
        return url, None
    user, colon, password = user_info.partition(":")
    kept, secret = (f"{user}@", password) if colon else ("", user_info)
    if not secret:
        return url, None
    return url.replace(f"{user_info}@", kept, 1), unquote(secret)


def with_secret(url: str, secret: str) -> str:
    """Return *url* with *secret*: the password of its user, or a token if it names none."""
    scheme, _, rest = url.partition("://")
    before, at, after = rest.rpartition("@")
    if at and ":" in before:
        return url
    user_info = f"{before}:{quote(secret, safe='')}" if at else quote(secret, safe="")
    return f"{scheme}://{user_info}@{after}"


def _masked_item(item: str, mask: str) -> str:
    name, equals, _ = item.partition("=")
    each = _FIELDS.get(unquote(name))
    return f"{name}{equals}{mask}" if each and each.metadata["secret"] else item


def _masked_blindly(url: str, mask: str) -> str:
    scheme, _, rest = url.partition("://")
    shown = scheme if scheme.lower() in ("jetstream", "jetstreams") else "jetstream"
    before, at, hosts = (rest or url).rpartition("@")
    # An '@' in the query may be part of a secret option's value, and so may all around it.
    tail = at + hosts.partition("?")[0] if at and "?" not in before else ""
    return f"{shown}://{mask}{tail}"


def url_from_parts(
    hostname: str | None,
    *,
    port: int | None = None,
    userid: str | None = None,
    password: str | None = None,
    virtual_host: str | None = None,
    transport: str = "jetstream",
) -> str:
    """Return the URL of a kombu `Connection` by its parts.

    kombu hands the whole URL over as *hostname*, and then the other parts are not looked at;
    but it takes URLs apart when it fails over to the next of several (`Connection.switch`), and
    ``Connection("host", transport="jetstream")`` never had one.
    """
    if hostname and "://" in hostname:
        return hostname
    host = hostname or "localhost"
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    user_info = quote(userid or "", safe="")
    if password is not None:
        user_info += ":" + quote(password, safe="")
    return "".join(
        [
            "jetstreams" if transport == "jetstreams" else "jetstream",
            "://",
            f"{user_info}@" if user_info else "",
            host,
            f":{port}" if port else "",
            "/",
            quote(virtual_host or "", safe=""),
        ]
    )
