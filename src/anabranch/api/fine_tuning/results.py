"""The metrics of a job as a CSV file, one line a step."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from anabranch.training.metrics_log import read_metrics

COLUMNS = ("step", "train_loss", "learning_rate", "grad_norm", "train_tokens", "valid_loss")

_LOGGED = {"loss": "train_loss", "lr": "learning_rate", "tokens": "train_tokens"}
"""Names in the log that are others in the file."""


def metrics_csv(log: Path) -> bytes:
    """The steps and validations of a ``metrics.jsonl``; what was not measured is left empty.

    The log and not the store's events: a job that is killed and goes on repeats steps, and forgets
    them in its log first.
    """
    steps: dict[int, dict[str, object]] = {}
    for entry in read_metrics(log):
        row = steps.setdefault(int(entry["step"]), {})
        if "validation" in entry:
            row["valid_loss"] = entry["validation"].get("loss")
        else:
            named = {_LOGGED.get(name, name): value for name, value in entry.items()}
            row.update({name: named[name] for name in COLUMNS if name in named})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **steps[step]} for step in sorted(steps))
    return text.getvalue().encode()
