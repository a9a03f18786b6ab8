"""Who has no fallback needs no ``redis``."""

from __future__ import annotations

import ast

from tests.servers import ROOT, run_python

PACKAGE = ROOT / "kombu_jetstream"


def test_one_module_imports_redis() -> None:
    importers = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            if any(name.split(".")[0] == "redis" for name in names):
                importers.add(path.name)

    assert importers == {"redis_lists.py"}


def test_the_transport_loads_nothing_of_the_fallback() -> None:
    done = run_python(
        """
import sys
import kombu, kombu_jetstream
kombu.Connection("jetstream://127.0.0.1:1").transport
loaded = {name for name in sys.modules if name.startswith(("redis", "kombu_jetstream."))}
ours = {"redis_lists", "fallback", "fallback_channels", "migration", "failover", "resp"}
assert "kombu_jetstream.session" in loaded
assert not loaded & {f"kombu_jetstream.{name}" for name in ours}, loaded
assert "redis" not in loaded
"""
    )

    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_told_with_the_remedy() -> None:
    done = run_python(
        """
import sys
sys.modules["redis"] = None
import kombu, kombu_jetstream
from kombu_jetstream.errors import OptionsError
options = {"fallback_url": "redis://127.0.0.1:1"}
try:
    kombu.Connection("jetstream://127.0.0.1:1", transport_options=options).connect()
except OptionsError as exc:
    print(exc)
"""
    )

    assert done.stdout == (
        "'fallback_url' needs the package 'redis': pip install 'kombu-jetstream[redis]'\n"
    ), done.stderr
