"""What is taken as a file of safetensors."""

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
import safetensors.torch
import torch

from penstock_kit.errors import InvalidArgument, Reason
from penstock_registry.domain.safetensors import check_safetensors


def check(data: bytes) -> None:
    check_safetensors(io.BytesIO(data), "model.safetensors", len(data))


def packed(header: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def test_what_the_library_writes_is_taken() -> None:
    check(safetensors.torch.save({"a": torch.zeros(3, 2), "b": torch.ones(4)}, {"made": "here"}))
    check(packed({}, b""))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (2**40).to_bytes(8, "little") + b"{}",
        packed({"a": tensor(0, 4)}, b"123"),
        packed({"a": tensor(0, 4)}, b"12345"),
        packed({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456"),
        packed({"a": tensor(0, 2), "b": tensor(4, 6)}, b"123456"),
        packed({"a": tensor(4, 2)}, b""),
        packed({"a": [1]}, b""),
        (5).to_bytes(8, "little") + b"[1,2]",
    ],
)
def test_what_its_header_does_not_describe_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument) as error:
        check(data)
    assert error.value.reason is Reason.MANIFEST_MISMATCH
