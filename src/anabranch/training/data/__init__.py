"""From sources to rows that are clean, split and free of leaks, with a report of what was left out.

What rows mean belongs to :mod:`anabranch.training.tasks`, tokens to
:mod:`anabranch.training.template`. Nothing here loads a model.
"""

from anabranch.training.data.prepare import Prepared, PreparedRow, prepare
from anabranch.training.data.report import DataReport, SourceReport

__all__ = ["DataReport", "Prepared", "PreparedRow", "SourceReport", "prepare"]
