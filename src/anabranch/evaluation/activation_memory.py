"""Bytes that wait between a forward and a backward pass, counted where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anabranch.serving.batch import StepPlan
from anabranch.serving.coserving.job import FinetuneJob
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.passes import Pass
from anabranch.serving.coserving.trainee import Trainee
from anabranch.serving.runner import DifferentiableRunner


def saved_by_autograd(model: nn.Module, tokens: Sequence[int]) -> int:
    """What autograd keeps of one sequence with all labels. Weights do not count."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.tensor([list(tokens)])
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # holds what is counted
        total = sum(found.values())
    del loss
    return total


def resident_of_windows(
    runner: DifferentiableRunner, job: FinetuneJob, window: int, vocabulary: int
) -> int:
    """The most that token-level training holds of a job's rows at any time.

    Layer inputs, gradients on their way, the sequences' pages of the cache, and the logits of one
    head window. The runner's pages are used: only for a runner that no engine has.
    """
    examples = [example for item in job.items for example in item]
    page_size = runner.page_size
    pages = sum(-(-len(example) // page_size) for example in examples)
    runner.allocate(pages)
    work = Pass(examples, Trainee(runner, job), runner, PagePool(0, pages, page_size), True)
    fixed = pages * runner.page_bytes + 4 * window * vocabulary
    most = 0
    while not work.done:
        assert work.ready()
        while not work.idle:
            if work.phase == "forward":
                segments = tuple(work.segments(window))
                runner.execute(StepPlan(segments, page_size))
                for segment in segments:
                    work.computed(segment)
            else:
                work.unit(window)
            most = max(most, work.bytes)
    return most + fixed
