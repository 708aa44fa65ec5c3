"""What a lineage and a gate's verdict may say."""

import math
from dataclasses import replace
from typing import Any

import pytest

from penstock_kit.errors import InvalidArgument
from penstock_registry.domain.lineage import GateVerdict, Lineage, check_lineage, check_verdict

WHOLE = Lineage(
    parents=("models/digits/versions/1",),
    operation="compress",
    code_digest="sha256:00",
    data_digest="sha256:11",
    parameters={"steps": "quantize"},
    job="jobs/compress-1",
    datasets=("artifacts/digits/versions/3",),
    seed=-7,
    environment={"python": "3.11.2", "torch": "2.13.0"},
)
VERDICT = GateVerdict(
    passed=False,
    metric="accuracy",
    max_metric_loss=0.01,
    failures=("it lost 0.02",),
    measured={"metric_loss": 0.02},
)


def test_a_whole_lineage_is_kept_and_read_back() -> None:
    check_lineage(WHOLE)
    assert Lineage.from_dict(WHOLE.to_dict()) == WHOLE
    check_verdict(VERDICT)
    assert GateVerdict.from_dict(VERDICT.to_dict()) == VERDICT


def test_a_lineage_stored_by_an_earlier_release_is_read() -> None:
    fields = {"parents": [], "operation": "push", "code_digest": "", "data_digest": "", "parameters": {}}
    assert Lineage.from_dict(fields) == Lineage(operation="push")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job": "compress-1"}, "jobs/"),
        ({"datasets": ("digits",)}, "artifacts/"),
        ({"datasets": ("artifacts/digits",)}, "artifacts/"),
        ({"datasets": ("artifacts/d/versions/1",) * 2}, "twice"),
        ({"datasets": tuple(f"artifacts/d/versions/{n}" for n in range(1, 66))}, "more than 64"),
        ({"environment": {"": "x"}}, "environment"),
        ({"environment": {"a": "\x00"}}, "NUL"),
        ({"data_digest": "two words"}, "no spaces"),
        ({"parents": ("models/digits",)}, "models/"),
    ],
)
def test_a_lineage_that_nobody_could_follow_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_lineage(replace(WHOLE, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_metric_loss": -0.1}, "max_metric_loss"),
        ({"min_speed_up": math.inf}, "min_speed_up"),
        ({"measured": {"speed_up": math.nan}}, "finite"),
        ({"passed": True}, "names failures"),
        ({"failures": ("x" * 2000,)}, "failures"),
        ({"failures": ("x",) * 65}, "more than 64"),
    ],
)
def test_a_verdict_that_contradicts_itself_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_verdict(replace(VERDICT, **changes))
