"""Rounds per second of our simulation and Flower's on the same federation."""
