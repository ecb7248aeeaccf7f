"""The engine: requests in, steps, tokens out.

``step`` is the whole of serving, and everything that runs on the engine runs in it. The engine
has no thread and no clock of its own; :class:`~anabranch.serving.model.EngineModel` runs it
behind the API, a simulation runs it on predicted time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anabranch import registry
from anabranch.errors import ConfigurationError, InvalidRequest, RequestTooLong
from anabranch.models.protocol import ModelStatistics, OutputDelta
from anabranch.planning import CostModel
from anabranch.serving.adapters import AdapterCheckpoint, ServedAdapter
from anabranch.serving.batch import StepPlan, StepResult
from anabranch.serving.coserving import FinetuneJob, JobHandle, Listener
from anabranch.serving.coserving.coserving import CoServing
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.running import RunningJob
from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.options import EngineOptions
from anabranch.serving.output import OutputBuilder
from anabranch.serving.runner import ModelRunner
from anabranch.serving.sampling import Sampled, sample
from anabranch.serving.scheduler import TokenBudgetScheduler
from anabranch.serving.sequence import Request, Segment, Sequence

logger = logging.getLogger(__name__)

FEWEST_PROMPT_TOKENS = 16
"""Of a step with a latency target: prompts go on even where the target cannot be met."""

FAILED = "this request could not be computed; the server's log says why"
NOT_FINITE = "the model computed values that are not finite for this request"


@dataclass(frozen=True)
class StepOutput:
    """What a step added to one choice of one request."""

    request_id: str
    delta: OutputDelta
    cached_tokens: int = 0
    embedding: torch.Tensor | None = None
    """[hidden], with the last delta of a pooling request"""


class Engine:
    """Serves one model: schedules, runs and samples steps over all requests."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Any = None,
        end_tokens: SequenceOf[int] = (),
        options: EngineOptions | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        options = options or EngineOptions()
        device = torch.device(device)
        wanted = options.max_model_len or runner.context_length
        if wanted > runner.context_length:
            raise ConfigurationError(
                f"max_model_len is {wanted}, but the model's context is {runner.context_length}"
            )
        pages = options.resolved_pages(runner.page_bytes, wanted, device)
        pool = PagePool(pages, -(-options.finetune_tokens // options.page_size), options.page_size)
        runner.allocate(pages + pool.count)
        self.options = options
        self.kv_memory = pages * runner.page_bytes
        self.cost_model = CostModel()
        self.cache = KVCacheManager(pages, options.page_size, options.prefix_reuse)
        self.max_context = min(wanted, self.cache.capacity)
        self.token_budget = options.resolved_token_budget(device)
        policy = registry.get("policies", options.policy)()
        self.scheduler = TokenBudgetScheduler(
            self.cache, policy, self.token_budget, options.max_sequences
        )
        self.coserving = CoServing(
            runner, pool, self.cost_model, clock, self._publish, options.time_between_tokens
        )
        """Fine-tuning jobs, which compute in what requests leave of the steps."""
        self._published: dict[str, ServedAdapter] = {}
        self.runner = runner
        self._clock = clock
        self.end_tokens = tuple(sorted(end_tokens))
        self._output = OutputBuilder(tokenizer, frozenset(end_tokens))
        self._requests: dict[str, list[Sequence]] = {}
        self._adapters: set[ServedAdapter] = set()
        self._adapter_users: Counter[ServedAdapter] = Counter()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._target_steps = self._target_met = 0

    def check(self, request: Request) -> None:
        """Raise :class:`InvalidRequest` if the request can never be served. Changes nothing."""
        sampling, length = request.sampling, len(request.prompt)
        vocabulary = self.runner.vocabulary
        if not length:
            raise InvalidRequest("prompt", "must have at least one token")
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
            raise InvalidRequest("prompt", f"token ids must be between 0 and {vocabulary - 1}")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise InvalidRequest("model", f"the adapter {request.adapter.name!r} was removed")
        limit = self.max_context if request.pooling else self.max_context - 1
        if length > limit:
            raise RequestTooLong(
                "prompt", f"has {length} tokens, but at most {limit} fit in {self._context_name()}"
            )
        wanted = length + (sampling.max_tokens or 0)
        if not request.pooling and wanted > self.max_context:
            raise RequestTooLong(
                "max_tokens",
                f"{length} prompt tokens and {sampling.max_tokens} new ones make {wanted}, but "
                f"at most {self.max_context} fit in {self._context_name()}",
            )
        for field, ids in (
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            for token in ids:
                if not 0 <= token < vocabulary:
                    raise InvalidRequest(
                        field, f"token id {token} is not between 0 and {vocabulary - 1}"
                    )

    def add(self, request: Request) -> None:
        """Queue a request. Raises :class:`InvalidRequest` before anything is changed."""
        self.check(request)
        if request.id in self._requests:
            raise InvalidRequest("id", f"{request.id!r} is already running")
        space = self.max_context - len(request.prompt)
        limit = request.sampling.max_tokens or space
        choices = [
            Sequence(
                request,
                index,
                list(request.prompt),
                max_tokens=limit,
                detokenizer=self._output.detokenizer(request),
            )
            for index in range(request.sampling.n)
        ]
        choices[0].siblings = choices[1:]
        self._requests[request.id] = choices
        if request.adapter is not None:
            self._adapter_users[request.adapter] += 1
        self._prompt_tokens += len(request.prompt)
        self.scheduler.add(choices[0])

    def abort(self, request_id: str) -> None:
        """Stop a request and free its pages now. Harmless if it is not running."""
        choices = self._forget(request_id)
        for sequence in choices:
            sequence.finish_reason = sequence.finish_reason or "abort"
            self.scheduler.remove(sequence)

    def abort_all(self) -> list[StepOutput]:
        """Give up every request, telling each choice."""
        outputs = [
            StepOutput(name, OutputDelta(choice.index, finish_reason="error", error=FAILED))
            for name, choices in self._requests.items()
            for choice in choices
            if choice.finish_reason is None
        ]
        for name in list(self._requests):
            self.abort(name)
        return outputs

    def add_adapter(
        self, name: str, checkpoint: AdapterCheckpoint, version: int = 1
    ) -> ServedAdapter:
        """Make an adapter ready for requests. Raises :class:`AdapterError` if it does not fit."""
        handle, memory = self.runner.add_adapter(checkpoint)
        identity = f"{name}@{version}/{checkpoint.fingerprint}"
        key = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        adapter = ServedAdapter(name, version, key, memory, handle)
        self._adapters.add(adapter)
        return adapter

    def remove_adapter(self, adapter: ServedAdapter) -> None:
        """Take no new requests on it; its memory is free once those that run have finished."""
        if adapter in self._adapters:
            self._adapters.remove(adapter)
            self._drop_unused(adapter)

    def finetune(self, job: FinetuneJob, listener: Listener | None = None) -> JobHandle:
        """Train an adapter in the steps to come; see :class:`FinetuneJob`.

        Its published versions are in :meth:`finetuned`. Raises an :class:`AnabranchError` if the
        job can never run here.
        """
        prepared = self.coserving.prepare(job, listener)
        self.coserving.add(prepared)
        return prepared.handle

    def finetuned(self, adapter: str) -> ServedAdapter:
        """The newest version that a job published under a name, for requests."""
        return self._published[adapter]

    def generate(self, requests: SequenceOf[Request]) -> dict[str, list[list[int]]]:
        """Run requests to the end. Returns the token ids of each request's choices."""
        tokens: dict[str, list[list[int]]] = {}
        for request in requests:
            self.add(request)
            tokens[request.id] = [[] for _ in range(request.sampling.n)]
        for output in self.run():
            tokens[output.request_id][output.delta.index].extend(output.delta.token_ids)
        return tokens

    def run(self) -> Iterator[StepOutput]:
        """Step until nothing is left, yielding outputs as they come."""
        while self.has_work:
            yield from self.step()

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would compute something, or a job waits for what it writes."""
        return self.scheduler.has_work or self.coserving.has_work()

    def step(self) -> list[StepOutput]:
        """Compute one batch of segments and return what it added to the requests."""
        # 1. Decide which tokens to compute: those of requests, and to train what time allows.
        began = self._clock()
        requested = self.scheduler.schedule(self._budget())
        plan = self.coserving.extend(requested, self.options.page_size)
        if plan is None:
            self.coserving.work(0)
            return []

        # 2. Compute them. Sequences that fail are taken out; the others go on.
        plan, result, outputs = self._execute(plan)
        if result is None:
            return outputs
        num_tokens = plan.num_tokens
        self.cost_model.observe(num_tokens, plan.num_context, self._clock() - began)

        # 3. Their keys and values are in the cache now.
        for segment in plan.segments:
            if segment.sequence.recorder is None:
                self.scheduler.computed(segment)
            else:
                self.coserving.computed(segment)
        plan = replace(plan, segments=tuple(s for s in plan.segments if not s.sequence.recorder))

        # 4. Sample a token for every sequence that is computed to its end.
        rows, ready = self._sampling_rows(plan)
        for sequence, sampled in zip(ready, sample(result.logits[rows], ready), strict=True):
            if sampled is None:
                outputs += self._fail(sequence, NOT_FINITE)
            else:
                outputs.append(self._append(sequence, sampled))

        # 5. Collect the vectors of pooling requests.
        for index, hidden in result.pooled.items():
            outputs += self._pool(plan.segments[index], hidden)

        # 6. Release what has finished, before the next step is planned.
        for segment in plan.segments:
            ready.append(segment.sequence)
        for sequence in ready:
            if sequence.finish_reason is not None:
                self._remove(sequence)

        # 7. Train in the rest of the step.
        self.coserving.work(num_tokens)
        self._count_target(requested, self._clock() - began)
        return outputs

    def statistics(self) -> ModelStatistics:
        """Load now and totals so far."""
        return ModelStatistics(
            waiting=self.scheduler.num_waiting,
            running=self.scheduler.num_running,
            cache_usage=self.cache.usage,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self.scheduler.num_preemptions,
            steps=self.scheduler.num_steps,
            finetune_tokens=self.coserving.statistics.tokens,
            finetune_jobs=len(self.coserving.jobs),
            slo_steps=self._target_steps,
            slo_met=self._target_met,
        )

    def _budget(self) -> int:
        """Tokens of the next step: fewer than at most if prompts would make streams late."""
        target = self.options.time_between_tokens
        if target is None or not self.cost_model.fitted:
            return self.token_budget
        least = self.scheduler.num_running + FEWEST_PROMPT_TOKENS
        room = self.cost_model.invert(target, self.scheduler.num_context)
        return min(self.token_budget, max(room, least))

    def _count_target(self, plan: StepPlan | None, seconds: float) -> None:
        target = self.options.time_between_tokens
        if target is None or plan is None:
            return
        if any(segment.kind == "decode" for segment in plan.segments):
            self._target_steps += 1
            self._target_met += seconds <= target

    def _publish(self, job: RunningJob, folder: Path) -> None:
        before = self._published.get(job.job.adapter)
        version = before.version + 1 if before else 1
        checkpoint = AdapterCheckpoint.read(folder)
        self._published[job.job.adapter] = self.add_adapter(job.job.adapter, checkpoint, version)
        if before is not None:
            self.remove_adapter(before)
        job.published(version)

    def _execute(self, plan: StepPlan) -> tuple[StepPlan, StepResult | None, list[StepOutput]]:
        """Run a plan; if it raises, run its segments one by one to find out whose fault it is."""
        if plan.page_copies:
            # Once and first: a retry must not copy from a page that the batch has overwritten.
            self.runner.copy_pages(plan.page_copies)
            plan = replace(plan, page_copies=())
        try:
            return plan, self.runner.execute(plan), []
        except Exception as error:
            if len(plan.segments) == 1:
                sequence = plan.segments[0].sequence
                if sequence.recorder is not None:
                    self.coserving.failed(sequence, error)
                    return plan, None, []
                logger.exception("a request failed")
                return plan, None, self._fail(sequence, FAILED)
            logger.warning("a step of %d segments failed; running them alone", len(plan.segments))

        survivors: list[Segment] = []
        results: list[StepResult] = []
        outputs: list[StepOutput] = []
        for segment in plan.segments:
            _, result, failures = self._execute(replace(plan, segments=(segment,)))
            outputs += failures
            if result is not None:
                survivors.append(segment)
                results.append(result)
        if not survivors:
            return plan, None, outputs
        merged = StepResult(
            logits=torch.cat([result.logits for result in results]),
            pooled={i: r.pooled[0] for i, r in enumerate(results) if r.pooled},
        )
        return replace(plan, segments=tuple(survivors)), merged, outputs

    def _sampling_rows(self, plan: StepPlan) -> tuple[list[int], list[Sequence]]:
        """Rows of logits and the sequences that draw from them.

        Choices of one request start here: they share the row after the prompt's last token.
        """
        rows: list[int] = []
        ready: list[Sequence] = []
        wanting = (segment.sequence for segment in plan.segments if segment.wants_logits)
        for row, parent in enumerate(wanting):
            choices = [parent, *self.scheduler.fork(parent)]
            ready += choices
            rows += [row] * len(choices)
        return rows, ready

    def _append(self, sequence: Sequence, sampled: Sampled) -> StepOutput:
        first = sequence.num_generated == 0
        sequence.tokens.append(sampled.token)
        self._generated_tokens += 1
        if first and sequence.index == 0:
            self._cached_tokens += sequence.cached_tokens
        delta = self._output.token(sequence, sampled)
        return StepOutput(sequence.request.id, delta, sequence.cached_tokens)

    def _pool(self, segment: Segment, hidden: torch.Tensor) -> list[StepOutput]:
        sequence = segment.sequence
        sequence.pooled = hidden if sequence.pooled is None else sequence.pooled + hidden
        if sequence.num_pending:
            return []
        mean = sequence.pooled / sequence.prompt_length
        if not torch.isfinite(mean).all():
            return self._fail(sequence, NOT_FINITE)
        sequence.finish_reason = "stop"
        delta = OutputDelta(sequence.index, finish_reason="stop")
        return [StepOutput(sequence.request.id, delta, embedding=mean)]

    def _fail(self, sequence: Sequence, message: str) -> list[StepOutput]:
        """Take a sequence out, with choices that wait for it, and clear what it wrote."""
        pages = self.scheduler.discard(sequence)
        if pages:
            self.runner.clear_pages(pages)
        failed = [sequence, *sequence.siblings]
        sequence.siblings = []
        for choice in failed:
            choice.finish_reason = "error"
            self._remove(choice)
        return [
            StepOutput(
                choice.request.id,
                OutputDelta(choice.index, finish_reason="error", error=message),
                choice.cached_tokens,
            )
            for choice in failed
        ]

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        choices = self._requests.get(sequence.request.id, [])
        if all(choice.finish_reason is not None for choice in choices):
            self._forget(sequence.request.id)

    def _forget(self, request_id: str) -> list[Sequence]:
        choices = self._requests.pop(request_id, [])
        adapter = choices[0].request.adapter if choices else None
        if adapter is not None:
            self._adapter_users[adapter] -= 1
            self._drop_unused(adapter)
        return choices

    def _drop_unused(self, adapter: ServedAdapter) -> None:
        if adapter not in self._adapters and not self._adapter_users[adapter]:
            del self._adapter_users[adapter]
            self.runner.remove_adapter(adapter.handle)

    def _context_name(self) -> str:
        if self.max_context < self.cache.capacity:
            return f"the context of {self.max_context}"
        return f"the cache of {self.cache.capacity} tokens"
