"""Recommenders and their parameters by name, as the command line gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from anabranch.errors import UnknownName
from anabranch.graphs.recommend.base import FactorRecommender
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.lightgcn import LightGCN
from anabranch.graphs.recommend.matrix_factorization import MatrixFactorization
from anabranch.graphs.recommend.popularity import Popularity
from anabranch.graphs.recommend.ultragcn import UltraGCN

RECOMMENDERS: dict[str, type[FactorRecommender]] = {
    "lightgcn": LightGCN,
    "mf": MatrixFactorization,
    "popularity": Popularity,
    "ultragcn": UltraGCN,
}


def recommender(
    name: str, preset: str | None = None, settings: Iterable[str] = (), **parameters: Any
) -> FactorRecommender:
    """A recommender with a preset and ``settings`` such as ``"lr=0.01"``, later ones first.

    ``parameters`` that the recommender does not have are left out: they are the caller's own.
    """
    if name not in RECOMMENDERS:
        raise UnknownName("recommender", name, RECOMMENDERS)
    chosen = RECOMMENDERS[name]
    if preset is not None and not issubclass(chosen, UltraGCN):
        raise RecommendError(f"presets are for ultragcn, not for {name}")
    model = chosen() if preset is None else UltraGCN.preset(preset)
    known = model.get_params(deep=False)
    found = {key: value for key, value in parameters.items() if key in known}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecommendError(f"{setting!r}: write settings as name=value, for example lr=0.01")
        if key not in known or key == "mapper":
            raise UnknownName(f"parameter of {name}", key, set(known) - {"mapper"})
        found[key] = _value(key, text, known[key])
    return model.set_params(**found)


def _value(key: str, text: str, default: Any) -> Any:
    """The text as a value of the default's kind."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and (isinstance(value, bool) or not isinstance(value, int | float)):
        if not (value is None and key == "patience"):
            raise RecommendError(f"{key} = {text}: a number is needed")
    elif isinstance(default, bool) and not isinstance(value, bool):
        raise RecommendError(f"{key} = {text}: write true or false")
    whole = isinstance(default, int) and not isinstance(default, bool)
    if whole and isinstance(value, float):
        raise RecommendError(f"{key} = {text}: a whole number is needed")
    return value
