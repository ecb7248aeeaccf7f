"""What a worker process does: it serves the sites that it is told of, one task after the other.

It blocks on its pipe when there is nothing to do. When the coordinator dies, it exits at once, in
the middle of a task if need be: what a site stores is stored whole or not at all.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import resource
import shutil
import signal
import threading
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Agreement, Node
from anabranch.federated.runtimes.processes.segments import Segments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Open:
    """A run begins: files with its agreement, its model, and the data of this worker's sites."""

    run: int
    agreement: Path
    model: Path
    data: Path


@dataclass(frozen=True)
class Assigned:
    """A task of a run, without its body, which lies in the segment ``body``."""

    run: int
    task: Task
    body: Path


@dataclass(frozen=True)
class Done:
    """A reply, without its body, which lies in the segment ``body``; or why there is none.

    ``cpu`` are the seconds of processor time that this worker used in its life.
    """

    run: int
    task: int
    reply: Reply | None
    body: str
    problem: str
    cpu: float


def serve(pipe: Connection, folder: Path, threads: int) -> None:
    """The whole life of a worker. Bodies of replies are written into ``folder``."""
    # The coordinator decides what becomes of an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    inbox: queue.SimpleQueue[Open | Assigned | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox, folder), daemon=True).start()
    crew: Crew | None = None
    while (message := inbox.get()) is not None:
        if isinstance(message, Open):
            crew = Crew(message)
            continue
        assert crew is not None, "a run is opened before its first task"
        pipe.send(_work(crew, message, Segments(folder)))


def _receive(pipe: Connection, inbox: queue.SimpleQueue[Any], folder: Path) -> None:
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            # A task that went on could store its state over that of whoever takes over.
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)
        inbox.put(message)


def _work(crew: Crew, assigned: Assigned, segments: Segments) -> Done:
    task = assigned.task
    try:
        reply = crew.node(task.client).handle(replace(task, body=assigned.body.read_bytes()))
        key = segments.put(reply.body)
        bare, problem = replace(reply, body=b""), ""
    except Exception as error:
        logger.warning("%s, task %d", task.client, task.id, exc_info=True)
        bare, key, problem = None, "", f"{type(error).__name__}: {error}"
    return Done(assigned.run, task.id, bare, key, problem, _cpu_seconds())


class Crew:
    """The sites of a worker in one run; a site is set up at its first task."""

    def __init__(self, opened: Open) -> None:
        self._opened = opened
        self._nodes: dict[str, Node] = {}
        self._loaded: tuple[Agreement, Any, dict[str, Any]] | None = None

    def node(self, name: str) -> Node:
        """A site's side of the protocol, with the state that it stored, if any."""
        if name not in self._nodes:
            agreement, model, data = self._load()
            self._nodes[name] = Node(name, agreement, data[name], model)
        return self._nodes[name]

    def _load(self) -> tuple[Agreement, Any, dict[str, Any]]:
        if self._loaded is None:
            agreement = pickle.loads(self._opened.agreement.read_bytes())
            model = load(self._opened.model)
            if callable(model) and not isinstance(model, nn.Module):
                model = model()
            self._loaded = agreement, model, load(self._opened.data)
        return self._loaded


def load(path: Path) -> Any:
    """What ``torch.save`` wrote. Tensors are mapped: a page is shared until someone writes."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
