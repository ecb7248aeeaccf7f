"""What things cost, before they run: cost models, and how a search spends its rounds."""

from anabranch.planning.cost import CostModel
from anabranch.planning.halving import Rung, successive_halving, survivors

__all__ = ["CostModel", "Rung", "successive_halving", "survivors"]
