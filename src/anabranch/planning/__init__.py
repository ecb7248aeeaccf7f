"""What things cost, before they run: cost models, and later clusters, rooflines and search."""

from anabranch.planning.cost import CostModel

__all__ = ["CostModel"]
