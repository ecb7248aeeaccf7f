"""Differential privacy of examples: how much a run may reveal, and an account of what it has.

Nobody who sees everything that a site sends can tell, beyond (epsilon, delta), whether any single
example was among its data. Not hidden: how many examples a site has, when it replies, and what is
known of an example from other examples. Texts of one person in several examples are protected as
single examples only.

The mechanism is DP-SGD (Abadi et al. 2016, algorithm 1): every example is in a step's batch with
probability q on its own, its gradient is clipped to norm ``clip``, and noise of ``noise * clip`` is
added to the sum. What it costs is added up by Opacus' accountant of Renyi differential privacy
(Mironov 2017). The steps are :mod:`anabranch.training.private_gradients`.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from anabranch.errors import AnabranchError, ConfigurationError, MissingExtra

MOST_NOISE = 1e4
"""A budget that needs more is out of reach."""


class PrivacyBudgetExceeded(AnabranchError):
    """The next steps would reveal more than was promised; nothing was computed."""

    exit_code = 1
    status = 409


@dataclass(frozen=True)
class Privacy:
    """What a site promises about its examples.

    ``epsilon`` is the budget of the whole run (None: no limit is kept, only the account), ``delta``
    the chance that it does not hold: below one over the number of examples. ``noise`` is the noise
    multiplier; None: the smallest that keeps the budget for ``tasks`` tasks like the first one.
    ``clip`` bounds the norm of one example's gradient.

    Noise is drawn from a secret of the site, by torch's generator, which is not made for
    cryptography. With ``seed`` it can be repeated, and taken away again by whoever knows the seed:
    for simulations and tests only.
    """

    delta: float
    clip: float
    epsilon: float | None = None
    noise: float | None = None
    tasks: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ConfigurationError(f"privacy: delta is between 0 and 1, not {self.delta}")
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise ConfigurationError(f"privacy: clip is above 0 and finite, not {self.clip}")
        if self.epsilon is not None and not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ConfigurationError(f"privacy: epsilon is above 0, not {self.epsilon}")
        if self.noise is not None and not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ConfigurationError(f"privacy: noise is at least 0, not {self.noise}")
        if self.noise is None and (self.epsilon is None or not self.tasks or self.tasks < 1):
            raise ConfigurationError(
                "privacy: give noise, or epsilon and the number of tasks from which it follows"
            )
        if self.noise == 0 and self.epsilon is not None:
            raise ConfigurationError("privacy: without noise there is no epsilon; leave one away")


class PrivacyAccount:
    """What a site has revealed, in a ``state`` that the caller stores: nothing else remembers it.

    ``state`` is a dict of JSON values and is changed in place. ``examples`` is the size of the
    site's data.
    """

    def __init__(self, privacy: Privacy, state: dict[str, Any], examples: int) -> None:
        if not privacy.delta < 1 / examples:
            raise ConfigurationError(
                f"privacy: delta={privacy.delta:g} is not below one over the site's {examples} "
                f"examples, {1 / examples:g}: revealing one of them entirely would be allowed"
            )
        self.privacy, self.state = privacy, state
        state.setdefault("history", [])
        if "secret" not in state:
            state["secret"] = (
                secrets.token_hex(16) if privacy.seed is None else f"seed {privacy.seed}"
            )

    @property
    def history(self) -> list[list[float]]:
        """``[noise, q, steps]`` of what was released, in order; equal neighbours are one entry."""
        return self.state["history"]

    def noise(self, q: float, steps: int) -> float:
        """The noise multiplier for batches of share ``q`` and ``steps`` steps a task.

        Settled at the first call, and stored.
        """
        if self.privacy.noise is not None:
            return self.privacy.noise
        if "noise" not in self.state:
            self.state["noise"] = noise_for(self.privacy, q, steps * (self.privacy.tasks or 1))
        return float(self.state["noise"])

    def epsilon(self, *more: tuple[float, float, int]) -> float:
        """What was revealed so far, and with ``more`` releases of (noise, q, steps)."""
        released = [(float(s), float(q), int(n)) for s, q, n in self.history] + list(more)
        released = [release for release in released if release[2]]
        if not released:
            return 0.0
        if any(noise == 0 for noise, _, _ in released):
            return math.inf
        analysis = load_opacus().accountants.analysis.rdp
        orders = load_opacus().accountants.RDPAccountant.DEFAULT_ALPHAS
        divergence = sum(_of_one_step(noise, q) * steps for noise, q, steps in released)
        with without_warnings():
            spent, _ = analysis.get_privacy_spent(
                orders=orders, rdp=divergence, delta=self.privacy.delta
            )
        return float(spent)

    def charge(self, noise: float, q: float, steps: int) -> float:
        """Note a release before it is computed; epsilon afterwards.

        Raises :class:`PrivacyBudgetExceeded`, with nothing noted, if the budget does not allow it.
        """
        after = self.epsilon((noise, q, steps))
        budget = self.privacy.epsilon
        if budget is not None and after > budget * (1 + 1e-9):
            raise PrivacyBudgetExceeded(
                f"{steps} more steps would reveal epsilon {after:.4g}; the budget is {budget:g}, "
                f"of which {self.epsilon():.4g} is spent"
            )
        if self.history and self.history[-1][:2] == [noise, q]:
            self.history[-1][2] += steps
        else:
            self.history.append([noise, q, steps])
        return after

    def generator(self, *words: int | str) -> torch.Generator:
        """Secret randomness for one purpose."""
        text = "\0".join([str(self.state["secret"]), *map(str, words)])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@cache
def _of_one_step(noise: float, q: float) -> Any:
    """Renyi divergence at every order: what Opacus' accountant computes anew at each question."""
    opacus = load_opacus()
    return opacus.accountants.analysis.rdp.compute_rdp(
        q=q, noise_multiplier=noise, steps=1, orders=opacus.accountants.RDPAccountant.DEFAULT_ALPHAS
    )


@cache
def noise_for(privacy: Privacy, q: float, steps: int) -> float:
    """The smallest noise multiplier that keeps the budget for so many steps (by Opacus)."""
    assert privacy.epsilon is not None
    from_opacus = load_opacus().accountants.utils.get_noise_multiplier
    try:
        with without_warnings():
            found = from_opacus(
                target_epsilon=privacy.epsilon,
                target_delta=privacy.delta,
                sample_rate=q,
                steps=steps,
                accountant="rdp",
                epsilon_tolerance=privacy.epsilon / 200,
            )
    except ValueError:
        found = math.inf
    if found > MOST_NOISE:
        raise ConfigurationError(
            f"privacy: no noise keeps epsilon {privacy.epsilon:g} over {steps} steps; "
            f"take fewer steps or a larger epsilon"
        )
    return float(found)


def load_opacus() -> Any:
    """The package; :class:`MissingExtra` where it is not installed."""
    try:
        with without_warnings():
            import opacus
            import opacus.accountants.analysis.rdp
            import opacus.accountants.utils
    except ImportError:
        raise MissingExtra("opacus", "privacy") from None
    return opacus


@contextmanager
def without_warnings() -> Iterator[None]:
    """Opacus recommends its other accountants by warnings."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
