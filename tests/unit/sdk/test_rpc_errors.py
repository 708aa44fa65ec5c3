"""What grpc raises, in the words of the error tree."""

from __future__ import annotations

import grpc

from penstock.errors import Internal, Unavailable
from penstock.rpc_errors import from_rpc_error


def raised(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


def test_a_stream_that_is_cut_while_it_is_written_to_may_be_tried_again() -> None:
    error = from_rpc_error(raised(grpc.StatusCode.INTERNAL, "Internal error from Core"), target="mesh")
    assert isinstance(error, Unavailable)
    assert "mesh: the stream ended while the request was being sent" in error.message


def test_other_internal_errors_stay_internal() -> None:
    assert isinstance(from_rpc_error(raised(grpc.StatusCode.INTERNAL, "a fault")), Internal)
