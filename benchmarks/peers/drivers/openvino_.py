"""Drives OpenVINO GenAI's continuous batching in its own process.

It reads the GGUF file as it is. Options: ``file``, ``max_sequences``, ``kv_gigabytes``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.drivers.protocol import Run, Times, drive


def load(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = options["kv_gigabytes"]
    scheduler.max_num_seqs = options["max_sequences"]
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(options["file"], scheduler, "CPU")
    cells = 0

    def run(
        prompts: list[list[int]], output_tokens: int, times: Times, adapters: list[int] | None
    ) -> None:
        nonlocal cells
        cells += 1
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        handles = [
            pipeline.add_request(
                cells * 1000 + index, openvino.Tensor(np.array([prompt], dtype=np.int64)), config
            )
            for index, prompt in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    (output,) = handle.read().values()
                    times.record(index, len(output.generated_ids))

    return run, {
        "version": openvino_genai.__version__,
        "threads": os.cpu_count(),
        "file": Path(options["file"]).name,
    }


if __name__ == "__main__":
    drive(load)
