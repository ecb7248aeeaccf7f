"""Fine-tuning behind OpenAI's interface: rows in, a served adapter out.

Belongs here: checking rows, turning a request into a job, running the store's jobs on the models
that train, and showing jobs in OpenAI's words. How a model trains is not known here: it gets a
:class:`~anabranch.serving.coserving.job.FinetuneJob` and reports to a listener.
"""

from anabranch.api.fine_tuning.service import FineTuningService

__all__ = ["FineTuningService"]
