"""Sends compiled candidates to the GPUs of a tracker: ``cuda.trial`` over TVM's RPC.

Run as ``python -m bertile.tune.measure.cuda.remote_trial HOST:PORT KEY`` in a process of its own,
as many of them as there are devices.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bertile.tune.measure.cuda.measure import TRIAL_SECONDS
from bertile.tune.measure.cuda.serving import NAME
from bertile.tune.measure.device import session
from bertile.tune.measure.trial_runner import STARTUP_SECONDS
from bertile.tune.measure.trial_server import serve

SESSION_SECONDS = STARTUP_SECONDS + TRIAL_SECONDS  # the device's process may have to start


def measure(tracker: str, key: str, image: str, **request: Any) -> dict[str, Any]:
    """What ``cuda.trial.measure`` says, on whichever device of the key is free."""
    path = Path(image)
    connected = session(tracker, key, SESSION_SECONDS, path)
    return json.loads(connected.get_function(NAME)(json.dumps(request), path.name))


if __name__ == "__main__":
    serve(partial(measure, *sys.argv[1:]))
