"""Training, done once: the command line, co-served jobs and federated clients take the same step.

The trainer, what it optimises (objectives and losses), data and recipes belong here; adapter
methods live in :mod:`anabranch.adapters`.
"""
