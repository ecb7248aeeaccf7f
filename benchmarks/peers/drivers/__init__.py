"""One program per engine; each runs in that engine's own environment and speaks ``protocol``."""
