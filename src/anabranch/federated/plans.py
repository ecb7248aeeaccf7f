"""What the schedules that a job could use would do, before anything is trained.

Shares of data are those of the job's split, times those of its devices: latency, bytes down, work,
bytes up. The bytes are measured with one task of one step, whose result is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.clock import DeviceProfile
from anabranch.federated.core import Federation
from anabranch.federated.job import FederateJob
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Work
from anabranch.federated.randomness import generator
from anabranch.federated.running import deal
from anabranch.federated.runtimes import Simulation, Site
from anabranch.federated.scheduling import Buffered, Deadline, Schedule, Sync
from anabranch.federated.scheduling.compass import Compass
from anabranch.federated.scheduling.fixed import MARGIN, FixedWindows
from anabranch.federated.surrogate import Plan, Weights, arrivals, fixed_windows, played, rounds
from anabranch.models.progress import Progress, silent
from anabranch.training.example import Item
from anabranch.training.setup import Setup

PLAYED_VERSIONS = 200


@dataclass(frozen=True)
class Expected:
    """A client: its examples and their share of all, and the seconds of a task on its device."""

    client: str
    examples: int
    share: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class SchedulePlan:
    """A schedule: with every update weighed by its client's share of the data (``equal``), and by
    that times the versions since the client's last one (``counting``, FedFix's weights).

    ``own`` says whether it is the job's.
    """

    name: str
    own: bool
    equal: Plan
    counting: Plan

    @property
    def seconds(self) -> float:
        """Of a version."""
        return 1 / self.equal.versions_per_second


@dataclass(frozen=True)
class JobPlan:
    """The clients, and what each schedule would make of them. ``down`` and ``up`` are bytes of one
    task's messages."""

    clients: Sequence[Expected]
    schedules: Sequence[SchedulePlan]
    down: int
    up: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "bytes": {"down": self.down, "up": self.up},
            "clients": [asdict(client) for client in self.clients],
            "schedules": [
                {
                    "name": plan.name,
                    "own": plan.own,
                    "seconds_per_version": plan.seconds,
                    "equal": asdict(plan.equal),
                    "counting": asdict(plan.counting),
                }
                for plan in self.schedules
            ],
        }


def plan_job(job: FederateJob, progress: Progress = silent) -> JobPlan:
    """The plan of a job, whose base and data are loaded.

    Raises :class:`ConfigurationError` for devices that take no time and for a secure sum, which
    leaves no choice of schedule.
    """
    if job.devices == "equal":
        raise ConfigurationError(
            "devices: equal take no time, so that no schedule differs from another; plan with "
            "devices: log_uniform"
        )
    if job.secure is not None:
        raise ConfigurationError("a secure sum has rounds of everyone: there is nothing to choose")
    setup, items, parts = deal(job, progress)
    progress("measuring a task of one step", 0.5)
    down, up, messages = _message_bytes(job, setup, items, parts)
    profiles = dict(zip(parts, job.make_devices(len(parts)), strict=True))
    devices = {
        name: DeviceProfile(
            seconds_per_unit=device.seconds_per_unit,
            latency_s=messages * device.latency_s + device.seconds(down, 0, up) - device.latency_s,
        )
        for name, device in profiles.items()
    }
    sizes = {name: len(part) for name, part in parts.items()}
    steps = {name: _steps(job, size) for name, size in sizes.items()}
    total = sum(sizes.values())
    clients = [
        Expected(name, size, size / total, steps[name], devices[name].seconds(0, steps[name], 0))
        for name, size in sizes.items()
    ]
    progress("playing the schedules", 0.8)
    return JobPlan(clients, plan_schedules(job.make_schedule(), clients, devices), down, up)


def plan_schedules(
    own: Schedule, clients: Sequence[Expected], devices: Mapping[str, DeviceProfile]
) -> list[SchedulePlan]:
    """The job's own schedule first, then the others that it could use instead.

    Rounds, a version for each arrival, windows of 1.05 times the median task, and FedCompass'
    groups with a fifth of a task's steps to all of them.
    """
    steps = {client.client: client.steps for client in clients}
    median = sorted(client.seconds for client in clients)[(len(clients) - 1) // 2]
    most = max(steps.values())
    others: list[Schedule] = [
        Sync(1),
        Buffered(1, size=1),
        FixedWindows(1, MARGIN * median),
        Compass(1, max_steps=most, min_steps=max(1, most // 5)),
    ]
    found = [_planned(own, True, clients, devices, steps)]
    for schedule in others:
        if schedule_name(schedule, clients) != found[0].name:
            found.append(_planned(schedule, False, clients, devices, steps))
    return found


def schedule_name(schedule: Schedule, clients: Sequence[Expected]) -> str:
    """What a schedule is called in a plan, with what decides its times."""
    match schedule:
        case Deadline():
            return f"rounds of at most {schedule.seconds:g} s"
        case Sync():
            chosen = _sampled(schedule, len(clients))
            return "rounds" if chosen == len(clients) else f"rounds of {chosen}"
        case Buffered():
            return "every arrival" if schedule.size == 1 else f"every {schedule.size} arrivals"
        case FixedWindows():
            return f"windows of {_window(schedule, clients):.4g} s"
        case Compass():
            return f"groups of {schedule.min_steps} to {schedule.max_steps} steps"
    raise ConfigurationError(f"there is no plan for the schedule {type(schedule).__name__}")


def _planned(
    schedule: Schedule,
    own: bool,
    clients: Sequence[Expected],
    devices: Mapping[str, DeviceProfile],
    steps: Mapping[str, int],
) -> SchedulePlan:
    seconds = {client.client: client.seconds for client in clients}
    shares = {client.client: client.share for client in clients}

    def plan(weights: Weights) -> Plan:
        match schedule:
            case Deadline():
                return _play(replace(schedule, rounds=PLAYED_VERSIONS), weights)
            case Sync():
                return rounds(seconds, shares, _sampled(schedule, len(seconds)))
            case Buffered():
                return arrivals(seconds, shares, schedule.size, weights)
            case FixedWindows():
                return fixed_windows(seconds, _window(schedule, clients), shares, weights)
        assert isinstance(schedule, Compass)
        return _play(replace(schedule, versions=PLAYED_VERSIONS), weights)

    def _play(fresh: Schedule, weights: Weights) -> Plan:
        return played(fresh, devices, steps, shares, weights)

    return SchedulePlan(schedule_name(schedule, clients), own, plan("equal"), plan("counting"))


def _sampled(schedule: Sync, clients: int) -> int:
    names = [str(number) for number in range(clients)]
    if schedule.sampler.needs(clients) > clients:
        raise ConfigurationError(
            f"a round needs {schedule.sampler.needs(clients)} clients, and there are {clients}"
        )
    return len(schedule.sampler.pick(names, generator("plan")))


def _window(schedule: FixedWindows, clients: Sequence[Expected]) -> float:
    times = sorted(client.seconds for client in clients)
    return schedule.seconds or MARGIN * times[(len(times) - 1) // 2]


def _steps(job: FederateJob, examples: int) -> int:
    """Optimiser steps of a task on so many examples."""
    if job.local.steps is not None:
        return job.local.steps
    assert job.local.epochs is not None
    return max(1, math.ceil(examples / job.recipe.train.batch * job.local.epochs))


def _message_bytes(
    job: FederateJob, setup: Setup, items: Sequence[Item], parts: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Payload bytes down and up of a task, and how many messages it takes each way."""
    name, part = max(parts.items(), key=lambda pair: len(pair[1]))
    strategy = job.make_strategy()
    federation = Federation(
        strategy.begin(setup.model),
        strategy.client(LocalTraining(setup.objective, job.recipe.train)),
        Sync(1, work=Work(steps=1)),
        Simulation([Site(name, [items[index] for index in part])], setup.model),
        codec=job.make_codec("up"),
        down=job.make_codec("down"),
        seed=job.seed,
    )
    ledger = federation.run().ledger
    down, up = (ledger.total(direction=direction) for direction in ("down", "up"))
    return down.payload, up.payload, down.messages
