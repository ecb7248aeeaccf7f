"""The methods that PEFT has, in the survey's taxonomy; none of them is written again here.

Every entry is held to its word by ``tests/adapters/test_methods.py``, which builds, trains, saves,
merges and mixes each of them on tiny models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from anabranch.adapters.info import Engine, Family, MethodInfo, Size

RANK = Size("r")
TOKENS = Size("num_virtual_tokens")
BLOCKS = Size("oft_block_size", (2, 4, 8, 16, 32, 64, 128, 256))
PROMPT = "it acts on tokens in front of the text, not on weights"

UNAVAILABLE: dict[str, str] = {
    "XLORA": "mixes trained LoRA folders: it needs adapters={name: folder} of the same base, and "
    "use_cache=False; nothing can be built from the base alone",
}
"""PEFT's types that are not in the catalogue, with the reason."""


def peft_methods() -> Iterator[MethodInfo]:
    """Entries for PEFT's methods."""
    yield from _low_rank()
    yield from _rotation_and_spectral()
    yield from _selective()
    yield from _soft_prompts()
    yield from _additive()


def _low_rank() -> Iterator[MethodInfo]:
    def row(name: str, summary: str, paper: str, **facts: Any) -> MethodInfo:
        facts.setdefault("size", RANK)
        return _row(name, summary, "reparameterised", facts.pop("leaf", "low rank"), paper, **facts)

    lora = {"type_": "LORA", "mixed_batch": True}
    hu = "LoRA (Hu et al. 2021), arXiv:2106.09685"
    yield row("lora", "Adds B A x: two factors of rank r.", hu, engine="batched", **lora)
    yield row(
        "rslora",
        "LoRA scaled by alpha / sqrt(r).",
        "rsLoRA (Kalajdzievski 2023), arXiv:2312.03732",
        defaults={"use_rslora": True},
        engine="batched",
        **lora,
    )
    yield row(
        "dora",
        "LoRA on the direction of W, with a trained magnitude per column.",
        "DoRA (Liu et al. 2024), arXiv:2402.09353",
        defaults={"use_dora": True},
        type_="LORA",
    )
    yield row(
        "adalora",
        "Low rank as an SVD whose ranks are pruned while training.",
        "AdaLoRA (Zhang et al. 2023), arXiv:2303.10512",
        leaf="rank search",
        defaults={"init_r": 12, "target_r": 8, "total_step": 1000},
        size=Size("init_r"),
        multi_adapter=False,
    )
    yield row(
        "vera",
        "Frozen random factors shared by all layers; trains two scaling vectors a module.",
        "VeRA (Kopiczko et al. 2024), arXiv:2310.11454",
    )
    yield row(
        "pvera",
        "VeRA whose scaling vectors are drawn from a learned distribution.",
        "PVeRA (2025), arXiv:2512.07703",
    )
    yield row(
        "vblora",
        "Factors composed from a bank of vectors that all layers share.",
        "VB-LoRA (Li et al. 2024), arXiv:2405.15179",
        defaults={"num_vectors": 256, "vector_length": 64},
        size=Size("num_vectors", (8, 16, 32, 64, 128, 256, 512, 1024)),
    )
    yield row(
        "unilora",
        "All factors projected from one trained vector.",
        "Uni-LoRA (2025), arXiv:2506.00799",
        size=Size("theta_d_length"),
        on_meta=False,
    )
    yield row(
        "tinylora",
        "A handful of weights expanded through the SVD of W.",
        "TinyLoRA (2026), arXiv:2602.04118",
        size=Size("u"),
        conv1d=False,
    )
    yield row(
        "randlora",
        "Full-rank update from random bases with trained diagonals.",
        "RandLoRA (Albert et al. 2025), arXiv:2502.00987",
        size=Size("r", (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)),
    )
    yield row(
        "loha",
        "Hadamard product of two low-rank products.",
        "FedPara (Hyeon-Woo et al. 2021), arXiv:2108.06098",
        conv1d=False,
    )
    yield row(
        "lokr",
        "Kronecker product of small factors.",
        "LoKr in LyCORIS, arXiv:2309.14859",
        conv1d=False,
    )
    yield row(
        "hira",
        "Hadamard product of W with a low-rank product.",
        "HiRA (Huang et al. 2025), ICLR, openreview:TwJrTz9cRS",
    )
    yield row(
        "miss",
        "One factor, expanded over shards of the input.",
        "MiSS (Kang 2024), arXiv:2409.15371",
        size=Size("r", (1, 2, 4, 8, 16, 32, 64, 128)),
        conv1d=False,
    )
    yield row(
        "gralora",
        "LoRA for each block of a k x k partition of W.",
        "GraLoRA (2025), arXiv:2505.20355",
        size=Size("r", (2, 4, 8, 16, 32, 64, 128)),
    )
    yield row(
        "delora",
        "Low rank with direction and strength decoupled.",
        "DeLoRA (Bini et al. 2025), arXiv:2503.18225",
        conv1d=False,
    )
    yield row(
        "deft",
        "Removes a subspace of W and puts a trained one in its place.",
        "DEFT: decompositional efficient fine-tuning, as in PEFT",
        conv1d=False,
    )
    yield row(
        "glora",
        "Generalised LoRA: trains changes of weight, input and bias together.",
        "GLoRA (Chavan et al. 2023), arXiv:2306.07967",
        mixed_batch=True,
        conv1d=False,
    )
    yield row(
        "lily",
        "Low-rank factors shared across layers, mixed by a router.",
        "Lily (Zhong et al. 2024), arXiv:2407.09946",
        mergeable=False,
        merge_note="a router weighs the factors by the input",
        conv1d=False,
    )
    yield row(
        "frod",
        "Shared full-rank factors with a trained diagonal and sparse entries.",
        "FRoD, doi:10.1609/aaai.v40i31.39813",
        targets="attention-output",
        size=Size("sparse_rate", (0.001, 0.003, 0.01, 0.03, 0.1)),
        defaults={"progressbar": False},
        on_meta=False,
    )
    yield row(
        "psoft",
        "Orthogonal fine-tuning inside the principal subspace of W.",
        "PSOFT, openreview:FSHrinMArK",
        defaults={"r": 32, "psoft_alpha": 32},
        conv1d=False,
    )
    yield row(
        "adamss",
        "Trains several small subspaces of the SVD of W.",
        "AdaMSS: adaptive multi-subspaces, as in PEFT",
        size=Size("num_subspaces", (1, 2, 3, 4, 5, 8)),
        on_meta=False,
        conv1d=False,
    )
    yield row(
        "poly",
        "A skill mixture of LoRAs, chosen by the task.",
        "Polytropon (Ponti et al. 2022), arXiv:2202.13914",
        leaf="mixture of LoRA",
        mergeable=False,
        merge_note="the mixture depends on the task of each row",
        engine="no",
        inputs=("task_ids",),
        conv1d=False,
    )


def _rotation_and_spectral() -> Iterator[MethodInfo]:
    def row(name: str, summary: str, paper: str, **facts: Any) -> MethodInfo:
        leaf = facts.pop("leaf", "rotation")
        return _row(name, summary, "reparameterised", leaf, paper, **facts)

    yield row(
        "oft",
        "Rotates the input by a block-diagonal orthogonal matrix.",
        "OFT (Qiu et al. 2023), arXiv:2306.07280",
        size=BLOCKS,
        conv1d=False,
    )
    yield row(
        "boft",
        "Orthogonal matrix as a product of butterfly factors.",
        "BOFT (Liu et al. 2023), arXiv:2311.06243",
        size=Size("boft_block_size", (2, 4, 8, 16, 32)),
        on_meta=False,
        conv1d=False,
    )
    yield row(
        "hra",
        "A chain of Householder reflections.",
        "HRA (Yuan et al. 2024), arXiv:2405.17484",
        size=RANK,
        conv1d=False,
    )
    yield row(
        "road",
        "Rotates pairs of output features.",
        "RoAd (Liao & Monz 2024), arXiv:2409.00119",
        mixed_batch=True,
        conv1d=False,
    )
    yield row(
        "fourierft",
        "Trains some entries of the update's Fourier transform.",
        "FourierFT (Gao et al. 2024), arXiv:2405.03003",
        leaf="spectral",
        size=Size("n_frequency"),
    )
    yield row(
        "waveft",
        "Trains some entries of the update's wavelet transform.",
        "WaveFT (2025), arXiv:2505.12532",
        leaf="spectral",
        size=Size("n_frequency"),
    )
    yield row(
        "c3a",
        "Circular convolution in blocks.",
        "C3A (Chen et al. 2024), arXiv:2407.19342",
        leaf="spectral",
        defaults={"block_size": 64},
        size=Size("block_size", (512, 256, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2)),
        conv1d=False,
    )


def _selective() -> Iterator[MethodInfo]:
    def row(name: str, summary: str, paper: str, **facts: Any) -> MethodInfo:
        return _row(name, summary, "selective", facts.pop("leaf", "unstructured"), paper, **facts)

    yield row(
        "shira",
        "Trains a fixed random set of each weight's entries.",
        "SHiRA (Bhardwaj et al. 2024), arXiv:2406.13175",
        size=RANK,
        on_meta=False,
        conv1d=False,
    )
    yield row(
        "supertuning",
        "Trains the entries of W that matter most by magnitude.",
        "Supertuning (2026), arXiv:2607.09287",
        size=Size("sparsity", (0.9999, 0.9995, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9)),
        conv1d=False,
    )
    yield row(
        "osf",
        "Trains the small singular directions of W and freezes the large ones.",
        "OSF: orthogonal subspace fine-tuning, arXiv:2504.07097",
        engine="no",
        size=Size("effective_rank", (0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
        conv1d=False,
    )
    yield row(
        "ln_tuning",
        "Trains the weights of the norms.",
        "LN tuning (Zhao et al. 2023), arXiv:2312.11420",
        leaf="structured",
        targets="norm",
    )
    yield row(
        "beft",
        "Adds a trained bias to the value projections.",
        "BEFT (2025), arXiv:2509.15974",
        leaf="structured",
        targets=None,
        merge_note="PEFT merges it only into modules that have a bias",
    )
    yield row(
        "trainable_tokens",
        "Trains the embeddings of chosen tokens.",
        "Trainable tokens, as in PEFT",
        leaf="structured",
        targets="embedding",
        defaults={"token_indices": [0]},
        size=None,
    )


def _soft_prompts() -> Iterator[MethodInfo]:
    def row(name: str, summary: str, paper: str, **facts: Any) -> MethodInfo:
        facts.setdefault("defaults", {"num_virtual_tokens": 20})
        facts.setdefault("size", TOKENS)
        return _row(
            name,
            summary,
            "additive",
            "soft prompt",
            paper,
            targets=None,
            mergeable=False,
            merge_note=PROMPT,
            engine="no",
            **facts,
        )

    yield row(
        "prompt_tuning",
        "Trained embeddings in front of the text.",
        "Prompt tuning (Lester et al. 2021), arXiv:2104.08691",
    )
    yield row(
        "p_tuning",
        "Prompt embeddings made by a small network.",
        "P-tuning (Liu et al. 2021), arXiv:2103.10385",
        defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    )
    yield row(
        "prefix_tuning",
        "Trained keys and values in front of the text, in every layer.",
        "Prefix tuning (Li & Liang 2021), arXiv:2101.00190",
    )
    yield row(
        "multitask_prompt_tuning",
        "A shared prompt times a low-rank matrix of the task.",
        "MPT (Wang et al. 2023), arXiv:2303.02861",
        inputs=("task_ids",),
    )
    yield row(
        "cpt",
        "Trains small changes of the embeddings of a given context.",
        "CPT (Blau et al. 2024), arXiv:2410.17222",
        defaults={"cpt_token_ids": [0], "cpt_mask": [1], "cpt_tokens_type_mask": [1]},
        size=None,
    )
    yield row(
        "cartridge",
        "A trained key/value cache that stands for a long context.",
        "Cartridges (Eyuboglu et al. 2025), arXiv:2506.06266",
    )


def _additive() -> Iterator[MethodInfo]:
    def row(name: str, summary: str, paper: str, **facts: Any) -> MethodInfo:
        return _row(name, summary, "additive", facts.pop("leaf", "adapter"), paper, **facts)

    yield row(
        "ia3",
        "Scales keys, values and the feed-forward block's inner features.",
        "IA3 (Liu et al. 2022), arXiv:2205.05638",
        leaf="other",
        targets=None,
    )
    yield row(
        "adaption_prompt",
        "LLaMA-Adapter: gated attention to trained prompts in the top layers.",
        "LLaMA-Adapter (Zhang et al. 2023), arXiv:2303.16199",
        targets=None,
        mergeable=False,
        merge_note="it attends to trained prompts, which no weight can do",
        defaults={"adapter_len": 10, "adapter_layers": 2},
        size=Size("adapter_len"),
        engine="no",
    )
    yield row(
        "peanut",
        "A small nonlinear network of W as the update.",
        "PEANuT (Zhong et al. 2024), arXiv:2410.01870",
        size=RANK,
        conv1d=False,
    )
    yield row(
        "shadow",
        "A small shadow model beside the base corrects its hidden states.",
        "ShadowPEFT, as in PEFT",
        targets=None,
        mergeable=False,
        merge_note="the change depends on the input and flows from layer to layer",
        engine="no",
    )


def _row(
    name: str,
    summary: str,
    family: Family,
    leaf: str,
    paper: str,
    *,
    type_: str | None = None,
    engine: Engine = "own branch",
    source: Literal["peft"] = "peft",
    **facts: Any,
) -> MethodInfo:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[type_ or name.upper()]]
    return MethodInfo(
        name=name,
        summary=summary,
        family=family,
        leaf=leaf,
        paper=paper,
        config=config,
        source=source,
        engine=engine,
        **facts,
    )
