import pytest

from anabranch.errors import ConfigurationError
from anabranch.training.options import TrainOptions, parse_options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give steps or epochs"),
        ({"steps": 1, "epochs": 1}, "both was given"),
        ({"steps": 0}, r"train\.steps: .*greater than or equal to 1; 0 was given"),
        ({"steps": 5, "warmup": 1.5}, "whole number of steps"),
        ({"steps": 5, "warmup": 6}, "longer than the run"),
        ({"steps": 5, "overlong": "drop"}, "needs max_length"),
        ({"steps": 5, "momentum": 0.9}, "belongs to sgd"),
        ({"steps": 5, "lr": float("nan")}, r"train\.lr"),
        ({"steps": 5, "schedual": "cosine"}, r"train\.schedual: .*did you mean 'schedule'"),
        ({"steps": 5, "checkpoint": {"evry": 2}}, r"checkpoint\.evry: .*did you mean 'every'"),
        (
            {"steps": 5, "early_stopping": {"patence": 2}},
            r"early_stopping\.patence: .*did you mean 'patience'",
        ),
    ],
)
def test_mistakes_are_named_with_their_path(values, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_options(TrainOptions, values, "train")


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigurationError) as raised:
        parse_options(TrainOptions, {"steps": 0, "lr": -1, "x": 1}, "train")
    assert len(str(raised.value).splitlines()) == 3


def test_length_of_a_run():
    assert TrainOptions(steps=7).total_steps(3) == 7
    assert TrainOptions(epochs=2).total_steps(3) == 6
    assert TrainOptions(epochs=0.5).total_steps(3) == 2
    assert TrainOptions(epochs=0.01).total_steps(3) == 1


def test_warmup_is_a_fraction_or_a_number():
    assert TrainOptions(steps=100, warmup=0.03).warmup_steps(100) == 3
    assert TrainOptions(steps=100, warmup=1).warmup_steps(100) == 1
    assert TrainOptions(steps=100, warmup=0).warmup_steps(100) == 0
    assert [TrainOptions(steps=1, warmup=0.5).warmup_steps(total) for total in (1, 2, 3)] == [
        0,
        1,
        2,
    ]


def test_options_survive_json():
    made = TrainOptions(steps=3, early_stopping={"patience": 2}, checkpoint={"every": 1})
    assert TrainOptions.model_validate_json(made.model_dump_json()) == made
