"""Rounds per second of our simulation and those of Flower and NVFlare on the same federation."""
