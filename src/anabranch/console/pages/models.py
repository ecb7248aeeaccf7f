"""Models: what is served, how large it is, and the adapters that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.frame import button, download_link, frame, heading
from anabranch.console.components.pieces import Notice, dialog, facts
from anabranch.console.console import Console
from anabranch.console.pages.access import page
from anabranch.console.pages.downloads import adapter_address
from anabranch.console.sessions import Visitor
from anabranch.console.text import bytes_text, count_text
from anabranch.errors import AnabranchError
from anabranch.models.protocol import Model

EXPLANATION = "One base, many branches: adapters are loaded and unloaded while the base answers."


def register(console: Console) -> None:
    """``/models``."""

    @page(console, "/models")
    async def models(request: Request, visitor: Visitor) -> None:
        with frame(console, "models", "Models"):
            with heading("Models", EXPLANATION):
                pass
            with ui.element("div").classes("stack"):
                for model in console.service.models.values():
                    ModelCardView(console, model, visitor)


class ModelCardView:
    """A base model with its adapters."""

    def __init__(self, console: Console, model: Model, visitor: Visitor) -> None:
        self._console = console
        self._owner = visitor.owner
        self._model = model
        with ui.element("section").classes("card stack"):
            with ui.element("div").classes("across"):
                with ui.element("h2"):
                    ui.label(model.name).classes("break")
                ui.element("div").classes("grow")
                _chat_button(model.name)
            facts(_facts(model))
            self._notice = Notice()
            self._adapters = ui.element("div").classes("stack").style("gap: 0")
            self._loader = ui.element("div").classes("across")
        self._show()

    def _show(self) -> None:
        self._adapters.clear()
        with self._adapters:
            for variant in self._model.variants():
                self._show_adapter(variant)
        self._loader.clear()
        waiting = self._console.service.loadable_adapters(self._model.name)
        if not waiting:
            return
        with self._loader:
            pick = ui.select(waiting, label="Adapter folder").props("outlined dense options-dense")
            pick.classes("pick").mark("adapter")
            load = button("Load", "plus", "plain").mark("load")
            load.on_click(lambda: self._load(pick.value))

    def _show_adapter(self, variant: Model) -> None:
        service = self._console.service
        with ui.element("div").classes("across adapter"):
            with ui.element("div").classes("grow"):
                ui.label(variant.name).classes("break")
                ui.label(_adapter_text(variant, self._model)).classes("dim small")
            _chat_button(variant.name)
            if service.may_read_adapter(variant, self._owner):
                download_link(variant.name, adapter_address(variant.name))
                if service.options.run_jobs and self._model.source is not None:
                    merge = button("Merge", "", "plain").mark(f"merge {variant.name}")
                    merge.on_click(lambda: self._ask_merge(variant.name))
            unload = button("Unload", "", "danger").mark(f"unload {variant.name}")
            unload.on_click(lambda: self._confirm(variant.name))

    def _ask_merge(self, name: str) -> None:
        """What the new model is called; the job's page shows how far it is."""
        with dialog(f"Merge {name} into a new model?") as asked:
            ui.label(
                "A copy of the base with the adapter in its weights, as large as the base. What is "
                "served stays as it is."
            )
            called = ui.input("Name", value=name.replace(":", "-").replace("/", "-"))
            called.props("outlined dense").mark("merged-name")
            problem = Notice()
            with ui.element("div").classes("across"):
                yes = button("Merge", "", "main").mark("confirm")
                button("Leave it", "", "plain").on_click(asked.close)

        async def merge() -> None:
            service = self._console.service
            try:
                job = await asyncio.to_thread(
                    service.merge_adapter, name, called.value, self._owner
                )
            except AnabranchError as error:
                problem.wrong(error)
                return
            ui.navigate.to(f"/jobs/{job.kind}/{job.id}")

        yes.on_click(merge)

    def _confirm(self, name: str) -> None:
        with dialog(f"Unload {name}?") as asked:
            ui.label("Requests that run on it finish. Its files stay and can be loaded again.")
            with ui.element("div").classes("across"):
                yes = button("Unload", "", "main").mark("confirm")
                button("Keep it", "", "plain").on_click(asked.close)

        async def unload() -> None:
            asked.close()
            await self._try(lambda: self._console.service.unload_adapter(name))

        yes.on_click(unload)

    async def _load(self, adapter: str | None) -> None:
        if adapter is None:
            self._notice.wrong("choose a folder first")
            return
        await self._try(lambda: self._console.service.load_adapter(self._model.name, adapter))

    async def _try(self, act: Callable[[], Awaitable[object]]) -> None:
        self._notice.clear()
        try:
            await act()
        except AnabranchError as error:
            self._notice.wrong(error)
        self._show()


def _chat_button(name: str) -> None:
    button("Chat", "chat", "plain").on_click(lambda: ui.navigate.to(f"/?model={name}"))


def _facts(model: Model) -> dict[str, str]:
    card = model.card
    memory: int | None = getattr(model, "kv_memory", None)
    return {
        "Architecture": card.architecture,
        "Parameters": count_text(card.parameters),
        "Weights": bytes_text(card.size_bytes),
        "Computed in": getattr(model, "dtype", card.dtype),
        "Context": f"{card.context_length:,} tokens",
        **({} if memory is None else {"Key-value cache": bytes_text(memory)}),
        "Licence": card.licence,
        "From": card.provenance,
        "Fingerprint": card.fingerprint[:16],
    }


def _adapter_text(variant: Model, base: Model) -> str:
    own = variant.card
    parts = []
    if own.parameters != base.card.parameters:
        parts.append(f"{count_text(abs(own.parameters - base.card.parameters))} parameters")
    if own.size_bytes != base.card.size_bytes:
        parts.append(bytes_text(abs(own.size_bytes - base.card.size_bytes)))
    parts.append(own.provenance.removeprefix(base.card.provenance).strip("; "))
    return " · ".join(part for part in parts if part)
