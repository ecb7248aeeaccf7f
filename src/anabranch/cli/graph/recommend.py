"""``anabranch graph recommend``: fit a recommender, measure it, and list what it recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.graph.options import Interactions, Json, MinRating, Seed
from anabranch.cli.graph.warned import shown_warnings
from anabranch.cli.output import errors, out, print_json, progress

SHOWN = 5
"""Users whose recommendations are printed."""


def recommend(
    file: Interactions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Best items: .npz, .parquet or .json.")
    ] = None,
    model: Annotated[str, typer.Option(help="ultragcn, lightgcn, mf or popularity.")] = "ultragcn",
    preset: Annotated[str | None, typer.Option(help="UltraGCN's settings for a data set.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter, as lr=0.01; may be repeated.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of the table rows to keep (GraphHash).")
    ] = None,
    user: Annotated[
        list[str] | None, typer.Option("--user", "-u", help="Only for this one; may be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Items for each user.")] = 20,
    split: Annotated[str, typer.Option(help="random, per_user or time.")] = "random",
    test: Annotated[float, typer.Option(help="Held-out share; 0 to train on everything.")] = 0.2,
    validation: Annotated[
        float, typer.Option(help="Share of the rest that selects the epoch; 0 for none.")
    ] = 0.1,
    min_rating: MinRating = None,
    save: Annotated[Path | None, typer.Option(help="The fitted recommender, .npz.")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder; the same command goes on from it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG of recall during training.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit a recommender and measure it on held-out interactions, ranking all items."""
    from anabranch.graphs.recommend import read_interactions
    from anabranch.graphs.recommend.choose import recommender
    from anabranch.graphs.recommend.hashing import GraphHash
    from anabranch.graphs.recommend.trained import TrainedRecommender
    from anabranch.graphs.recommend.write import (
        check_recommendations_output,
        write_recommendations,
    )

    if output is not None:
        check_recommendations_output(output)
    mapper = None if budget is None else GraphHash(budget=budget, merge_isolated=True, seed=seed)
    fitted = recommender(model, preset, settings or (), seed=seed, mapper=mapper)
    trains = isinstance(fitted, TrainedRecommender)
    if not trains and (unused := [n for n, v in _trained_only(budget, checkpoints, plot) if v]):
        raise typer.BadParameter(f"{model} is not trained: {', '.join(unused)} cannot be used")
    if plot is not None and not validation:
        raise typer.BadParameter("--plot shows validations: --validation must be above 0")
    with shown_warnings(), progress() as report:
        report(f"reading {file}", None)
        whole = read_interactions(file)
        if min_rating is not None:
            whole = whole.rated_at_least(min_rating).compact()
        users = parse_users(whole, user)
        train, held_out = whole.split(split, test, seed) if test else (whole, None)  # type: ignore[arg-type]
        chosen = None
        if validation and trains:
            train, chosen = train.split("random", validation, seed, "validation")
        options: dict[str, Any] = {"output": checkpoints} if trains else {}
        fitted.fit(train, validation=chosen, progress=report, **options)
        report("ranking", None)
        figures = None if held_out is None else fitted.evaluate(held_out, k=top).to_dict()
        items, scores = fitted.recommend(users, top)
        if output is not None:
            write_recommendations(output, whole, users, items, scores)
        if save is not None:
            fitted.save(save)
        if plot is not None:
            _draw(plot, fitted, model)
    facts = {
        "users": whole.num_users,
        "items": whole.num_items,
        "interactions": len(whole),
        "model": model,
        **({"best_epoch": fitted.best_epoch_} if isinstance(fitted, TrainedRecommender) else {}),
        "test": figures,
        "output": output and str(output),
        "saved": save and str(save),
    }
    _show(facts, whole, users, items, scores, everyone=user is None, json=json)


def parse_users(interactions: Any, names: list[str] | None) -> Any:
    """Rows of users by their names; all of them if none is named."""
    import numpy as np

    from anabranch.graphs.recommend import RecommendError

    if names is None:
        return np.arange(interactions.num_users)
    ids = interactions.user_ids
    known = {str(n): r for r, n in enumerate(range(interactions.num_users) if ids is None else ids)}
    for name in names:
        if name not in known:
            raise RecommendError(f"no user {name!r} among the {len(known)} of the file")
    return np.array([known[name] for name in names], np.int64)


def _trained_only(
    budget: float | None, checkpoints: Path | None, plot: Path | None
) -> list[tuple[str, object]]:
    return [("--budget", budget), ("--checkpoints", checkpoints), ("--plot", plot)]


def _draw(path: Path, fitted: Any, name: str) -> None:
    from anabranch.evaluation.plotting import Plot, svg
    from anabranch.files import write_text

    curve = [(float(v.epoch), v.ranking.recall) for v in fitted.history_]
    write_text(path, svg(Plot("Validation", "epoch", "recall@20", {name: curve})))


def _show(
    facts: dict[str, Any],
    whole: Any,
    users: Any,
    items: Any,
    scores: Any,
    *,
    everyone: bool,
    json: bool,
) -> None:
    """Figures and, unless all users were asked for, what is recommended to each."""
    from anabranch.graphs.recommend.write import names_of

    answers = []
    for row, name in enumerate(names_of(whole, "user", users).tolist()):
        if everyone and (json or row >= SHOWN):
            break
        there = items[row] >= 0
        answers.append(
            {
                "user": name,
                "items": names_of(whole, "item", items[row][there]).tolist(),
                "scores": [round(float(score), 5) for score in scores[row][there]],
            }
        )
    if json:
        print_json(facts if everyone else {**facts, "recommendations": answers})
        return
    for answer in answers:
        table = Table("item", "score", box=None, pad_edge=False, title=f"{answer['user']}")
        for item, score in zip(answer["items"][:SHOWN], answer["scores"], strict=False):
            table.add_row(str(item), f"{score:.4f}")
        out.print(table)
    if (found := facts["test"]) is not None:
        out.print(
            f"recall@{found['k']} {found['recall']:.4f}  ndcg@{found['k']} {found['ndcg']:.4f}  "
            f"of {found['active']:,} users with held-out items"
        )
    for path in (facts["output"], facts["saved"]):
        if path:
            out.print(path)
    errors.print(
        f"{facts['users']:,} users, {facts['items']:,} items, "
        f"{facts['interactions']:,} interactions",
        style="dim",
    )
