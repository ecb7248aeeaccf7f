"""The timeline of a run from its folder, finished or not."""

from __future__ import annotations

from pathlib import Path

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import StoreError
from anabranch.federated.result import Clock
from anabranch.federated.store import read_state
from anabranch.federated.timeline import Timeline
from anabranch.training.run_record import read_json


def read_timeline(folder: Path) -> tuple[Timeline, Clock]:
    """The bars and whose seconds they are in: of the report, else of the newest readable snapshot.

    Raises :class:`ConfigurationError` if the folder holds no run, or one whose schedule keeps no
    timeline.
    """
    if not (folder / "job.json").is_file():
        raise ConfigurationError(
            f"{folder} holds no federation; name a folder that anabranch federate wrote to, such "
            f"as runs/<name of the job>"
        )
    if (folder / "report.json").is_file():
        report = read_json(folder / "report.json")
        if "timeline" in report:
            return Timeline.from_list(report["timeline"]), report["clock"]
    else:
        for path in sorted((folder / "run").glob("snapshot-*"), reverse=True):
            try:
                schedule = read_state(path)["schedule"]
            except StoreError:
                continue  # the one before is complete: a run keeps two
            if "tasks" in schedule:
                simulated = read_json(folder / "job.json")["runtime"] == "simulation"
                on_network = (folder / "network").exists()
                clock: Clock = "virtual" if simulated and not on_network else "real"
                return Timeline.from_list(schedule["tasks"]), clock
            break
        else:
            raise ConfigurationError(f"the run in {folder} has no version yet; nothing to show")
    raise ConfigurationError(
        f"the run in {folder} has no groups: strategy fedcompass without a schedule of another "
        f"name forms them"
    )
