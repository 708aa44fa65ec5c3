"""Do page-locked copies, streams and graphs change nothing but the time? Runs where there is a GPU.

`pytest -m gpu -s tests/integration/worker` also prints what they are worth.
"""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock_kit.oip import Signature, TensorSpec
from penstock_worker.adapters.runtimes.cuda_path import CudaPath, GraphMode
from penstock_worker.adapters.runtimes.cuda_streams import CudaStreams
from penstock_worker.adapters.runtimes.torch_runtime import TorchRuntime
from penstock_worker.domain.runtime import Bundle, Servable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

WIDTH = 64
MAX_ROWS = 32
LAYERS = 20
SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, WIDTH)),), (TensorSpec("y", "FP32", (-1, WIDTH)),), batched=True
)


class Deep(torch.nn.Module):
    """Many small kernels: what graphs are for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            *(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()) for _ in range(LAYERS))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Decides(torch.nn.Module):
    """Looks at its input before it goes on, which no graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x * 2
        return x - 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "model.pt2"
    rows = torch.export.Dim("rows", min=1, max=1024)
    program = torch.export.export(Deep().eval(), (torch.zeros(2, WIDTH),), dynamic_shapes=({0: rows},))
    torch.export.save(program, path)
    return path


def load(path: Path, device: str = "gpu0", **parameters: str) -> Servable:
    kind = "pt2" if path.suffix == ".pt2" else "torchscript"
    bundle = Bundle(path.parent, kind, path, SIGNATURE, parameters, max_rows=MAX_ROWS)
    return TorchRuntime().load(bundle, (device,) if device else ())


def path_of(servable: Servable) -> CudaPath:
    found = vars(servable)["_path"]
    assert isinstance(found, CudaPath)
    return found


def rows_of(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("mode", list(GraphMode))
def test_every_batch_size_is_answered_as_on_the_cpu(exported: Path, mode: GraphMode) -> None:
    on_cpu, on_gpu = load(exported, ""), load(exported, cuda_graphs=mode)
    captured = () if mode is GraphMode.OFF else (32, 16, 8, 4, 2, 1)
    assert path_of(on_gpu).captured == captured
    for rows in [*range(1, MAX_ROWS + 4), 1, MAX_ROWS]:
        x = rows_of(rows, rows)
        got, want = on_gpu.predict({"x": x})["y"], on_cpu.predict({"x": x})["y"]
        # GPUs may round the factors of a product to 10 bits (TF32).
        assert np.allclose(got, want, rtol=1e-2, atol=1e-2), f"{rows} rows"
    on_gpu.close()


def test_a_replayed_graph_gives_what_the_model_gives(exported: Path) -> None:
    graphs, without = load(exported), load(exported, cuda_graphs="off")
    for rows in (1, 2, 4, 8, 16, 32) * 5:
        x = rows_of(rows, rows)
        assert np.allclose(
            graphs.predict({"x": x})["y"], without.predict({"x": x})["y"], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("mode", list(GraphMode))
def test_copies_beside_computing_mix_up_nothing(mode: GraphMode) -> None:
    # 8 MiB at most: long enough under way that a copy from or to the wrong place would show.
    wide = 65_536
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, wide)),), (TensorSpec("y", "FP32", (-1, wide)),), batched=True
    )
    path = CudaPath(
        lambda tensors: {"y": tensors[0] * 2 + 1},
        signature,
        CudaStreams(torch.device("cuda:0")),
        lambda tensor: tensor.numpy(),
    )
    path.capture(mode, MAX_ROWS)
    before, expected = None, 0.0
    for number in range(500):
        rows = (number * 7) % MAX_ROWS + 1
        ticket = path.begin({"x": np.full((rows, wide), number, np.float32)})
        if before is not None:
            answer = path.finish(before)["y"]
            assert answer.min() == answer.max() == expected
        before, expected = ticket, number * 2.0 + 1
    assert before is not None
    assert (path.finish(before)["y"] == expected).all()
    path.close()


def test_a_model_that_looks_at_its_input_is_computed_without_graphs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.jit.save(torch.jit.script(Decides()), str(tmp_path / "model.pt"))
    with caplog.at_level(logging.WARNING):
        servable = load(tmp_path / "model.pt", cuda_graphs="exact")
    assert path_of(servable).captured == ()
    ours = [record for record in caplog.records if record.name.startswith("penstock")]
    assert [record.message for record in ours] == [
        "computing without CUDA graphs what they have not captured"
    ]
    for _ in range(3):
        ones = np.ones((4, WIDTH), np.float32)
        assert (servable.predict({"x": ones})["y"] == 2).all()
        assert (servable.predict({"x": -ones})["y"] == -2).all()


@pytest.mark.parametrize("mode", list(GraphMode))
def test_a_thousand_batches_take_no_more_memory_than_a_hundred(exported: Path, mode: GraphMode) -> None:
    servable = load(exported, cuda_graphs=mode)
    taken: list[tuple[int, int, int]] = []
    for number in range(1100):
        servable.predict({"x": rows_of(number % (MAX_ROWS + 8) + 1)})
        if number in (99, 1099):
            torch.cuda.synchronize()
            host = torch.cuda.host_memory_stats()["allocated_bytes.current"]
            taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), host))
    device, reserved, locked = (after - before for before, after in zip(*taken, strict=True))
    # Blocks that two streams used are given back late, and room is taken by 2 MiB at a time; a thousand
    # inputs would be 5 MiB.
    assert device <= 2**20
    assert reserved <= 2**22
    assert locked == 0


def test_what_streams_and_graphs_are_worth(exported: Path) -> None:
    ways = {
        "plain": load(exported, cuda_streams="off"),
        "streams": load(exported, cuda_graphs="off"),
        "graphs": load(exported),
    }
    print(f"\n{torch.cuda.get_device_name()}, {LAYERS} layers of {WIDTH}: µs of a call, × faster than plain")
    for rows in (1, 8, 32):
        x = rows_of(rows)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        # By turns, so that what else happens to the machine happens to all.
        for _ in range(300):
            for way, servable in ways.items():
                start = time.perf_counter()
                servable.predict({"x": x})
                seconds[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(values[50:]) for way, values in seconds.items()}
        words = [f"{way} {s * 1e6:.0f} (×{medians['plain'] / s:.2f})" for way, s in medians.items()]
        print(f"{rows:3d} rows: {', '.join(words)}")
        assert all(median > 0 for median in medians.values())
