"""A Ray actor that does the turns of several sites.

A turn is a function of what it is given: the task, the site's data, and what the site had stored
after its last turn. So it may be run again, here or elsewhere, after its actor was killed; what an
actor keeps from turn to turn only spares it reading that again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import nn

from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Agreement, Node
from anabranch.federated.runtimes.processes.segments import Segments
from anabranch.federated.store import ClientStore


class SiteWorker:
    """The actor. ``model`` is a module, or a function without arguments that makes one."""

    def __init__(self, agreement: Agreement, model: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        self._scratch = Segments.owned().part("sites")
        self._agreement = replace(agreement, folder=self._scratch.folder)
        self._model = model
        if callable(model) and not isinstance(model, nn.Module):
            self._model = model()
        self._data: dict[str, Any] = {}
        self._nodes: dict[str, tuple[Node, bytes]] = {}
        """A site's side of the protocol, and what it has stored."""

    def turn(
        self, task: Task, body: bytes, data: Sequence[Any], stored: bytes | None
    ) -> tuple[Reply, bytes]:
        """Do a task. Returns the reply, and what the site has stored with it.

        ``data`` holds a reference to the site's data, which is fetched for its first turn here.
        """
        name = task.client
        if name not in self._data:
            self._data[name] = ray.get(data[0])
        place = ClientStore(self._scratch.folder, name).path
        node, known = self._nodes.pop(name, (None, b""))
        if node is None or known != stored:
            if stored is not None:
                place.write_bytes(stored)
            node = Node(name, self._agreement, self._data[name], self._model)
        reply = node.handle(replace(task, body=body))
        after = place.read_bytes()
        place.unlink()  # an actor that is killed leaves nothing in memory
        self._nodes[name] = node, after
        return reply, after
