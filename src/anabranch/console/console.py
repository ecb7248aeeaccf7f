"""What all pages of a server share: the services of the HTTP API, and what is read once for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anabranch.api.service import Service
from anabranch.console.conversation import Conversations
from anabranch.console.engine import EngineSampler
from anabranch.console.federations import Federations
from anabranch.console.fine_tuning import FineTuning
from anabranch.console.jobs import ConsoleKind
from anabranch.console.options import ConsoleOptions
from anabranch.console.processes import Processes
from anabranch.console.sessions import Sessions


class Console:
    """One for a server. Pages hold no state of their own but what is on the screen."""

    def __init__(self, service: Service, options: ConsoleOptions | None = None) -> None:
        options = options or ConsoleOptions()
        self.service = service
        self.sessions = Sessions(service.options.api_keys)
        self.conversations = Conversations(service)
        self.sampler = EngineSampler(service.models.values(), service.metrics)
        self.federations = Federations(options.runs)
        kinds: list[ConsoleKind] = []
        if service.fine_tuning is not None:
            kinds.append(FineTuning(service.fine_tuning))
        if (jobs := service.jobs) is not None:
            kinds += [Processes(service, jobs, kind) for kind in jobs.kinds.values()]
        self.job_kinds = {kind.name: kind for kind in kinds}
        """What the Jobs page can create and show; empty if the server keeps no jobs."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sample the engines while the server runs; afterwards stop what the console began."""
        sampling = asyncio.create_task(self.sampler.run())
        try:
            yield
        finally:
            sampling.cancel()
            await self.conversations.close()
