"""Engine: what each model does now and did in the last five minutes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.chart import Chart
from anabranch.console.components.frame import frame, heading
from anabranch.console.components.pieces import Tile
from anabranch.console.console import Console
from anabranch.console.engine import HISTORY_SECONDS, LATENCY_WINDOW_SECONDS, Sample, Samples
from anabranch.console.live import Watchers
from anabranch.console.pages.access import page, until_left
from anabranch.console.sessions import Visitor
from anabranch.console.text import NONE, seconds_text, share_text
from anabranch.models.protocol import Model


@dataclass(frozen=True)
class Plotted:
    """A chart of some of a sample's numbers, by the names that they have in the legend."""

    title: str
    series: dict[str, str]
    unit: str = ""
    maximum: float | None = None
    area: bool = True
    target: str = ""
    """The number that is a line across, the last of the series; left out without a target."""
    only_with_target: bool = False

    def values(self, sample: Sample) -> list[float | None]:
        """In the order of the legend."""
        return [getattr(sample, name) for name in self.series.values()]


CHARTS = (
    Plotted("Throughput", {"generated": "generated", "prompt": "prompt"}, "tok/s"),
    Plotted(
        "Time to first token",
        {"p50": "first_token_p50", "p95": "first_token_p95"},
        "s",
        area=False,
    ),
    Plotted(
        "Time between tokens",
        {
            "p50": "between_tokens_p50",
            "p95": "between_tokens_p95",
            "p99": "between_tokens_p99",
            "target": "between_tokens_target",
        },
        "s",
        area=False,
        target="target",
    ),
    Plotted("Key-value cache in use", {"in use": "cache_usage"}, "%", 1.0),
    Plotted("Requests", {"running": "running", "waiting": "waiting"}),
    Plotted("Fine-tuning", {"trained": "trained"}, "tok/s"),
    Plotted("Steps that kept the target", {"kept": "target_kept"}, "%", 1.0, only_with_target=True),
)
"""Those that need a target come last: without one a model has fewer."""

TILES = (
    "tokens a second",
    "running / waiting",
    "first token, p95",
    "between tokens, p95",
    "cache in use",
    "prompt from cache",
    "drafts accepted",
    "share of fine-tuning",
    "latency target kept",
)
OPTIONAL = frozenset(TILES[5:])
EXPLANATION = (
    f"Sampled once a second for all tabs together. Latencies are percentiles over the last "
    f"{LATENCY_WINDOW_SECONDS:g} seconds of requests, as /metrics counts them; the target is that "
    f"of --tpot-slo-ms."
)


# A second's numbers for all charts and tiles come in one message.
_SCRIPT = """<script>
function engineSample(panels, samples) {
  for (const [name, { time, series, tiles }] of Object.entries(samples)) {
    const panel = panels[name];
    panel.charts.forEach((id, i) => getElement(id)?.push([time, ...series[i]]));
    panel.tiles.forEach((id, i) => {
      const value = getHtmlElement(id);
      if (!value || tiles[i] === value.innerText) return;
      value.innerText = tiles[i];
      if (tiles[i] !== "NONE") value.parentElement.classList.remove("hidden");
    });
  }
}
</script>""".replace("NONE", NONE)


def register(console: Console) -> None:
    """``/engine``."""
    tabs: Watchers[str] = Watchers()
    console.sampler.watch(lambda samples: tabs.tell(message(samples)) if len(tabs) else None)

    @page(console, "/engine")
    async def engine(request: Request, visitor: Visitor) -> None:
        ui.add_head_html(_SCRIPT)
        with frame(console, "engine", "Engine"):
            with heading("Engine", EXPLANATION):
                pass
            history = console.sampler.history
            served = console.service.models.values()
            panels = {model.name: Panel(model, list(history[model.name])).ids() for model in served}
        client, places = ui.context.client, json.dumps(panels)

        def show(samples: str) -> None:
            if client.has_socket_connection:
                client.run_javascript(f"engineSample({places}, {samples})")

        until_left(tabs.add(show))


def message(samples: Samples) -> str:
    """What all tabs are sent about a second, as JSON: written once for all of them."""
    return json.dumps(
        {
            name: {
                "time": sample.time,
                "series": [
                    [None if value is None else round(value, 4) for value in plotted.values(sample)]
                    for plotted in CHARTS
                ],
                "tiles": list(_tiles(sample).values()),
            }
            for name, sample in samples.items()
        }
    )


class Panel:
    """One model's numbers and charts."""

    def __init__(self, model: Model, history: list[Sample]) -> None:
        has_target = model.time_between_tokens is not None
        shown = _tiles(history[-1]) if history else dict.fromkeys(TILES, NONE)
        with ui.element("section").classes("stack").style("margin-bottom: 28px"):
            with ui.element("h2"):
                ui.label(model.name).classes("break")
            with ui.element("div").classes("tiles"):
                # What this server never does takes no room.
                self._tiles = [
                    Tile(tile, text, hidden=tile in OPTIONAL and text == NONE)
                    for tile, text in shown.items()
                ]
            with ui.element("div").classes("grid2"):
                self._charts = [
                    _chart(plotted, history, has_target)
                    for plotted in CHARTS
                    if has_target or not plotted.only_with_target
                ]

    def ids(self) -> dict[str, list[int]]:
        """Where the browser finds what a sample changes."""
        return {
            "charts": [chart.id for chart in self._charts],
            "tiles": [tile.value.id for tile in self._tiles],
        }


def _tiles(sample: Sample) -> dict[str, str]:
    """The numbers at the top."""
    values = (
        f"{sample.generated:,.0f}",
        f"{sample.running} / {sample.waiting}",
        seconds_text(sample.first_token_p95),
        seconds_text(sample.between_tokens_p95),
        share_text(sample.cache_usage),
        share_text(sample.cached_share),
        share_text(sample.accepted_share),
        share_text(sample.trained_share),
        share_text(sample.target_kept),
    )
    return dict(zip(TILES, values, strict=True))


def _chart(plotted: Plotted, history: list[Sample], has_target: bool) -> Chart:
    columns = {
        label: [(sample.time, getattr(sample, name)) for sample in history]
        for label, name in plotted.series.items()
        if has_target or label != plotted.target
    }
    with ui.element("div").classes("card"):
        return Chart(
            plotted.title,
            columns,
            unit=plotted.unit,
            axis="time",
            window=HISTORY_SECONDS,
            area=plotted.area,
            maximum=plotted.maximum,
            levels=[plotted.target] if has_target and plotted.target else [],
        )
