"""Which way a batch takes through a GPU, with a stand-in for the GPU."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock_kit.errors import FailedPrecondition
from penstock_kit.oip import BFLOAT16, NUMPY, Signature, TensorSpec
from penstock_worker.adapters.runtimes.cuda_path import (
    CudaPath,
    GraphMode,
    HostMemory,
    mode_of,
    size_for,
    sizes_of,
)
from penstock_worker.domain.runtime import Batch, Bundle, DeviceLost
from penstock_worker.hotpath.execution import Executor

Tensors = dict[str, torch.Tensor]


class HostStreams:
    """Does on the CPU, at once, what CUDA would do later."""

    def __init__(self) -> None:
        self.pinned: list[int] = []
        self.pin_fails = False
        self.capture_fails_from = 0
        self.captures: list[int] = []
        self.replays: list[int] = []
        self.drains = 0
        self.lost = False

    def pin(self, size: int) -> torch.Tensor:
        if self.pin_fails:
            raise RuntimeError("out of lockable memory")
        self.pinned.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()

    @contextlib.contextmanager
    def computing(self, uploaded: Sequence[torch.Tensor]) -> Iterator[None]:
        yield

    def mark(self) -> "HostStreams":
        return self

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("device-side assert triggered")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def capture(self, compute: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        outputs = {name: tensor.clone() for name, tensor in compute().items()}
        size = len(next(iter(outputs.values())))
        if size <= self.capture_fails_from:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures.append(size)

        def replay() -> None:
            self.replays.append(size)
            for name, tensor in compute().items():
                outputs[name].copy_(tensor)

        return replay, outputs

    def drain(self) -> None:
        self.drains += 1
        self.synchronize()

    def release(self) -> None:
        pass


X = Signature((TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1, 3)),), batched=True)


def doubled(tensors: Sequence[torch.Tensor]) -> Tensors:
    return {"y": tensors[0] * 2}


def path_of(
    streams: HostStreams,
    compute: Callable[[Sequence[torch.Tensor]], Tensors] = doubled,
    signature: Signature = X,
) -> CudaPath:
    return CudaPath(compute, signature, streams, lambda tensor: tensor.numpy())


def rows_of(count: int, first: float = 1.0) -> Any:
    return np.arange(first, first + count * 3, dtype=np.float32).reshape(count, 3)


def bundle(kind: str, **parameters: str) -> Bundle:
    return Bundle(Path(), kind, Path(), X, parameters)


# decisions


@pytest.mark.parametrize(
    ("max_rows", "sizes"), [(1, (1,)), (2, (2, 1)), (8, (8, 4, 2, 1)), (12, (12, 8, 4, 2, 1))]
)
def test_graphs_are_for_full_batches_and_the_powers_of_two_below(
    max_rows: int, sizes: tuple[int, ...]
) -> None:
    assert sizes_of(X, max_rows) == sizes


def test_a_million_rows_take_no_more_than_21_graphs() -> None:
    assert len(sizes_of(X, 1_000_000)) == 21


@pytest.mark.parametrize(
    "spec", [TensorSpec("x", "FP32", (-1, -1)), TensorSpec("x", "FP32", (-1, 3), optional=True)]
)
def test_there_are_no_graphs_of_inputs_without_a_fixed_shape(spec: TensorSpec) -> None:
    assert sizes_of(Signature((spec,), X.outputs, batched=True), 8) == ()


def test_a_model_that_does_not_batch_has_one_graph() -> None:
    fixed = Signature((TensorSpec("x", "FP32", (2, 3)),), (TensorSpec("y", "FP32", (2, 3)),), batched=False)
    assert sizes_of(fixed, 1) == (1,)
    streams = HostStreams()
    path = path_of(streams, signature=fixed)
    path.capture(GraphMode.PAD, 1)
    assert path.predict({"x": rows_of(2)})["y"].tolist() == (rows_of(2) * 2).tolist()
    assert len(streams.replays) == 2


@pytest.mark.parametrize(
    ("rows", "mode", "size"),
    [(4, "exact", 4), (3, "exact", None), (3, "pad", 4), (5, "pad", 8), (9, "pad", None), (1, "pad", 1)],
)
def test_rows_are_added_only_where_that_is_allowed(rows: int, mode: str, size: int | None) -> None:
    assert size_for(rows, (8, 4, 2, 1), GraphMode(mode)) == size


def test_exported_programs_get_graphs_and_torchscript_only_on_request() -> None:
    assert mode_of(bundle("pt2")) is GraphMode.EXACT
    assert mode_of(bundle("torchscript")) is GraphMode.OFF
    assert mode_of(bundle("torchscript", cuda_graphs="pad")) is GraphMode.PAD
    assert mode_of(bundle("pt2", cuda_graphs="off")) is GraphMode.OFF
    with pytest.raises(FailedPrecondition, match="it may be off, exact, pad"):
        mode_of(bundle("pt2", cuda_graphs="on"))


# batches


@pytest.mark.parametrize("mode", list(GraphMode))
def test_answers_are_the_models_whichever_way_they_come(mode: GraphMode) -> None:
    streams = HostStreams()
    path = path_of(streams)
    path.capture(mode, 8)
    streams.replays.clear()
    for rows in [*range(1, 11), 3, 8, 1]:
        given = rows_of(rows, first=rows)
        assert path.predict({"x": given})["y"].tolist() == (given * 2).tolist()
    assert (
        streams.replays
        == {
            GraphMode.OFF: [],
            GraphMode.EXACT: [1, 2, 4, 8, 8, 1],
            GraphMode.PAD: [1, 2, 4, 4, 8, 8, 8, 8, 4, 8, 1],
        }[mode]
    )


def test_an_answer_stays_while_later_ones_are_computed() -> None:
    path = path_of(HostStreams())
    path.capture(GraphMode.EXACT, 4)
    first = path.predict({"x": rows_of(4)})["y"]
    path.predict({"x": rows_of(4, first=100)})
    assert first.tolist() == (rows_of(4) * 2).tolist()


def test_two_batches_may_be_under_way_and_a_third_is_refused() -> None:
    path = path_of(HostStreams())
    path.capture(GraphMode.PAD, 4)
    for number in range(50):
        first = path.begin({"x": rows_of(4, first=number)})
        second = path.begin({"x": rows_of(3, first=-number)})
        with pytest.raises(RuntimeError, match="finish one first"):
            path.begin({"x": rows_of(1)})
        assert path.finish(second)["y"].tolist() == (rows_of(3, first=-number) * 2).tolist()
        assert path.finish(first)["y"].tolist() == (rows_of(4, first=number) * 2).tolist()


def test_a_batch_of_another_shape_or_datatype_than_the_graph_is_computed_without_it() -> None:
    streams = HostStreams()
    path = path_of(streams)
    path.capture(GraphMode.PAD, 4)
    streams.replays.clear()
    assert path.predict({"x": np.ones((2, 5), np.float32)})["y"].shape == (2, 5)
    assert path.predict({"x": np.ones((2, 3), np.float64)})["y"].dtype == np.float64
    assert not streams.replays


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
@pytest.mark.parametrize("datatype", [name for name in NUMPY if name not in ("BYTES", "BF16")])
def test_every_datatype_and_shape_goes_through_unchanged(datatype: str, shape: tuple[int, ...]) -> None:
    dims = (-1,) * len(shape)
    signature = Signature(
        (TensorSpec("x", datatype, dims),), (TensorSpec("x", datatype, dims),), batched=False
    )
    given = np.ones(shape, NUMPY[datatype])
    got = path_of(HostStreams(), lambda tensors: {"x": tensors[0]}, signature).predict({"x": given})["x"]
    assert got.dtype == given.dtype
    assert got.shape == shape
    assert (got == given).all()


def test_bfloat16_goes_through_bit_by_bit() -> None:
    signature = Signature((TensorSpec("x", "BF16", (-1, 3)),), X.outputs, batched=True)
    path = path_of(HostStreams(), lambda tensors: {"y": tensors[0].float()}, signature)
    given = np.array([[1.5, -2.0, 3.0]], np.float32)
    assert path.predict({"x": given.astype(BFLOAT16)})["y"].tolist() == given.tolist()


def test_bytes_of_a_request_need_not_be_writable_or_contiguous() -> None:
    given = np.frombuffer(np.arange(24, dtype=np.float32).tobytes(), np.float32).reshape(4, 6)[:, ::2]
    assert path_of(HostStreams()).predict({"x": given})["y"].tolist() == (given * 2).tolist()


# what goes wrong


def test_a_capture_that_fails_leaves_the_model_to_compute_and_says_why_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams = HostStreams()
    streams.capture_fails_from = 2
    path = path_of(streams)
    with caplog.at_level(logging.INFO):
        path.capture(GraphMode.EXACT, 8)
    assert path.captured == (8, 4)
    (record,) = caplog.records
    assert record.reason == "RuntimeError: operation not permitted when stream is capturing"  # type: ignore[attr-defined]
    assert path.predict({"x": rows_of(2)})["y"].tolist() == (rows_of(2) * 2).tolist()


def test_the_models_error_is_named_not_that_the_capture_could_not_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Ends(HostStreams):
        def capture(self, compute: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
            try:
                raise RuntimeError("the model waits for the device")
            finally:
                raise RuntimeError("capture failed")

    path_of(Ends()).capture(GraphMode.EXACT, 2)
    assert caplog.records[0].reason == "RuntimeError: the model waits for the device"  # type: ignore[attr-defined]


def test_a_model_that_changes_from_call_to_call_gets_no_graphs(caplog: pytest.LogCaptureFixture) -> None:
    calls = iter(range(1000))
    path = path_of(HostStreams(), lambda tensors: {"y": tensors[0] + next(calls)})
    path.capture(GraphMode.EXACT, 4)
    assert path.captured == ()
    assert "a replay gave another y than the model" in caplog.records[0].reason  # type: ignore[attr-defined]


def test_a_model_that_writes_to_its_inputs_may_have_graphs() -> None:
    path = path_of(HostStreams(), lambda tensors: {"y": tensors[0].mul_(2)})
    path.capture(GraphMode.EXACT, 2)
    assert path.captured == (2, 1)
    assert path.predict({"x": rows_of(2)})["y"].tolist() == (rows_of(2) * 2).tolist()


def test_what_is_not_a_number_does_not_count_as_a_change() -> None:
    path = path_of(HostStreams(), lambda tensors: {"y": torch.log(tensors[0] - 0.5)})
    path.capture(GraphMode.EXACT, 2)
    assert path.captured == (2, 1)


def test_after_an_error_of_the_model_the_next_batch_is_computed() -> None:
    def refuses(tensors: Sequence[torch.Tensor]) -> Tensors:
        if tensors[0][0, 0] < 0:
            raise ValueError("negative")
        return doubled(tensors)

    streams = HostStreams()
    path = path_of(streams, refuses)
    for _ in range(5):
        with pytest.raises(ValueError, match="negative"):
            path.predict({"x": -rows_of(1)})
    assert streams.drains == 5
    assert path.predict({"x": rows_of(1)})["y"].tolist() == (rows_of(1) * 2).tolist()


def test_a_gpu_that_is_lost_is_no_error_of_one_request() -> None:
    streams = HostStreams()
    path = path_of(streams)
    streams.lost = True
    with pytest.raises(DeviceLost, match="device-side assert"):
        path.predict({"x": rows_of(1)})
    with pytest.raises(DeviceLost):
        path_of(streams, lambda tensors: {}[""]).predict({"x": rows_of(1)})
    assert not issubclass(DeviceLost, Exception)


def test_the_executor_lets_the_process_end_with_its_gpu() -> None:
    class Lost:
        def predict(self, batch: Batch) -> Batch:
            raise DeviceLost("The GPU failed")

        def close(self) -> None:
            pass

    with pytest.raises(DeviceLost):
        Executor(Lost(), X, max_rows=4, pad=False).call({"x": rows_of(1)}, 1)


# memory


def test_page_locked_memory_is_reused_and_grows_only_for_larger_batches() -> None:
    streams = HostStreams()
    path = path_of(streams)
    for _ in range(100):
        for rows in (1, 64, 7, 100):
            path.predict({"x": rows_of(rows)})
    # x and y: 512 bytes at first, then 1024 (64 rows of 12 bytes), then 2048 (100 rows).
    assert streams.pinned == [512, 512, 1024, 1024, 2048, 2048]


def test_all_share_one_bound_beyond_which_memory_is_ordinary() -> None:
    streams = HostStreams()
    budget = [2048]
    first, second = HostMemory(streams, budget), HostMemory(streams, budget)
    first.take("x", (1000,), torch.uint8)
    second.take("x", (1000,), torch.uint8)
    assert budget == [0]
    assert second.take("y", (600,), torch.uint8).shape == (600,)
    assert second.take("x", (2, 5), torch.float32).shape == (2, 5)
    assert streams.pinned == [1024, 1024]


def test_a_machine_without_page_locked_memory_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    streams = HostStreams()
    streams.pin_fails = True
    path = path_of(streams)
    for _ in range(3):
        assert path.predict({"x": rows_of(2)})["y"].tolist() == (rows_of(2) * 2).tolist()
    assert [record.message for record in caplog.records] == ["no page-locked memory"]
