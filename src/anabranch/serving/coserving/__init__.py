"""Co-serving: adapters are trained by the engine that serves, in the time that it has left.

Oliaro et al., "FlexLLM: Token-Level Co-Serving of LLM Inference and Finetuning with SLO
Guarantees". The engine calls :class:`~.coserving.CoServing` around each of its steps.
"""

from anabranch.serving.coserving.job import FinetuneJob, JobEvent, JobHandle, JobProgress, Listener

__all__ = ["FinetuneJob", "JobEvent", "JobHandle", "JobProgress", "Listener"]
