"""Structured output: JSONSchemaBench, the official test suite, and quality under constraints.

Source: Geng et al. 2025, "Generating Structured Outputs from Language Models: Benchmark and
Studies". :func:`maskbench` needs no model; :func:`coverage` and :func:`quality` ask one.
"""

from anabranch.evaluation.structured_output.benchmark import maskbench
from anabranch.evaluation.structured_output.cases import SchemaCase, datasets, load
from anabranch.evaluation.structured_output.coverage import coverage, summarise
from anabranch.evaluation.structured_output.quality import TASKS, quality
from anabranch.evaluation.structured_output.report import Report

__all__ = [
    "TASKS",
    "Report",
    "SchemaCase",
    "coverage",
    "datasets",
    "load",
    "maskbench",
    "quality",
    "summarise",
]
