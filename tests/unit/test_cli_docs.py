from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from celery_ext.cli import jetstream
from tests.servers import ROOT

REFERENCE = (ROOT / "docs" / "reference" / "cli.md").read_text()


def walk(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from walk(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


COMMANDS = dict(walk(jetstream))

#: Described once for all commands, or with their group.
COMMON = {"--json", "--timeout", "--force", "--dry-run", "--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_reference(name: str) -> None:
    assert f"### {name}\n" in REFERENCE or f"`{name}" in REFERENCE


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("migrate")])
def test_every_option_is_in_the_reference(name: str) -> None:
    long = {
        option
        for parameter in COMMANDS[name].params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if option.startswith("--")
    }

    # A list of queues is written by its short name.
    missing = {option for option in long - COMMON - {"--queues"} if option not in REFERENCE}
    assert not missing
