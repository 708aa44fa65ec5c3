"""A batch prediction of files alone, and as a process that may be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1 import envelope_pb2 as envelope
from penstock.scheduler.v1 import job_pb2
from penstock_kit.queue.messages import Request
from penstock_worker.adapters.batch_predict.job import run
from penstock_worker.domain.runtime import Mesh
from support.job_context import FileJobContext, dataset_of

DATASET = "artifacts/data/versions/1"


def rows_of(request: Request) -> np.ndarray[Any, Any]:
    """What a request sends as x, [rows, 4]."""
    asked = oip.ModelInferRequest.FromString(request.payload)
    return np.frombuffer(asked.raw_input_contents[0], np.float32).reshape(asked.inputs[0].shape)


def answer(request: Request) -> tuple[envelope.ReplyHeader, bytes]:
    """Twice the first two numbers of each row, as y."""
    y = rows_of(request)[:, :2] * 2
    out = oip.ModelInferResponse(model_name=request.header.model_name, model_version="1")
    out.outputs.add(name="y", datatype="FP32", shape=y.shape)
    out.raw_output_contents.append(np.ascontiguousarray(y, np.float32).tobytes())
    return envelope.ReplyHeader(), out.SerializeToString()


def write_rows(folder: Path, rows: int) -> Path:
    """A dataset whose row n begins with n."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.zeros((rows, 4), np.float32)
    x[:, 0] = np.arange(rows)
    x[:, 1] = -np.arange(rows)
    np.savez(folder / "data.npz", x=x)
    return folder


def prediction(
    root: Path, data: Path, redis_url: str, scheduler: str, name: str, **fields: Any
) -> FileJobContext:
    """A job that answers `data` with the deployment toy."""
    work = {"deployment": "deployments/toy", "dataset": DATASET, "artifact": "artifacts/answers", **fields}
    job = job_pb2.Job(name="jobs/predict", batch_predict=work, attempt=1)
    context = FileJobContext(root, job, datasets={DATASET: dataset_of(data)})
    context.mesh = Mesh(redis_url, scheduler, name)
    return context


def answers_of(context: FileJobContext, number: int = 1) -> pa.Table:
    """All chunks that were published."""
    folder = context.root / "published/artifacts/answers/versions" / str(number)
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])


def start(
    root: Path, data: Path, redis_url: str, scheduler: str, name: str, chunk_rows: int
) -> subprocess.Popen[bytes]:
    """The same as a process of its own."""
    arguments = map(str, (root, data, redis_url, scheduler, name, chunk_rows))
    return subprocess.Popen(
        [sys.executable, "-m", "support.batch_prediction", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


if __name__ == "__main__":
    root_, data_, redis_url_, scheduler_, name_, chunk_rows_ = sys.argv[1:]
    run(
        prediction(
            Path(root_),
            Path(data_),
            redis_url_,
            scheduler_,
            name_,
            chunk_rows=int(chunk_rows_),
            request_rows=8,
        )
    )
