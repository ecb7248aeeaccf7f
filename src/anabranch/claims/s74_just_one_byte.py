"""S74, Just One Byte: peers train every weight together and send one byte a gradient.

Every weight of the TinyOps transformer is trained by four machines with an operation each.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class JustOneByteClaim(Claim):
    """Codes of one byte against four, four machines against one, and a late joiner."""

    id = "S74"
    name = "just-one-byte"
    system = "Just One Byte (per gradient)"
    paper = "one byte per gradient; machines join and leave; more machines learn faster (no table)"
    baseline = "the same with float32 scalars, and one machine alone"
    method = "int8 codes, 4 machines, 2 slopes an iteration, 150 iterations, rate 1e-3"
    threshold = (
        "held-out loss with one byte at most 5 % above float32's; 8 bytes up an iteration from all "
        "four machines together, and 1 byte a slope on SmolLM2-135M; four machines end lower than "
        "one; a fifth that joins half-way and replays the log has the others' model to the bit"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Learning on TinyOps, a late joiner, then one slope of SmolLM2-135M."""
        from anabranch.claims.federated_experiments.just_one_byte import measure

        return measure(seed, progress)
