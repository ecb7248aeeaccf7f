"""Experiments of the claims about federated methods."""
