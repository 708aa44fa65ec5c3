"""gRPC reflection, v1 and v1alpha, for grpcurl, `buf curl` and their like.

Our OIP messages are compiled in package `penstock.oip.v2`, so that they can live beside another client's;
on the wire the service is `inference.GRPCInferenceService`. Reflection therefore shows a copy of the file
with the package rewritten, in a descriptor pool of its own: the process's default pool never sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from penstock.gateway.v1 import gateway_service_pb2
from penstock.oip.v2 import inference_pb2
from penstock.registry.v1 import artifact_service_pb2, registry_service_pb2
from penstock.scheduler.v1 import job_service_pb2, project_service_pb2, scheduler_service_pb2
from penstock_gateway.api.grpc.methods import parse
from penstock_gateway.hotpath.grpc_framing import Call, Handler

V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"
# The servicer's methods take a context and never use it.
_NO_CONTEXT: Any = None


def wire_file() -> descriptor_pb2.FileDescriptorProto:
    """Return the file of the Open Inference Protocol as callers know it: in package `inference`."""
    file = descriptor_pb2.FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = "inference/grpc_service.proto"
    repackage(file, "penstock.oip.v2", "inference")
    return file


def repackage(file: descriptor_pb2.FileDescriptorProto, old: str, new: str) -> None:
    """Move a file's package, and all its references to itself, to another name."""
    prefix, wanted = f".{old}.", f".{new}."
    file.package = new

    def rename(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(prefix, wanted)
        for nested in message.nested_type:
            rename(nested)

    for message in file.message_type:
        rename(message)
    for service in file.service:
        for rpc in service.method:
            rpc.input_type = rpc.input_type.replace(prefix, wanted)
            rpc.output_type = rpc.output_type.replace(prefix, wanted)


def pool() -> descriptor_pool.DescriptorPool:
    """Return a pool with everything that this gateway carries."""
    made = descriptor_pool.DescriptorPool()
    seen: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in seen:
            return
        seen.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        copy = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(copy)
        made.Add(copy)

    for module in (
        registry_service_pb2,
        artifact_service_pb2,
        scheduler_service_pb2,
        job_service_pb2,
        project_service_pb2,
        gateway_service_pb2,
        health_pb2,
        reflection_pb2,
    ):
        add(module.DESCRIPTOR)
    made.Add(wire_file())
    # The two versions of the reflection protocol differ in their package only.
    v1 = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1)
    v1.name = "grpc/reflection/v1/reflection.proto"
    repackage(v1, "grpc.reflection.v1alpha", "grpc.reflection.v1")
    made.Add(v1)
    return made


class ReflectionService:
    """Answers questions about services and messages.

    Args:
        services: Full names of all services that this gateway carries.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._servicer = ReflectionServicer([*services, V1, V1ALPHA], pool=pool())

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by path; the messages of the two versions are alike on the wire."""
        return {f"/{name}/ServerReflectionInfo": self._info for name in (V1, V1ALPHA)}

    async def _info(self, call: Call) -> None:
        await call.open()
        while (data := await call.read()) is not None:
            request = parse(reflection_pb2.ServerReflectionRequest, data)
            for answer in self._servicer.ServerReflectionInfo(iter((request,)), _NO_CONTEXT):
                await call.write(answer.SerializeToString())
            await asyncio.sleep(0)
