"""Drives llama.cpp through its library: all sequences in one batch, a token for each in every step.

Its best case, as for a server whose slots are all taken at once: what the prompts have in common is
computed once and shared. Options: ``file`` (GGUF), ``max_sequences``, ``flash_attention``.
"""

from __future__ import annotations

import os
from itertools import takewhile
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.drivers.protocol import Run, Times, drive

BATCH = 2048
"""Tokens of one call; llama.cpp computes them 512 at a time."""


def load(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        options["file"].encode(), llama_cpp.llama_model_default_params()
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    threads = os.cpu_count() or 1
    batch = llama_cpp.llama_batch_init(BATCH, 0, options["max_sequences"])

    def context_for(prompts: list[list[int]], output_tokens: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sum(map(len, prompts)) + len(prompts) * (output_tokens + 1) + 256
        parameters.n_batch = BATCH
        parameters.n_seq_max = len(prompts)
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = int(options["flash_attention"])
        return llama_cpp.llama_init_from_model(model, parameters)

    def decode(context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """``(token, position, sequence, wants logits)``, at most BATCH of them."""
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    def best(context: Any, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def run(
        prompts: list[list[int]], output_tokens: int, times: Times, adapters: list[int] | None
    ) -> None:
        context = context_for(prompts, output_tokens)
        memory = llama_cpp.llama_get_memory(context)
        tokens = [0] * len(prompts)
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        shared = shared if len(prompts) > 1 else 0
        for at in range(0, shared, BATCH):
            part = prompts[0][at : min(at + BATCH, shared)]
            decode(context, [(token, at + i, 0, False) for i, token in enumerate(part)])
        if shared:
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, 0, shared)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= shared
        ]
        for at in range(0, len(rows), BATCH):
            part_rows = rows[at : at + BATCH]
            decode(context, part_rows)
            for index, (_, _, sequence, wanted) in enumerate(part_rows):
                if wanted:
                    tokens[sequence] = best(context, index)
                    times.record(sequence)
        for step in range(output_tokens - 1):
            decode(context, [(t, len(prompts[s]) + step, s, True) for s, t in enumerate(tokens)])
            tokens = [best(context, row) for row in range(len(tokens))]
            times.record_all()
        llama_cpp.llama_free(context)

    return run, {
        "version": llama_cpp.__version__,
        "threads": threads,
        "file": os.path.basename(options["file"]),  # noqa: PTH119
    }


if __name__ == "__main__":
    drive(load)
