from __future__ import annotations

import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kombu_jetstream.routing import (
    Binding,
    Table,
    key_subject,
    matcher,
    subjects_of,
    topic_matches,
)
from kombu_jetstream.topology import Names

WORDS = ("a", "b", "", "x.y", "ü", "*", "a b")


def brute_force(pattern: list[str], key: list[str]) -> bool:
    """AMQP 0-9-1 section 3.1.3.3, word by word."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(brute_force(pattern[1:], key[i:]) for i in range(len(key) + 1))
    return bool(key) and pattern[0] in ("*", key[0]) and brute_force(pattern[1:], key[1:])


def words(text: str) -> list[str]:
    return text.split(".") if text else []


keys = st.lists(st.sampled_from(["a", "b", "c", "", "aa"]), max_size=5).map(".".join)
patterns = st.lists(st.sampled_from(["a", "b", "*", "#", "", "aa"]), max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("#", "", True),
        ("#", "a.b.c", True),
        ("*", "a", True),
        ("*", "", False),
        ("*", "a.b", False),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("a.#", "ab", False),
        ("#.b", "b", True),
        ("#.b", "a.b", True),
        ("#.b", "a.b.c", False),
        ("a.#.c", "a.c", True),
        ("a.#.c", "a.b.b.c", True),
        ("a.#.c", "a.b", False),
        ("a.*.c", "a.c", False),
        ("#.#", "", True),
        ("#.*", "", False),
        ("*.#", "a", True),
        ("a.b", "a.b", True),
        ("a.b", "a.B", False),
        ("", "", True),
        ("", "a", False),
        ("a.", "a.", True),
        ("a.*", "a.", True),
    ],
)
def test_topic_patterns(pattern: str, key: str, expected: bool) -> None:
    assert topic_matches(pattern, key) is expected


@given(patterns, keys)
@settings(max_examples=500)
def test_topic_patterns_agree_with_the_specification(pattern: str, key: str) -> None:
    assert topic_matches(pattern, key) == brute_force(words(pattern), words(key))


def test_topic_patterns_are_not_exponential() -> None:
    pattern = ".".join(["#", "a"] * 30 + ["b"])
    key = ".".join(["a"] * 200)

    start = time.perf_counter()
    assert not topic_matches(pattern, key)

    assert time.perf_counter() - start < 0.5


@given(st.sampled_from(["direct", "topic", "fanout"]), patterns, keys)
def test_matcher_is_what_the_exchange_type_says(kind: str, pattern: str, key: str) -> None:
    expected = {
        "fanout": True,
        "direct": pattern == key,
        "topic": brute_force(words(pattern), words(key)),
    }

    assert matcher(kind, pattern)(key) == expected[kind]


# Subjects


def nats_matches(subscription: str, subject: str) -> bool:
    """NATS subject matching: ``*`` one token, a final ``>`` at least one."""
    wanted, found = subscription.split("."), subject.split(".")
    for at, token in enumerate(wanted):
        if token == ">" and at == len(wanted) - 1:
            return len(found) > at
        if at >= len(found) or token not in ("*", found[at]):
            return False
    return len(wanted) == len(found)


NAMES = Names("ns")

texts = st.text(max_size=6)
odd_keys = st.one_of(keys, texts, st.lists(st.sampled_from(WORDS), max_size=4).map(".".join))
odd_patterns = st.one_of(
    patterns, texts, st.lists(st.sampled_from([*WORDS, "#"]), max_size=4).map(".".join)
)


@given(st.sampled_from(["direct", "topic", "fanout"]), odd_patterns, odd_keys, st.text(max_size=5))
@settings(max_examples=500)
def test_subscriptions_get_what_the_binding_covers(
    kind: str, pattern: str, key: str, exchange: str
) -> None:
    suffixes, needs_filter = subjects_of(kind, pattern)
    published = NAMES.exchange(exchange, key_subject(key))

    arrives = [nats_matches(NAMES.exchange(exchange, suffix), published) for suffix in suffixes]

    covers = matcher(kind, pattern)(key)
    if covers or not needs_filter:
        # Exactly once: two subscriptions would mean two copies.
        assert sum(arrives) == int(covers)
    else:
        assert sum(arrives) <= 1


@given(st.text(max_size=8), st.text(max_size=8), odd_keys, odd_keys)
def test_no_message_reaches_another_exchange_or_key(
    exchange: str, other: str, key: str, other_key: str
) -> None:
    one = NAMES.exchange(exchange, key_subject(key))
    two = NAMES.exchange(other, key_subject(other_key))

    assert (one == two) == ((exchange, words(key)) == (other, words(other_key)))


@given(odd_keys, st.text(max_size=8))
def test_subjects_are_fit_to_publish_to(key: str, exchange: str) -> None:
    subject = NAMES.exchange(exchange, key_subject(key))

    assert subject.isascii()
    assert not set(subject) & set(" \t\r\n*>")
    assert all(subject.split("."))


# The table


def table_of(*bindings: tuple[str, str, str, str]) -> Table:
    table = Table()
    for kind, exchange, key, queue in bindings:
        table.add(Binding(exchange, key, queue, kind))
    return table


def test_each_queue_is_in_a_route_once() -> None:
    table = table_of(
        ("topic", "t", "a.#", "q"),
        ("topic", "t", "*.b", "q"),
        ("topic", "t", "a.b", "other"),
        ("topic", "t", "c", "never"),
        ("topic", "elsewhere", "a.b", "never"),
    )

    assert table.route("t", "a.b") == ("q", "other")


def test_routes_follow_the_bindings() -> None:
    table = table_of(("direct", "d", "k", "one"))
    assert table.route("d", "k") == ("one",)
    assert table.route("d", "other") == ()

    table.add(Binding("d", "k", "two"))
    assert table.route("d", "k") == ("one", "two")
    table.remove("d", "k", "one")
    assert table.route("d", "k") == ("two",)
    table.remove("d", "k", "never there")
    table.clear()
    assert table.route("d", "k") == ()


def test_bindings_are_found_by_queue_and_exchange() -> None:
    table = table_of(*[("direct", e, k, q) for e, k, q in product("de", "kl", "qr")])

    assert len(table.bindings()) == 8
    assert {b.queue for b in table.bindings(queue="q")} == {"q"}
    assert len(table.bindings(queue="q", exchange="d")) == 2
    assert table.has(Binding("d", "k", "q", "direct"))
    assert not table.has(Binding("d", "k", "q", "topic"))


def test_unbounded_routing_keys_do_not_fill_the_memory() -> None:
    table = table_of(("topic", "t", "#", "q"))

    for number in range(25_000):
        assert table.route("t", f"id.{number}") == ("q",)

    assert len(table._routes) <= 10_001


def test_a_route_is_found_quickly_among_many_bindings() -> None:
    table = table_of(*[("topic", "t", f"*.{i}.#", f"q{i}") for i in range(2000)])
    table.route("t", "a.77.b")

    start = time.perf_counter()
    for _ in range(1000):
        table.route("t", "a.77.b")

    assert time.perf_counter() - start < 0.1


@given(st.lists(st.tuples(st.sampled_from("tu"), patterns, st.sampled_from("pqr")), max_size=12))
def test_the_table_routes_as_its_bindings_say(
    bindings: list[tuple[str, str, str]],
) -> None:
    table = table_of(*[("topic", *binding) for binding in bindings])

    for exchange, key in product("tu", ("", "a", "a.b", "b.a", "a.b.aa")):
        expected = {q for e, p, q in bindings if e == exchange and topic_matches(p, key)}
        assert set(table.route(exchange, key)) == expected
        assert table.route(exchange, key) == table.route(exchange, key)
