"""What a language model can do: questions with an answer that is right or wrong.

A benchmark is found by its ``name`` (``anabranch list benchmarks``); its options are constructor
arguments. Losses of held-out rows are a recipe's ``evaluate``.
"""

from anabranch.evaluation.benchmarks.base import Benchmark, Result, Subject

__all__ = ["Benchmark", "Result", "Subject"]
