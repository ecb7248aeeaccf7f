"""Personal values that take effect only if the server took the reply they were made with."""

from __future__ import annotations

from typing import Any

from anabranch.federated.client import ClientContext


def settled(ctx: ClientContext) -> dict[str, Any]:
    """The site's values as the server knows of them; empty at first.

    What was proposed with the last reply is kept if that reply counts, and dropped if it was lost,
    late or refused. A site must not have two tasks at once, as under all schedules here.
    """
    pending = ctx.state.pop("pending", None)
    if pending is not None and ctx.accepted >= pending["task"]:
        ctx.state["settled"] = pending["values"]
    return ctx.state.get("settled", {})


def propose(ctx: ClientContext, values: dict[str, Any]) -> None:
    """Values to be settled when the server has taken this task's reply."""
    ctx.state["pending"] = {"task": ctx.task, "values": values}


def if_accepted(state: dict[str, Any], accepted: int) -> dict[str, Any]:
    """What :func:`settled` will give, from a site's stored state; for checks of invariants."""
    pending = state.get("pending")
    if pending is not None and accepted >= pending["task"]:
        return pending["values"]
    return state.get("settled", {})
