"""Drives vLLM's CPU build through ``LLMEngine.step``, in its own process.

In one process, so that no second one polls for work on the few cores there are. Options: ``model``
(a folder), ``dtype``, ``max_sequences``, ``adapters`` (folders).
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from benchmarks.peers.drivers.protocol import Run, Times, drive


def load(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    folders = options["adapters"]
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=options["model"],
            dtype=options["dtype"],
            max_num_seqs=options["max_sequences"],
            skip_tokenizer_init=True,
            disable_log_stats=True,
            enable_lora=bool(folders),
            max_loras=max(1, len(folders)),
            max_lora_rank=16,
        )
    )
    requests = [LoRARequest(str(i), i + 1, folder) for i, folder in enumerate(folders)]
    cells = 0

    def run(
        prompts: list[list[int]], output_tokens: int, times: Times, adapters: list[int] | None
    ) -> None:
        nonlocal cells
        cells += 1
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for index, prompt in enumerate(prompts):
            engine.add_request(
                f"{cells}-{index}",
                {"prompt_token_ids": prompt},
                sampling.clone(),
                lora_request=requests[adapters[index]] if adapters else None,
            )
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                times.record(index, len(output.outputs[0].token_ids))

    return run, {
        "version": vllm.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    drive(load)
