"""Takes requests into the house, or refuses them, and has their texts answered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from bertile.server import errors
from bertile.server.call import Call, Held
from bertile.server.catalogue import Catalogue, Served
from bertile.server.errors import Refusal
from bertile.server.metrics import Metrics
from bertile.server.scheduler import Work
from bertile.server.settings import Settings
from bertile.text.text_model import Steps

# Of large bodies at a time: what so many clients may send does not depend on how many there are.
HELD_BYTES, HELD_BODIES = 64_000_000, 8


class Service:
    """What the routes of a server share: settings, models, metrics, and how many are in the house.

    `stopping` is set when it takes no more requests. `remember` is told the directories by name
    whenever they have changed.
    """

    def __init__(
        self, settings: Settings, remember: Callable[[dict[str, str]], None] | None = None
    ) -> None:
        self.settings = settings
        self._remember = remember
        self.in_house = 0
        self.held = Held(max(HELD_BYTES, HELD_BODIES * settings.payload_limit))
        self.stopping = False
        self.metrics = Metrics(lambda: self.in_house)
        self.models = Catalogue(settings, self.metrics)

    def changed(self) -> None:
        """Tell that models were loaded, exchanged or removed."""
        if self._remember is not None:
            self._remember(self.models.directories)

    async def ask(
        self, call: Call, texts: Sequence[Any], steps: Steps, counted: str = "embed"
    ) -> list[Any]:
        """What `steps` make of each answer of the model `call.served`; Refusal where there is none.

        `counted` is what the texts are counted as: "embed" or "predict".
        """
        served = call.served
        metrics = self.metrics.of(served.name)
        counts = metrics.counts
        counts["te_request_count", call.method] += 1
        counts[f"te_{counted}_count", ""] += len(texts)
        self.check_room(served)
        loop = asyncio.get_running_loop()
        work = call.work = Work(texts, steps, loop.create_future(), call.deadline)
        self.in_house += 1
        call.look_after(work, loop)
        try:
            served.scheduler.submit(work)
            await work.done
        finally:
            self.in_house -= 1
            call.let_go()
            work.dropped = True  # what is not done by now is for nobody
        if work.refusal is not None:
            raise work.refusal
        counts["te_request_success", call.method] += 1
        counts[f"te_{counted}_success", ""] += len(texts)
        return work.results

    async def beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives that takes a while and runs no model, in another thread."""
        self.check_room()
        self.in_house += 1
        try:
            return await asyncio.to_thread(function, *arguments)
        finally:
            self.in_house -= 1

    def check_room(self, served: Served | None = None) -> None:
        """Raise Refusal where as many requests as may be are in the house.

        It says when to come again: when `served`, or each model, has answered what waits for it.
        """
        if self.in_house >= self.settings.max_concurrent_requests:
            models = self.models if served is None else (served,)
            wait = max((model.scheduler.wait_seconds() for model in models), default=0.0)
            raise Refusal(
                errors.OVERLOADED, "Model is overloaded", retry_after=max(1, math.ceil(wait))
            )
