"""``anabranch up``: load a model and serve it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.panel import Panel
from rich.text import Text

from anabranch.cli.output import bytes_text, count_text, errors, out, parse_bytes, progress
from anabranch.models.packaged import DEFAULT

if TYPE_CHECKING:
    from fastapi import FastAPI

    from anabranch.models.protocol import Model
    from anabranch.serving.options import CacheFormat, WeightFormat

OPEN_WARNING = "warning: whoever reaches this address can use it; see --api-key-file"
LOG_LEVELS = ("debug", "info", "warning", "error")


def _env(name: str) -> str:
    return f"ANABRANCH_{name.upper()}"


def _log_level(value: str) -> str:
    if value.lower() not in LOG_LEVELS:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(LOG_LEVELS)}")
    return value.lower()


def up(
    model: Annotated[
        str,
        typer.Option(envvar=_env("model"), help="A name, a folder, a GGUF file or a hub id."),
    ] = DEFAULT,
    name: Annotated[
        str | None, typer.Option(envvar=_env("name"), help="The name that clients use.")
    ] = None,
    host: Annotated[
        str, typer.Option(envvar=_env("host"), help="0.0.0.0 to be reached from elsewhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar=_env("port"), min=0, max=65535, help="0: any free one.")
    ] = 8000,
    dtype: Annotated[
        str | None, typer.Option(envvar=_env("dtype"), help="float32, bfloat16 or float16.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(envvar=_env("max_model_len"), min=1, help="Tokens of context.")
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(envvar=_env("token_budget"), min=1, help="Tokens of one step.")
    ] = None,
    kv_memory: Annotated[
        int | None,
        typer.Option(
            envvar=_env("kv_memory"),
            parser=parse_bytes,
            metavar="SIZE",
            help="Memory for keys and values: 2GiB, 512MB or bytes.",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(envvar=_env("max_queue"), min=1, help="Requests that may wait.")
    ] = 1024,
    max_sequences: Annotated[
        int, typer.Option(envvar=_env("max_sequences"), min=1, help="Sequences of one step.")
    ] = 256,
    policy: Annotated[
        str, typer.Option(envvar=_env("policy"), help="See: anabranch list policies.")
    ] = "splitfuse",
    page_size: Annotated[
        int, typer.Option(envvar=_env("page_size"), min=1, help="Tokens of one cache page.")
    ] = 32,
    no_prefix_reuse: Annotated[
        bool,
        typer.Option(
            "--no-prefix-reuse",
            envvar=_env("no_prefix_reuse"),
            help="Compute shared prompt beginnings again.",
        ),
    ] = False,
    runner: Annotated[
        str, typer.Option(envvar=_env("runner"), help="auto, fused or transformers.")
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(envvar=_env("weights"), help="bf16, or int8: faster, a little less exact."),
    ] = "bf16",
    kv_cache: Annotated[
        str,
        typer.Option(
            envvar=_env("kv_cache"), help="Keys and values: auto, fp32, or bf16: half the memory."
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(envvar=_env("threads"), min=1, help="CPU threads.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=FOLDER]",
            help="An adapter to serve as MODEL:NAME; may be repeated. Without a folder: one that "
            "a recipe has deployed under this name.",
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            envvar=_env("adapters"), help="Folder whose adapters clients may load by name."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(envvar=_env("state"), help="Folder for uploaded files and fine-tuning jobs."),
    ] = None,
    jobs_url: Annotated[
        str | None,
        typer.Option(
            envvar=_env("jobs_url"),
            help="Database for jobs, as an SQLAlchemy URL; SQLite in the state folder if absent.",
        ),
    ] = None,
    run_jobs: Annotated[
        bool | None,
        typer.Option(
            "--run-jobs/--no-run-jobs",
            envvar=_env("run_jobs"),
            help="Whether clients may start jobs as processes of this machine. Default: only if "
            "nobody else reaches it: a loopback address and no API keys.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_env("allowed_host"),
            metavar="NAME",
            help="A name by which requests may call the server, as behind a proxy; may be "
            "repeated. Default: without API keys, loopback names only on a loopback address.",
        ),
    ] = None,
    tpot_slo_ms: Annotated[
        float | None,
        typer.Option(
            envvar=_env("tpot_slo_ms"),
            min=0.1,
            help="Milliseconds between two tokens of a stream that prompts and fine-tuning must "
            "leave; without it fine-tuning slows streams down by a quarter.",
        ),
    ] = None,
    finetune_tokens: Annotated[
        int,
        typer.Option(
            envvar=_env("finetune_tokens"),
            min=0,
            help="Cache for sequences that are trained on, and the longest of them.",
        ),
    ] = 4096,
    speculation: Annotated[
        str,
        typer.Option(
            envvar=_env("speculation"),
            help="Who drafts tokens that are verified together where it pays: lookup (copies from "
            "the context), model, pearl (the draft model at the same time), layers, or off.",
        ),
    ] = "lookup",
    draft_model: Annotated[
        str | None,
        typer.Option(
            envvar=_env("draft_model"), help="A smaller model, for --speculation model or pearl."
        ),
    ] = None,
    draft_layers: Annotated[
        int | None,
        typer.Option(
            envvar=_env("draft_layers"), min=1, help="Layers that draft, for --speculation layers."
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            envvar=_env("draft_tokens"),
            min=1,
            help="Tokens that --speculation pearl drafts in one step; without it as many as fit.",
        ),
    ] = None,
    drafts: Annotated[
        int,
        typer.Option(
            envvar=_env("drafts"), min=1, help="Independent drafts of a model for each sequence."
        ),
    ] = 1,
    constraint_backend: Annotated[
        str,
        typer.Option(
            envvar=_env("constraint_backend"),
            help="What keeps answers to schemas and grammars: auto, llguidance or xgrammar.",
        ),
    ] = "auto",
    max_finetune_jobs: Annotated[
        int,
        typer.Option(
            envvar=_env("max_finetune_jobs"), min=1, help="Jobs that train at a time; others wait."
        ),
    ] = 4,
    embedding_model: Annotated[
        str | None,
        typer.Option(envvar=_env("embedding_model"), help="A sentence encoder to serve as well."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(envvar=_env("api_key_file"), help="One key a line; # begins a comment."),
    ] = None,
    no_console: Annotated[
        bool,
        typer.Option("--no-console", envvar=_env("no_console"), help="Serve the HTTP API only."),
    ] = False,
    drain_timeout: Annotated[
        float,
        typer.Option(envvar=_env("drain_timeout"), min=0, help="Seconds to finish on SIGTERM."),
    ] = 30.0,
    log_level: Annotated[
        str,
        typer.Option(envvar=_env("log_level"), callback=_log_level, help=", ".join(LOG_LEVELS)),
    ] = "warning",
) -> None:
    """Serve a model over HTTP, for any OpenAI client.

    Every option can also be set as an environment variable.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    # What can be wrong cheaply is found before the model is loaded.
    from anabranch.addresses import is_loopback
    from anabranch.api import ServerOptions, bind, create_app, read_api_keys, serve
    from anabranch.jobs import Workspace
    from anabranch.models import cache

    keys = read_api_keys(api_key_file) if api_key_file else ()
    server_options = ServerOptions(api_keys=keys, max_finetune_jobs=max_finetune_jobs)
    if adapters is not None:
        server_options = replace(server_options, adapters=adapters)
    folders = [_named_folder(text, server_options.adapters) for text in adapter or ()]
    listener = bind(host, port)
    workspace = Workspace.open(state or cache.root() / "state", jobs_url)
    if run_jobs is None:
        run_jobs = not keys and is_loopback(host)
    server_options = replace(
        server_options,
        workspace=workspace,
        run_jobs=run_jobs,
        allowed_hosts=tuple(allowed_host or ()),
    )
    with progress() as report:
        report("importing torch", None)
        # Idle threads of torch soon sleep instead of spinning: the event loop needs a core too.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        import torch

        from anabranch import models
        from anabranch.registry import get
        from anabranch.serving import EngineModel, EngineOptions

        get("policies", policy)
        if threads is not None:
            torch.set_num_threads(threads)
        options = EngineOptions(
            token_budget=token_budget,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            max_sequences=max_sequences,
            max_queue=max_queue,
            policy=policy,
            page_size=page_size,
            prefix_reuse=not no_prefix_reuse,
            runner=runner,
            weights=cast("WeightFormat", weights),
            kv_cache=cast("CacheFormat", kv_cache),
            time_between_tokens=None if tpot_slo_ms is None else tpot_slo_ms / 1e3,
            finetune_tokens=finetune_tokens,
            speculation=speculation,
            draft_model=draft_model,
            draft_layers=draft_layers,
            draft_tokens=draft_tokens,
            drafts=drafts,
            constraint_backend=constraint_backend,
        )
        base = EngineModel.load(
            model, served_name=name, options=options, dtype=dtype, progress=report
        )
        served: list[Model] = [base]
        for adapter_name, folder in folders:
            report(f"loading the adapter {adapter_name}", None)
            base.load_adapter(adapter_name, folder)
        if embedding_model is not None:
            report(f"loading {embedding_model}", None)
            served.append(models.load_encoder(embedding_model))
    app = create_app(served, server_options)
    console = "not served" if no_console else install_console(app)

    def on_listening(url: str) -> None:
        announce(served, url, needs_key=bool(keys), console=console)

    try:
        status = serve(app, listener, drain_timeout=drain_timeout, on_listening=on_listening)
    finally:
        workspace.close()
    raise typer.Exit(status)


def _named_folder(text: str, deployed: Path) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not name or bool(equals) != bool(folder):
        raise typer.BadParameter(f"{text!r}; write --adapter NAME=FOLDER")
    return name, Path(folder) if folder else deployed / name


def install_console(app: FastAPI) -> str:
    """Serve the web page if its extra is installed; empty, or why it is not served."""
    from anabranch.console import install
    from anabranch.errors import MissingExtra

    try:
        install(app)
    except MissingExtra as error:
        return f"not installed; pip install 'anabranch[{error.extra}]'"
    return ""


def announce(served: list[Model], url: str, needs_key: bool, console: str = "") -> None:
    """Say what is served, where, and how to try it: a panel on a terminal, else plain lines."""
    lines = []
    for model in served:
        card = model.card
        facts = [
            f"{count_text(card.parameters)} parameters",
            computed_in(model),
            f"context {card.context_length}",
            card.licence,
        ]
        lines.append(f"model    {model.name} ({', '.join(facts)})")
        lines += [f"adapter  {variant.name}" for variant in model.variants()]
        memory = getattr(model, "kv_memory", None)
        if memory is not None:
            lines.append(f"memory   {bytes_text(memory)} for keys and values")
    lines.append(f"address  {url}/v1")
    lines.append(f"console  {console or url + '/'}")
    text = "\n".join(lines)
    if out.is_terminal:
        panel = Panel(Text(text), title="anabranch is listening", expand=False)
        out.print(panel, soft_wrap=False)
    else:
        out.print(f"listening on {url}\n{text}")
    # Outside the panel: its border would be copied along.
    out.print(curl(served[0].name, _local(url), needs_key))
    if not needs_key and not url.startswith(("http://127.", "http://[::1]")):
        errors.print(OPEN_WARNING)
    sys.stdout.flush()


def computed_in(model: Model) -> str:
    """The stored number format, and the one that this machine computes in if it is another."""
    stored = model.card.dtype
    actual = getattr(model, "dtype", stored)
    return actual if actual.startswith(stored) else f"{stored} computed as {actual}"


def _local(url: str) -> str:
    """An address that this machine can connect to, for one that means all its addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def curl(model: str, url: str, needs_key: bool) -> str:
    """A command that asks the server something, to be pasted into a shell."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    key = '  -H "authorization: Bearer $KEY" \\\n' if needs_key else ""
    return (
        f"curl {url}/v1/chat/completions \\\n{key}"
        f"  -H 'content-type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
    )
