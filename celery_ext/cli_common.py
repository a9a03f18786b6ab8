"""What the commands of ``celery jetstream`` share: options, errors, tables and JSON."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.platforms import EX_FAILURE, EX_UNAVAILABLE, EX_USAGE

if TYPE_CHECKING:
    from .tables import Column

__all__ = [
    "TABLE_LIMIT",
    "command",
    "complain",
    "confirm",
    "count_of",
    "dry_run_option",
    "duration",
    "force_option",
    "json_option",
    "moment",
    "print_json",
    "print_table",
    "queues_option",
    "remark",
    "timeout_option",
]

F = TypeVar("F", bound=Callable[..., Any])

#: Letters and tasks in a table, unless ``--limit`` says otherwise; JSON has all.
TABLE_LIMIT = 50


def command(group: click.Group, name: str | None = None) -> Callable[[F], click.Command]:
    """Make a function a command of *group* that says errors in one line each."""

    def decorate(function: F) -> click.Command:
        @functools.wraps(function)
        def guarded(ctx: click.Context, *args: Any, **kwargs: Any) -> None:
            from kombu.exceptions import OperationalError

            from kombu_jetstream.errors import (
                ConnectionLost,
                ConnectionRejected,
                JetStreamTransportError,
                OptionsError,
            )

            try:
                function(ctx, *args, **kwargs)
            except OptionsError as exc:
                complain(ctx, f"Error: {exc}")
                ctx.exit(EX_USAGE)
            except (ConnectionLost, ConnectionRejected) as exc:
                complain(ctx, f"Error: {exc}")
                ctx.exit(EX_UNAVAILABLE)
            except JetStreamTransportError as exc:
                complain(ctx, f"Error: {exc}")
                ctx.exit(EX_FAILURE)
            except OperationalError as exc:  # kombu's, for what went wrong while connecting
                complain(ctx, f"Error: {exc}")
                ctx.exit(EX_UNAVAILABLE)
            except ModuleNotFoundError as exc:
                if exc.name != "redis":
                    raise
                complain(ctx, "Error: this needs the package 'redis': pip install redis")
                ctx.exit(EX_USAGE)

        handled = click.pass_context(handle_preload_options(guarded))
        return group.command(name, cls=CeleryCommand)(handled)

    return decorate


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def timeout_option(function: F) -> F:
    return click.option(
        "-t",
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=5.0,
        show_default=True,
        help="Seconds to wait for one answer of the server.",
    )(function)


def force_option(function: F) -> F:
    return click.option("-f", "--force", is_flag=True, help="Do not ask.")(function)


def dry_run_option(function: F) -> F:
    return click.option(
        "-n", "--dry-run", is_flag=True, help="Show what would be done, and do nothing."
    )(function)


def queues_option(function: F) -> F:
    return click.option(
        "-Q",
        "--queues",
        "queue_names",
        callback=lambda ctx, param, value: value.split(",") if value else None,
        help="Comma-separated queues. [default: all]",
    )(function)


def moment(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Read a moment, as an option's callback; seconds since the epoch."""
    from .times import moment_of

    try:
        return moment_of(value, time.time()) if value is not None else None
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Read a duration, as an option's callback; seconds."""
    from .times import duration_of

    try:
        return duration_of(value) if value is not None else None
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


def print_json(ctx: click.Context, value: Any) -> None:
    ctx.obj.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def print_table(
    ctx: click.Context, columns: Sequence[Column], rows: Iterable[Sequence[object]], empty: str
) -> None:
    from .tables import show

    rows = list(rows)
    if rows:
        show(ctx.obj, columns, rows)
    else:
        remark(ctx, empty)


def complain(ctx: click.Context, text: str) -> None:
    """Say what went wrong, on stderr.

    The style is part of the text: Celery's ``error(fg=…)`` raises with ``--no-color``.
    """
    ctx.obj.error(ctx.obj.style(text, fg="red"))


def remark(ctx: click.Context, text: str) -> None:
    if not ctx.obj.quiet:
        ctx.obj.error(text)


def confirm(ctx: click.Context, question: str, force: bool) -> None:
    if not force:
        click.confirm(f"{question}?", abort=True, err=True)


def count_of(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
