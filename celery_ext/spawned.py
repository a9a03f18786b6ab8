"""Connects the hooks in processes of a pool that are spawned (macOS, ``worker_pool_start_method``).

A forked process has everything its parent had.  A spawned one imports what the configuration names
and builds the tasks anew, without a connection that would load the transport.  So the worker adds
this module to ``include``, which travels with the app.
"""

from __future__ import annotations

from . import connect_in_spawned_process

__all__: list[str] = []

connect_in_spawned_process()
