"""A kind of job whose process is a few lines of Python."""

from __future__ import annotations

import sys
from pathlib import Path

from anabranch.jobs.kinds import JobKind, Terms

COUNTING = """
import json, os, pathlib, sys, time
from anabranch.jobs.attached import hold

hold()
done = pathlib.Path("output/count")
done.parent.mkdir(exist_ok=True)
count = int(done.read_text()) if done.exists() else 0
try:
    while count < {until}:
        count += 1
        time.sleep({pause})
        with open(os.environ["ANABRANCH_PROGRESS"], "a") as file:
            done_so_far = {{"message": f"step {{count}}", "fraction": count / {until}}}
            file.write(json.dumps(done_so_far) + "\\n")
        if count == {die_at} and not pathlib.Path("died").exists():
            pathlib.Path("died").touch()
            done.write_text(str(count))
            os.kill(os.getpid(), 9)
except KeyboardInterrupt:
    done.write_text(str(count))
    sys.exit(130)
done.write_text(str(count))
print(json.dumps({{"count": count}}))
print("error: as asked", file=sys.stderr)
sys.exit({status})
"""


class ScriptSpec(Terms):
    until: int = 3
    pause: float = 0.01
    die_at: int = -1
    status: int = 0


class Script(JobKind[ScriptSpec]):
    """Counts; a count is its checkpoint."""

    name = "script"
    spec = ScriptSpec

    def title(self, spec: ScriptSpec) -> str:
        return f"to {spec.until}"

    def command(self, spec: ScriptSpec, folder: Path) -> list[str]:
        options = spec.model_dump(include={"until", "pause", "die_at", "status"})
        return [sys.executable, "-c", COUNTING.format(**options)]
