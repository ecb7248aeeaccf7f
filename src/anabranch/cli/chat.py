"""``anabranch chat``: talk to a running server, over HTTP like any other client."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from anabranch.cli.output import show_error
from anabranch.errors import AnabranchError


class ServerError(AnabranchError):
    """The server cannot be reached, or refused the request."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation.")
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="ANABRANCH_URL", help="The server's address.")
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="A served name; without it, the first one.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ANABRANCH_API_KEY")] = None,
    system: Annotated[str | None, typer.Option(help="What the model should be like.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer.")] = None,
) -> None:
    """Talk to a running server. Ctrl-C stops an answer, Ctrl-D ends."""
    piped = prompt is None and not sys.stdin.isatty()
    if piped:
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise ServerError("nothing was asked: standard input is empty")
    client = Client(url, api_key, {"temperature": temperature, "max_tokens": max_tokens})
    client.model = model or client.first_model()
    messages = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        messages.append({"role": "user", "content": prompt})
        show(client.answer(messages))
        return
    typer.echo(f"{client.model} at {url}. Ctrl-C stops an answer, Ctrl-D ends.", err=True)
    converse(client, messages)


def converse(client: Client, messages: list[dict[str, str]]) -> None:
    """Ask for turns until the input ends."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() history and editing
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            typer.echo(err=True)
            return
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D ends)", err=True)
            continue
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = show(client.answer(messages))
        except ServerError as error:
            # The conversation goes on without the turn that failed.
            messages.pop()
            show_error(error)
            continue
        messages.append({"role": "assistant", "content": answer})


def show(pieces: Iterator[str]) -> str:
    """Print an answer as it comes; Ctrl-C ends it early. Returns what was shown."""
    parts = []
    try:
        for piece in pieces:
            parts.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(" (stopped)", err=True, nl=False)
    typer.echo()
    return "".join(parts)


class Client:
    """The two calls that a conversation needs. ``options`` go into every request."""

    def __init__(self, url: str, api_key: str | None, options: dict[str, Any]) -> None:
        import httpx

        self.model = ""
        self._url = url.rstrip("/")
        self._options = {key: value for key, value in options.items() if value is not None}
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # An answer may take as long as it takes; a connection may not.
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=5.0))

    def first_model(self) -> str:
        """The name of the model that the server lists first."""
        import httpx

        try:
            response = self._http.get(f"{self._url}/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        self._check(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise self._foreign() from error

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The pieces of the next turn."""
        import json

        import httpx

        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        try:
            with self._http.stream("POST", f"{self._url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._check(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ServerError(event["error"]["message"])
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        except (ValueError, LookupError, TypeError) as error:
            raise self._foreign() from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _check(self, response: Any) -> None:
        if response.status_code == 200:
            return
        try:
            message = response.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = f"{self._url} answered with status {response.status_code}"
        raise ServerError(message)

    def _foreign(self) -> ServerError:
        return ServerError(f"{self._url} does not answer like an OpenAI server")

    def _unreachable(self, error: Exception) -> ServerError:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerError(f"no server listens at {self._url}; start one with: anabranch up")
        return ServerError(f"the connection to {self._url} failed: {error}")
