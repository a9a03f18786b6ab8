"""Programs that fork with a connection open: web servers, multiprocessing, prefork pools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import trustme

from kombu_jetstream.server import NatsServer
from tests.acceptance.sites import Site, start_all
from tests.servers import api_request, run_nats_server, run_python

pytestmark = pytest.mark.nats29

#: Publishes in the parent, in two children and in the parent again; a child ends in the way that
#: is named.  Prints the ids.
PROGRAM = """
import json, os, sys
from tests.acceptance.app import app

def publish(count):
    return [app.tasks["noop"].delay().id for _ in range(count)]

ids = publish(3)
for _ in range(2):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        with os.fdopen(write_end, "w") as out:
            json.dump(publish(3), out)
        if sys.argv[1] == "exit":
            sys.exit(0)
        os._exit(0)
    os.close(write_end)
    ids += publish(3)
    with os.fdopen(read_end) as answers:
        ids += json.load(answers)
    assert os.waitpid(pid, 0)[1] == 0
    ids += publish(3)
print(json.dumps(ids))
"""

#: A consumer goes on in the parent while a child publishes.
CONSUMER = """
import os, sys
from kombu import Connection, Queue

with Connection(sys.argv[1]) as connection:
    got = []
    queue = Queue("work")
    def take(body, message):
        got.append(body)
        message.ack()

    with connection.Consumer(queue, callbacks=[take]):
        connection.Producer().publish("parent", routing_key="work", declare=[queue])
        pid = os.fork()
        if not pid:
            with Connection(sys.argv[1]) as own:
                own.Producer().publish("child", routing_key="work")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        connection.Producer().publish("parent again", routing_key="work")
        while len(got) < 3:
            connection.drain_events(timeout=5)
print(sorted(got))
"""


@pytest.fixture(scope="module", params=["plain", "TLS"])
def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_site: Callable[..., Site],
) -> Iterator[Site]:
    """A site whose broker is reached in plain text, and one with TLS."""
    if request.param == "plain":
        with run_nats_server(tmp_path_factory.mktemp("nats store")) as server:
            site = make_site(server.broker_url, "plain")
            start_all([site.worker()])
            yield site
        return
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    made = authority.issue_cert("127.0.0.1", "localhost")
    made.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    made.private_key_pem.write_to_path(str(folder / "server.key"))
    tls = {"cert_file": str(folder / "server.pem"), "key_file": str(folder / "server.key")}
    with run_nats_server(tmp_path_factory.mktemp("nats store"), config={"tls": tls}) as server:
        url = server.broker_url.replace("jetstream://", "jetstreams://")
        site = make_site(url, "tls", broker_use_ssl={"ca_certs": str(folder / "ca.pem")})
        start_all([site.worker()])
        yield site


@pytest.mark.parametrize("end", ["exit", "_exit"])
def test_publishing_in_forked_children_and_in_the_parent(site: Site, end: str) -> None:
    done = run_python(PROGRAM, site.env(), args=[end])

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    task_ids = json.loads(done.stdout)
    assert len(set(task_ids)) == 3 + 2 * 9
    site.wait_ended(task_ids, within=15)
    site.assert_each_ran_once(task_ids)


def test_consumer_goes_on_in_the_parent(shared_nats_server: NatsServer) -> None:
    done = run_python(CONSUMER, args=[f"{shared_nats_server.broker_url}/fork"])

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['child', 'parent', 'parent again']"
    info = api_request(shared_nats_server.url, "STREAM.INFO.fork_medium")
    assert info["state"]["messages"] == 0
