"""The `autoscaling` section: what it takes, and the sentence about what it does not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve_app.autoscaling_settings import AutoscalingSection


def test_only_the_maximum_must_be_said() -> None:
    section = AutoscalingSection(max_replicas=4)
    assert (section.min_replicas, section.from_zero) == (1, "hold")
    assert (section.scale_up_at, section.scale_down_at, section.window_s) == (0.55, 0.40, 45.0)
    assert (section.max_growth, section.up_period_s, section.down_period_s) == (1.0, 60.0, 120.0)
    with pytest.raises(ValidationError, match="max_replicas"):
        AutoscalingSection.model_validate({})


def test_every_key_says_what_it_does() -> None:
    for name, field in AutoscalingSection.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"min_replicas": 5}, "max_replicas 4 is less than min_replicas 5; raise it"),
        ({"scale_down_at": 0.55}, "scale_down_at 0.55 is not below scale_up_at 0.55"),
        (
            {"target_ttft_s": None, "target_itl_s": None, "target_kv_share": None}
            | {"target_places_share": None},
            "every target is null",
        ),
        ({"max_replicas": 0}, "greater than or equal to 1"),
        ({"target_ttft_s": float("nan")}, "finite number"),
        ({"window_s": float("inf")}, "finite number"),
        ({"target_kv_share": 1.5}, "less than or equal to 1"),
        ({"from_zero": "wait"}, "'hold' or 'refuse'"),
        ({"scale_up": 0.5}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        AutoscalingSection.model_validate({"max_replicas": 4} | given)
