"""Anabranch against other serving engines on this machine: ``python -m benchmarks.peers``."""
