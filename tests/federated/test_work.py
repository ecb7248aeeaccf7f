"""What a task asks of a client."""

from __future__ import annotations

import pytest

from anabranch.errors import ConfigurationError
from anabranch.federated.messages import Work


@pytest.mark.parametrize("work", [{"steps": 0}, {"epochs": 0.0}, {"batch_size": -1}, {"tokens": 0}])
def test_work_is_more_than_none(work):
    [(name, value)] = work.items()
    with pytest.raises(ConfigurationError, match=f"task's {name} are above 0, not {value}"):
        Work(**work)
