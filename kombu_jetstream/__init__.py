"""kombu over NATS JetStream: the broker transport behind ``broker_url = "jetstream://…"``.

Celery loads it by itself (an entry point, see `registration`); plain kombu users import it.

A map, in the order to read it:

======================  ==========================================================================
`transport`             opens and closes connections for kombu, error tuples
`session`               one broker connection: reads, hands on, event loop
`channel`               one kombu channel, in three parts: `declaring` exchanges and queues,
                        `settling` deliveries, `consuming` them
`outgoing`              where a message goes, when, under which id;  `publishing` confirms
`pulls`                 how much to ask of which queue and level (pure);  `qos` what is held
`leases`                held deliveries stay ours, and outlive their connection; `dropped`
                        says which of them nobody wants any more
`jetstream`             JetStream's API: streams, consumers, pulls, settling
`registry`              durable queues and bindings, shared by all;  `transient` the other queues
`topology`              names and configurations (pure);  `routing` exchanges, patterns (pure)
`envelope`              message to bytes and back (pure);  `message` what kombu gets;
                        `tasks` what Celery takes for granted in one (pure);  `pools` what is
                        read from its pool
`arguments`             queue arguments (pure);  `delays` due times and TTLs (pure)
`deadletter`            what a dead letter records (pure)
`connection`            a synchronous NATS connection;  `endpoint` addresses, log-in, TCP and TLS;
                        `protocol` the wire protocol (pure)
`options`               everything that can be set (pure), by `rules`;  `tls` certificates;
                        `errors` everything that can go wrong
`fallback`              Redis lists beside JetStream, chosen by `failover` (pure);
                        `fallback_channels`, `redis_lists`, `resp` (pure), `migration`
`backend`               the seam between channels and stores
`extensions`            what else is loaded in Celery processes: `celery_ext`
`server`                a nats-server for development and tests
======================  ==========================================================================
"""

from __future__ import annotations

from . import registration as registration

__all__ = ["registration"]
