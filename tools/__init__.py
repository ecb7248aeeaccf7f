"""Programs for those who work on Anabranch; no part of the package."""
