"""Sentence encoders: models that only embed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anabranch.errors import InvalidRequest, ModelCorrupt, ModelUnsupported, RequestTooLong
from anabranch.models.architectures import require_encoder
from anabranch.models.card import ModelCard
from anabranch.models.checks import read_json
from anabranch.models.library import ready
from anabranch.models.loading import read_tokenizer, require_complete
from anabranch.models.progress import silent
from anabranch.models.protocol import Embedding, Model, ModelStatistics
from anabranch.models.quiet import quiet

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "cls"]
_BATCH_TOKENS = 8192
_BATCH_TEXTS = 64
_ALL_POOLINGS = {
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
}


class SentenceEncoder(Model):
    """Embeds texts; made by :func:`load_encoder`.

    A vector is the mean of the last hidden states (or the first token's), scaled to length 1.
    ``max_tokens`` is the longest text, special tokens included.
    """

    def __init__(self, card: ModelCard, network: Any, tokenizer: Any, pooling: Pooling) -> None:
        self.name = card.name
        self.card = card
        self.max_tokens = card.context_length
        self._network = network
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._count = threading.Lock()
        self._tokens = self._batches = self._running = 0

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        """One unit vector for each text, in order, computed in a worker thread.

        Token ids are used as they are, so they must include the special tokens.
        Raises :class:`RequestTooLong` or :class:`InvalidRequest` before anything is computed.
        """
        return await asyncio.to_thread(self._embed, texts)

    def statistics(self) -> ModelStatistics:
        """Totals since the start; ``running`` counts calls, ``steps`` batches."""
        with self._count:
            return ModelStatistics(
                running=self._running, prompt_tokens=self._tokens, steps=self._batches
            )

    def _embed(self, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        rows = [self._ids(i, text) for i, text in enumerate(texts)]
        vectors: list[list[float]] = [[]] * len(rows)
        with self._count:
            self._running += 1
        try:
            for batch in _batches([len(row) for row in rows]):
                pooled = self._forward([rows[i] for i in batch])  # [batch, hidden]
                for i, vector in zip(batch, pooled.tolist(), strict=True):
                    vectors[i] = vector
                with self._count:
                    self._batches += 1
                    self._tokens += sum(len(rows[i]) for i in batch)
        finally:
            with self._count:
                self._running -= 1
        return [Embedding(v, len(row)) for v, row in zip(vectors, rows, strict=True)]

    def _ids(self, index: int, text: str | Sequence[int]) -> list[int]:
        field = f"input[{index}]"
        # Neither padding nor truncation: both would change the shared tokenizer's state.
        ids = self._tokenizer(text)["input_ids"] if isinstance(text, str) else list(text)
        if not ids:
            raise InvalidRequest(field, "must have at least one token")
        vocabulary = self._network.config.vocab_size
        if not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
            raise InvalidRequest(field, f"token ids must be integers from 0 to {vocabulary - 1}")
        if len(ids) > self.max_tokens:
            raise RequestTooLong(
                field,
                f"has {len(ids)} tokens, but {self.name!r} takes at most {self.max_tokens}; "
                f"split the text",
            )
        return ids

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        import torch

        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self._network.device
        ids, mask = ids.to(device), mask.to(device)
        with torch.inference_mode():
            hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            # hidden: [batch, tokens, hidden]
            if self._pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weight = mask.unsqueeze(-1)  # [batch, tokens, 1]
                pooled = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1)


def load_encoder(name: str) -> SentenceEncoder:
    """Load a sentence encoder: ``all-minilm-l6-v2``, or a folder or hub id of an encoder.

    A sentence-transformers folder says how it pools; any other encoder is pooled by the mean.
    Raises the errors of :func:`anabranch.models.load`.
    """
    with ready(name, silent) as model:
        folder = model.contents.folder
        require_encoder(model.contents.config, folder)
        pooling = _pooling(folder)
        from transformers import AutoModel

        with quiet():
            tokenizer = read_tokenizer(folder)
            loaded: Any = AutoModel.from_pretrained(
                folder,
                dtype=model.card.dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    network, info = loaded
    require_complete(info, folder, ignored="pooler.")
    return SentenceEncoder(model.card, network.eval().requires_grad_(False), tokenizer, pooling)


def _pooling(folder: Path) -> Pooling:
    if not (folder / "modules.json").is_file():
        return "mean"
    paths = _module_paths(folder / "modules.json")
    for kind in paths:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelUnsupported(
                f"{folder} has a {kind} layer after its encoder; Transformer, Pooling and "
                f"Normalize can be run"
            )
    if "Pooling" not in paths:
        return "mean"
    config = read_json(folder / paths["Pooling"] / "config.json")
    chosen = {k.removeprefix("pooling_mode_") for k, v in config.items() if v is True}
    modes = {str(config["pooling_mode"])} if "pooling_mode" in config else chosen & _ALL_POOLINGS
    if modes in ({"mean_tokens"}, {"mean"}):
        return "mean"
    if modes in ({"cls_token"}, {"cls"}):
        return "cls"
    raise ModelUnsupported(
        f"{folder} pools by {', '.join(sorted(modes)) or 'nothing'}; mean and cls can be run"
    )


def _module_paths(path: Path) -> dict[str, str]:
    """Type (its last name) to subfolder, from sentence-transformers' modules.json."""
    try:
        paths = {m["type"].rpartition(".")[2]: m["path"] for m in json.loads(path.read_bytes())}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelCorrupt(f"{path} cannot be read: {error}; get the file again") from error
    for folder in paths.values():
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ModelCorrupt(f"{path} names {folder!r}, which is outside the model's folder")
    return paths


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Indices of texts that run together, shortest first, so that little is padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == _BATCH_TEXTS or (len(batch) + 1) * lengths[i] > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
