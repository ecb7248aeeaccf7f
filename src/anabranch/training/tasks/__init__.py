"""Tasks: what the rows of a data set mean. Each module is one, found by its ``name``.

A task knows rows, texts and answers; tokens belong to :mod:`anabranch.training.template`, files and
filters to :mod:`anabranch.training.data`.
"""

from anabranch.training.task import Rendered, Row, Task

__all__ = ["Rendered", "Row", "Task"]
