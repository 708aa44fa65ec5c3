"""Columns of a dataset become the inputs of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock_kit.oip import Signature, TensorSpec
from penstock_worker.adapters.measuring import drawn_inputs, inputs_of
from penstock_worker.usecases.job_context import JobFailure

OUTPUT = TensorSpec("y", "FP32", (-1, 2))


def taking(*inputs: TensorSpec) -> Signature:
    return Signature(inputs, (OUTPUT,), batched=True)


def test_inputs_take_the_columns_of_their_names_in_their_datatypes() -> None:
    signature = taking(TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,)))
    found = inputs_of(signature, {"b": torch.tensor([1.0, 2.0]), "a": np.zeros((2, 2)), "more": [0, 0]})
    assert list(found) == ["a", "b"]
    assert [found[name].dtype.str for name in found] == ["<f4", "<i8"]


def test_one_input_takes_the_only_column_and_rows_of_the_same_size_in_another_shape() -> None:
    found = inputs_of(taking(TensorSpec("image", "FP32", (-1, 1, 8, 8))), {"x": np.zeros((3, 8, 8))})
    assert found["image"].shape == (3, 1, 8, 8)


def test_one_input_takes_all_numbers_side_by_side() -> None:
    columns = {"age": np.array([1.0, 2.0]), "size": np.array([[3.0], [4.0]])}
    found = inputs_of(taking(TensorSpec("x", "FP32", (-1, 2))), columns)
    assert found["x"].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_texts_become_bytes() -> None:
    found = inputs_of(taking(TensorSpec("text", "BYTES", (-1,))), {"text": ["ja", "né"]})
    assert found["text"].tolist() == [b"ja", "né".encode()]


def test_what_does_not_fit_is_said_with_both_shapes() -> None:
    with pytest.raises(JobFailure, match=r"shape \[3\].*takes \[2\]") as failure:
        inputs_of(taking(TensorSpec("x", "FP32", (-1, 2))), {"x": np.zeros((4, 3))})
    assert failure.value.cause == "INVALID_DATA"
    with pytest.raises(JobFailure, match="has texts"):
        inputs_of(taking(TensorSpec("x", "FP32", (-1, 2))), {"x": ["a", "b"]})
    with pytest.raises(JobFailure, match="takes a, b; the dataset has x"):
        inputs_of(taking(TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "FP32", (-1,))), {"x": [1.0]})


def test_drawn_inputs_fit_the_signature_and_are_the_same_each_time() -> None:
    signature = taking(
        TensorSpec("x", "BF16", (-1, -1, 3)),
        TensorSpec("ids", "INT64", (-1, 4)),
        TensorSpec("text", "BYTES", (-1,)),
        TensorSpec("maybe", "FP32", (-1,), optional=True),
    )
    found = drawn_inputs(signature, 5)
    assert {name: array.shape for name, array in found.items()} == {
        "x": (5, 16, 3),
        "ids": (5, 4),
        "text": (5,),
    }
    assert set(found["ids"].ravel().tolist()) <= {0, 1}
    assert np.array_equal(found["x"], drawn_inputs(signature, 5)["x"])
