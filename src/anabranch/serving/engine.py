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
from anabranch.errors import ConfigurationError, InvalidRequest, RequestFailed, RequestTooLong
from anabranch.models.protocol import ModelStatistics, OutputDelta
from anabranch.planning import CostModel
from anabranch.serving.adapters import AdapterCheckpoint, ServedAdapter
from anabranch.serving.batch import StepPlan, StepResult
from anabranch.serving.contrast.pairs import Contrast, Pairs, companion_of, follow
from anabranch.serving.coserving import FinetuneJob, JobHandle, Listener
from anabranch.serving.coserving.coserving import CoServing
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.running import RunningJob
from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.options import EngineOptions
from anabranch.serving.output import OutputBuilder, merged
from anabranch.serving.runner import ModelRunner
from anabranch.serving.scheduler import TokenBudgetScheduler
from anabranch.serving.sequence import Request, Segment, Sequence
from anabranch.serving.speculation import DraftingContext, Proposal
from anabranch.serving.speculation.speculation import Speculation
from anabranch.serving.speculation.verification import Candidate, Verdict

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
        draft_runner: ModelRunner | None = None,
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
        context = DraftingContext(options, runner, self.cache, draft_runner, clock)
        self.speculation = Speculation.of(context, self.cost_model, self.max_context, end_tokens)
        self._published: dict[str, ServedAdapter] = {}
        self.pairs = Pairs()
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
        if (sampling.constraint is None) != (request.constraint is None):
            raise InvalidRequest("constraint", "must be compiled for the request, or be absent")
        if request.constraint is not None and sampling.ignore_eos:
            raise InvalidRequest("ignore_eos", "an answer with a constraint ends where it says")
        if request.contrast is not None:
            self._check_contrast(request, request.contrast)
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

    def _check_contrast(self, request: Request, contrast: Contrast) -> None:
        length, sampling = len(contrast.prompt), request.sampling
        if not length or tuple(request.prompt) == contrast.prompt:
            raise InvalidRequest("contrast.prompt", "must be another prompt, of a token or more")
        if sampling.n > 1 or request.pooling:
            raise InvalidRequest("n", "must be 1 with contrast")
        if self.options.max_sequences < 2:
            raise InvalidRequest("contrast", "needs an engine with max_sequences of 2 or more")
        limit = self.max_context - length - 1
        if limit < 1 or (sampling.max_tokens or 0) > limit:
            raise RequestTooLong(
                "contrast.prompt",
                f"has {length} tokens, which leaves {max(limit, 0)} for the answer in "
                f"{self._context_name()}",
            )
        new = sampling.max_tokens or min(limit, self.max_context - len(request.prompt))
        size = self.cache.page_size
        pages = sum(-(-(len(prompt) + new) // size) for prompt in (request.prompt, contrast.prompt))
        if pages > self.cache.num_pages:
            raise RequestTooLong(
                "contrast",
                f"both prompts with {new} new tokens need {pages} pages of the cache, "
                f"which has {self.cache.num_pages}; lower max_tokens",
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises :class:`InvalidRequest` before anything is changed."""
        self.check(request)
        if request.id in self._requests:
            raise InvalidRequest("id", f"{request.id!r} is already running")
        longest = max(len(request.prompt), len(request.contrast.prompt) if request.contrast else 0)
        limit = request.sampling.max_tokens or self.max_context - longest
        choices = [
            Sequence(
                request,
                index,
                list(request.prompt),
                max_tokens=limit,
                detokenizer=self._output.detokenizer(request),
                constraint=request.constraint.start() if request.constraint else None,
            )
            for index in range(request.sampling.n)
        ]
        choices[0].siblings = choices[1:]
        self._requests[request.id] = choices
        if request.adapter is not None:
            self._adapter_users[request.adapter] += 1
        self._prompt_tokens += len(request.prompt)
        self.scheduler.add(choices[0])
        if request.contrast is not None:
            self.scheduler.add(companion_of(choices[0]))

    def abort(self, request_id: str) -> None:
        """Stop a request and free its pages now. Harmless if it is not running."""
        choices = self._forget(request_id)
        for sequence in choices:
            sequence.finish_reason = sequence.finish_reason or "abort"
            self._dismiss(sequence)

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
        # 1. Decide which tokens to compute: those of requests with what may follow them, and to
        # train what time allows.
        began = self._clock()
        budget = self._budget()
        self._propose(budget)
        requested = self.scheduler.schedule(budget)
        plan = self.coserving.extend(requested, self.options.page_size)
        if plan is None:
            self.coserving.work(0)
            return []

        # 2. Compute them. Sequences that fail are taken out; the others go on.
        self.speculation.begin(plan.segments)
        plan, result, outputs = self._execute(plan)
        grown = self.speculation.finish()
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

        # 4. Choose the next tokens of every sequence that is computed to its end.
        candidates = self._candidates(plan, grown, result.logits)
        logits = self._paired(candidates, result.logits)
        verdicts = self.speculation.verify(logits, candidates)
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            if verdict is None:
                failure = candidate.sequence.failure or NOT_FINITE
                outputs += self._fail(candidate.sequence, failure)
            else:
                outputs.append(self._append(candidate, verdict))

        # 5. Collect the vectors of pooling requests.
        for index, hidden in result.pooled.items():
            outputs += self._pool(plan.segments[index], hidden)

        # 6. Release what has finished, before the next step is planned.
        ready = [candidate.sequence for candidate in candidates]
        for sequence in [*ready, *(segment.sequence for segment in plan.segments)]:
            if sequence.finish_reason is not None:
                self._remove(sequence)

        # 7. Train in the rest of the step.
        self.speculation.record(self._clock() - began)
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
            drafted_tokens=self.speculation.statistics.drafted,
            accepted_tokens=self.speculation.statistics.accepted,
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

    def _propose(self, budget: int) -> None:
        """Draft what may follow the sequences that decode."""
        decoding = self.scheduler.decoding()
        if decoding:
            prompts = self.scheduler.prompt_tokens(max(0, budget - len(decoding)))
            free = self.cache.num_available * self.options.page_size
            self.speculation.propose(decoding, prompts, free)

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
                segment = plan.segments[0]
                sequence = segment.sequence
                if segment.draft is not None:
                    logger.exception("a draft could not be verified; going on without")
                    return self._execute(replace(plan, segments=(replace(segment, draft=None),)))
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
            alone, result, failures = self._execute(replace(plan, segments=(segment,)))
            outputs += failures
            if result is not None:
                survivors += alone.segments
                results.append(result)
        if not survivors:
            return plan, None, outputs
        merged = StepResult(
            logits=torch.cat([result.logits for result in results]),
            pooled={i: r.pooled[0] for i, r in enumerate(results) if r.pooled},
        )
        return replace(plan, segments=tuple(survivors)), merged, outputs

    def _candidates(
        self, plan: StepPlan, grown: dict[Sequence, Proposal], logits: torch.Tensor
    ) -> list[Candidate]:
        """Sequences and the rows of logits that they choose from, with drafts that have grown.

        Of these, one node more is verified than was computed: the last row decides on it. Choices
        of one request start here: they share the row after the prompt's last token.
        """
        candidates: list[Candidate] = []
        row = 0
        for segment in plan.segments:
            if segment.num_logits:
                parent = segment.sequence
                if parent.partner is not None:
                    self.pairs.hold(parent, logits[row])
                    row += segment.num_logits
                    continue
                draft = segment.draft
                if parent in grown:
                    draft = grown[parent].first(segment.num_logits)
                candidates.append(Candidate(parent, row, draft, segment.num_logits))
                candidates += (Candidate(choice, row) for choice in self.scheduler.fork(parent))
                row += segment.num_logits
        return candidates

    def _paired(self, candidates: list[Candidate], logits: torch.Tensor) -> torch.Tensor:
        """Add leaders whose rows, and if necessary their companions', have come."""
        ready = self.pairs.resolve()
        if not ready:
            return logits
        for row, (leader, _, instead) in enumerate(ready, start=len(logits)):
            candidates.append(Candidate(leader, row, instead=instead))
        return torch.cat([logits, torch.stack([row for _, row, _ in ready])])

    def _append(self, candidate: Candidate, verdict: Verdict) -> StepOutput:
        """Add what was chosen to a sequence, as far as it does not end before."""
        sequence, draft = candidate.sequence, candidate.draft
        if sequence.num_generated == 0 and sequence.index == 0:
            self._cached_tokens += sequence.cached_tokens
        before = len(sequence.tokens)
        deltas: list[OutputDelta] = []
        for sampled in verdict.tokens:
            sequence.append(sampled.token)
            deltas.append(self._output.token(sequence, sampled))
            if sequence.finish_reason is not None:
                break
            if sequence.constraint is not None:
                try:
                    sequence.constraint.accept(sampled.token)
                except RequestFailed as error:
                    sequence.failure = str(error)
                    break
        self._generated_tokens += len(deltas)
        contrast = sequence.request.contrast
        if contrast is not None and not contrast.lazy:
            follow(sequence)
        if draft is not None:
            self._keep(candidate, draft, verdict, before)
        return StepOutput(sequence.request.id, merged(deltas), sequence.cached_tokens)

    def _keep(self, candidate: Candidate, draft: Proposal, verdict: Verdict, before: int) -> None:
        """Keep the keys and values of accepted drafts, where the tokens are now."""
        sequence = candidate.sequence
        computed = [node for node in verdict.nodes if node < candidate.num_rows - 1]
        nodes = computed[: len(sequence.tokens) - before]
        moved = [(node, place) for place, node in enumerate(nodes) if node != place]
        if moved:
            slots = [
                [self.cache.slot(sequence, before + place) for place in places]
                for places in zip(*moved, strict=True)
            ]
            self.runner.move_slots(*slots)
        self.scheduler.computed(Segment(sequence, before, before), len(nodes))
        self.cache.truncate(sequence)
        self.speculation.observe(sequence, draft, verdict)

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
        if sequence.follows and sequence.partner is not None:
            sequence = sequence.partner
        pages = self.scheduler.discard(sequence)
        if sequence.partner is not None:
            pages += self.scheduler.discard(sequence.partner)
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

    def _dismiss(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.partner is not None:
            self.scheduler.remove(sequence.partner)
            self.pairs.forget(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self._dismiss(sequence)
        choices = self._requests.get(sequence.request.id, [])
        if all(choice.finish_reason is not None for choice in choices):
            self._forget(sequence.request.id)

    def _forget(self, request_id: str) -> list[Sequence]:
        choices = self._requests.pop(request_id, [])
        for choice in choices:
            self.speculation.forget(choice)
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
