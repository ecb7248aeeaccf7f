"""A model that the serving engine runs: the engine on its own thread, behind an asyncio face."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anabranch import models
from anabranch.errors import Draining, QueueFull
from anabranch.models.card import ModelCard
from anabranch.models.constraint import OutputConstraint
from anabranch.models.dtype import fastest_dtype
from anabranch.models.progress import Progress, silent
from anabranch.models.protocol import (
    Embedding,
    Message,
    Model,
    ModelStatistics,
    SamplingParameters,
)
from anabranch.models.source import absolute
from anabranch.models.tools import Tool
from anabranch.serving.adapters import AdapterBank, AdapterCheckpoint, ServedAdapter
from anabranch.serving.adapters.bank import require_adapter_name
from anabranch.serving.constraints import CompiledConstraint, ConstraintCompiler
from anabranch.serving.contrast.pairs import Contrast
from anabranch.serving.coserving import FinetuneJob, JobHandle, Listener
from anabranch.serving.coserving.running import RunningJob
from anabranch.serving.engine import Engine, StepOutput
from anabranch.serving.engine_thread import EngineThread, in_passing_thread
from anabranch.serving.generation import EngineGeneration
from anabranch.serving.options import EngineOptions
from anabranch.serving.prompts import Prompts
from anabranch.serving.runner import ModelRunner
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.runner.memory import return_free_memory
from anabranch.serving.runner.selection import make_draft_runner, make_runner
from anabranch.serving.sequence import Request

if TYPE_CHECKING:
    from anabranch.models import LoadedModel


class EngineModel(Model):
    """Serves a loaded language model. Create it with :meth:`load`."""

    def __init__(self, name: str, card: ModelCard, tokenizer: Any, engine: Engine) -> None:
        self.name = name
        self.card = card
        self.engine = engine
        self.dtype = card.dtype
        self.time_between_tokens = engine.options.time_between_tokens
        self._tokenizer = tokenizer
        self._prompts = Prompts(name, tokenizer, engine.max_context)
        self._thread = EngineThread(engine)
        self._running: dict[str, EngineGeneration] = {}
        self._num_sent = 0  # requests, counted by the event loop
        self._num_taken = 0  # the same requests, counted by the engine's thread
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
        self._thread.start(self._deliver)

    async def close(self) -> None:
        """Abort everything, stop the thread, and end all generations."""
        if not self._thread.running:
            return
        await self._thread.stop()
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
        prepared.handle.wake = self._thread.wake
        self._thread.do(lambda: self.engine.coserving.add(prepared))
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
        prompt = await self._prompts.of_messages(messages, tools, opening)
        contrast = None
        if sampling.contrast is not None:
            contrast = await self._prompts.contrast_of_messages(
                messages, sampling.contrast, tools, opening
            )
        return await self._generate(prompt, sampling, adapter, contrast)

    async def complete(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParameters,
        adapter: str | None = None,
    ) -> EngineGeneration:
        """Continue a text or token ids."""
        tokens, contrast = await self._prompts.of_text(prompt, "prompt"), None
        if sampling.contrast is not None:
            contrast = await self._prompts.contrast_of_text(prompt, sampling.contrast)
        return await self._generate(tokens, sampling, adapter, contrast)

    async def embed(
        self, texts: Sequence[str | Sequence[int]], adapter: str | None = None
    ) -> list[Embedding]:
        """Mean of the last hidden states over each text's tokens, scaled to unit length."""
        prompts = [await self._prompts.of_text(text, "input") for text in texts]
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
            self._thread.do(lambda: self.engine.abort(request_id))

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
            prediction = await self._prompts.of_text(sampling.prediction, "prediction")
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
        if not self._thread.running:
            raise Draining("the model is not running")
        self.engine.check(request)
        waiting = self._num_sent - self._num_taken + self.engine.scheduler.num_waiting
        if waiting >= self.engine.options.max_queue:
            raise QueueFull(
                f"{waiting} requests wait already and the queue holds "
                f"{self.engine.options.max_queue}; try again later"
            )
        generation = EngineGeneration(request, self.abort)
        self._running[request.id] = generation
        self._num_sent += 1
        self._thread.do(lambda: self._add(request))
        return generation

    async def _acquire(self, adapter: str | None) -> ServedAdapter | None:
        return None if adapter is None else await self.adapters.acquire(adapter)

    async def _attach(
        self, name: str, version: int, checkpoint: AdapterCheckpoint
    ) -> ServedAdapter:
        def add() -> ServedAdapter:
            return self.engine.add_adapter(name, checkpoint, version)

        return await self._thread.ask(add) if self._thread.running else add()

    def _detach(self, adapter: ServedAdapter) -> None:
        self._thread.do(lambda: self.engine.remove_adapter(adapter))

    def _publish(self, job: RunningJob, folder: Path) -> None:
        """Load a version that a job has written, and tell the job."""

        async def load() -> None:
            try:
                card = await self.adapters.load(job.job.adapter, folder)
            except Exception as error:
                failure = error
                self._thread.do(lambda: job.fail(failure))
            else:
                self._thread.do(lambda: job.published(card.version))

        task = asyncio.get_running_loop().create_task(load())
        self._publications.add(task)
        task.add_done_callback(self._publications.discard)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            generation = self._running.get(output.request_id)
            if generation is not None and generation.take(output):
                del self._running[output.request_id]

    def _add(self, request: Request) -> None:
        """On the engine's thread."""
        self.engine.add(request)
        self._num_taken += 1


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


def describe(runner: ModelRunner, loaded: LoadedModel) -> str:
    """The number format that a runner computes in, for people."""
    if isinstance(runner, FusedRunner):
        return f"{'bfloat16' if runner.weights == 'bf16' else runner.weights}, fused"
    return str(loaded.network.dtype).removeprefix("torch.")


def _new_id() -> str:
    return uuid.uuid4().hex


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Ids that end an answer: those of the generation configuration and of the tokenizer."""
    configured = loaded.generation.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, loaded.tokenizer.eos_token_id) if i is not None})
