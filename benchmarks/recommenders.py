"""Recommenders of three libraries on the same split: quality of the ranking, and time to train.

    python -m benchmarks.recommenders [--seed 0] [--peers implicit,recbole] [--json FILE]
    python -m benchmarks.recommenders --race 20000x20000x68    # see recommenders_race.py

Ours, ``implicit`` (BPR and ALS) and RecBole (LightGCN and BPR) see the same training pairs with 64
columns, on one thread. Every model may choose among a few settings by the same validation pairs;
the test pairs are ranked by one piece of code for all, from the vectors that each side gives.
Seconds are processor seconds of training with the chosen setting, data loading left out. RecBole's
contain its own validation, every fifth epoch. Peers run in environments of their own, built once
below the cache; one that cannot be built or run is named with its reason.

``--race USERSxITEMSxPER_USER`` asks something else: UltraGCN's time to LightGCN's recall on planted
interactions of that size, so many drawn for each user.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.claims.base import machine
from anabranch.claims.graph_experiments.ultragcn import interactions
from anabranch.evaluation.ranking import Ranking, rank
from anabranch.graphs.recommend import (
    Interactions,
    LightGCN,
    MatrixFactorization,
    Popularity,
    UltraGCN,
)
from benchmarks.peers.asking import PeerFailed, ask
from benchmarks.peers.environments import TORCH, EnvironmentFailed, Recipe
from benchmarks.recommenders_race import race

PEERS = {
    "implicit": Recipe("implicit", ("implicit==0.7.3",)),
    # Written for NumPy 1 and an older pandas.
    "recbole": Recipe(
        "recbole",
        (*TORCH, "recbole==1.2.1", "numpy<2", "pandas<2.2", "scipy<1.13", "setuptools<81"),
    ),
}
PEER_SECONDS = 3600
Parts = tuple[Interactions, Interactions, Interactions]
Row = dict[str, Any]


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".* no interaction to train on")
    if options.race is not None:
        found = race(*options.race, options.seed)
        print(
            f"times faster to LightGCN's recall: {found['times_faster'] or 'not reached'}, "
            f"to 98 % of it: {found['times_faster_to_98_percent'] or 'not reached'}"
        )
        if options.json:
            options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")
        return
    *parts, note = interactions(options.seed)
    print(f"{note}; {', '.join(f'{len(p)} {p.part}' for p in parts)}")
    rows = []
    for row in measured(parts, options.seed, options.peers):  # type: ignore[arg-type]
        rows.append(row)
        print(line(row))
    if options.json:
        report = {"machine": machine(), "data": note, "seed": options.seed, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measured(parts: Parts, seed: int, peers: Sequence[str]) -> Iterator[Row]:
    """One row for each model, ours first."""
    yield from ours(parts, seed)
    with tempfile.TemporaryDirectory() as folder:
        for peer in peers:
            try:
                yield from theirs(peer, parts, seed, Path(folder))
            except (EnvironmentFailed, PeerFailed) as reason:
                yield {"side": peer, "failed": str(reason)}


def ours(parts: Parts, seed: int) -> Iterator[Row]:
    train, validation, test = parts
    popular = Popularity().fit(train, validation=validation).evaluate(test)
    yield row("anabranch", "popularity", "", 0.0, popular)
    choices: dict[str, list[Any]] = {
        "UltraGCN": [UltraGCN(seed=seed)],
        "LightGCN": [
            LightGCN(lr=lr, init=0.1, epochs=150, evaluate_every=5, patience=4, seed=seed)
            for lr in (5e-3, 2e-3)
        ],
        "BPR": [MatrixFactorization(lr=lr, patience=6, seed=seed) for lr in (5e-3, 2e-3)],
    }
    for name, models in choices.items():
        for model in models:
            model.fit(train, validation=validation)
        best = max(models, key=lambda m: max(v.ranking.recall for v in m.history_))
        setting = f"lr {best.lr}, epoch {best.best_epoch_}"
        yield row("anabranch", name, setting, best.processor_seconds_, best.evaluate(test))


def theirs(peer: str, parts: Parts, seed: int, folder: Path) -> Iterator[Row]:
    """Its models, each with the setting that ranks the validation best."""
    train, validation, test = parts
    python = PEERS[peer].build()
    data = folder / "parts.npz"
    arrays = {f"{p.part}.{side}": getattr(p, side) for p in parts[:2] for side in ("user", "item")}
    np.savez(data, **arrays, shape=[train.num_users, train.num_items])
    question = {"peer": peer, "data": str(data), "output": str(folder), "seed": seed}
    driver = Path(__file__).with_name("recommenders_peer.py")
    answers = ask(python, driver, json.dumps(question), folder=folder, seconds=PEER_SECONDS)
    found: dict[str, list[tuple[float, Row]]] = {}
    for answer in answers:
        with np.load(answer["factors"]) as factors:
            users, items = factors["users"], factors["items"]
        chosen = ranked(users, items, validation, train)
        everything = ranked(users, items, test, train.joined(validation))
        figures = row(peer, answer["model"], answer["setting"], answer["seconds"], everything)
        found.setdefault(answer["model"], []).append((chosen.recall, figures))
    for settings in found.values():
        yield max(settings, key=lambda pair: pair[0])[1]


def ranked(
    users: NDArray[np.float32],
    items: NDArray[np.float32],
    relevant: Interactions,
    seen: Interactions,
) -> Ranking:
    return rank(lambda block: users[block] @ items.T, relevant.csr(), seen.csr())


def row(side: str, model: str, setting: str, seconds: float, ranking: Ranking) -> Row:
    return {
        "side": side,
        "model": model,
        "setting": setting,
        "recall@20": round(ranking.recall, 4),
        "ndcg@20": round(ranking.ndcg, 4),
        "processor_seconds": round(seconds, 1),
    }


def line(row: Row) -> str:
    if "failed" in row:
        return f"{row['side']:10} cannot be measured: {row['failed']}"
    return (
        f"{row['side']:10} {row['model']:10} recall@20 {row['recall@20']:.4f}  ndcg@20 "
        f"{row['ndcg@20']:.4f}  {row['processor_seconds']:7.1f} s  {row['setting']}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recommenders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peers", type=lambda text: [p for p in text.split(",") if p], default=list(PEERS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--race", type=sizes, metavar="USERSxITEMSxPER_USER")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    return options


def sizes(text: str) -> tuple[int, int, int]:
    """Three whole numbers with an x between them."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or not all(int(number) for number in found.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 20000x20000x68")
    users, items, per_user = map(int, found.groups())
    return users, items, per_user


if __name__ == "__main__":
    main()
