"""``broker_use_ssl`` as an `ssl.SSLContext`.

kombu hands the setting over untouched (`Connection.ssl`), and every transport has its own spelling
of the keys.  Ours are those of py-amqp (`ssl.wrap_socket`), with or without the ``ssl_`` Celery's
Redis settings have in front, so that a project keeps its setting when it moves.  What is not
given is safe: the certificate and the host name are checked, against the system's authorities.

Reads the certificate files, and does nothing else outside of itself.
"""

from __future__ import annotations

import os
import ssl as _ssl
from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import OptionsError, shortened

__all__ = ["server_hostname", "ssl_context"]

_CERT_REQS = {
    "none": _ssl.CERT_NONE,
    "optional": _ssl.CERT_OPTIONAL,
    "required": _ssl.CERT_REQUIRED,
}

#: Other spellings of the keys of ``broker_use_ssl``: those of `ssl.create_default_context`, which
#: py-amqp takes as ``context``, and of redis-py.
_ALIASES = {
    "cafile": "ca_certs",
    "capath": "ca_path",
    "cadata": "ca_data",
    "keyfile_password": "password",
    "min_version": "minimum_version",
    "tls_minimum_version": "minimum_version",
}
_KEYS = frozenset(
    {
        "ca_certs",
        "ca_data",
        "ca_path",
        "cert_reqs",
        "certfile",
        "check_hostname",
        "ciphers",
        "context",
        "keyfile",
        "minimum_version",
        "password",
        "server_hostname",
    }
)


def ssl_context(ssl: object, tls: bool) -> _ssl.SSLContext | None:
    """Return the context for ``broker_use_ssl`` (kombu's ``Connection.ssl``), or None for none.

    *tls* is `Options.tls`: with it there is a context even if *ssl* is empty.

    Raises `OptionsError` for unknown keys, bad values and files that cannot be used.
    """
    settings = _settings(ssl)
    if isinstance(ssl, _ssl.SSLContext):
        return ssl
    if not ssl and not tls:
        return None
    given = settings.get("context")
    if isinstance(given, _ssl.SSLContext):
        others = sorted(settings.keys() - {"context", "server_hostname"})
        if others:
            raise OptionsError(
                f"expected {others[0]!r} of broker_use_ssl to be set in 'context', as one is given",
                others[0],
            )
        return given
    context = _ssl.SSLContext(_ssl.PROTOCOL_TLS_CLIENT)
    _set_verification(context, settings)
    _load_authorities(context, settings)
    _load_own_certificate(context, settings)
    return context


def server_hostname(ssl: object, tls_hostname: str | None) -> str | None:
    """Return the name the server's certificate must have, or None for the host connected to.

    It is ``server_hostname`` of ``broker_use_ssl``, or *tls_hostname*, which is the option.
    """
    given = _settings(ssl).get("server_hostname")
    if given is None:
        return tls_hostname
    if not isinstance(given, str) or not given:
        _bad("server_hostname", "a host name", given)
    if tls_hostname not in (None, given):
        raise OptionsError(
            f"'tls_hostname' is {tls_hostname!r} and 'server_hostname' of broker_use_ssl is "
            f"{given!r}, say it once",
            "tls_hostname",
        )
    return given


def _settings(ssl: object) -> dict[str, Any]:
    """Return ``broker_use_ssl`` with each key in one spelling; a key of None is not given."""
    if ssl is None or isinstance(ssl, (bool, _ssl.SSLContext)):
        return {}
    if not isinstance(ssl, Mapping):
        raise OptionsError.bad_value(
            "broker_use_ssl", "", "True, a dictionary or an SSLContext", shortened(ssl)
        )
    settings: dict[str, Any] = {}
    for key, value in ssl.items():
        name = _key(key)
        if value is None:
            continue
        if name == "context" and isinstance(value, Mapping):
            pairs = _settings(value).items()
        else:
            pairs = {name: value}.items()
        for each, one in pairs:
            if settings.setdefault(each, one) != one:
                raise OptionsError(f"{each!r} is twice in broker_use_ssl, say it once", each)
    return settings


def _key(key: object) -> str:
    name = str(key)
    if name == "ssl_version":
        raise OptionsError(
            "unknown key 'ssl_version' of broker_use_ssl, the version is negotiated; "
            "'minimum_version' sets the least",
            name,
        )
    name = name.removeprefix("ssl_")
    name = _ALIASES.get(name, name)
    if name not in _KEYS:
        raise OptionsError.unknown("key", key, _KEYS, where=" of broker_use_ssl")
    return name


def _set_verification(context: _ssl.SSLContext, settings: Mapping[str, Any]) -> None:
    wanted = settings.get("cert_reqs", _ssl.CERT_REQUIRED)
    if isinstance(wanted, str):
        wanted = _CERT_REQS.get(wanted.lower().removeprefix("cert_"), wanted)
    if isinstance(wanted, bool) or wanted not in tuple(_CERT_REQS.values()):
        _bad("cert_reqs", "one of 'required', 'optional', 'none'", wanted)
    check = settings.get("check_hostname", wanted != _ssl.CERT_NONE)
    if not isinstance(check, bool):
        _bad("check_hostname", "True or False", check)
    if check and wanted == _ssl.CERT_NONE:
        raise OptionsError(
            "'check_hostname' of broker_use_ssl needs certificates, 'cert_reqs' says none",
            "check_hostname",
        )
    context.check_hostname = check
    context.verify_mode = _ssl.VerifyMode(wanted)
    if "ciphers" in settings:
        try:
            context.set_ciphers(settings["ciphers"])
        except (_ssl.SSLError, TypeError, ValueError):
            _bad("ciphers", "an OpenSSL cipher list", settings["ciphers"])
    if "minimum_version" in settings:
        context.minimum_version = _version(settings["minimum_version"])


def _version(value: object) -> _ssl.TLSVersion:
    if isinstance(value, str):
        value = getattr(_ssl.TLSVersion, value, value)
    if not isinstance(value, _ssl.TLSVersion):
        _bad("minimum_version", "an ssl.TLSVersion or its name, such as 'TLSv1_3'", value)
    return value


def _load_authorities(context: _ssl.SSLContext, settings: Mapping[str, Any]) -> None:
    places = {"cafile": "ca_certs", "capath": "ca_path", "cadata": "ca_data"}
    found = {place: settings[key] for place, key in places.items() if key in settings}
    if not found:
        context.load_default_certs()
        return
    for place, value in found.items():
        key = places[place]
        try:
            if place == "capath" and not os.path.isdir(value):
                raise FileNotFoundError("no such folder")
            context.load_verify_locations(**{place: value})
        except (OSError, TypeError, ValueError) as exc:
            _unusable(key, "" if place == "cadata" else f" {shortened(value)}", exc)


def _load_own_certificate(context: _ssl.SSLContext, settings: Mapping[str, Any]) -> None:
    certfile, keyfile = settings.get("certfile"), settings.get("keyfile")
    if certfile is None:
        if keyfile is not None:
            raise OptionsError(
                "'keyfile' of broker_use_ssl needs 'certfile', the certificate of that key",
                "certfile",
            )
        return

    def password() -> Any:
        # Without a callable OpenSSL asks on the terminal, and a worker would wait there for ever.
        if settings.get("password") is None:
            raise ValueError("the key is encrypted, 'password' must be given")
        return settings["password"]

    for key, path in (("certfile", certfile), ("keyfile", keyfile)):
        try:
            if path is not None:
                with open(path, "rb"):
                    pass
        except (OSError, TypeError) as exc:
            _unusable(key, f" {shortened(path)}", exc)
    try:
        context.load_cert_chain(certfile, keyfile, password)
    except (OSError, TypeError, ValueError) as exc:
        _unusable("certfile", f" {shortened(certfile)} with its key", exc)


def _bad(key: str, expected: str, value: object) -> NoReturn:
    raise OptionsError.bad_value(key, " of broker_use_ssl", expected, shortened(value))


def _unusable(key: str, what: str, exc: Exception) -> NoReturn:
    reason = getattr(exc, "strerror", None) or exc
    raise OptionsError(f"cannot use {key!r} of broker_use_ssl{what}: {reason}", key) from exc
