import os
import tempfile

import pytest

from anabranch.federated.runtimes.processes.segments import VARIABLE, shared_memory


@pytest.fixture(autouse=True, scope="session")
def own_shared_memory():
    """These tests look for what is left: what others do meanwhile must not be seen."""
    with tempfile.TemporaryDirectory(prefix="anabranch-tests-", dir=shared_memory()) as folder:
        os.environ[VARIABLE] = folder
        yield
        del os.environ[VARIABLE]
