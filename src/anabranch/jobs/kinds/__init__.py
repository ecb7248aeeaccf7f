"""Kinds of jobs that run as a process of their own: plug-ins of the kind ``jobs``."""

from anabranch.jobs.kinds.base import JobKind, Limits, Terms

__all__ = ["JobKind", "Limits", "Terms"]
