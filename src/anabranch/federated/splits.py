"""Who gets which examples. Every split is a partition, the same for the same seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from anabranch.federated.errors import SplitError
from anabranch.federated.randomness import generator

DRAWS = 1000

Split = list[np.ndarray]
"""Sorted indices of each client's examples, int64."""


def iid(examples: int, clients: int, seed: int = 0) -> Split:
    """Shuffled, in shares that differ by at most one example."""
    _require(clients, examples)
    order = generator("split iid", seed).permutation(examples)
    return [np.sort(share) for share in np.array_split(order, clients)]


def dirichlet(
    labels: Sequence[Hashable],
    clients: int,
    alpha: float,
    min_size: int = 1,
    seed: int = 0,
    balance: bool = False,
) -> Split:
    """Each label is spread over the clients by shares from Dirichlet(``alpha``) (Hsu et al. 2019).

    A small ``alpha`` gives clients of few labels. Redrawn until everyone has ``min_size`` examples,
    at most 1,000 times. With ``balance`` a client that already has its even share gets nothing of
    the labels to come (as FedIT's Dolly split does).
    """
    _require(clients, len(labels), min_size)
    if not alpha > 0:
        raise SplitError(f"alpha is above 0, not {alpha}")
    rng = generator("split dirichlet", seed)
    groups = list(_by_label(labels).values())
    smallest = 0
    for _ in range(DRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, dtype=np.int64)
        for group in groups:
            shares = rng.dirichlet(np.full(clients, alpha))
            if balance:
                shares = shares * (sizes < len(labels) / clients)
                if not shares.sum():
                    shares = np.ones(clients)
            ends = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(group)).astype(np.int64)
            for client, part in enumerate(np.split(rng.permutation(group), ends)):
                parts[client].append(part)
                sizes[client] += len(part)
        if sizes.min() >= min_size:
            return [np.sort(np.concatenate(part)) for part in parts]
        smallest = max(smallest, int(sizes.min()))
    raise SplitError(
        f"in {DRAWS} draws the smallest of {clients} clients never had {min_size} of the "
        f"{len(labels)} examples, at best {smallest}; raise alpha ({alpha:g}) or lower min_size"
    )


def by_category(labels: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
    """One client for each label, in the order in which labels first appear."""
    if not len(labels):
        raise SplitError("there are no examples to split")
    return {label: np.asarray(group) for label, group in _by_label(labels).items()}


def shards(labels: Sequence[Hashable], clients: int, per_client: int = 2, seed: int = 0) -> Split:
    """Sorted by label, cut into equal shards, and dealt out (McMahan et al. 2017, section 3).

    Nobody sees more than about ``per_client`` labels.
    """
    if per_client < 1:
        raise SplitError(f"per_client is at least 1, not {per_client}")
    _require(clients, len(labels), per_client)
    ordered = np.concatenate([np.asarray(group) for group in _by_label(labels).values()])
    pieces = np.array_split(ordered, clients * per_client)
    deal = generator("split shards", seed).permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[index] for index in row])) for row in deal]


def _by_label(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return groups


def _require(clients: int, examples: int, each: int = 1) -> None:
    if clients < 1:
        raise SplitError(f"a split needs at least one client, not {clients}")
    if clients * max(each, 1) > examples:
        raise SplitError(
            f"{examples} examples do not suffice for {clients} clients with at least {each} each"
        )
