"""Which graphs can be served, and what is said of those that cannot."""

from __future__ import annotations

import pytest

from penstock.ensemble_types import ModelType, TensorType, mismatch, tensor_types
from penstock.ensembles import (
    Step,
    check_graph,
    free_inputs,
    free_outputs,
    needed,
    split_reference,
    stages,
)
from penstock.errors import FailedPrecondition, InvalidArgument


def step(name: str, takes: str, gives: str, model: str = "") -> Step:
    """`takes` and `gives` are tensors with blanks between; the model calls them i0, i1 …, o0, o1 …"""
    return Step(
        name,
        model or name,
        {f"i{index}": tensor for index, tensor in enumerate(takes.split())},
        {f"o{index}": tensor for index, tensor in enumerate(gives.split())},
    )


DIAMOND = [step("join", "b c", "d"), step("left", "a", "b"), step("right", "a", "c")]


def test_sequence_fan_out_and_join_follow_from_the_tensors() -> None:
    assert check_graph(DIAMOND, ["a"], ["d"]) == ()
    assert [[one.name for one in stage] for stage in stages(DIAMOND)] == [["left", "right"], ["join"]]
    assert (free_inputs(DIAMOND), free_outputs(DIAMOND)) == (("a",), ("d",))


def test_only_what_outputs_depend_on_is_needed() -> None:
    steps = [*DIAMOND, step("aside", "b", "e"), step("after", "d", "f")]
    assert [one.name for one in needed(steps, ["b"])] == ["left"]
    assert [one.name for one in needed(steps, ["e"])] == ["left", "aside"]
    assert [one.name for one in needed(steps, ["d"])] == ["join", "left", "right"]
    assert needed(steps, ["a"]) == ()


def test_what_nobody_uses_is_remarked() -> None:
    steps = [step("left", "a", "b spare"), step("aside", "a", "e")]
    assert check_graph(steps, ["a", "more"], ["b"]) == (
        "Step aside adds nothing to the outputs and never runs.",
        "Nobody uses 'spare', which step left gives.",
        "No step takes the input 'more'.",
    )


@pytest.mark.parametrize(
    ("steps", "inputs", "outputs", "words"),
    [
        ([], ["a"], ["b"], "An ensemble has 1 to 64 steps, not 0"),
        ([step(f"s{n}", "a", f"t{n}") for n in range(65)], ["a"], ["t0"], "1 to 64 steps, not 65"),
        ([step("x", "a", "b"), step("x", "a", "c")], ["a"], ["b"], "Two steps are called x"),
        ([step("-", "a", "b", "m")], ["a"], ["b"], "'-' cannot name a step"),
        ([step("x", "a", "b", "m@")], ["a"], ["b"], "'m@' is not what a step can call"),
        ([step("x", "", "b")], ["a"], ["b"], "Step x takes nothing"),
        ([step("x", "a", "")], ["a"], ["b"], "Step x gives nothing"),
        ([Step("x", "x", {"i": "a"}, {"o": "\n"})], ["a"], ["b"], "is not a tensor name"),
        ([step("x", "a", "b"), step("y", "a", "b")], ["a"], ["b"], "'b' is given by step y and by step x"),
        ([step("x", "a", "a")], ["a"], ["a"], "'a' is given by step x and by the ensemble's inputs"),
        ([step("x", "imag", "b")], ["image"], ["b"], r"takes 'imag' as its input i0.*Did you mean 'image'\?"),
        ([step("x", "q", "b")], ["a"], ["b"], r"There are a, b\."),
        (
            [step("x", "a", "label")],
            ["a"],
            ["lable"],
            r"'lable' is given by no step\. Did you mean 'label'\?",
        ),
        ([step("x", "y0", "x0"), step("y", "x0", "y0")], [], ["y0"], "x takes 'y0' of y, y takes 'x0' of x"),
        ([step("x", "a x0", "x0")], ["a"], ["x0"], "in a circle: x takes 'x0' of x"),
    ],
)
def test_a_graph_that_cannot_be_served_is_refused_with_the_reason(
    steps: list[Step], inputs: list[str], outputs: list[str], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_graph(steps, inputs, outputs)


def test_a_circle_is_shown_without_what_only_leads_to_it() -> None:
    steps = [step("lead", "a b2", "l"), step("b", "c2", "b2"), step("c", "d2", "c2"), step("d", "b2", "d2")]
    with pytest.raises(InvalidArgument, match="circle") as caught:
        check_graph(steps, ["a"], ["l"])
    assert caught.value.metadata["cycle"] == "b c d"


@pytest.mark.parametrize(
    ("text", "parts"),
    [("m", ("m", "")), ("m@good", ("m", "@good")), ("m:12", ("m", "12")), ("a.b-c_d", ("a.b-c_d", ""))],
)
def test_a_step_calls_a_deployment_or_one_version_of_it(text: str, parts: tuple[str, str]) -> None:
    assert split_reference(text) == parts


@pytest.mark.parametrize(
    "text", ["", "@good", "m:", "m:0", "m:x", "m@1", "m@a@b", "m:1:2", "m/1", "ü", "m:1@a"]
)
def test_what_is_no_name_is_not_called(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not what a step can call"):
        split_reference(text)


FP32, FP64 = TensorType("FP32", (-1, 4)), TensorType("FP64", (-1, 4))


def model(
    words: str = "m:1", *, takes: TensorType = FP32, gives: TensorType = FP32, batch: int = 8
) -> ModelType:
    return ModelType(
        {"i0": takes, "i1": TensorType("BYTES", (-1,), optional=True)}, {"o0": gives}, batch, words
    )


CHAIN = [step("x", "a", "b"), step("y", "b", "c")]
OPEN = {"a": TensorType()}, {"c": TensorType()}


def test_types_follow_from_the_models() -> None:
    gives = TensorType("INT64", (-1,), labels=("no", "yes"))
    models = {"x": model(takes=TensorType("FP32", (-1, 4))), "y": model(gives=gives)}
    types = tensor_types(CHAIN, models, *OPEN)
    assert (types["a"], types["b"], types["c"]) == (FP32, FP32, gives)


def test_an_input_of_several_steps_has_what_all_of_them_allow() -> None:
    steps = [step("x", "a", "b"), step("y", "a", "c")]
    models = {
        "x": model(takes=TensorType("FP32", (-1, -1, 3))),
        "y": model(takes=TensorType("FP32", (-1, 4, -1), optional=True)),
    }
    types = tensor_types(steps, models, {"a": TensorType()}, {"c": TensorType()})
    assert types["a"] == TensorType("FP32", (-1, 4, 3))
    only = tensor_types([steps[1]], {"y": models["y"]}, {"a": TensorType()}, {"c": TensorType()})
    assert only["a"].optional


def test_what_is_not_deployed_yet_says_nothing() -> None:
    types = tensor_types(CHAIN, {"y": model()}, *OPEN)
    assert types["a"] == types["b"] == TensorType()
    assert types["c"] == FP32


@pytest.mark.parametrize(
    ("steps", "models", "words"),
    [
        (
            CHAIN,
            {"x": model(gives=FP64), "y": model()},
            r"'b', the output o0 of step x.*step y.*FP64, not FP32",
        ),
        (CHAIN, {"y": model(gives=FP64)}, None),
        ([Step("x", "x", {"i": "a"}, {"o0": "c"})], {"x": model()}, r"Step x: m:1 has no input 'i'.*i0, i1"),
        ([Step("x", "x", {"i0": "a"}, {"o": "c"})], {"x": model()}, r"no output 'o'.*Did you mean 'o0'"),
        ([Step("x", "x", {"i1": "a"}, {"o0": "c"})], {"x": model()}, "needs the input 'i0'"),
    ],
)
def test_models_that_do_not_fit_are_told_apart(
    steps: list[Step], models: dict[str, ModelType], words: str | None
) -> None:
    if words is None:
        tensor_types(steps, models, *OPEN)
        return
    with pytest.raises(FailedPrecondition, match=words):
        tensor_types(steps, models, *OPEN)


@pytest.mark.parametrize(
    ("given", "taken", "words"),
    [
        (FP32, TensorType("FP32", (-1, -1)), ""),
        (FP32, TensorType(), ""),
        (TensorType("FP32", (2, 4)), FP32, ""),
        (FP32, FP64, "it is FP32, not FP64"),
        (FP32, TensorType("FP32", (-1,)), "it has the shape [-1, 4], not [-1]"),
        (FP32, TensorType("FP32", (-1, 5)), "it has the shape [-1, 4], not [-1, 5]"),
    ],
)
def test_a_tensor_fits_where_datatype_and_every_size_may_agree(
    given: TensorType, taken: TensorType, words: str
) -> None:
    assert mismatch(given, taken) == words
