"""The settings of `celery_ext`: four keys of the Celery configuration, read once per app.

=========================  =======================================================================
``jetstream_retry``        a dictionary: the fields of `RetryPolicy`, and ``tasks``, such
                           dictionaries by glob
``jetstream_priorities``   globs of task names to ``"high"``, ``"medium"`` or ``"low"``
``jetstream_dead_letter``  False: final failures of tasks are not kept
``jetstream_hooks``        False: nothing of `celery_ext` happens for this app
=========================  =======================================================================

Celery takes any key, so a bad one would go unnoticed: everything is checked here, and reported in
the words of the transport's options.  Globs match as in ``task_routes``: the exact name first,
then the patterns in the order they are written.  Pure, but for the lookup of builtin exceptions.

Reference for users: docs/reference/settings.md, which a test compares with the fields.
"""

from __future__ import annotations

import builtins
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from fnmatch import translate
from typing import Any, Generic, TypeVar

from kombu_jetstream.errors import OptionsError, shortened
from kombu_jetstream.rules import COUNT, SECONDS_OR_ZERO, SWITCH, Rule, one_of
from kombu_jetstream.topology import LEVELS, Level

__all__ = ["KEYS", "Globs", "RetryPolicy", "Settings", "dotted_name"]

T = TypeVar("T")
U = TypeVar("U")

#: Task names remembered with what they match; more than any app has.
MAX_REMEMBERED = 4096

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Globs(Generic[T]):
    """Values by task name: exact names first, then patterns in their order.

    Remembers the answers, as the same few names are asked for at every publish.
    """

    __slots__ = ("_exact", "_found", "_patterns")

    def __init__(self, values: Mapping[str, T]) -> None:
        self._exact = {name: value for name, value in values.items() if not _is_pattern(name)}
        self._patterns = [
            (re.compile(translate(name)), value)
            for name, value in values.items()
            if _is_pattern(name)
        ]
        self._found: dict[str, T | None] = {}

    def __bool__(self) -> bool:
        return bool(self._exact or self._patterns)

    def map(self, function: Callable[[T], U]) -> Globs[U]:
        """Return these globs with *function* applied to each value."""
        mapped: Globs[U] = Globs({})
        mapped._exact = {name: function(value) for name, value in self._exact.items()}
        mapped._patterns = [(glob, function(value)) for glob, value in self._patterns]
        return mapped

    def get(self, task_name: str, default: T | None = None) -> T | None:
        """Return the value for *task_name*, or *default* if nothing matches."""
        if task_name in self._exact:
            return self._exact[task_name]
        if not self._patterns:
            return default
        try:
            return self._found[task_name]
        except KeyError:
            pass
        found = next((value for glob, value in self._patterns if glob.match(task_name)), default)
        if len(self._found) >= MAX_REMEMBERED:
            self._found.clear()
        self._found[task_name] = found
        return found


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def dotted_name(cls: type) -> str:
    """Return the name of a class as the settings have it: with its module, builtins bare."""
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _exception_names(value: Any) -> tuple[str, ...]:
    """Accept a list of dotted names, or of exception classes."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError
    return tuple(_exception_name(each) for each in value)


def _exception_name(value: Any) -> str:
    """Return the dotted name of an exception, builtins bare."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return dotted_name(value)
    if isinstance(value, str) and _DOTTED.fullmatch(value):
        return value.removeprefix("builtins.")
    raise TypeError


_EXCEPTIONS = Rule("a list of exceptions by their dotted names, builtins bare", _exception_names)
_LEVEL = one_of(*LEVELS)


def _setting(default: Any, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed task is tried again.  Seconds."""

    #: Executions of one task at most, the first one included.
    max_attempts: int = _setting(5, COUNT)
    #: Delay before the second attempt; each further one waits twice as long.
    backoff_base: float = _setting(1.0, SECONDS_OR_ZERO)
    #: Longest delay.
    backoff_max: float = _setting(300.0, SECONDS_OR_ZERO)
    #: Take a random part of the delay, so that tasks that failed together do not come together.
    jitter: bool = _setting(True, SWITCH)
    #: Exceptions that make a dead letter at once; subclasses count.
    unrecoverable: tuple[str, ...] = _setting((), _EXCEPTIONS)
    #: The only exceptions that are tried again; None: all that are not `unrecoverable`.
    retryable: tuple[str, ...] | None = _setting(None, _EXCEPTIONS.or_none())


_POLICY_FIELDS: Mapping[str, Field[Any]] = {each.name: each for each in fields(RetryPolicy)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one app is told to do."""

    #: None: off.
    retry: RetryPolicy | None = None
    #: Overrides of `retry`; None as a value: off for these tasks.
    retry_tasks: Globs[RetryPolicy | None] = field(default_factory=lambda: Globs({}))
    priorities: Globs[Level] = field(default_factory=lambda: Globs({}))
    dead_letter: bool = True
    hooks: bool = True

    def retry_for(self, task_name: str) -> RetryPolicy | None:
        """Return the policy of a task, or None if it is not tried again."""
        return self.retry_tasks.get(task_name, self.retry)

    @classmethod
    def read(cls, conf: Mapping[str, Any]) -> Settings:
        """Return the settings in a Celery configuration.

        Raises `OptionsError` for unknown names and bad values.
        """
        for name, known in _misspelled(conf):
            raise OptionsError.unknown("setting", name, known)
        retry, retry_tasks = _retry(_value(conf, "jetstream_retry"))
        return cls(
            retry=retry,
            retry_tasks=Globs(retry_tasks),
            priorities=Globs(_priorities(_value(conf, "jetstream_priorities"))),
            dead_letter=_switch(conf, "jetstream_dead_letter"),
            hooks=_switch(conf, "jetstream_hooks"),
        )


#: Every key of the Celery configuration that is read here.
KEYS = ("jetstream_retry", "jetstream_priorities", "jetstream_dead_letter", "jetstream_hooks")


def _value(conf: Mapping[str, Any], key: str) -> Any:
    """Return a key's value, also from a configuration with the upper-case names of Celery 3.

    A ``namespace`` of ``config_from_object`` is looked after by Celery.
    """
    candidates = (conf.get(name) for name in (key, key.upper(), f"CELERY_{key.upper()}"))
    return next((value for value in candidates if value is not None), None)


def _switch(conf: Mapping[str, Any], key: str) -> bool:
    value = _value(conf, key)
    return True if value is None else bool(SWITCH.checked(value, key))


def _misspelled(conf: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield keys that are nearly ours, and what ours are in the same spelling.

    Others are the user's: a configuration module may have any name in it.
    """
    namespace = (getattr(conf, "prefix", None) or "").lower()
    for key in conf:
        if not isinstance(key, str) or "jet" not in key.lower():
            continue
        name = key.lower().removeprefix(namespace).removeprefix("celery_")
        if name not in KEYS and difflib.get_close_matches(name, KEYS, n=1, cutoff=0.85):
            prefix = key[: -len(name)]
            yield key, [prefix + (each.upper() if key.isupper() else each) for each in KEYS]


def _retry(value: Any) -> tuple[RetryPolicy | None, dict[str, RetryPolicy | None]]:
    where = "jetstream_retry"
    if value is None or value is False:
        return None, {}
    general = dict(_mapping(value, where))
    overrides = general.pop("tasks", None)
    policy = _policy(general, {}, where)
    tasks = {}
    for glob, override in _globs(overrides, "tasks", f" of {where}"):
        place = f"{where}['tasks'][{glob!r}]"
        off = override is None or override is False
        tasks[glob] = None if off else _policy(_mapping(override, place), general, place)
    return policy, tasks


def _policy(values: Mapping[Any, Any], general: Mapping[Any, Any], where: str) -> RetryPolicy:
    """Return the policy of *values* over those of *general*, which were checked before."""
    checked = {}
    for name, value in {**general, **values}.items():
        each = _POLICY_FIELDS.get(name)
        if each is None:
            known = _POLICY_FIELDS if where.endswith("]") else (*_POLICY_FIELDS, "tasks")
            raise OptionsError.unknown("key", name, known, f" in {where}")
        rule: Rule = each.metadata["rule"]
        checked[name] = rule.checked(value, each.name, f" of {where}")
    if "backoff_max" in checked and "backoff_base" not in checked:
        # Who asks for short delays need not know the default of the first one.
        default = _POLICY_FIELDS["backoff_base"].default
        checked["backoff_base"] = min(default, checked["backoff_max"])
    policy = RetryPolicy(**checked)
    _check_together(policy, where)
    return policy


def _check_together(policy: RetryPolicy, where: str) -> None:
    if policy.backoff_base > policy.backoff_max:
        raise OptionsError(
            f"expected 'backoff_base' of {where} to be at most 'backoff_max' "
            f"({policy.backoff_max}), got {policy.backoff_base}",
            "backoff_base",
        )
    both = set(policy.unrecoverable) & set(policy.retryable or ())
    if both:
        raise OptionsError(
            f"expected {min(both)!r} in one of 'unrecoverable' and 'retryable' of {where}, "
            "got it in both",
            "retryable",
        )
    for option in ("unrecoverable", "retryable"):
        for name in getattr(policy, option) or ():
            if "." not in name and name not in _BUILTIN_EXCEPTIONS:
                raise OptionsError.unknown(
                    "builtin exception",
                    name,
                    _BUILTIN_EXCEPTIONS,
                    f" in {option!r} of {where}, where others have their module in front",
                )


_BUILTIN_EXCEPTIONS = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)


def _priorities(value: Any) -> dict[str, Level]:
    where = "jetstream_priorities"
    return {
        glob: _LEVEL.checked(level, glob, f" of {where}")
        for glob, level in _globs(value, where, "")
    }


def _globs(value: Any, name: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of a dictionary of globs; None is an empty one."""
    if value is None:
        return
    rule = Rule("a dictionary with globs of task names as keys", _accept_mapping)
    for glob, item in rule.checked(value, name, where).items():
        if not isinstance(glob, str) or not glob:
            raise OptionsError.bad_value(
                name, where, "a dictionary with globs of task names as keys", shortened(value)
            )
        yield glob, item


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    checked: Mapping[Any, Any] = Rule("a dictionary", _accept_mapping).checked(value, where)
    return checked


def _accept_mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return value
