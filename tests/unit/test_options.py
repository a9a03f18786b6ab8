from __future__ import annotations

import contextlib
import dataclasses
import pickle
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import kombu.transport.redis
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.utils.url import parse_url

from kombu_jetstream import tls as tls_module
from kombu_jetstream.errors import OptionsError
from kombu_jetstream.options import (
    IGNORED_OPTIONS,
    KOMBU_OPTIONS,
    Options,
    as_uri,
    url_from_parts,
)
from kombu_jetstream.tls import server_hostname, ssl_context

ROOT = Path(__file__).parents[2]
FIELDS = {each.name: each for each in dataclasses.fields(Options)}


def refusal(url: str, transport_options: dict[Any, Any] | None = None) -> str:
    with pytest.raises(OptionsError) as raised:
        Options.parse(url, transport_options)
    return str(raised.value)


# The URL


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("jetstream://", {}),
        ("jetstream:///", {}),
        ("jetstream:////", {}),
        ("jetstream://localhost:4222//", {}),
        ("jetstream://localhost/%2F", {}),
        ("JetStream://localhost", {}),
        ("jetstream://@localhost", {}),
        ("jetstreams://", {"tls": True}),
        ("jetstream://h", {"servers": (("h", 4222),)}),
        ("jetstream://h:1", {"servers": (("h", 1),)}),
        ("jetstream://:1", {"servers": (("localhost", 1),)}),
        ("jetstream://h/shop", {"servers": (("h", 4222),), "namespace": "shop"}),
        (
            "jetstream://a,b_1:5,c.d-e:6/shop",
            {"servers": (("a", 4222), ("b_1", 5), ("c.d-e", 6)), "namespace": "shop"},
        ),
        ("jetstream://[::1]", {"servers": (("::1", 4222),)}),
        (
            "jetstream://[fe80::1%25eth0]:5,10.0.0.1:6",
            {"servers": (("fe80::1%eth0", 5), ("10.0.0.1", 6))},
        ),
        ("jetstream://ann:geheim@", {"user": "ann", "password": "geheim"}),
        ("jetstream://ann:@", {"user": "ann", "password": ""}),
        ("jetstream://none:None@", {"user": "none", "password": "None"}),
        (
            "jetstream://h/none?jetstream_domain=none",
            {
                "servers": (("h", 4222),),
                "namespace": "none",
                "jetstream_domain": "none",
            },
        ),
        ("jetstream://a%3Ab:%40%2F%25+%20:@", {"user": "a:b", "password": "@/%+ :"}),
        ("jetstream://a:b@c@", {"user": "a", "password": "b@c"}),
        ("jetstream://t%2Bk@", {"token": "t+k"}),
        ("jetstream://?visibility_timeout=10", {"visibility_timeout": 10.0}),
        ("jetstream://?ack_confirm=true&ack_confirm=1", {"ack_confirm": True}),
        ("jetstream://?ack_confirm=FALSE&", {"ack_confirm": False}),
        (
            "jetstream://?publish_window=7&priority_levels=1",
            {"publish_window": 7, "priority_levels": 1},
        ),
        ("jetstream://?max_deliveries=none", {"max_deliveries": None}),
        ("jetstream://?max_deliveries=0", {"max_deliveries": None}),
        (
            "jetstream://?credentials_file=%2Frun%2Fa%20b.creds",
            {"credentials_file": "/run/a b.creds"},
        ),
        (
            "jetstream://?fallback_url=redis://:geheim%40r:6379/0",
            {"fallback_url": "redis://:geheim@r:6379/0"},
        ),
        ("jetstream://?tls_handshake_first=true", {"tls_handshake_first": True, "tls": True}),
    ],
)
def test_url_sets_options(url: str, expected: dict[str, Any]) -> None:
    assert Options.parse(url) == Options(**expected)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "localhost",
            "expected a URL jetstream://[user:password@]host[:4222][,host2][/namespace], "
            "or jetstreams:// for TLS",
        ),
        ("jetstream://h#x", "expected the URL to have no '#', write %23 in a password"),
        ("jetstream://a b", "expected the URL to have no blanks, write %20 in a password"),
        ("jetstream://a\nb", "expected the URL to have no blanks, write %20 in a password"),
        (
            "jetstream://ann:ge/heim@h",
            "expected no '@' after the hosts of the URL; in a password write '/' as %2F and "
            "'?' as %3F, elsewhere '@' as %40",
        ),
        ("jetstream://a,,b", "expected a host on both sides of each ',' of the URL"),
        ("jetstream://a,:5", "expected a host on both sides of each ',' of the URL"),
        (
            "jetstream://::1",
            "expected each host of the URL to be a name, an IPv4 address or an IPv6 address in "
            "brackets, with or without a port",
        ),
        ("jetstream://[x]", "expected an IPv6 address in brackets in the URL, got 'x'"),
        (
            "jetstream://ann:geheim",
            "expected the port of host 'ann' in the URL to be a number from 1 to 65535",
        ),
        (
            "jetstream://h:65536",
            "expected the port of host 'h' in the URL to be a number from 1 to 65535",
        ),
        (
            "jetstream://h/a.b",
            "expected 'namespace' to be 1 to 64 letters, digits, '_' or '-', got 'a.b'",
        ),
        ("jetstream://:geheim@h", "expected 'user' to be text that is not empty or None, got ''"),
        (
            "jetstream://h?visibilty_timeout=1",
            "unknown option 'visibilty_timeout', did you mean 'visibility_timeout'?",
        ),
        (
            "jetstream://h?visibility_timeout=1h",
            "expected 'visibility_timeout' to be seconds > 0, got '1h'",
        ),
        (
            "jetstream://h?visibility_timeout",
            "expected 'visibility_timeout' to be seconds > 0, got ''",
        ),
        ("jetstream://h?ack_confirm=yes", "expected 'ack_confirm' to be True or False, got 'yes'"),
        (
            "jetstream://h?publish_window=1&publish_window=2",
            "'publish_window' is twice in the URL, say it once",
        ),
        (
            "jetstream://h?max_retries=3",
            "'max_retries' belongs in the transport options, not in the URL",
        ),
        (
            "jetstream://h?ssl_ca_certs=ca.pem",
            "'ssl_ca_certs' belongs in broker_use_ssl, not in the URL",
        ),
        (
            "jetstream://h?tls=true",
            "unknown option 'tls', TLS is demanded by a jetstreams:// URL or by broker_use_ssl",
        ),
    ],
)
def test_bad_url_names_the_part_and_no_password(url: str, sentence: str) -> None:
    told = refusal(url)

    assert told == sentence
    assert "heim" not in told


def test_no_ascii_digits_are_no_port() -> None:
    assert "number from 1 to 65535" in refusal("jetstream://h:٤٢")


# broker_transport_options


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("visibility_timeout", 3600, 3600.0),
        ("delay_threshold", 0, 0.0),
        ("fallback_after", 0.0, 0.0),
        ("stream_max_age", None, None),
        ("credentials_file", Path("a.creds"), "a.creds"),
        ("max_deliveries", 0, None),
        ("max_deliveries", None, None),
        ("publish_confirms", "pipelined", "pipelined"),
        ("namespace", "shop-1", "shop-1"),
        ("inbox_prefix", "_INBOX.shop", "_INBOX.shop"),
        ("dead_letter_max_bytes", None, None),
        ("dead_letter_max_age", None, None),
    ],
)
def test_option_is_stored_in_its_type(name: str, value: object, stored: object) -> None:
    found = getattr(Options.parse("jetstream://", {name: value}), name)

    assert found == stored
    assert type(found) is type(stored)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"visibilty_timeout": 5},
            "unknown option 'visibilty_timeout', did you mean 'visibility_timeout'?",
        ),
        ({"max_retrys": 5}, "unknown option 'max_retrys', did you mean 'max_retries'?"),
        ({"zzz": 5}, "unknown option 'zzz'"),
        ({7: 5}, "unknown option 7"),
        (
            {"servers": ["a"]},
            "unknown option 'servers', the servers are the hosts of the URL: "
            "jetstream://host:4222,host2:4222",
        ),
        (
            {"visibility_timeout": "1h"},
            "expected 'visibility_timeout' to be seconds > 0, got '1h'",
        ),
        ({"visibility_timeout": 0}, "expected 'visibility_timeout' to be seconds > 0, got 0"),
        ({"visibility_timeout": True}, "expected 'visibility_timeout' to be seconds > 0, got True"),
        ({"visibility_timeout": None}, "expected 'visibility_timeout' to be seconds > 0, got None"),
        (
            {"visibility_timeout": float("inf")},
            "expected 'visibility_timeout' to be seconds > 0, got inf",
        ),
        (
            {"visibility_timeout": 10**400},
            "expected 'visibility_timeout' to be seconds > 0, got 1000",
        ),
        ({"lease_limit": -1}, "expected 'lease_limit' to be seconds > 0 or None, got -1"),
        ({"delay_threshold": -1}, "expected 'delay_threshold' to be seconds >= 0, got -1"),
        ({"ack_confirm": 1}, "expected 'ack_confirm' to be True or False, got 1"),
        ({"publish_window": 0}, "expected 'publish_window' to be a whole number >= 1, got 0"),
        ({"publish_window": 1.5}, "expected 'publish_window' to be a whole number >= 1, got 1.5"),
        (
            {"max_deliveries": -1},
            "expected 'max_deliveries' to be a whole number >= 0 or None, got -1",
        ),
        (
            {"stream_replicas": 6},
            "expected 'stream_replicas' to be a whole number from 1 to 5, got 6",
        ),
        (
            {"stream_max_bytes": "1G"},
            "expected 'stream_max_bytes' to be a whole number of bytes >= 1 or None, got '1G'",
        ),
        ({"priority_levels": 2}, "expected 'priority_levels' to be one of 1, 3, got 2"),
        ({"priority_levels": True}, "expected 'priority_levels' to be one of 1, 3, got True"),
        (
            {"publish_confirms": ["each"]},
            "expected 'publish_confirms' to be one of 'each', 'pipelined', got ['each']",
        ),
        (
            {"provision": "Auto"},
            "expected 'provision' to be one of 'auto', 'verify', 'off', got 'Auto'",
        ),
        (
            {"namespace": "a.b"},
            "expected 'namespace' to be 1 to 64 letters, digits, '_' or '-', got 'a.b'",
        ),
        (
            {"namespace": "a\n"},
            "expected 'namespace' to be 1 to 64 letters, digits, '_' or '-', got 'a\\n'",
        ),
        (
            {"inbox_prefix": "a..b"},
            "expected 'inbox_prefix' to be a NATS subject without blanks, '*', '>' and empty "
            "parts, got 'a..b'",
        ),
        (
            {"jetstream_domain": "a.b"},
            "expected 'jetstream_domain' to be one NATS subject token, without blanks, '.', '*' "
            "and '>' or None, got 'a.b'",
        ),
        (
            {"credentials_file": 3},
            "expected 'credentials_file' to be the path of a file or None, got 3",
        ),
        (
            {"nkey_seed_file": ""},
            "expected 'nkey_seed_file' to be the path of a file or None, got ''",
        ),
        (
            {"token": b"geheim"},
            "expected 'token' to be text that is not empty or None, got bytes (not shown)",
        ),
        (
            {"fallback_url": "http://ann:geheim@h"},
            "expected 'fallback_url' to be a redis://, rediss:// or unix:// URL or None, "
            "got str (not shown)",
        ),
        (
            {"user": "ann"},
            "expected 'user' and 'password' to be given together",
        ),
        (
            {"token": "geheim", "credentials_file": "a.creds"},
            "expected one of 'user' with 'password', 'token', 'credentials_file' and "
            "'nkey_seed_file', got more than one",
        ),
        (
            {"lease_limit": 29},
            "expected 'lease_limit' to be at least 'visibility_timeout' (30.0), got 29.0",
        ),
        (
            {"publish_timeout": 121},
            "expected 'publish_timeout' to be at most 'dedup_window' (120.0), got 121.0",
        ),
        (
            {"stream_max_age": 60},
            "expected 'dedup_window' to be at most 'stream_max_age' (60.0), got 120.0",
        ),
        (
            {"dead_letter_max_age": 60},
            "expected 'dedup_window' to be at most 'dead_letter_max_age' (60.0), got 120.0",
        ),
        (
            {"migration_phase": "dual-read"},
            "expected 'fallback_url' to be given, as 'migration_phase' is 'dual-read'",
        ),
    ],
    ids=str,
)
def test_bad_option_says_what_was_expected(options: dict[Any, Any], sentence: str) -> None:
    told = refusal("jetstream://", options)

    assert told.startswith(sentence)
    assert len(told) < len(sentence) + 100
    assert "geheim" not in told


def test_error_names_the_option() -> None:
    with pytest.raises(OptionsError) as raised:
        Options.parse("jetstream://", {"publish_window": 0})

    assert raised.value.option == "publish_window"


def test_option_given_twice_with_one_value_is_fine() -> None:
    parsed = Options.parse(
        "jetstream://h/shop?publish_window=7", {"publish_window": 7, "namespace": "shop"}
    )

    assert parsed == Options(servers=(("h", 4222),), namespace="shop", publish_window=7)


@pytest.mark.parametrize(
    ("url", "options", "sentence"),
    [
        (
            "jetstream://h?visibility_timeout=10",
            {"visibility_timeout": 30},
            "'visibility_timeout' is 10.0 in the URL and 30.0 in the transport options, "
            "say it once",
        ),
        (
            "jetstream://h/shop",
            {"namespace": "store"},
            "'namespace' is 'shop' in the URL and 'store' in the transport options, say it once",
        ),
        (
            "jetstream://geheim@h",
            {"token": "geheimer"},
            "'token' is str (not shown) in the URL and str (not shown) in the transport options, "
            "say it once",
        ),
    ],
)
def test_option_given_twice_with_two_values_is_an_error(
    url: str, options: dict[str, Any], sentence: str
) -> None:
    assert refusal(url, options) == sentence


@pytest.mark.parametrize("name", sorted(KOMBU_OPTIONS | IGNORED_OPTIONS))
def test_options_of_kombu_and_of_the_transports_people_come_from_pass(name: str) -> None:
    assert Options.parse("jetstream://", {name: object()}) == Options()


def test_every_option_of_kombu_s_redis_transport_passes() -> None:
    theirs = set(kombu.transport.redis.Channel.from_transport_options)

    assert theirs - IGNORED_OPTIONS == {"global_keyprefix", "visibility_timeout"}


def test_kombu_options_and_ours_do_not_overlap() -> None:
    assert not (KOMBU_OPTIONS | IGNORED_OPTIONS) & FIELDS.keys()
    assert not KOMBU_OPTIONS & IGNORED_OPTIONS


def test_bad_value_is_refused_by_the_constructor_too() -> None:
    with pytest.raises(OptionsError, match="expected 'servers' to be pairs of host and port"):
        Options(servers=(("h", 0),))


def test_defaults_pass_their_own_rules_unchanged() -> None:
    assert {name: getattr(Options(), name) for name in FIELDS} == {
        name: each.default for name, each in FIELDS.items()
    }


def test_options_are_values() -> None:
    options = Options.parse("jetstream://ann:geheim@h")

    assert hash(options) == hash(pickle.loads(pickle.dumps(options)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.namespace = "other"  # type: ignore[misc]


def test_repr_shows_what_is_set_and_no_secret() -> None:
    options = Options(
        user="ann", password="geheim", fallback_url="redis://:geheim@r", visibility_timeout=5
    )

    assert repr(options) == (
        "Options(user='ann', password=**, visibility_timeout=5.0, fallback_url=**)"
    )
    assert repr(Options(token="geheim")) == "Options(token=**)"


# as_uri


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("jetstream://", "jetstream://"),
        ("jetstream://a:1,b:2/shop?publish_window=7", "jetstream://a:1,b:2/shop?publish_window=7"),
        ("jetstreams://ann:geheim@a,[::1]/shop", "jetstreams://ann:**@a,[::1]/shop"),
        ("jetstream://geheim@a//", "jetstream://**@a//"),
        (
            "jetstream://a?token=geheim&ack_confirm=1&fallback_url=redis://:geheim%40r",
            "jetstream://a?token=**&ack_confirm=1&fallback_url=**",
        ),
        # not to be read, so nothing before the last '@' is shown
        ("jetstream://ann:ge/heim@a/shop", "jetstream://**@a/shop"),
        ("jetstream://ann:ge#heim@a?token=geheim", "jetstream://**@a"),
        ("jetstream://ann:geheim", "jetstream://**"),
        ("jetstream://ann:geheim@a?token=geheim&unknown=1", "jetstream://**@a"),
        ("ann:geheim@a", "jetstream://**@a"),
        ("jetstream://a?token=ge@heim", "jetstream://**"),
        ("geheim", "jetstream://**"),
    ],
)
def test_as_uri_masks_every_secret(url: str, shown: str) -> None:
    assert as_uri(url) == shown
    assert as_uri(url, include_password=True) == url


def test_as_uri_takes_another_mask() -> None:
    assert as_uri("jetstream://ann:geheim@h", mask="...") == "jetstream://ann:...@h"


# What kombu makes of a URL


def test_url_of_a_connection_is_the_hostname_kombu_hands_over() -> None:
    assert url_from_parts("jetstream://a,b", port=1, userid="x") == "jetstream://a,b"


@pytest.mark.parametrize(
    "url",
    [
        "jetstream://",
        "jetstream://h:5/shop",
        "jetstream://ann:ge%2Fh%40eim@h//",
        "jetstream://t%2Fk@h:5",
        "jetstreams://[::1]:5/shop",
        "jetstream://h/%2F",
    ],
)
def test_url_taken_apart_by_kombu_means_the_same(url: str) -> None:
    parts = parse_url(url)

    rebuilt = url_from_parts(**parts)

    assert Options.parse(rebuilt) == Options.parse(url)


# Properties

NO_SURROGATES = st.characters(exclude_categories=["Cs"])
HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
PORTS = st.none() | st.integers(1, 65535)


@given(st.text() | st.text(alphabet="jetsram:/@?#[],%=&0").map("jetstream://".__add__))
@example("jetstream://[::1%25]")
def test_parse_of_any_text_raises_options_error_or_nothing(url: str) -> None:
    with contextlib.suppress(OptionsError):
        Options.parse(url)
    as_uri(url)


@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "max_retries"]) | st.text() | st.integers(),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.binary()
        | st.lists(st.text())
        | st.just(object()),
        max_size=4,
    )
)
def test_parse_of_any_options_raises_options_error_or_nothing(options: dict[Any, Any]) -> None:
    with contextlib.suppress(OptionsError):
        Options.parse("jetstream://", options)


@given(
    user=st.text(NO_SURROGATES, min_size=1),
    password=st.text(NO_SURROGATES),
    servers=st.lists(st.tuples(HOSTS, PORTS), min_size=1, max_size=4),
    namespace=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    window=st.integers(1),
)
def test_parse_gives_back_what_the_url_was_made_of(
    user: str, password: str, servers: list[tuple[str, int | None]], namespace: str, window: int
) -> None:
    hosts = ",".join(host if port is None else f"{host}:{port}" for host, port in servers)
    user_info = f"{quote(user, safe='')}:{quote(password, safe='')}"
    url = f"jetstream://{user_info}@{hosts}/{namespace}?publish_window={window}"

    parsed = Options.parse(as_uri(url, include_password=True))

    assert parsed == Options(
        user=user,
        password=password,
        servers=tuple(
            (host.strip("[]"), port if port is not None else 4222) for host, port in servers
        ),
        namespace=namespace,
        publish_window=window,
    )


def outcome(url: str) -> str:
    try:
        return repr(Options.parse(url))
    except OptionsError as error:
        return f"{error} {error!r} {error.option}"


SECRET = "S3cret"
PLACES = [
    "jetstream://ann:{}@h/shop",
    "jetstream://{}@h",
    "jetstream://ann:{}@h?unknown=1",
    "jetstream://ann:{}@h:port",
    "jetstream://h?token={}",
    "jetstream://h?token={}&x",
    "jetstream://h?password={}&user=ann",
    "jetstream://h?fallback_url=redis://:{}%40r",
]


@given(st.text(), st.text(), st.sampled_from(PLACES), st.booleans())
def test_no_secret_is_in_what_people_read(
    before: str, after: str, place: str, is_encoded: bool
) -> None:
    secret = f"{SECRET}{before}{SECRET}{after}{SECRET}"
    if is_encoded:
        secret = quote(secret.encode("utf-8", "replace"), safe="")
    else:  # what says by itself that the secret ends here
        secret = secret.replace(":", "").replace("&", "")
    url = place.format(secret)

    assert SECRET not in as_uri(url)
    assert SECRET not in outcome(url)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "both.pem"))
    (folder / "other.pem").write_bytes(authority.issue_cert("x").private_key_pem.bytes())
    (folder / "rubbish.pem").write_text("rubbish")
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    (folder / "encrypted.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"geheim"))
    )
    return folder


def tls_refusal(setting: object) -> str:
    with pytest.raises(OptionsError) as raised:
        ssl_context(setting, tls=False)
    return str(raised.value)


@pytest.mark.parametrize("setting", [None, False, {}], ids=repr)
def test_no_setting_is_no_tls(setting: object) -> None:
    assert ssl_context(setting, tls=False) is None


@pytest.mark.parametrize(("setting", "tls"), [(True, False), (False, True), ({}, True)], ids=repr)
def test_tls_alone_checks_certificate_and_host_name(setting: object, tls: bool) -> None:
    context = ssl_context(setting, tls)

    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("prefix", ["", "ssl_"])
def test_both_spellings_of_celery_are_taken(prefix: str, certificates: Path) -> None:
    setting = {
        f"{prefix}ca_certs": str(certificates / "ca.pem"),
        f"{prefix}certfile": certificates / "cert.pem",
        f"{prefix}keyfile": certificates / "key.pem",
        f"{prefix}cert_reqs": ssl.CERT_REQUIRED,
        f"{prefix}check_hostname": False,
        f"{prefix}ciphers": "ECDHE+AESGCM",
        f"{prefix}min_version": "TLSv1_3",
        f"{prefix}keyfile_password": None,
    }

    context = ssl_context(setting, tls=False)

    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert not context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("value", ["none", "CERT_NONE", "cert_none", ssl.CERT_NONE, 0], ids=repr)
def test_cert_reqs_none_checks_nothing(value: object) -> None:
    context = ssl_context({"cert_reqs": value}, tls=False)

    assert context is not None
    assert context.verify_mode is ssl.CERT_NONE
    assert not context.check_hostname


def test_context_is_taken_as_it_is() -> None:
    context = ssl.create_default_context()

    assert ssl_context(context, tls=False) is context
    assert ssl_context({"context": context, "server_hostname": "h"}, tls=False) is context


def test_context_of_py_amqp_is_taken(certificates: Path) -> None:
    setting = {"context": {"cafile": str(certificates / "ca.pem"), "check_hostname": False}}

    context = ssl_context(setting, tls=False)

    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert not context.check_hostname


def test_authorities_may_be_text_or_a_folder(certificates: Path) -> None:
    text = (certificates / "ca.pem").read_text()

    context = ssl_context({"ca_data": text, "ssl_ca_path": str(certificates)}, tls=False)

    assert context is not None
    assert len(context.get_ca_certs()) == 1


def test_key_may_be_in_the_certificate_file(certificates: Path) -> None:
    assert ssl_context({"certfile": certificates / "both.pem"}, tls=False)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("true", "expected 'broker_use_ssl' to be True, a dictionary or an SSLContext, got 'true'"),
        (
            {"ca_cert": "x"},
            "unknown key 'ca_cert' of broker_use_ssl, did you mean 'ca_certs'?",
        ),
        (
            {"ssl_certfle": "x"},
            "unknown key 'ssl_certfle' of broker_use_ssl, did you mean 'certfile'?",
        ),
        (
            {"ssl_version": ssl.PROTOCOL_TLS_CLIENT},
            "unknown key 'ssl_version' of broker_use_ssl, the version is negotiated; "
            "'minimum_version' sets the least",
        ),
        (
            {"ca_certs": "a", "ssl_ca_certs": "b"},
            "'ca_certs' is twice in broker_use_ssl, say it once",
        ),
        (
            {"cert_reqs": "maybe"},
            "expected 'cert_reqs' of broker_use_ssl to be one of 'required', 'optional', 'none', "
            "got 'maybe'",
        ),
        (
            {"check_hostname": "no"},
            "expected 'check_hostname' of broker_use_ssl to be True or False, got 'no'",
        ),
        (
            {"check_hostname": True, "cert_reqs": "none"},
            "'check_hostname' of broker_use_ssl needs certificates, 'cert_reqs' says none",
        ),
        (
            {"ciphers": "rubbish"},
            "expected 'ciphers' of broker_use_ssl to be an OpenSSL cipher list, got 'rubbish'",
        ),
        (
            {"minimum_version": "1.3"},
            "expected 'minimum_version' of broker_use_ssl to be an ssl.TLSVersion or its name, "
            "such as 'TLSv1_3', got '1.3'",
        ),
        (
            {"ca_certs": "missing.pem"},
            "cannot use 'ca_certs' of broker_use_ssl 'missing.pem': No such file or directory",
        ),
        (
            {"ca_path": "missing"},
            "cannot use 'ca_path' of broker_use_ssl 'missing': no such folder",
        ),
        (
            {"certfile": "missing.pem"},
            "cannot use 'certfile' of broker_use_ssl 'missing.pem': No such file or directory",
        ),
        (
            {"keyfile": "missing.pem"},
            "'keyfile' of broker_use_ssl needs 'certfile', the certificate of that key",
        ),
    ],
    ids=str,
)
def test_bad_tls_setting_says_what_was_expected(setting: object, sentence: str) -> None:
    assert tls_refusal(setting) == sentence


@pytest.mark.parametrize(
    ("setting", "start"),
    [
        ({"ca_certs": "rubbish.pem"}, "cannot use 'ca_certs' of broker_use_ssl '"),
        ({"certfile": "rubbish.pem"}, "cannot use 'certfile' of broker_use_ssl '"),
        (
            {"certfile": "cert.pem", "keyfile": "missing.pem"},
            "cannot use 'keyfile' of broker_use_ssl '",
        ),
        (
            {"certfile": "cert.pem", "keyfile": "other.pem"},
            "cannot use 'certfile' of broker_use_ssl '",
        ),
    ],
    ids=str,
)
def test_file_that_cannot_be_used_is_named(
    setting: dict[str, str], start: str, certificates: Path
) -> None:
    told = tls_refusal({key: str(certificates / name) for key, name in setting.items()})

    assert told.startswith(start)


def test_encrypted_key_is_opened_with_its_password(certificates: Path) -> None:
    setting = {
        "certfile": str(certificates / "cert.pem"),
        "keyfile": str(certificates / "encrypted.pem"),
    }

    assert ssl_context({**setting, "ssl_password": "geheim"}, tls=False)
    # and does not ask on the terminal when there is none
    assert tls_refusal(setting).endswith("the key is encrypted, 'password' must be given")


def test_context_and_other_keys_are_an_error() -> None:
    told = tls_refusal({"context": ssl.create_default_context(), "ca_certs": "x"})

    assert told == "expected 'ca_certs' of broker_use_ssl to be set in 'context', as one is given"


@pytest.mark.parametrize(
    ("setting", "option", "expected"),
    [
        (None, None, None),
        (True, "n", "n"),
        ({"server_hostname": "n"}, None, "n"),
        ({"ssl_server_hostname": "n"}, "n", "n"),
    ],
    ids=repr,
)
def test_name_of_the_certificate_comes_from_either_setting(
    setting: object, option: str | None, expected: str | None
) -> None:
    assert server_hostname(setting, option) == expected


def test_bad_name_of_the_certificate_is_an_error() -> None:
    with pytest.raises(OptionsError, match="'server_hostname' of broker_use_ssl to be a host name"):
        server_hostname({"server_hostname": ""}, None)


def test_two_names_of_the_certificate_are_an_error() -> None:
    with pytest.raises(OptionsError, match="say it once"):
        server_hostname({"server_hostname": "n"}, "m")


# The reference, and whether options do anything

REFERENCE = (ROOT / "docs" / "reference" / "options.md").read_text("utf-8")


def rows(columns: int) -> Iterator[list[str]]:
    for line in REFERENCE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == columns:
            yield cells


def test_reference_has_every_option_with_its_default() -> None:
    documented = {name.strip("`"): default.strip("`") for name, default, _, _ in rows(4)}

    assert documented == {
        name: str(each.default).replace("'", '"')
        if isinstance(each.default, tuple)
        else f'"{each.default}"'
        if isinstance(each.default, str)
        else repr(each.default)
        for name, each in FIELDS.items()
    }


def test_reference_has_the_unit_of_every_number() -> None:
    for name, default, unit, meaning in rows(4):
        assert meaning, name
        is_number = "float" in FIELDS[name.strip("`")].type or "int" in FIELDS[name.strip("`")].type
        is_number = is_number and "Server" not in FIELDS[name.strip("`")].type
        assert bool(unit) == is_number, (name, default)


def test_reference_has_every_key_of_broker_use_ssl() -> None:
    assert {name.strip("`") for name, _, _ in rows(3)} == tls_module._KEYS


def test_reference_has_every_option_of_kombu() -> None:
    kombus = re.search(r"(?s)names are kombu's own.*?:\n(.*?)\.\n", REFERENCE)
    assert kombus
    assert set(re.findall(r"`(\w+)`", kombus[1])) == KOMBU_OPTIONS
    assert {n for row in rows(2) for n in re.findall(r"`(\w+)`", row[0])} == IGNORED_OPTIONS


def test_every_option_is_read_by_the_code() -> None:
    sources = "\n".join(
        path.read_text("utf-8")
        for folder in ("kombu_jetstream", "celery_ext")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "options.py"
    )
    read = set(re.findall(r"\b(?:options|parsed)\.(\w+)", sources))

    assert FIELDS.keys() - read == set()


@pytest.mark.parametrize(
    ("name", "value"), [("sep", ":"), ("priority_steps", [0, 5]), ("priority_steps", range(10))]
)
def test_lists_of_other_names_are_refused_with_a_fallback(name: str, value: Any) -> None:
    url = "jetstream://h"
    Options.parse(url, {name: value})  # as before: they mean nothing here

    with pytest.raises(OptionsError, match=f"expected '{name}' to be kombu's default"):
        Options.parse(url, {name: value, "fallback_url": "redis://h"})


def test_lists_of_kombus_names_may_be_said() -> None:
    said = {"sep": "\x06\x16", "priority_steps": (0, 3, 6, 9), "fallback_url": "redis://h"}

    assert Options.parse("jetstream://h", said).fallback_url == "redis://h"
