"""What is compared, and the settings that each side may choose from.

A side with several settings tries each on a short cell and keeps the fastest on this machine. That
is mostly the number format: a processor without bfloat16 instructions is often, not always, faster
in float32. ``anabranch-int8`` has other weights than the model (8 bits); ``llama.cpp`` and
``openvino`` have those of the model's file (4 bits), which it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anabranch import models
from anabranch.models.packaged import find
from benchmarks.peers.environments import RECIPES

KV_MEMORY = 2
"""GiB of keys and values, for the sides that reserve them."""
MAX_SEQUENCES = 64


@dataclass(frozen=True)
class Side:
    """``recipe`` names its environment, None for the one that runs the coordinator.

    ``mixes_adapters``: requests on several adapters can share a batch. Cells with adapters have
    processes of their own, because an engine that is prepared for them may be slower without.
    """

    name: str
    driver: str
    settings: tuple[Mapping[str, Any], ...]
    recipe: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    mixes_adapters: bool = True

    def with_adapters(self, folders: Sequence[str]) -> Side:
        """The same side for the cells with adapters."""
        settings = tuple({**setting, "adapters": list(folders)} for setting in self.settings)
        return replace(self, settings=settings)


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as results show them: without places on this machine."""
    hidden = ("model", "file", "adapters")
    return {name: value for name, value in settings.items() if name not in hidden}


def sides(model: str) -> list[Side]:
    """All sides for a model of Anabranch's library, ours first."""
    folder = str(models.load(model).path)
    formats = tuple(
        {"model": folder, "dtype": dtype, "adapters": []} for dtype in ("float32", "bfloat16")
    )
    packaged = find(model)
    file = packaged.path() if packaged else None

    def ours(weights: str, kv_caches: Sequence[str]) -> Side:
        common = {"model": model, "weights": weights, "adapters": []}
        common["kv_memory"] = KV_MEMORY * 2**30
        return Side(
            f"anabranch-{weights}",
            "anabranch_",
            tuple({**common, "kv_cache": kv_cache} for kv_cache in kv_caches),
            # Threads that wait for the next kernel give the core back soon.
            variables={"GOMP_SPINCOUNT": "20000"},
        )

    listed = [
        # Keys and values in bfloat16 are what a peer's bfloat16 setting has.
        ours("bf16", ("fp32", "bf16")),
        ours("int8", ("bf16",)),
        Side("transformers", "transformers_", formats, "transformers"),
        Side(
            "vllm",
            "vllm_",
            tuple({**setting, "max_sequences": MAX_SEQUENCES} for setting in formats),
            "vllm",
            {
                "VLLM_CPU_KVCACHE_SPACE": str(KV_MEMORY),
                "VLLM_CPU_OMP_THREADS_BIND": "auto",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # Its ahead-of-time cache does not load again: a minute of compiling at each start.
                "VLLM_USE_AOT_COMPILE": "0",
                "VLLM_NO_USAGE_STATS": "1",
                # vLLM's own advice; the library comes with it. Ignored where it is missing.
                "LD_PRELOAD": str(RECIPES["vllm"].folder / "lib" / "libiomp5.so"),
            },
        ),
    ]
    if file is not None and file.suffix == ".gguf":
        settings = [
            {"file": str(file), "max_sequences": MAX_SEQUENCES, "flash_attention": flash}
            for flash in (False, True)
        ]
        listed.append(
            Side("llama.cpp", "llama_cpp_", tuple(settings), "llama.cpp", mixes_adapters=False)
        )
        settings = [{"file": str(file), "max_sequences": MAX_SEQUENCES, "kv_gigabytes": KV_MEMORY}]
        listed.append(
            Side("openvino", "openvino_", tuple(settings), "openvino", mixes_adapters=False)
        )
    return listed
