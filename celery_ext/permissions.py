"""What NATS must allow to the programs of one application, and nothing else.

For ``provision="off"``: an operator makes the streams and queues (``celery jetstream provision``),
producers and workers only use them.

========  ===========================================================================
role      may
========  ===========================================================================
producer  send tasks to the app's queues, at once or later, and events;
          with *control* revoke tasks and ask workers, too
worker    that, take tasks from the app's queues, write dead letters, be controlled
operator  all that ``celery jetstream`` does, within the namespace
========  ===========================================================================

Everybody may subscribe to replies and to the registry, which says where messages go.  Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

from kombu_jetstream.options import Options
from kombu_jetstream.topology import Names, levels, queue_token

from .provision import Declared

__all__ = ["ROLES", "Permissions", "Role", "as_nats_config", "permissions", "uses_rpc_results"]

Role = Literal["producer", "worker", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

#: As the server's configuration has it: ``{"publish": {"allow": […]}, "subscribe": …}``.
Permissions: TypeAlias = "dict[str, dict[str, list[str]]]"


def permissions(
    role: Role,
    options: Options,
    app: Declared,
    *,
    control: bool = False,
    rpc_results: bool = False,
) -> Permissions:
    """Return the permissions of *role* for an application.

    *control*: a producer may use remote control, with which workers can be stopped.
    *rpc_results*: the application's result backend is ``rpc://``, so that a worker sends results
    to the queues of producers.  Those producers cannot be restricted: each makes a queue.
    """
    names = Names(options.namespace)
    publish: list[str] = []
    subscribe = [f"{options.inbox_prefix}.>", f"{names.registry}.>"]
    prefix = f"$JS.{options.jetstream_domain}.API" if options.jetstream_domain else "$JS.API"
    if role == "operator":
        publish = [*_operate(names, prefix), f"{names.namespace}.>"]
        subscribe = [f"{options.inbox_prefix}.>", f"{names.namespace}.>"]
        return _block(publish, subscribe)
    publish.append(f"{prefix}.DIRECT.GET.{names.registry_stream}")
    for queue in app.queues:
        for level in levels(options):
            publish.append(names.subject(level, queue))
            publish.append(names.delayed(level, queue))
    if role == "producer":
        # Copies of events go to a bare exchange or below it.
        for exchange in app.exchanges:
            if control or exchange not in app.control:
                publish += [names.exchange(exchange, ""), names.exchange(exchange, ">")]
        if control:
            subscribe += [names.exchange(exchange, ">") for exchange in app.control]
        if control:
            subscribe.append(f"{names.namespace}.q.>")
        return _block(publish, subscribe)
    for queue in app.queues:
        token = queue_token(queue)
        publish.append(names.dead_letter_subject(queue))
        for level in levels(options):
            stream = names.stream(level)
            publish.append(f"{prefix}.CONSUMER.MSG.NEXT.{stream}.{token}")
            publish += _acks(stream, token, options.jetstream_domain)
    if rpc_results:
        publish.append(f"{names.namespace}.medium.*")
    # Remote control, events, gossip and replies: plain NATS, no queue of anybody.
    transient = [f"{names.namespace}.x.>", f"{names.namespace}.q.>"]
    return _block(publish + transient, subscribe + transient)


def _acks(stream: str, consumer: str, domain: str | None) -> list[str]:
    """Return the subjects of acknowledgements, in the form without and with a domain (ADR-15)."""
    plain = f"$JS.ACK.{stream}.{consumer}.>"
    return [plain] if domain is None else [plain, f"$JS.ACK.{domain}.*.{stream}.{consumer}.>"]


def _operate(names: Names, prefix: str) -> Iterable[str]:
    yield f"{prefix}.INFO"
    yield f"{prefix}.STREAM.NAMES"
    streams = [names.stream(level) for level in ("high", "medium", "low")]
    streams += [names.dead_letter_stream, names.registry_stream, names.mirror_stream]
    for stream in streams:
        yield f"{prefix}.STREAM.*.{stream}"  # CREATE, UPDATE, INFO, PURGE, DELETE
        yield f"{prefix}.STREAM.MSG.*.{stream}"  # GET, DELETE
        yield f"{prefix}.DIRECT.GET.{stream}"
        yield f"{prefix}.CONSUMER.*.{stream}"  # CREATE, LIST, NAMES
        yield f"{prefix}.CONSUMER.*.{stream}.>"  # CREATE, INFO, DELETE, PAUSE
        yield f"{prefix}.CONSUMER.MSG.NEXT.{stream}.>"
        yield f"$JS.ACK.{stream}.>"


def _block(publish: list[str], subscribe: list[str]) -> Permissions:
    return {
        "publish": {"allow": list(dict.fromkeys(publish))},
        "subscribe": {"allow": list(dict.fromkeys(subscribe))},
    }


def as_nats_config(allowed: Permissions) -> str:
    """Return a ``permissions`` block for a user in the server's configuration file."""
    lines = ["permissions: {"]
    for direction, block in allowed.items():
        lines.append(f"  {direction}: {{")
        lines.append("    allow: [")
        lines += [f"      {json.dumps(subject)}" for subject in block["allow"]]
        lines += ["    ]", "  }"]
    return "\n".join([*lines, "}"])


def uses_rpc_results(app: Any) -> bool:
    """Return whether the result backend of a Celery *app* is ``rpc://``."""
    return str(app.conf.result_backend or "").partition(":")[0] == "rpc"
