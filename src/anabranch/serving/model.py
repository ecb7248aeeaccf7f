"""A model that the serving engine runs: the engine on its own thread, behind an asyncio face.

The thread alone touches the engine. Requests and aborts reach it through an inbox that it empties
before every step; what a step produced goes back to the event loop in one call, however many
requests it belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from anabranch import models
from anabranch.errors import Draining, InvalidRequest, QueueFull, RequestFailed, RequestTooLong
from anabranch.models.card import ModelCard
from anabranch.models.constraint import OutputConstraint
from anabranch.models.dtype import fastest_dtype
from anabranch.models.progress import Progress, silent
from anabranch.models.protocol import (
    ContrastParameters,
    Embedding,
    Message,
    Model,
    ModelStatistics,
    OutputDelta,
    SamplingParameters,
)
from anabranch.models.source import absolute
from anabranch.models.tools import Tool, render
from anabranch.serving.adapters import AdapterBank, AdapterCheckpoint, ServedAdapter
from anabranch.serving.adapters.bank import require_adapter_name
from anabranch.serving.constraints import CompiledConstraint, ConstraintCompiler
from anabranch.serving.contrast import UncertaintyContrast, lame_prompt
from anabranch.serving.contrast.pairs import Contrast
from anabranch.serving.coserving import FinetuneJob, JobHandle, Listener
from anabranch.serving.coserving.running import RunningJob
from anabranch.serving.engine import Engine, StepOutput
from anabranch.serving.options import EngineOptions
from anabranch.serving.runner import ModelRunner
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.runner.memory import return_free_memory
from anabranch.serving.runner.selection import make_draft_runner, make_runner
from anabranch.serving.sequence import Request

if TYPE_CHECKING:
    from anabranch.models import LoadedModel

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class EngineModel(Model):
    """Serves a loaded language model. Create it with :meth:`load`."""

    def __init__(self, name: str, card: ModelCard, tokenizer: Any, engine: Engine) -> None:
        self.name = name
        self.card = card
        self.engine = engine
        self.dtype = card.dtype
        self.time_between_tokens = engine.options.time_between_tokens
        self._tokenizer = tokenizer
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[str, EngineGeneration] = {}
        self._num_sent = 0  # requests, counted by the event loop
        self._num_taken = 0  # the same requests, counted by the engine's thread
        self._thread: threading.Thread | None = None
        self._publications: set[asyncio.Task[None]] = set()  # the loop itself holds no reference
        self.adapters = AdapterBank(self._attach, self._detach)
        self._compiler: ConstraintCompiler | None = None  # made when the first constraint comes
        self._compiler_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        name: str = models.DEFAULT,
        *,
        served_name: str | None = None,
        options: EngineOptions | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> EngineModel:
        """Load a base model by any name that :func:`anabranch.models.load` knows.

        ``dtype`` None is the type that this machine computes fastest, ``device`` None the GPU if
        there is one.
        """
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

        def load() -> EngineModel:
            loaded = models.load(
                name,
                dtype=fastest_dtype(models.card(name), target) if dtype is None else dtype,
                device=target,
                progress=progress,
            )
            return cls.from_loaded(
                loaded, options=options, served_name=served_name, progress=progress or silent
            )

        model = in_passing_thread(load)
        model.source = absolute(name)
        return_free_memory()  # the runner has what it needs of the loaded weights
        return model

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedModel,
        *,
        options: EngineOptions | None = None,
        served_name: str | None = None,
        progress: Progress = silent,
    ) -> EngineModel:
        """Take over a model that is already in memory."""
        options = options or EngineOptions()
        runner = make_runner(loaded, options, progress)
        draft_runner = None
        if options.draft_model is not None:
            draft_runner = make_draft_runner(options.draft_model, loaded, options, progress)
        engine = Engine(
            runner,
            draft_runner=draft_runner,
            tokenizer=loaded.tokenizer,
            end_tokens=end_tokens(loaded),
            options=options,
            device=loaded.network.device,
        )
        model = cls(served_name or loaded.name, loaded.card, loaded.tokenizer, engine)
        model.dtype = describe(runner, loaded)
        return model

    @property
    def kv_memory(self) -> int:
        """Bytes of the key/value cache."""
        return self.engine.kv_memory

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    @property
    def end_tokens(self) -> Sequence[int]:
        """Ids at which an answer ends."""
        return self.engine.end_tokens

    @property
    def max_finetune_tokens(self) -> int:
        """Tokens that a row may have to be trained on."""
        return min(self.engine.max_context, self.engine.options.finetune_tokens)

    async def start(self) -> None:
        """Start the engine's thread."""
        loop = asyncio.get_running_loop()

        def publish(job: RunningJob, folder: Path) -> None:
            loop.call_soon_threadsafe(self._publish, job, folder)

        self.engine.coserving.publish = publish
        self._thread = threading.Thread(
            target=self._work, args=(loop,), name="anabranch-engine", daemon=True
        )
        self._thread.start()

    async def close(self) -> None:
        """Abort everything, stop the thread, and end all generations."""
        if self._thread is None:
            return
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        self.engine.speculation.close()
        for generation in self._running.values():
            generation.end()
        self._running.clear()

    def statistics(self) -> ModelStatistics:
        """Load and totals of the engine."""
        return self.engine.statistics()

    def variants(self) -> list[Model]:
        """This model with each of its adapters."""
        return [self.variant(card.name) for card in self.adapters.cards()]

    def variant(self, adapter: str) -> AdaptedModel:
        """This model with one of its adapters; :class:`ModelNotFound` if it has none so named."""
        return AdaptedModel(self, adapter)

    async def add_adapter(self, name: str, folder: Path) -> AdaptedModel:
        """Load an adapter, or a new version of one."""
        await self.adapters.load(name, folder)
        return self.variant(name)

    def load_adapter(self, name: str, folder: Path) -> None:
        """The same as :meth:`add_adapter` before the model is started."""
        in_passing_thread(lambda: asyncio.run(self.adapters.load(name, folder)))

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run on it finish."""
        self.adapters.unregister(name)

    def submit_finetune(self, job: FinetuneJob, listener: Listener | None = None) -> JobHandle:
        """Train an adapter while requests are served; its versions answer as ``model:adapter``.

        Any thread but the event loop's, which it would hold up for about a second, may call it
        once the model is started. Submitting a job whose output has checkpoints goes on after the
        last one. Raises an :class:`AnabranchError` if the job can never run.
        """
        require_adapter_name(job.adapter)
        prepared = in_passing_thread(lambda: self.engine.coserving.prepare(job, listener))
        prepared.handle.wake = lambda: self._inbox.put(lambda: None)
        self._inbox.put(lambda: self.engine.coserving.add(prepared))
        return prepared.handle

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        adapter: str | None = None,
        *,
        tools: Sequence[Tool] = (),
        opening: str = "",
    ) -> EngineGeneration:
        """Apply the model's chat template and generate."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise InvalidRequest(
                "messages",
                f"{self.name!r} has no chat template; use /v1/completions with a plain prompt",
            )
        self._refuse_hopeless(sum(len(str(m.get("content"))) for m in messages), "messages")
        prompt = await asyncio.to_thread(self._render, messages, tools, opening)
        contrast = None
        if sampling.contrast is not None:
            lame = await asyncio.to_thread(_without_examples, messages, sampling.contrast)
            tokens = await asyncio.to_thread(self._render, lame, tools, opening)
            contrast = _contrast(tokens, sampling.contrast)
        return await self._generate(prompt, sampling, adapter, contrast)

    async def complete(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParameters,
        adapter: str | None = None,
    ) -> EngineGeneration:
        """Continue a text or token ids."""
        tokens, contrast = await self._tokenize(prompt, "prompt"), None
        if sampling.contrast is not None:
            if not isinstance(prompt, str):
                raise InvalidRequest("contrast", "needs the prompt as text, not as token ids")
            text = await asyncio.to_thread(_lame_text, prompt, sampling.contrast)
            lame = await self._tokenize(text, "contrast.prompt")
            contrast = _contrast(lame, sampling.contrast)
        return await self._generate(tokens, sampling, adapter, contrast)

    async def embed(
        self, texts: Sequence[str | Sequence[int]], adapter: str | None = None
    ) -> list[Embedding]:
        """Mean of the last hidden states over each text's tokens, scaled to unit length."""
        prompts = [await self._tokenize(text, "input") for text in texts]
        pending: list[EngineGeneration] = []
        try:
            for prompt in prompts:
                served = await self._acquire(adapter)
                request = Request(_new_id(), prompt, pooling=True, adapter=served)
                pending.append(self._submit(request))
            return [Embedding(await each.vector(), each.prompt_tokens) for each in pending]
        finally:
            for generation in pending:
                await generation.aclose()

    def abort(self, request_id: str) -> None:
        """Stop a request; its pages are free before the next step is planned."""
        if self._running.pop(request_id, None) is not None:
            self._inbox.put(lambda: self.engine.abort(request_id))

    async def _generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParameters,
        adapter: str | None,
        contrast: Contrast | None = None,
    ) -> EngineGeneration:
        compiled: CompiledConstraint | None = None
        prediction: Sequence[int] = ()
        if sampling.constraint is not None:
            compiled = await asyncio.to_thread(self._compile, sampling.constraint)
        if sampling.prediction:
            prediction = await self._tokenize(sampling.prediction, "prediction")
        served = await self._acquire(adapter)
        return self._submit(
            Request(
                _new_id(),
                prompt,
                sampling,
                adapter=served,
                constraint=compiled,
                contrast=contrast,
                prediction=prediction,
            )
        )

    def _compile(self, constraint: OutputConstraint) -> CompiledConstraint:
        with self._compiler_lock:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(
                    self._tokenizer,
                    self.engine.runner.vocabulary,
                    self.engine.end_tokens,
                    self.engine.options.constraint_backend,
                )
        return self._compiler.compile(constraint)

    def _submit(self, request: Request) -> EngineGeneration:
        if self._thread is None:
            raise Draining("the model is not running")
        self.engine.check(request)
        waiting = self._num_sent - self._num_taken + self.engine.scheduler.num_waiting
        if waiting >= self.engine.options.max_queue:
            raise QueueFull(
                f"{waiting} requests wait already and the queue holds "
                f"{self.engine.options.max_queue}; try again later"
            )
        generation = EngineGeneration(self, request)
        self._running[request.id] = generation
        self._num_sent += 1
        self._inbox.put(lambda: self._add(request))
        return generation

    async def _acquire(self, adapter: str | None) -> ServedAdapter | None:
        return None if adapter is None else await self.adapters.acquire(adapter)

    async def _attach(
        self, name: str, version: int, checkpoint: AdapterCheckpoint
    ) -> ServedAdapter:
        if self._thread is None:
            return self.engine.add_adapter(name, checkpoint, version)
        outcome: Future[ServedAdapter] = Future()

        def add() -> None:
            try:
                outcome.set_result(self.engine.add_adapter(name, checkpoint, version))
            except BaseException as error:
                outcome.set_exception(error)

        self._inbox.put(add)
        return await asyncio.wrap_future(outcome)

    def _detach(self, adapter: ServedAdapter) -> None:
        self._inbox.put(lambda: self.engine.remove_adapter(adapter))

    def _publish(self, job: RunningJob, folder: Path) -> None:
        """Load a version that a job has written, and tell the job."""

        async def load() -> None:
            try:
                card = await self.adapters.load(job.job.adapter, folder)
            except Exception as error:
                failure = error
                self._inbox.put(lambda: job.fail(failure))
            else:
                self._inbox.put(lambda: job.published(card.version))

        task = asyncio.get_running_loop().create_task(load())
        self._publications.add(task)
        task.add_done_callback(self._publications.discard)

    async def _tokenize(self, text: str | Sequence[int], field: str) -> Sequence[int]:
        if not isinstance(text, str):
            return list(text)
        self._refuse_hopeless(len(text), field)
        return await asyncio.to_thread(lambda: self._tokenizer(text)["input_ids"])

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), opening: str = ""
    ) -> list[int]:
        try:
            rendered = render(self._tokenizer, messages, tools) + opening
        except Exception as error:  # templates raise whatever their author chose
            raise InvalidRequest("messages", f"the chat template refuses them: {error}") from error
        self._refuse_hopeless(len(rendered), "messages")
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _refuse_hopeless(self, characters: int, field: str) -> None:
        """Refuse text that cannot fit without spending seconds on tokenizing it."""
        fewest = characters // self._longest_token
        if fewest > self.engine.max_context:
            raise RequestTooLong(
                field,
                f"{characters} characters are at least {fewest} tokens, but at most "
                f"{self.engine.max_context} fit in the context",
            )

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            generation = self._running.get(output.request_id)
            if generation is not None and generation.take(output):
                del self._running[output.request_id]

    # The methods below run on the engine's thread.

    def _add(self, request: Request) -> None:
        self.engine.add(request)
        self._num_taken += 1

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._take_commands():
            try:
                outputs = self.engine.step()
            except Exception:  # a defect of ours must not take the server down
                logger.exception("a step failed; its requests are given up")
                outputs = self.engine.abort_all()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._deliver, outputs)

    def _take_commands(self) -> bool:
        """Carry out what arrived; sleep while there is nothing to compute. False to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()


class AdaptedModel(Model):
    """An engine's model with an adapter on top, under the name ``model:adapter``."""

    def __init__(self, base: EngineModel, adapter: str) -> None:
        facts = base.adapters.card(adapter)
        self.name = f"{base.name}:{adapter}"
        self.base = base
        self.card = replace(
            base.card,
            name=self.name,
            parameters=base.card.parameters + facts.parameters,
            provenance=f"{base.card.provenance}; {facts.method} adapter, version {facts.version}",
            fingerprint=hashlib.sha256(
                f"{base.card.fingerprint}/{facts.fingerprint}".encode()
            ).hexdigest(),
        )
        self.adapter_folder = base.adapters.folder(adapter)
        self._adapter = adapter

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        *,
        tools: Sequence[Tool] = (),
        opening: str = "",
    ) -> EngineGeneration:
        """Answer with the adapter's newest version."""
        return await self.base.chat(messages, sampling, self._adapter, tools=tools, opening=opening)

    async def complete(
        self, prompt: str | Sequence[int], sampling: SamplingParameters
    ) -> EngineGeneration:
        """Continue with the adapter's newest version."""
        return await self.base.complete(prompt, sampling, self._adapter)

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        """Vectors of the adapted model."""
        return await self.base.embed(texts, self._adapter)


class EngineGeneration:
    """One request's deltas as they are produced; see :class:`anabranch.models.Generation`."""

    def __init__(self, model: EngineModel, request: Request) -> None:
        self.id = request.id
        self.prompt_tokens = len(request.prompt)
        self.cached_tokens = 0
        self._model = model
        self._unfinished = set(range(request.sampling.n))
        self._unread = request.sampling.n  # choices whose end was not yet handed out
        self._deltas: asyncio.Queue[OutputDelta] = asyncio.Queue()
        self._embedding: torch.Tensor | None = None

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while self._unread:
            delta = await self._deltas.get()
            if delta.finish_reason is not None:
                self._unread -= 1
            yield delta

    async def vector(self) -> list[float]:
        """The pooled vector of a pooling request, of unit length."""
        async for delta in self:
            if delta.finish_reason != "stop":
                raise RequestFailed(delta.error or f"the request ended with {delta.finish_reason}")
        assert self._embedding is not None
        return torch.nn.functional.normalize(self._embedding, dim=0).tolist()

    async def aclose(self) -> None:
        """Abort, unless it has finished."""
        self._model.abort(self.id)

    def take(self, output: StepOutput) -> bool:
        """Accept an output from the engine; returns whether it was the last one."""
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.embedding is not None:
            self._embedding = output.embedding
        if output.delta.finish_reason is not None:
            self._unfinished.discard(output.delta.index)
        self._deltas.put_nowait(output.delta)
        return not self._unfinished

    def end(self) -> None:
        """Finish every choice that is still open, because the model stops serving."""
        for index in sorted(self._unfinished):
            self._deltas.put_nowait(OutputDelta(index, finish_reason="abort"))
        self._unfinished.clear()


def in_passing_thread(work: Callable[[], Result]) -> Result:
    """Do work in a thread of its own that is gone afterwards.

    OpenMP keeps worker threads for every thread that ever computed. Once they are more than the
    cores, idle ones sleep at once instead of waiting a moment for more, which made the engine's
    thread 1.6 times slower when another thread had loaded the model.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # A daemon, so that an interrupt need not wait for a long conversion.
    thread = threading.Thread(target=run, name="anabranch-load", daemon=True)
    thread.start()
    result = outcome.result()
    thread.join()
    return result


def describe(runner: ModelRunner, loaded: LoadedModel) -> str:
    """The number format that a runner computes in, for people."""
    if isinstance(runner, FusedRunner):
        return f"{'bfloat16' if runner.weights == 'bf16' else runner.weights}, fused"
    return str(loaded.network.dtype).removeprefix("torch.")


def _lame_text(text: str, contrast: ContrastParameters) -> str:
    """The prompt without its examples, or what the client gave for it."""
    if contrast.prompt is not None:
        return contrast.prompt
    found = lame_prompt(text)
    if found is None:
        raise InvalidRequest(
            "contrast.prompt",
            "no examples were found to leave out of the prompt; give the text without them, or "
            "leave out contrast",
        )
    return found


def _without_examples(
    messages: Sequence[Message], contrast: ContrastParameters
) -> Sequence[Message]:
    """The conversation with a lame last user message."""
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=None)
    if last is None:
        raise InvalidRequest("contrast", "needs a user message")
    text = _lame_text(str(messages[last].get("content")), contrast)
    return [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]


def _contrast(prompt: Sequence[int], contrast: ContrastParameters) -> Contrast:
    names = ("threshold", "weight", "filter_ratio")
    given = {name: getattr(contrast, name) for name in names}
    settings = UncertaintyContrast(**{k: v for k, v in given.items() if v is not None})
    return Contrast(tuple(prompt), settings)


def _new_id() -> str:
    return uuid.uuid4().hex


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Ids that end an answer: those of the generation configuration and of the tokenizer."""
    configured = loaded.generation.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, loaded.tokenizer.eos_token_id) if i is not None})
