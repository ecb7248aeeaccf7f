"""A peer's recommenders on given pairs, in an environment of its own (``benchmarks.recommenders``).

    python benchmarks/recommenders_peer.py QUESTION

The question is JSON: ``peer``, ``data`` (an ``.npz`` with ``train.user``, ``train.item``, the same
of ``validation``, and ``shape``), ``output`` (a folder) and ``seed``. The last line printed is a
list with, for each model and setting, ``seconds`` and the ``.npz`` of its vectors, whose products
are the scores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Found = tuple[str, str, float, Any, Any]
"""Model, setting, processor seconds, vectors of users and of items."""


def implicit_models(data: Any, folder: Path, seed: int) -> Iterator[Found]:
    """BPR and weighted ALS. BPR's last columns are its item biases and ones."""
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    users, items = data["train.user"], data["train.item"]
    matrix = csr_matrix(
        (np.ones(len(users), np.float32), (users, items)), shape=tuple(data["shape"])
    )
    common = {"factors": 64, "num_threads": 1, "random_state": seed}
    models = [
        (
            "BPR",
            f"lr {lr}, {epochs} epochs",
            BayesianPersonalizedRanking,
            {"learning_rate": lr, "iterations": epochs, "regularization": 0.01},
        )
        for lr in (0.05, 0.02)
        for epochs in (50, 100, 200)
    ] + [
        (
            "ALS",
            f"alpha {alpha}, l2 {l2}, 15 rounds",
            AlternatingLeastSquares,
            {"alpha": alpha, "regularization": l2, "iterations": 15},
        )
        for alpha in (1.0, 5.0)
        for l2 in (1.0, 10.0, 50.0)
    ]
    for name, setting, make, options in models:
        model = make(**common, **options)
        began = time.process_time()
        model.fit(matrix, show_progress=False)
        yield name, setting, time.process_time() - began, model.user_factors, model.item_factors


def recbole_models(data: Any, folder: Path, seed: int) -> Iterator[Found]:
    """LightGCN and BPR with its own trainer, early stopping on recall@20."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    torch.set_num_threads(1)
    place = folder / "pairs"
    place.mkdir(exist_ok=True)
    for part in ("train", "validation"):
        pairs = zip(data[f"{part}.user"], data[f"{part}.item"], strict=True)
        text = "user_id:token\titem_id:token\n" + "".join(f"{u}\t{i}\n" for u, i in pairs)
        (place / f"pairs.{part}.inter").write_text(text)
    for name in ("LightGCN", "BPR"):
        for lr in (5e-3, 2e-3):
            config = Config(
                model=name,
                dataset="pairs",
                config_dict={
                    "data_path": str(folder),
                    "benchmark_filename": ["train", "validation", "validation"],
                    "load_col": {"inter": ["user_id", "item_id"]},
                    "embedding_size": 64,
                    "n_layers": 3,
                    "reg_weight": 1e-4,
                    "learning_rate": lr,
                    "train_batch_size": 1024,
                    "epochs": 150,
                    "eval_step": 5,
                    "stopping_step": 4,
                    "topk": [20],
                    "metrics": ["Recall"],
                    "valid_metric": "Recall@20",
                    "eval_args": {"group_by": "user", "order": "RO", "mode": "full"},
                    "use_gpu": False,
                    "seed": seed,
                    "show_progress": False,
                    "state": "ERROR",
                    "checkpoint_dir": str(folder / "saved"),
                },
            )
            init_seed(seed, True)
            dataset = create_dataset(config)
            train, valid, _ = data_preparation(config, dataset)
            model = get_model(name)(config, train.dataset)
            trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
            began = time.process_time()
            trainer.fit(train, valid, saved=True, show_progress=False)
            seconds = time.process_time() - began
            saved = torch.load(trainer.saved_model_file, weights_only=False)
            model.load_state_dict(saved["state_dict"])
            model.eval()
            with torch.no_grad():
                if name == "LightGCN":
                    users, items = model.forward()
                else:
                    users, items = model.user_embedding.weight, model.item_embedding.weight
            best = f"lr {lr}, at most 150 epochs"
            count_users, count_items = data["shape"]
            yield (
                name,
                best,
                seconds,
                rows_of(dataset, "user", users.detach().numpy(), count_users),
                rows_of(dataset, "item", items.detach().numpy(), count_items),
            )


def rows_of(dataset: Any, side: str, vectors: Any, count: int) -> Any:
    """Its vectors in the order of our row numbers; zeros for what it never saw."""
    ordered = np.zeros((count, vectors.shape[1]), np.float32)
    for token, row in dataset.field2token_id[f"{side}_id"].items():
        if token != "[PAD]":
            ordered[int(token)] = vectors[row]
    return ordered


def main() -> None:
    question = json.loads(sys.argv[1])
    folder = Path(question["output"])
    models = {"implicit": implicit_models, "recbole": recbole_models}[question["peer"]]
    answers = []
    with np.load(question["data"]) as file:
        data = dict(file)
    for number, (name, setting, seconds, users, items) in enumerate(
        models(data, folder, question["seed"])
    ):
        path = folder / f"{question['peer']}{number}.npz"
        np.savez(path, users=np.asarray(users), items=np.asarray(items))
        answers.append(
            {"model": name, "setting": setting, "seconds": seconds, "factors": str(path)}
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
