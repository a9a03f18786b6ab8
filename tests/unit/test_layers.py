"""Which module may know which: read from the imports, without importing anything."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "kombu_jetstream"
EXTENSION = "celery_ext"

#: Values in, values out: no socket, clock, thread or process, and nothing that has one.
PURE = frozenset(
    {
        "arguments",
        "backend",
        "deadletter",
        "delays",
        "envelope",
        "errors",
        "options",
        "protocol",
        "pulls",
        "qos",
        "resp",
        "routing",
        "rules",
        "tasks",
        "topology",
    }
)

#: What a pure module does not even import.
EFFECTS = frozenset(
    {
        "asyncio",
        "concurrent",
        "multiprocessing",
        "queue",
        "random",
        "sched",
        "select",
        "selectors",
        "signal",
        "socket",
        "socketserver",
        "ssl",
        "subprocess",
        "threading",
        "time",
    }
)

#: Who has a thread, a lock or a condition.
THREADED = frozenset(
    {
        "connection",
        "extensions",
        "failover",
        "fallback",
        "leases",
        "redis_lists",
        "server",
        "session",
    }
)

#: Who touches sockets.
NETWORKED = frozenset(
    {"connection", "endpoint", "fallback", "redis_lists", "server", "session", "tls"}
)


class Import(NamedTuple):
    module: str
    #: inside a function, so at its first call
    is_late: bool
    #: for the type checker alone
    is_type: bool


@lru_cache
def imports_of(path: Path) -> tuple[Import, ...]:
    found: list[Import] = []

    def walk(node: ast.AST, is_late: bool, is_type: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, is_late, is_type) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{path.parent.name}{'.' if node.module else ''}" if node.level else ""
            base += node.module or ""
            if node.level and not node.module:
                found.extend(Import(f"{base}.{a.name}", is_late, is_type) for a in node.names)
            else:
                found.append(Import(base, is_late, is_type))
                found.extend(Import(f"{base}.{a.name}", is_late, is_type) for a in node.names)
        is_check = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            walk(child, is_late or is_function, is_type or is_check)

    walk(ast.parse(path.read_text()), False, False)
    return tuple(found)


def modules(package: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / package).glob("*.py"))}


MODULES = modules(PACKAGE)


def ours(name: str, *, late: bool = True) -> set[str]:
    """Return the modules of the package that *name* imports when it runs."""
    return {
        found.module.split(".")[1]
        for found in imports_of(MODULES[name])
        if found.module.startswith(f"{PACKAGE}.")
        and found.module.split(".")[1] in MODULES
        and not found.is_type
        and (late or not found.is_late)
    }


def others(name: str) -> set[str]:
    """Return the packages outside of this one that *name* imports when it runs."""
    roots = {f.module.split(".")[0] for f in imports_of(MODULES[name]) if not f.is_type}
    return roots - {PACKAGE}


def importers_of(package: str) -> set[str]:
    return {name for name in MODULES if package in others(name)}


def test_the_lists_name_modules_that_exist() -> None:
    assert set(MODULES) >= PURE | THREADED | NETWORKED
    assert not PURE & (THREADED | NETWORKED)


@pytest.mark.parametrize("name", sorted(PURE))
def test_a_pure_module_has_no_effects(name: str) -> None:
    assert not others(name) & EFFECTS
    assert ours(name) <= PURE


def test_only_some_modules_have_threads_or_sockets() -> None:
    assert importers_of("threading") <= THREADED
    assert {n for n in MODULES if others(n) & {"socket", "select", "ssl"}} <= NETWORKED


def test_nothing_is_asynchronous() -> None:
    assert importers_of("asyncio") == set()


def test_imports_have_no_cycle() -> None:
    graph = {name: ours(name, late=False) for name in MODULES}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(f"a cycle of imports: {' -> '.join(exc.args[1])}")
    assert order.index("errors") < order.index("protocol") < order.index("connection")
    assert order.index("connection") < order.index("jetstream") < order.index("session")
    assert order.index("session") < order.index("transport")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", set()),
        ("pulls", set()),
        ("backend", set()),
        ("protocol", {"errors"}),
        ("rules", {"errors"}),
        ("options", {"errors", "rules"}),
        ("endpoint", {"errors"}),
        ("connection", {"endpoint", "errors", "protocol"}),
        ("routing", {"topology"}),
        ("registration", set()),
        ("server", set()),
    ],
)
def test_what_is_at_the_bottom_knows_little(name: str, allowed: set[str]) -> None:
    assert ours(name) <= allowed


def test_nobody_looks_up_to_what_uses_it() -> None:
    for name in MODULES:
        if name not in ("transport", "__init__"):
            assert "transport" not in ours(name, late=False), name
        if name not in ("transport", "fallback", "fallback_channels", "migration"):
            assert "session" not in ours(name, late=False), name
            assert not ours(name) & {"fallback", "fallback_channels", "redis_lists"}, name
    assert not ours("connection") & {"jetstream", "session", "channel"}


def test_redis_is_imported_by_one_module_alone() -> None:
    assert importers_of("redis") == {"redis_lists"}
    late = {n for n in MODULES if "redis_lists" in ours(n, late=False)}
    assert late <= {"fallback", "fallback_channels", "migration"}
    # And those only by who has found that a fallback is configured.
    for name in set(MODULES) - {"fallback", "fallback_channels", "migration"}:
        assert not ours(name, late=False) & late, name


def test_nats_py_gives_dataclasses_and_no_client() -> None:
    for name in MODULES:
        found = {f.module for f in imports_of(MODULES[name]) if f.module.split(".")[0] == "nats"}
        assert found <= {"nats.js", "nats.js.api"}, name


def test_the_transport_knows_neither_celery_nor_its_extension() -> None:
    assert importers_of("celery") == set()
    assert importers_of(EXTENSION) == set()


def test_the_entry_point_imports_nothing_but_kombus_table_of_transports() -> None:
    late = {f.module for f in imports_of(MODULES["registration"]) if f.is_late}
    at_once = {f.module.split(".")[0] for f in imports_of(MODULES["registration"]) if not f.is_late}

    assert {module.split(".")[0] for module in late} <= {"kombu"}
    assert at_once <= {"__future__", "collections", "json", "logging", "typing"}


def test_the_package_imports_its_entry_point_alone() -> None:
    assert ours("__init__") == {"registration"}


def test_the_map_in_the_package_shows_every_module() -> None:
    text = ast.get_docstring(ast.parse(MODULES["__init__"].read_text())) or ""
    shown = set(re.findall(r"`(\w+)`", text))

    assert set(MODULES) - {"__init__", "registration"} <= shown
    assert shown <= set(MODULES) | {EXTENSION}


def test_the_map_says_pure_of_pure_modules_only() -> None:
    text = ast.get_docstring(ast.parse(MODULES["__init__"].read_text())) or ""
    said = set(re.findall(r"`(\w+)`[^`]*\(pure\)", text.replace("\n", " ")))

    assert said <= PURE | {"failover"}  # that one has a lock around its table


@pytest.mark.parametrize("name", sorted(modules(EXTENSION)))
def test_the_extension_uses_no_private_name_of_the_transport(name: str) -> None:
    tree = ast.parse(modules(EXTENSION)[name].read_text())
    private = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        for alias in node.names
        if alias.name.startswith("_")
    ]

    assert private == []
