from __future__ import annotations

import pytest

from tests.servers import run_python

BOTH_SCHEMES_ARE_KNOWN = """
from kombu.transport import TRANSPORT_ALIASES
assert TRANSPORT_ALIASES["jetstream"] == "kombu_jetstream.transport:Transport"
assert TRANSPORT_ALIASES["jetstreams"] == "kombu_jetstream.transport:SecureTransport"
"""


@pytest.mark.parametrize(
    "first_import",
    [
        "import kombu.serialization",
        "import kombu.messaging",
        "import celery; celery.Celery",
        "from celery import Celery",
        "import kombu_jetstream",
        "import kombu_jetstream.registration",
        "from kombu import Connection, Producer",
        "import kombu.transport, kombu_jetstream",
    ],
)
def test_schemes_are_known_whatever_is_imported_first(first_import: str) -> None:
    done = run_python(f"{first_import}\n{BOTH_SCHEMES_ARE_KNOWN}")

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first_import",
    ["import kombu", "from kombu import Connection", "import celery", "import kombu.utils.json"],
)
def test_import_order_never_breaks_kombu(first_import: str) -> None:
    done = run_python(f"{first_import}\nimport kombu.serialization, kombu_jetstream, celery.app")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_serializer_round_trips_through_kombu() -> None:
    done = run_python("""
from kombu.serialization import dumps, loads
data = {"text": "naïve ☃", "numbers": [1, 2.5, None, True], "nested": {"a": {}}}
content_type, encoding, payload = dumps(data, serializer="jetstream-envelope")
assert content_type == "application/x-jetstream-envelope"
accept = {content_type}
assert loads(payload, content_type, encoding, accept=accept) == data
assert loads(payload.encode(), content_type, encoding, accept=accept) == data
""")

    assert done.returncode == 0, done.stderr


def test_serializer_is_not_accepted_unless_asked_for() -> None:
    done = run_python("""
from kombu.exceptions import ContentDisallowed
from kombu.serialization import dumps, loads
content_type, encoding, payload = dumps({}, serializer="jetstream-envelope")
try:
    loads(payload, content_type, encoding, accept={"application/json"})
except ContentDisallowed:
    print("refused")
""")

    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize(
    "breakage",
    ["del kombu.transport.TRANSPORT_ALIASES", "kombu.transport.TRANSPORT_ALIASES = None"],
    ids=["missing", "not a dict"],
)
def test_other_kombu_users_are_unharmed_when_the_aliases_cannot_be_set(breakage: str) -> None:
    done = run_python(f"""
import kombu.transport
{breakage}
import kombu.serialization
import kombu_jetstream.registration
assert kombu_jetstream.registration.register_aliases() is False
assert len(kombu_jetstream.registration.register_args) == 4
assert kombu.serialization.dumps([1], serializer="json")[2] == "[1]"
""")

    assert done.returncode == 0, done.stderr
    assert "cannot register the kombu transports jetstream, jetstreams" in done.stderr


def test_registration_loads_no_client_library() -> None:
    done = run_python("""
import sys, kombu.serialization
print(sorted({m.partition(".")[0] for m in sys.modules} & {"nats", "nkeys", "redis", "asyncio"}))
""")

    assert done.stdout == "[]\n", done.stderr
