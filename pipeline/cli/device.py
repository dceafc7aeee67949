"""Runs `bertile device`: serves this machine as a device, lists devices, or shares them out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.cli.command import Outcome
from bertile.cli.option_lists import positive

ACTIONS = {
    "serve": "run the candidates of a tuner on this machine",
    "list": "list the devices of a tracker",
    "tracker": "share devices among tuners",
}


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    listing = "; ".join(f"{name}: {what}" for name, what in ACTIONS.items())
    add("action", metavar="|".join(ACTIONS), choices=tuple(ACTIONS), help=listing)
    add("--tracker", metavar="HOST:PORT", help="of serve and list: the tracker's address")
    add("--key", metavar="KEY", help="of serve: the kind of device, the same for all of one kind")
    add("--threads", metavar="N", type=positive, help="of serve: cores to use")
    add(
        "--host",
        metavar="HOST",
        default="127.0.0.1",
        help="of serve and tracker: the interface to listen on; 0.0.0.0 lets other machines in",
    )
    add("--port", metavar="N", type=positive, help="of serve and tracker: the port to listen on")


def run(options: Namespace, progress: Progress) -> Outcome:
    """Data and text of the answer; serve and tracker give none before Ctrl-C."""
    from bertile.tune.measure import device

    wanted = {"serve": ("tracker", "key"), "list": ("tracker",), "tracker": ()}[options.action]
    for name in wanted:
        if not getattr(options, name):
            raise UsageError(f"device {options.action} lacks --{name}", "give it")
    if options.action == "list":
        rows = device.fleet(options.tracker)
        return Outcome(rows, device.as_text(rows))
    if options.action == "tracker":
        device.run_tracker(options.host, options.port or device.TRACKER_PORT, progress)
    else:
        port = options.port or device.SERVER_PORT
        served = (options.tracker, options.key, options.host, port, options.threads)
        device.serve(*served, progress)
    return Outcome(None, "")
