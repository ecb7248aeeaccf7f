"""Drives ``generate`` of transformers on the whole batch at once.

Its best case: requests of one cell have the same length and arrive together, so nothing is padded
and nothing waits. Options: ``model`` (a folder), ``dtype``, ``adapters`` (folders).
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers

from benchmarks.peers.drivers.protocol import Run, Times, drive


class Stopwatch(transformers.StoppingCriteria):
    """Never stops; is asked after every token."""

    def __init__(self, times: Times) -> None:
        self.times = times

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.record_all()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=getattr(torch, options["dtype"])
    ).eval()
    model.generation_config.eos_token_id = None
    for index, folder in enumerate(options["adapters"]):
        if index == 0:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            model.load_adapter(folder, adapter_name=str(index))
    model.eval()

    @torch.inference_mode()
    def run(
        prompts: list[list[int]], output_tokens: int, times: Times, adapters: list[int] | None
    ) -> None:
        tokens = torch.tensor(prompts)
        mixed = {"adapter_names": [str(index) for index in adapters]} if adapters else {}
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=output_tokens,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([Stopwatch(times)]),
            **mixed,
        )

    return run, {
        "version": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    drive(load)
