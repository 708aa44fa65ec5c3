"""Does every request get its own rows, whatever is joined with it?"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.queue.v1.envelope_pb2 import RequestHeader
from penstock_kit.errors import DeadlineExceeded, FailedPrecondition
from penstock_kit.oip import BFLOAT16, Form, InferRequest, Signature, TensorSpec
from penstock_kit.queue.messages import Request
from penstock_worker.hotpath.execution import Executor, ModelError, Work

Arrays = Mapping[str, Any]


class Model:
    def __init__(self, function: Callable[[Arrays], Arrays]) -> None:
        self._function = function
        self.rows: list[int] = []

    def predict(self, batch: Arrays) -> Arrays:
        self.rows.append(len(next(iter(batch.values()))))
        return self._function(batch)

    def close(self) -> None:
        pass


def executor(
    function: Callable[[Arrays], Arrays],
    *,
    max_rows: int = 8,
    datatype: str = "FP32",
    takes: tuple[int, ...] = (-1, 2),
    gives: tuple[int, ...] = (-1, 2),
    pad: bool = False,
) -> tuple[Executor, Model]:
    model = Model(function)
    signature = Signature(
        (TensorSpec("x", "FP32", takes),), (TensorSpec("y", datatype, gives),), batched=takes[0] == -1
    )
    return Executor(model, signature, max_rows=max_rows, pad=pad), model


def work(array: Any, *, seconds: float = 60) -> Work:
    header = RequestHeader(id=b"1", deadline_unix_micros=int((time.time() + seconds) * 1e6))
    x = np.asarray(array, dtype=np.float32)
    infer = InferRequest({"x": x}, len(x) if x.ndim else 1, Form.RAW)
    return Work(Request(header, b"", 0, b"1-0", b"s"), infer, 1, time.time_ns())


def double(batch: Arrays) -> Arrays:
    return {"y": batch["x"] * 2}


def test_joined_requests_get_their_own_rows() -> None:
    run, model = executor(double)
    works = [work(np.full((rows, 2), rows)) for rows in (1, 3, 2)]
    outcomes = run.run(works)
    assert model.rows == [6]
    for outcome, rows in zip(outcomes, (1, 3, 2), strict=True):
        assert not isinstance(outcome.result, Exception)
        assert outcome.result["y"].tolist() == [[2 * rows] * 2] * rows
    assert [(call.rows, call.compute_ns > 0) for call in run.calls] == [(6, True)]


def test_a_model_gets_numbers_that_lie_where_the_processor_wants_them() -> None:
    seen: list[bool] = []

    def look(batch: Arrays) -> Arrays:
        seen.append(batch["x"].flags.aligned)
        return double(batch)

    run, _ = executor(look)
    message = b"?" + np.array([[1, 2]], np.float32).tobytes()
    unaligned = work([[0, 0]])
    unaligned.infer.inputs["x"] = np.frombuffer(message, np.float32, 2, 1).reshape(1, 2)
    assert not unaligned.infer.inputs["x"].flags.aligned
    (outcome,) = run.run([unaligned])
    assert outcome.result["y"].tolist() == [[2, 4]]  # type: ignore[index]
    assert seen == [True]


@pytest.mark.parametrize(
    "arrays",
    [
        [np.arange(6, dtype=np.float16).reshape(3, 2), np.arange(2, dtype=np.float16).reshape(1, 2)],
        [np.array([True, False]), np.array([True])],
        [np.zeros((0, 3), np.int64), np.zeros((0, 3), np.int64)],
        [np.arange(12, dtype=np.int32).reshape(4, 3)[::2], np.arange(3, dtype=np.int32).reshape(1, 3)],
        [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(6.0).reshape(2, 3)],
        [np.frombuffer(b"?" + np.ones(4, np.float32).tobytes(), np.float32, 4, 1).reshape(2, 2)] * 2,
        [np.ones((2, 2), BFLOAT16), np.zeros((1, 2), BFLOAT16)],
        [np.array([b"a", b"bc"], dtype=object), np.array([b""], dtype=object)],
    ],
    ids=["halves", "booleans", "no rows", "every other row", "columns", "unaligned", "bfloat16", "texts"],
)
def test_arrays_of_any_kind_are_joined_into_memory_of_their_own(arrays: list[Any]) -> None:
    def keep(batch: Arrays) -> Arrays:
        seen.append(batch["x"])
        return {"y": batch["x"]}

    seen: list[Any] = []
    trailing = arrays[0].shape[1:]
    run, _ = executor(keep, takes=(-1, *trailing), gives=(-1, *trailing))
    works = [work(np.zeros((len(array), *trailing))) for array in arrays]
    for one, array in zip(works, arrays, strict=True):
        one.infer.inputs["x"] = array
    run.run(works)
    joined, want = seen[0], np.concatenate(arrays)
    assert joined.dtype == want.dtype
    assert joined.tolist() == want.tolist()
    assert joined.flags.writeable
    assert joined.flags.aligned
    assert not any(np.shares_memory(joined, array) for array in arrays)


def test_only_the_request_that_makes_the_model_fail_gets_the_error() -> None:
    def touchy(batch: Arrays) -> Arrays:
        if (batch["x"] < 0).any():
            raise ArithmeticError("below zero")
        return double(batch)

    run, model = executor(touchy)
    good, bad, too = run.run([work([[1, 1]]), work([[-1, 1]]), work([[3, 3]])])
    assert model.rows == [3, 1, 1, 1]
    assert isinstance(bad.result, ModelError)
    assert bad.result.message == "The model raised ArithmeticError: below zero"
    assert [good.result["y"].tolist(), too.result["y"].tolist()] == [[[2, 2]], [[6, 6]]]  # type: ignore[index]


def test_a_model_that_cannot_be_joined_after_all_is_served_one_by_one() -> None:
    run, model = executor(lambda batch: {"y": batch["x"][:1] * 2})
    outcomes = run.run([work([[1, 1]]), work([[2, 2]])])
    assert model.rows == [2, 1, 1]
    assert [outcome.result["y"].tolist() for outcome in outcomes] == [[[2, 2]], [[4, 4]]]  # type: ignore[index]


def test_a_request_past_its_deadline_is_not_computed() -> None:
    run, model = executor(double)
    outcomes = run.run([work([[1, 1]], seconds=-1), work([[2, 2]])])
    assert model.rows == [1]
    assert isinstance(outcomes[0].result, DeadlineExceeded)
    assert not isinstance(outcomes[1].result, Exception)


def test_a_request_whose_deadline_passes_while_its_batch_fails_is_not_computed_alone() -> None:
    until = time.time() + 0.05

    def fails_slowly(batch: Arrays) -> Arrays:
        while len(batch["x"]) > 1 and time.time() < until:
            pass
        if len(batch["x"]) > 1:
            raise ArithmeticError("not together")
        return double(batch)

    run, model = executor(fails_slowly)
    patient, hasty = work([[1, 1]]), work([[2, 2]], seconds=0.04)
    outcomes = run.run([patient, hasty])
    assert model.rows == [2, 1]
    assert not isinstance(outcomes[0].result, Exception)
    assert isinstance(outcomes[1].result, DeadlineExceeded)


@pytest.mark.parametrize("length", [2**19, 2**21])
def test_requests_that_do_not_fit_into_memory_together_are_computed_one_by_one(length: int) -> None:
    run, model = executor(
        lambda batch: {"y": batch["x"].reshape(1, -1)[:, :1]},
        takes=(-1, -1, -1, -1),
        gives=(-1, -1),
        pad=True,
    )
    # Each is long in another direction; padded, they would take 2**60 bytes or more.
    shapes = [(1, length, 1, 1), (1, 1, length, 1), (1, 1, 1, length)]
    outcomes = run.run([work(np.full(shape, number)) for number, shape in enumerate(shapes)])
    assert model.rows == [1, 1, 1]
    assert [outcome.result["y"].tolist() for outcome in outcomes] == [[[0]], [[1]], [[2]]]  # type: ignore[index]


def test_an_error_of_our_tree_that_the_model_raises_goes_to_the_caller_as_it_is() -> None:
    def picky(batch: Arrays) -> Arrays:
        raise FailedPrecondition("not on Sundays")

    (outcome,) = executor(picky)[0].run([work([[1, 1]])])
    assert isinstance(outcome.result, FailedPrecondition)


def test_shapes_are_joined_only_if_equal_or_padded() -> None:
    narrow, wide = work([[1.0, 2.0]]), work([[1.0, 2.0, 3.0]])
    plain, _ = executor(double, takes=(-1, -1), gives=(-1, -1))
    assert plain.key(narrow.infer) != plain.key(wide.infer)
    padding, model = executor(double, takes=(-1, -1), gives=(-1, -1), pad=True)
    assert padding.key(narrow.infer) == padding.key(wide.infer)
    short, long = padding.run([narrow, wide])
    assert model.rows == [2]
    assert short.result["y"].tolist() == [[2, 4]]  # type: ignore[index]
    assert long.result["y"].tolist() == [[2, 4, 6]]  # type: ignore[index]


def test_a_model_without_a_batch_runs_each_request_as_it_is() -> None:
    run, _ = executor(double, max_rows=1, takes=(2,), gives=(2,))
    assert run.key(work([1, 2]).infer) is None
    (outcome,) = run.run([work([1, 2])])
    assert outcome.result["y"].tolist() == [2, 4]  # type: ignore[index]


@pytest.mark.parametrize(
    ("datatype", "given", "want"),
    [
        ("FP32", np.float64(1.5), np.float32(1.5)),
        ("FP64", np.float32(1.5), np.float64(1.5)),
        ("INT32", np.int64(7), np.int32(7)),
        ("FP32", np.int64(7), np.float32(7)),
        ("BF16", np.float32(1.5), np.array(1.5, dtype=BFLOAT16)[()]),
        ("FP32", np.array(1.5, dtype=BFLOAT16)[()], np.float32(1.5)),
        ("BYTES", "é", "é".encode()),
        ("BYTES", b"raw", b"raw"),
    ],
)
def test_precision_follows_the_signature(datatype: str, given: Any, want: Any) -> None:
    run, _ = executor(lambda batch: {"y": np.array([given])}, datatype=datatype, gives=(-1,))
    (outcome,) = run.run([work([[1, 1]])])
    assert not isinstance(outcome.result, Exception)
    array = outcome.result["y"]
    assert array.dtype == (object if datatype == "BYTES" else np.asarray(want).dtype)
    assert array.tolist() == [want if datatype == "BYTES" else np.asarray(want).item()]


@pytest.mark.parametrize(
    ("datatype", "given"),
    [
        ("INT32", np.float32(1)),
        ("BOOL", np.int8(1)),
        ("FP32", "text"),
        ("BYTES", np.float32(1)),
        ("FP32", 1j),
    ],
)
def test_another_kind_than_the_signature_says_is_a_model_error(datatype: str, given: Any) -> None:
    run, _ = executor(lambda batch: {"y": np.array([given])}, datatype=datatype, gives=(-1,))
    (outcome,) = run.run([work([[1, 1]])])
    assert isinstance(outcome.result, ModelError)
    assert "output y" in outcome.result.message


def test_requests_of_very_different_lengths_are_not_padded_to_one_another() -> None:
    run, _ = executor(double, takes=(-1, -1), gives=(-1, -1), pad=True)
    keys = [run.key(work(np.zeros((1, length))).infer) for length in (1, 8, 9, 16, 17, 100)]
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 4


lengths = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=6)


@given(lengths)
def test_a_padded_answer_is_the_one_without_padding(shapes: list[tuple[int, int, int]]) -> None:
    """Two inputs of variable lengths; outputs of both, of one turned around, and of none."""

    def compute(batch: Arrays) -> Arrays:
        x, mask = batch["x"], batch["mask"]
        return {
            "scaled": x * 2,
            "turned": np.ascontiguousarray(x.transpose(0, 2, 1)),
            "marked": mask + 1,
            "sum": x.sum(axis=(1, 2)),
        }

    signature = Signature(
        (TensorSpec("x", "FP32", (-1, -1, -1)), TensorSpec("mask", "FP32", (-1, -1))),
        (
            TensorSpec("scaled", "FP32", (-1, -1, -1)),
            TensorSpec("turned", "FP32", (-1, -1, -1)),
            TensorSpec("marked", "FP32", (-1, -1)),
            TensorSpec("sum", "FP32", (-1,)),
        ),
        batched=True,
    )
    run = Executor(Model(compute), signature, max_rows=64, pad=True)
    works = []
    for index, (rows, width, height) in enumerate(shapes):
        one = work(np.zeros((rows, 1)))
        # Widths and heights differ, else nobody could say with which of them a turned output grew.
        x = np.full((rows, width, 20 + height), index + 1, np.float32)
        one.infer.inputs = {"x": x, "mask": x[:, :, 0]}
        works.append(one)
    together = run.run(works)
    assert len(run.calls) == 1
    for one, outcome in zip(works, together, strict=True):
        (alone,) = run.run([one])
        assert isinstance(outcome.result, dict)
        assert isinstance(alone.result, dict)
        for name, array in alone.result.items():
            assert outcome.result[name].shape == array.shape
            assert outcome.result[name].tolist() == array.tolist()
