"""Anabranch: adapt, federate, compress, serve and compose language models on shared machines."""

__version__ = "0.1.0"
