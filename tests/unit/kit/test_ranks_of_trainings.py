"""Trainings that cannot be spread as asked are refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from penstock.scheduler.v1 import job_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs import check


def job(
    ranks: int, *, strategy: str = "", nodes: int = 1, min_nodes: int = 0, gpus: int = 0, **recipe: Any
) -> job_pb2.Job:
    said = {"name": strategy} | recipe.pop("spread", {})
    found = {
        "train": {"dataset": "digits", "model": "models/digits", "recipe": {"strategy": said, **recipe}},
        "nodes": nodes,
        "ranksPerNode": ranks,
        "minNodes": min_nodes,
        "resources": {"gpus": gpus},
    }
    return json_format.ParseDict(found, job_pb2.Job())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (job(2, strategy="single"), "single is one process, and the job asks for 2 ranks"),
        (job(1, precision="fp16"), "fp16 needs a GPU"),
        (job(2, strategy="pipeline", precision="fp16", gpus=1), "cannot compute in fp16"),
        (job(2, strategy="fsdp", precision="fp16", gpus=1), "cannot compute in fp16"),
        (job(2, strategy="parameter_server", spread={"servers": 2}), "2 of 2 ranks would be servers"),
        (job(1, strategy="parameter_server"), "1 of 1 ranks would be servers"),
        (
            job(1, strategy="parameter_server", nodes=4, min_nodes=2, spread={"servers": 2}),
            "2 of 2 ranks would be servers",
        ),
        (job(4, batch_size=3), "A batch of 3 rows cannot be cut into parts for 4 ranks"),
        (job(4, strategy="pipeline", batch_size=6, spread={"microbatches": 8}), "into 8 pieces"),
        (
            job(4, strategy="pipeline", architecture="mlp", architecture_parameters={"hidden": [8, 8]}),
            "mlp has 3 layers here, which cannot be cut into 4 stages",
        ),
        (
            job(3, strategy="tensor_parallel", task="text", architecture="transformer"),
            "4 heads of attention cannot be spread over 3 ranks",
        ),
        (
            job(1, nodes=4, min_nodes=2, strategy="tensor_parallel", task="text", architecture="transformer"),
            "4 heads of attention cannot be spread over 3 ranks",
        ),
        (job(2, strategy="fsdp", optimizer={"name": "adafactor"}), "needs whole tensors"),
        (job(2, strategy="pipelin"), "pipeline"),
    ],
)
def test_what_cannot_be_spread_is_refused_with_words(wrong: job_pb2.Job, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check(wrong)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "right",
    [
        job(4),
        job(4, batch_size=2, optimizer={"name": "gd"}),
        job(4, strategy="pipeline", task="image", architecture="vit"),
        job(4, strategy="tensor_parallel", task="text", architecture="transformer"),
        job(4, strategy="parameter_server", spread={"servers": 2, "asynchronous": True}),
        job(2, precision="fp16", gpus=1),
    ],
)
def test_what_can_be_spread_is_taken(right: job_pb2.Job) -> None:
    check(right)
