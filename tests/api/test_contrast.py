"""``contrast``: what reaches the engine, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.errors import InvalidRequest
from anabranch.models.protocol import ContrastParameters
from anabranch.serving.prompts import _contrast, lame_text, without_examples

from .conftest import Api, EchoModel, make
from .test_refusals import check

TASK = """def double(x: int) -> int:
    \"\"\"Return twice x.

    >>> double(2)
    4
    \"\"\"
"""


def test_settings_that_are_given_replace_the_defaults() -> None:
    contrast = _contrast([1, 2], ContrastParameters(weight=-0.2))
    assert contrast.prompt == (1, 2)
    assert (contrast.settings.weight, contrast.settings.threshold) == (
        -0.2,
        pytest.approx(0.894, 1e-3),
    )


def test_examples_are_left_out_of_the_last_user_message_only() -> None:
    messages = [
        {"role": "user", "content": TASK},
        {"role": "assistant", "content": ">>> 1"},
        {"role": "user", "content": TASK},
        {"role": "assistant", "content": "def"},
    ]
    lame = without_examples(messages, ContrastParameters())
    assert lame[:2] == messages[:2] and lame[3] == messages[3]
    assert ">>>" not in lame[2]["content"] and "Return twice x." in lame[2]["content"]
    given = without_examples(messages, ContrastParameters(prompt="plain"))
    assert given[2]["content"] == "plain"


def test_nothing_to_leave_out_is_said() -> None:
    with pytest.raises(InvalidRequest, match="no examples were found"):
        lame_text("Hello.", ContrastParameters())
    with pytest.raises(InvalidRequest, match="needs a user message"):
        without_examples([{"role": "system", "content": "x"}], ContrastParameters())


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"weight": 0.5}, "contrast.weight"),
        ({"threshold": -1}, "contrast.threshold"),
        ({"prompt": ""}, "contrast.prompt"),
        ({"wait": 1}, "contrast.wait"),
    ],
)
def test_bad_settings_are_refused_by_name(api: Api, given: dict[str, Any], param: str) -> None:
    check(api.chat(contrast=given), 400, param)


def test_it_reaches_the_model() -> None:
    model = EchoModel()
    assert make(model).chat(contrast={"weight": -0.5}).status_code == 200
    assert model.sampling is not None
    assert model.sampling.contrast == ContrastParameters(weight=-0.5)
    assert make(model).complete().status_code == 200
    assert model.sampling.contrast is None
