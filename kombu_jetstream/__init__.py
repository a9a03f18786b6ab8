"""kombu over NATS JetStream: the broker transport behind ``broker_url = "jetstream://…"``.

Celery loads it by itself (an entry point, see `registration`); plain kombu users import it.

A map, in the order to read it:

==================  ==============================================================================
`transport`         opens and closes connections for kombu, error tuples
`session`           one broker connection: reads, hands on, event loop
`channel`           the AMQP verbs
`outgoing`          where a message goes, when, under which id;  `publishing` confirms
`pulls`             how much to ask of which queue and level (pure);  `qos` what is held
`leases`            held deliveries stay ours, and outlive their connection
`jetstream`         JetStream's API: streams, consumers, pulls, settling
`registry`          durable queues and bindings, shared by all processes;  `transient` the others
`topology`          names and configurations (pure);  `routing` exchanges and patterns (pure)
`envelope`          message to bytes and back (pure);  `message` what kombu gets
`tasks`             what Celery takes for granted in a message (pure)
`arguments`         queue arguments (pure);  `delays` due times and TTLs (pure)
`deadletter`        what a dead letter records (pure)
`connection`        a synchronous NATS connection;  `protocol` the wire protocol (pure)
`options`           everything that can be set (pure);  `errors` everything that can go wrong
`backend`           the seam between channels and stores
`server`            a nats-server for development and tests
==================  ==============================================================================
"""

from __future__ import annotations

from . import registration as registration

__all__ = ["registration"]
