"""A model as the log of the scalars that made it.

Every machine that applies the same log to the same base has the same model to the bit, whenever and
wherever it does so. The log is one record an iteration::

    2 bytes                        number of contributions
    6 bytes each                   machine, age in iterations, number of scalars
    1 or 4 bytes a scalar          codes of all contributions, in the same order

all little-endian. The scale of the codes follows from the log, too, and takes no bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError, PayloadError
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_directions import ENGINE
from anabranch.federated.seeded_model import (
    LARGEST,
    ModelDiverged,
    SeededModel,
    digest,
    require_same_base,
    to_units,
)
from anabranch.files import replacing

_COUNT = struct.Struct("<H")
_CONTRIBUTION = struct.Struct("<HHH")
_FIRST_SCALE, _LEAST_SCALE = 8.0, 1e-3
_SKIPPED = -128
Kind = Literal["int8", "float8_e4m3", "float32"]
_LARGEST_FLOAT8 = 448.0
_FORMAT = "anabranch replay log 1"


class ScalarQuantiser:
    """Codes of scalars: ``int8`` [-scale, scale] in 255 levels, ``float8_e4m3`` (Micikevicius et
    al. 2022, "FP8 Formats for Deep Learning", section 3) or ``float32`` as they are.

    A float8 has a fixed scale of 1: a 16th of a scalar off at most from 2**-6 to 448, and 2**-10
    below. Scalars beyond the scale, or beyond 448, are cut off; NaN has a code of its own and comes
    back as NaN.
    """

    def __init__(self, kind: Kind = "int8") -> None:
        if kind not in get_args(Kind):
            raise ConfigurationError(f"codes are {', '.join(get_args(Kind))}, not {kind!r}")
        self.kind = kind
        self.width = 4 if kind == "float32" else 1
        """Bytes a scalar."""

    def encode(self, scalars: Sequence[float], scale: float) -> bytes:
        """One code each."""
        values = np.asarray(scalars, dtype=np.float64)
        if self.kind == "float32":
            return values.astype("<f4").tobytes()
        if self.kind == "float8_e4m3":
            within = torch.from_numpy(values.clip(-_LARGEST_FLOAT8, _LARGEST_FLOAT8))
            return within.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
        unknown = np.isnan(values)
        levels = np.rint(np.where(unknown, 0, values) * (127 / scale)).clip(-127, 127)
        return np.where(unknown, _SKIPPED, levels).astype(np.int8).tobytes()

    def decode(self, codes: bytes, scale: float) -> NDArray[np.float64]:
        """The scalars again; of int8 at most ``scale / 254`` away if they were within the scale."""
        if self.kind == "float32":
            return np.frombuffer(codes, dtype="<f4").astype(np.float64)
        if self.kind == "float8_e4m3":
            found = torch.from_numpy(np.frombuffer(codes, dtype=np.uint8).copy())
            return found.view(torch.float8_e4m3fn).to(torch.float64).numpy()
        levels = np.frombuffer(codes, dtype=np.int8).astype(np.float64)
        return np.where(levels == _SKIPPED, np.nan, levels * (scale / 127))


@dataclass(frozen=True)
class Contribution:
    """What one machine measured ``age`` iterations ago: ``codes`` of its samples 0, 1, ..."""

    machine: int
    age: int
    codes: bytes


Record = Sequence[Contribution]
"""What counts in one iteration, in the order in which everyone applies it."""


def pack(record: Record, width: int) -> bytes:
    """A record as bytes; codes take ``width`` bytes each."""
    heads = [_CONTRIBUTION.pack(c.machine, c.age, len(c.codes) // width) for c in record]
    return b"".join([_COUNT.pack(len(record)), *heads, *(c.codes for c in record)])


def unpack(log: bytes, width: int) -> list[Record]:
    """The records of a log; :class:`PayloadError` if it was cut off."""
    records: list[Record] = []
    at = 0
    try:
        while at < len(log):
            (count,) = _COUNT.unpack_from(log, at)
            at += _COUNT.size
            heads = [_CONTRIBUTION.unpack_from(log, at + 6 * i) for i in range(count)]
            at += 6 * count
            record = []
            for machine, age, scalars in heads:
                codes = log[at : at + scalars * width]
                if len(codes) < scalars * width:
                    raise PayloadError(f"record {len(records)} lacks codes of machine {machine}")
                record.append(Contribution(machine, age, codes))
                at += len(codes)
            records.append(record)
    except struct.error:
        raise PayloadError(f"the log ends within record {len(records)}") from None
    return records


class ReplayedModel:
    """The base after some iterations of a log. ``run`` names the directions of a run."""

    def __init__(
        self, start: Mapping[str, Tensor], lr: float, run: int, quantiser: ScalarQuantiser
    ) -> None:
        self.model = SeededModel(start, lr)
        self.run = run
        self.quantiser = quantiser
        self.scales = [_FIRST_SCALE]
        """Of the codes that were measured in each iteration, the present one last."""
        self.spent = 0.0

    @property
    def iteration(self) -> int:
        """Records applied."""
        return len(self.scales) - 1

    def seed(self, iteration: int, machine: int, sample: int) -> int:
        """The direction of a scalar."""
        return derive_seed(self.run, iteration, machine, sample)

    def apply(self, record: Record) -> None:
        """``w -= lr / n * sum of g z`` over the record's n scalars.

        Everyone decodes codes, its own as well: what it measured before rounding is known to
        itself alone. Raises :class:`ModelDiverged` and :class:`PayloadError` before any change.
        """
        steps: list[tuple[int, float]] = []
        for part in record:
            measured = self.iteration - part.age
            if measured < 0:
                raise PayloadError(f"machine {part.machine} measured before the run began")
            found = self.quantiser.decode(part.codes, self.scales[measured]).tolist()
            steps += [
                (self.seed(measured, part.machine, sample), slope)
                for sample, slope in enumerate(found)
                if math.isfinite(slope)
            ]
        scalars = np.array([slope for _, slope in steps]) / max(len(steps), 1)
        units = to_units(scalars)
        size = float(np.abs(scalars).sum())  # the mean size of a slope
        if self.spent + size > LARGEST:
            raise ModelDiverged(f"slopes of {self.iteration} iterations add up to over {LARGEST:g}")
        for (seed, _), count in zip(steps, units.tolist(), strict=True):
            self.model.add(seed, count)
        self.spent += size
        last = self.scales[-1]
        self.scales.append(max(0.9 * last + 0.1 * 4 * size, _LEAST_SCALE) if steps else last)

    def state_dict(self) -> dict[str, Any]:
        """Sums, scales and what was spent; the base is not in it."""
        return {"sums": self.model.sums, "scales": self.scales, "spent": self.spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.model.restore(state["sums"])
        self.scales, self.spent = list(state["scales"]), state["spent"]


class ReplayLogError(FederationError):
    """A file is no whole replay log, or does not give the model that it promises."""


@dataclass(frozen=True)
class ReplayLog:
    """A version as its base and everyone's codes: what fine-tuning made of a model, in kilobytes.

    A file is a line of JSON with all but the ``records``, then these. ``base`` and ``result`` are
    the digests of the model before and after; ``run`` names the directions, drawn the way
    ``directions``.
    """

    base: int
    result: int
    run: int
    lr: float
    codes: Kind
    records: bytes
    directions: int = ENGINE

    def replay(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The version's tensors, from those of the base.

        Raises :class:`BaseModelMismatch` if these are others, :class:`ReplayLogError` if what comes
        out is not what the log was made of.
        """
        require_same_base("this machine", digest(start), self.base)
        if self.directions != ENGINE:
            raise ReplayLogError(
                f"the log's directions are drawn the way {self.directions}, this version of "
                f"anabranch draws them the way {ENGINE}; replay it with the version that wrote it"
            )
        quantiser = ScalarQuantiser(self.codes)
        model = ReplayedModel(start, self.lr, self.run, quantiser)
        for record in unpack(self.records, quantiser.width):
            model.apply(record)
        found = model.model.tensors
        if digest(found) != self.result:
            raise ReplayLogError(
                f"the log leads to {digest(found):012x} and was written for {self.result:012x}: "
                f"a record was changed or lost; get the file again"
            )
        return found

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        header = {"format": _FORMAT, **asdict(self)}
        del header["records"]
        with replacing(path) as draft:
            draft.write_bytes(json.dumps(header).encode() + b"\n" + self.records)

    @classmethod
    def load(cls, path: Path) -> ReplayLog:
        """Read a file; :class:`ReplayLogError` if it holds something else."""
        line, _, records = path.read_bytes().partition(b"\n")
        try:
            header = json.loads(line)
            if header.pop("format") != _FORMAT:
                raise ValueError
            log = cls(records=records, **header)
            unpack(log.records, ScalarQuantiser(log.codes).width)
        except (ValueError, TypeError, KeyError, AttributeError, ConfigurationError):
            raise ReplayLogError(
                f"{path} is no whole replay log; a federation with just-one-byte writes one"
            ) from None
        return log
