"""Fixtures that several folders share: tiny random models, and the real default one."""

from __future__ import annotations

import os
import signal

# What runs in the background of a script ignores Ctrl-C, and so would all processes of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two test processes, or a server beside a test, must not spin on each other's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (workers + 1))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from anabranch import models

# A slow machine is no failure; pytest's own timeout finds what hangs.
settings.register_profile("anabranch", deadline=None)
settings.load_profile("anabranch")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> models.LoadedModel:
    """The default model in single precision, never handed to an engine."""
    return models.load(models.DEFAULT, dtype="float32")
