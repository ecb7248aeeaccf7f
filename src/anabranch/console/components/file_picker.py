"""Choosing a file, or dropping it, for the server to keep."""

from __future__ import annotations

from nicegui import ui
from nicegui.events import Handler, UploadEventArguments


class FilePicker(ui.upload, component="file_picker.js"):
    """NiceGUI's upload behind a plain file field, which every screen reader knows."""

    def __init__(self, label: str, hint: str, on_upload: Handler[UploadEventArguments]) -> None:
        super().__init__(label=label, on_upload=on_upload)
        self._props["hint"] = hint
