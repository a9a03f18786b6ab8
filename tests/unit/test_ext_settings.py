from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from types import ModuleType
from typing import Any

import pytest
from celery import Celery

from celery_ext.settings import KEYS, Globs, RetryPolicy, Settings, dotted_name
from kombu_jetstream.errors import OptionsError
from tests.servers import ROOT


class DeclinedError(Exception):
    class Nested(Exception):
        pass


def read(**conf: Any) -> Settings:
    app = Celery("settings", set_as_current=False)
    app.conf.update(conf)
    return Settings.read(app.conf)


def test_defaults() -> None:
    settings = read()

    assert settings.retry is None
    assert settings.retry_for("any.task") is None
    assert settings.priorities.get("any.task") is None
    assert settings.dead_letter is True
    assert settings.hooks is True


def test_an_empty_retry_dictionary_switches_retries_on_with_the_defaults() -> None:
    assert read(jetstream_retry={}).retry == RetryPolicy(
        max_attempts=5,
        backoff_base=1.0,
        backoff_max=300.0,
        jitter=True,
        unrecoverable=(),
        retryable=None,
    )


@pytest.mark.parametrize("off", [None, False])
def test_retry_can_be_said_to_be_off(off: object) -> None:
    assert read(jetstream_retry=off).retry is None


def test_the_form_of_the_reference() -> None:
    settings = read(
        jetstream_retry={
            "max_attempts": 7,
            "backoff_base": 1,
            "backoff_max": 300.0,
            "jitter": False,
            "unrecoverable": ["ValueError", "shop.errors.BadCard"],
            "retryable": ["OSError"],
            "tasks": {"billing.*": {"max_attempts": 2, "retryable": None}},
        },
        jetstream_priorities={"billing.*": "high"},
        jetstream_dead_letter=False,
        jetstream_hooks=False,
    )

    assert settings.retry == RetryPolicy(
        max_attempts=7,
        backoff_base=1.0,
        backoff_max=300.0,
        jitter=False,
        unrecoverable=("ValueError", "shop.errors.BadCard"),
        retryable=("OSError",),
    )
    assert settings.retry_for("billing.charge") == RetryPolicy(
        max_attempts=2, jitter=False, unrecoverable=("ValueError", "shop.errors.BadCard")
    )
    assert settings.priorities.get("billing.charge") == "high"
    assert settings.dead_letter is False
    assert settings.hooks is False


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    settings = read(jetstream_retry={})
    assert settings.retry is not None

    with pytest.raises(FrozenInstanceError):
        settings.retry.max_attempts = 9  # type: ignore[misc]


@pytest.mark.parametrize("off", [None, False])
def test_retries_can_be_off_for_some_tasks(off: object) -> None:
    settings = read(jetstream_retry={"tasks": {"mail.*": off}})

    assert settings.retry_for("mail.send") is None
    assert settings.retry_for("other") == RetryPolicy()


def test_the_exact_name_wins_over_patterns_and_the_first_pattern_over_the_next() -> None:
    globs = Globs({"a.*": 1, "a.b*": 2, "a.bc": 3})

    assert [globs.get(name) for name in ("a.x", "a.bx", "a.bc", "b")] == [1, 1, 3, None]
    assert [globs.get(name) for name in ("a.x", "a.bx", "a.bc", "b")] == [1, 1, 3, None]


def test_globs_match_case_and_the_whole_name() -> None:
    globs = Globs({"mail.[ab]?": 1})

    assert [globs.get(n) for n in ("mail.ax", "mail.cx", "Mail.ax", "mail.axx", "x.mail.ax")] == [
        1,
        None,
        None,
        None,
        None,
    ]


def test_globs_forget_rather_than_grow() -> None:
    globs = Globs({"a*": 1})

    for number in range(10_000):
        assert globs.get(f"a{number}") == 1

    assert len(globs._found) < 5_000


def test_exceptions_may_be_given_as_classes() -> None:
    policy = read(jetstream_retry={"unrecoverable": (ValueError, DeclinedError.Nested)}).retry

    assert policy is not None
    assert policy.unrecoverable == ("ValueError", f"{__name__}.DeclinedError.Nested")


def test_builtins_may_have_their_module_in_front() -> None:
    policy = read(jetstream_retry={"retryable": ["builtins.OSError"]}).retry

    assert policy is not None
    assert policy.retryable == ("OSError",)
    assert dotted_name(OSError) == "OSError"


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"jetstream_retry": {"max_atempts": 5}},
        "unknown key 'max_atempts' in jetstream_retry, did you mean 'max_attempts'?",
    ),
    (
        {"jetstream_retry": {"task": {}}},
        "unknown key 'task' in jetstream_retry, did you mean 'tasks'?",
    ),
    ({"jetstream_retry": 5}, "expected 'jetstream_retry' to be a dictionary, got 5"),
    ({"jetstream_retry": True}, "expected 'jetstream_retry' to be a dictionary, got True"),
    (
        {"jetstream_retry": {"max_attempts": 0}},
        "expected 'max_attempts' of jetstream_retry to be a whole number >= 1, got 0",
    ),
    (
        {"jetstream_retry": {"backoff_base": "1h"}},
        "expected 'backoff_base' of jetstream_retry to be seconds >= 0, got '1h'",
    ),
    (
        {"jetstream_retry": {"backoff_max": float("inf")}},
        "expected 'backoff_max' of jetstream_retry to be seconds >= 0, got inf",
    ),
    (
        {"jetstream_retry": {"backoff_base": 60, "backoff_max": 10}},
        "expected 'backoff_base' of jetstream_retry to be at most 'backoff_max' (10.0), got 60.0",
    ),
    (
        {"jetstream_retry": {"jitter": 1}},
        "expected 'jitter' of jetstream_retry to be True or False, got 1",
    ),
    (
        {"jetstream_retry": {"unrecoverable": "ValueError"}},
        "expected 'unrecoverable' of jetstream_retry to be a list of exceptions by their dotted "
        "names, builtins bare, got 'ValueError'",
    ),
    (
        {"jetstream_retry": {"unrecoverable": ["shop errors"]}},
        "expected 'unrecoverable' of jetstream_retry to be a list of exceptions by their dotted "
        "names, builtins bare, got ['shop errors']",
    ),
    (
        {"jetstream_retry": {"unrecoverable": ["ValueEror"]}},
        "unknown builtin exception 'ValueEror' in 'unrecoverable' of jetstream_retry, where others "
        "have their module in front, did you mean 'ValueError'?",
    ),
    (
        {"jetstream_retry": {"unrecoverable": ["OSError"], "retryable": ["OSError"]}},
        "expected 'OSError' in one of 'unrecoverable' and 'retryable' of jetstream_retry, "
        "got it in both",
    ),
    (
        {"jetstream_retry": {"tasks": ["a"]}},
        "expected 'tasks' of jetstream_retry to be a dictionary with globs of task names as keys, "
        "got ['a']",
    ),
    (
        {"jetstream_retry": {"tasks": {"a.*": {"tasks": {}}}}},
        "unknown key 'tasks' in jetstream_retry['tasks']['a.*']",
    ),
    (
        {"jetstream_retry": {"tasks": {"a.*": {"backof_max": 3}}}},
        "unknown key 'backof_max' in jetstream_retry['tasks']['a.*'], did you mean 'backoff_max'?",
    ),
    (
        {"jetstream_retry": {"tasks": {"a.*": {"max_attempts": "3"}}}},
        "expected 'max_attempts' of jetstream_retry['tasks']['a.*'] to be a whole number >= 1, "
        "got '3'",
    ),
    (
        {"jetstream_priorities": {"a.*": "urgent"}},
        "expected 'a.*' of jetstream_priorities to be one of 'high', 'medium', 'low', got 'urgent'",
    ),
    (
        {"jetstream_priorities": ["a"]},
        "expected 'jetstream_priorities' to be a dictionary with globs of task names as keys, "
        "got ['a']",
    ),
    (
        {"jetstream_priorities": {5: "high"}},
        "expected 'jetstream_priorities' to be a dictionary with globs of task names as keys, "
        "got {5: 'high'}",
    ),
    (
        {"jetstream_dead_letter": "no"},
        "expected 'jetstream_dead_letter' to be True or False, got 'no'",
    ),
    ({"jetstream_hooks": 0}, "expected 'jetstream_hooks' to be True or False, got 0"),
    (
        {"jetstream_retrys": {}},
        "unknown setting 'jetstream_retrys', did you mean 'jetstream_retry'?",
    ),
    (
        {"jetstream_deadletter": False},
        "unknown setting 'jetstream_deadletter', did you mean 'jetstream_dead_letter'?",
    ),
]


@pytest.mark.parametrize(("conf", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_bad_setting_is_reported_with_what_was_expected(
    conf: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionsError) as caught:
        read(**conf)

    assert str(caught.value) == message


def test_other_names_with_jetstream_in_them_are_the_users() -> None:
    assert read(jetstream_url="nats://x", my_jetstream_host="x").hooks is True


def module(**names: Any) -> ModuleType:
    made = ModuleType("celeryconfig")
    vars(made).update(names)
    return made


def test_keys_with_a_namespace() -> None:
    app = Celery("settings", set_as_current=False)
    app.config_from_object(
        module(CELERY_JETSTREAM_RETRY={"max_attempts": 3}, CELERY_JETSTREAM_HOOKS=False),
        namespace="CELERY",
    )

    settings = Settings.read(app.conf)

    assert settings.retry == RetryPolicy(max_attempts=3)
    assert settings.hooks is False


def test_a_misspelled_key_with_a_namespace() -> None:
    app = Celery("settings", set_as_current=False)
    app.config_from_object(module(CELERY_JETSTREAM_RETRYS={}), namespace="CELERY")

    with pytest.raises(OptionsError, match="did you mean 'CELERY_JETSTREAM_RETRY'"):
        Settings.read(app.conf)


@pytest.mark.parametrize("name", ["jetstream_retry", "JETSTREAM_RETRY", "CELERY_JETSTREAM_RETRY"])
def test_keys_of_a_configuration_module(name: str) -> None:
    app = Celery("settings", set_as_current=False)
    app.config_from_object(module(**{name: {"max_attempts": 3}}))

    assert Settings.read(app.conf).retry == RetryPolicy(max_attempts=3)


def test_the_reference_has_every_key_and_field_with_its_default() -> None:
    text = (ROOT / "docs/reference/settings.md").read_text("utf-8")
    tables = text[: text.index("## Attributes of a task")]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", tables, re.MULTILINE))

    policy = {each.name: each.default for each in fields(RetryPolicy)}
    assert rows.keys() == {*KEYS, *policy, "tasks"}
    for name, default in policy.items():
        assert rows[name] == ("`[]`" if default == () else f"`{default!r}`"), name


def test_a_short_longest_delay_shortens_the_first_one() -> None:
    policy = Settings.read({"jetstream_retry": {"backoff_max": 0.5}}).retry

    assert policy is not None
    assert policy.backoff_base == policy.backoff_max == 0.5


def test_a_misspelled_name_of_the_server_is_found() -> None:
    with pytest.raises(OptionsError, match="did you mean 'jetstream_retry'"):
        Settings.read({"jetsream_retry": {}})
