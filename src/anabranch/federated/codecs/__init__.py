"""Codecs make messages smaller; each module is one or a family, found by its ``name``.

A codec replaces the floating-point tensors of a payload by what stands for them and leaves
everything else alone, so that codecs can be chained: sparsify, then quantise the values that are
left. ``anabranch list codecs`` shows them.
"""

from anabranch.federated.codecs.base import Codec, Identity, TensorCodec
from anabranch.federated.codecs.cast import Cast
from anabranch.federated.codecs.chain import Chain
from anabranch.federated.codecs.error_feedback import ErrorFeedback
from anabranch.federated.codecs.projection import Projection
from anabranch.federated.codecs.quantise import Quantise
from anabranch.federated.codecs.sign import Sign
from anabranch.federated.codecs.sparse import RandK, TopK

__all__ = [
    "Cast",
    "Chain",
    "Codec",
    "ErrorFeedback",
    "Identity",
    "Projection",
    "Quantise",
    "RandK",
    "Sign",
    "TensorCodec",
    "TopK",
]
