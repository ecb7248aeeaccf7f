"""Time and memory of the graph estimators on large random graphs."""
