from __future__ import annotations

import configparser
import importlib
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.servers import ROOT

SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg")


def _lines(section: str, option: str) -> list[str]:
    return [line for line in SETUP[section][option].splitlines() if line and line[0] != "#"]


def test_every_entry_point_can_be_loaded() -> None:
    declared = [
        line.partition("=")[2].strip()
        for group in SETUP["options.entry_points"]
        for line in _lines("options.entry_points", group)
    ]

    assert declared
    for target in declared:
        # "module:name" or "module", and the extra it belongs to.
        module_name, _, name = target.partition(" [")[0].partition(":")
        module = importlib.import_module(module_name)
        assert not name or hasattr(module, name), target


def test_installed_entry_points_are_the_declared_ones() -> None:
    declared = {
        (group, *(part.strip() for part in line.split("=")))
        for group in SETUP["options.entry_points"]
        for line in _lines("options.entry_points", group)
    }

    installed = distribution("kombu-jetstream").entry_points

    assert {(e.group, e.name, e.value) for e in installed} == declared


@pytest.mark.parametrize("package", _lines("options", "packages"))
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_all_packages_are_shipped() -> None:
    found = {str(init.parent.relative_to(ROOT)) for init in ROOT.glob("[a-z]*/__init__.py")}

    assert found - {"tests"} <= set(_lines("options", "packages"))


def test_ci_runs_what_make_test_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci" / "run").read_text()

    assert "@.venv/bin/python -m pytest $(ARGS) ||" in makefile
    assert ci.endswith("\nexec make --silent test\n")


def test_public_files_name_no_path_of_a_machine() -> None:
    for file in [ROOT / "Makefile", ROOT / "setup.cfg", *Path(ROOT, "docs").rglob("*.*")]:
        if file.suffix in {"", ".md", ".py", ".cfg"}:
            assert "/root/" not in file.read_text(), file
