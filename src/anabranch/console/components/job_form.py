"""The form for a new job: fields or YAML, checked while it is filled in."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nicegui import events, ui

from anabranch.api.routes.files import plain_name
from anabranch.console.components.file_picker import FilePicker
from anabranch.console.components.frame import button
from anabranch.console.components.pieces import Notice
from anabranch.console.jobs import (
    ConsoleKind,
    Field,
    TakesFiles,
    UploadedFile,
    nested,
    read_yaml,
    write_yaml,
)
from anabranch.console.text import bytes_text
from anabranch.errors import AnabranchError, InvalidRequest

CHECK_AFTER_MS = 400
CORRECT = "This can be started."


class JobForm:
    """Asks what a kind of job needs, says beside each field what is wrong, and starts the job.

    ``created`` is called with the new job's id.
    """

    def __init__(
        self,
        kind: ConsoleKind,
        owner: str | None,
        fields: Sequence[Field],
        created: Callable[[str], None],
    ) -> None:
        self._kind = kind
        self._owner = owner
        self._fields = {field.key: field for field in fields}
        self._inputs: dict[str, Any] = {}
        self._touched: set[str] = set()
        self._problems: Mapping[str, str] = {}
        self._checks = 0
        self._from_form = ""
        self._created = created
        with ui.element("div").classes("stack"):
            if kind.explanation:
                ui.label(kind.explanation).classes("dim")
            if isinstance(kind, TakesFiles):
                self._make_upload(kind)
            with ui.tabs().props("no-caps align=left") as self._tabs:
                ui.tab("form", "Form").mark("form-tab")
                ui.tab("yaml", "YAML").mark("yaml-tab")
            with ui.tab_panels(self._tabs, value="form", animated=False).style("width: 100%"):
                with ui.tab_panel("form"), ui.element("div").classes("grid3"):
                    for field in fields:
                        self._inputs[field.key] = self._make_input(field)
                with ui.tab_panel("yaml"):
                    self._make_yaml()
            self._tabs.on_value_change(self._switched)
            self._notice = Notice()
            with ui.element("div").classes("across"):
                self._start = button("Start", "", "main").mark("start")
                self._start.on_click(self._create)

    def _make_upload(self, kind: TakesFiles) -> None:
        async def uploaded(event: events.UploadEventArguments) -> None:
            await self._uploaded(kind, event)

        FilePicker("Upload a file", "JSON lines; or drop it here.", uploaded).mark("upload")
        self._upload_notice = Notice()

    def _make_input(self, field: Field) -> Any:
        label = f"{field.label} *" if field.required else field.label
        made: Any

        def check(value: Any) -> str | None:
            return self._problem(field.key)

        if field.kind in ("choice", "file"):
            only = list(field.choices)[:1] if field.required and len(field.choices) == 1 else [None]
            made = ui.select(dict(field.choices), value=only[0], label=label, validation=check)
            made.props("options-dense" + ("" if field.required else " clearable"))
            if len(field.choices) > 8:
                made.props("use-input input-debounce=0")
        elif field.kind == "number":
            made = ui.number(label, validation=check).props(f"debounce={CHECK_AFTER_MS}")
        elif field.kind in ("long", "lines"):
            made = ui.textarea(label, validation=check)
            made.props(f"autogrow debounce={CHECK_AFTER_MS} spellcheck=false")
            made.classes("code").style("grid-column: 1 / -1")
        else:
            made = ui.input(label, validation=check).props(f"debounce={CHECK_AFTER_MS}")
        made.props("outlined dense").mark(field.key)
        if field.hint:
            made._props["hint"] = field.hint
        made.on_value_change(lambda: self._check_form(field.key))
        return made

    def _make_yaml(self) -> None:
        self._yaml = ui.textarea("The request").props(
            f"outlined autogrow debounce={CHECK_AFTER_MS} spellcheck=false"
        )
        self._yaml.classes("code").style("width: 100%").mark("yaml")
        self._yaml.on_value_change(self._check_yaml)

    def _form_request(self) -> dict[str, Any]:
        values = {key: _plain(self._fields[key], each.value) for key, each in self._inputs.items()}
        return nested(values)

    async def _check_form(self, key: str) -> None:
        """Errors beside the fields that were filled in; what is empty may still be."""
        self._touched.add(key)
        self._notice.clear()
        await self._mark()

    async def _mark(self) -> None:
        """Show at each field what is wrong with it, unless that has changed meanwhile."""
        self._checks += 1
        check, request = self._checks, self._form_request()
        problems = await asyncio.to_thread(self._kind.problems, request)
        if check == self._checks:
            self._show_problems(problems)

    def _show_problems(self, problems: Mapping[str, str]) -> None:
        self._problems = problems
        for each in self._inputs.values():
            each.validate()

    def _problem(self, key: str) -> str | None:
        """What is wrong with a field, if it was filled in."""
        return self._problems.get(key) if key in self._touched else None

    async def _check_yaml(self) -> None:
        self._checks += 1
        check = self._checks
        wrong: AnabranchError | None = None
        try:
            request = read_yaml(self._yaml.value or "")
            await asyncio.to_thread(self._kind.check, request)
        except AnabranchError as error:
            wrong = error
        if check != self._checks:
            return
        if wrong is not None:
            self._notice.wrong(wrong)
        else:
            self._notice.right(CORRECT)

    async def _switched(self) -> None:
        """The YAML begins as what the form says, or as an example."""
        self._notice.clear()
        if self._tabs.value != "yaml":
            return
        if self._yaml.value in ("", None, self._from_form):  # what was written by hand stays
            request = self._form_request()
            self._from_form = write_yaml(request) if request else self._kind.example
            self._yaml.value = self._from_form
        await self._check_yaml()

    async def _create(self) -> None:
        self._checks += 1  # what a check finds from now on is said already
        self._notice.clear()
        try:
            if self._tabs.value == "yaml":
                request = read_yaml(self._yaml.value or "")
            else:
                self._touched = set(self._inputs)
                await self._mark()
                request = self._form_request()
            self._start.disable()
            job_id = await asyncio.to_thread(self._kind.create, request, self._owner)
        except InvalidRequest as error:
            self._refused(error)
        except AnabranchError as error:
            self._notice.wrong(error)
        else:
            self._created(job_id)
        finally:
            self._start.enable()

    def _refused(self, error: InvalidRequest) -> None:
        if self._tabs.value == "yaml" or error.field not in self._inputs:
            self._notice.wrong(error)
            return
        self._show_problems({error.field: str(error).removeprefix(f"{error.field}: ")})
        self._notice.wrong(f"{self._fields[error.field].label}: see above")

    async def _uploaded(self, kind: TakesFiles, event: events.UploadEventArguments) -> None:
        self._upload_notice.clear()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "upload"
            await event.file.save(path)
            try:
                file = await asyncio.to_thread(self._keep, kind, path, plain_name(event.file.name))
            except AnabranchError as error:
                self._upload_notice.wrong(f"{event.file.name} was not kept. {error}")
                return
        await self._offer(file)
        self._upload_notice.right(f"{file.name} is here: {bytes_text(file.size)}.")

    def _keep(self, kind: TakesFiles, path: Path, name: str) -> UploadedFile:
        with path.open("rb") as content:
            return kind.upload(content, name, self._owner)

    async def _offer(self, file: UploadedFile) -> None:
        """The new file is among the choices, and the one to train on."""
        fields = await asyncio.to_thread(self._kind.fields, self._owner)
        for field in fields:
            if field.kind == "file":
                chosen = self._inputs[field.key]
                value = file.id if field.required else chosen.value
                chosen.set_options(dict(field.choices), value=value)


def _plain(field: Field, value: Any) -> Any:
    """Numbers of a field without a fraction are whole; an entry of a list is a line with text."""
    if field.kind == "lines":
        return [line.strip() for line in (value or "").splitlines() if line.strip()] or None
    return int(value) if isinstance(value, float) and value.is_integer() else value
