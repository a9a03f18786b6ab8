import os
from pathlib import Path

# The one line that says which broker it is.
broker_url = os.environ.get("BROKER_URL", "jetstream://127.0.0.1:4222")

# Results in a folder: enough for one machine, and chords need a store of results.
_results = Path(os.environ.get("SHOP_RESULTS", "results")).absolute()
_results.mkdir(parents=True, exist_ok=True)
result_backend = f"file://{_results}"

# A task is taken off the queue when it is done, not when it starts: it comes back
# when its worker dies.
task_acks_late = True

task_track_started = True
timezone = "UTC"

beat_schedule = {
    "look through the shelves": {"task": "shop.tasks.look_through_shelves", "schedule": 2.0},
}
