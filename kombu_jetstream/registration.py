"""Make ``jetstream://`` known to kombu, without an import in user code.

kombu has no entry point for transports, but ``kombu.serialization``, which every
Celery process imports, loads each entry point of the group ``kombu.serializers``
and calls ``register(name, *loaded)``. This module is such an entry point: loading
it adds the two URL schemes, and what it hands back is a real serializer.

Two rules follow from where it runs, in the middle of ``import kombu.serialization``:

- it imports nothing of kombu but ``kombu.transport``, since the rest is half loaded;
- it does not raise: an exception here would break every program that imports kombu
  on this machine, whether it uses this package or not.
"""

from __future__ import annotations

import json
import logging
from typing import Any

__all__ = ["ALIASES", "register_aliases", "register_args"]

logger = logging.getLogger(__name__)

#: URL scheme to the transport class that kombu imports when the scheme is used.
ALIASES = {
    "jetstream": "kombu_jetstream.transport:Transport",
    "jetstreams": "kombu_jetstream.transport:SecureTransport",
}


def register_aliases() -> bool:
    """Tell kombu which classes serve ``jetstream://`` and ``jetstreams://``.

    Returns False, and logs why, when kombu is not as expected; never raises.
    """
    try:
        from kombu.transport import TRANSPORT_ALIASES

        TRANSPORT_ALIASES.update(ALIASES)
    except Exception:
        logger.warning("cannot register the kombu transports %s", ", ".join(ALIASES), exc_info=True)
        return False
    return True


def _encode(obj: Any) -> str:
    return json.dumps(obj, ensure_ascii=False, separators=(",", ":"))


def _decode(text: str | bytes) -> Any:
    return json.loads(text)


#: What ``kombu.serialization.register`` takes after the name: encoder, decoder,
#: content type, content encoding. The format is plain JSON in UTF-8, without
#: kombu's extra types, so that a reader in any language understands it.
register_args = (_encode, _decode, "application/x-jetstream-envelope", "utf-8")

register_aliases()
