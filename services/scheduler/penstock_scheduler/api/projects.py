"""ProjectService."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from penstock.common.v1 import resources_pb2
from penstock.scheduler.v1 import project_pb2, project_service_pb2_grpc
from penstock.scheduler.v1 import project_service_pb2 as pb
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.rpc import principal
from penstock_scheduler.api.convert import time_to_message
from penstock_scheduler.api.paging import decode_token, encode_token, page_size
from penstock_scheduler.domain.project import (
    Holding,
    Project,
    check_description,
    check_weight,
    quota_of,
    resources_of,
)
from penstock_scheduler.domain.resources import Resources
from penstock_scheduler.usecases.ports import ProjectView
from penstock_scheduler.usecases.projects import CHANGEABLE, ProjectChanges, Projects

Context = grpc.aio.ServicerContext[Any, Any]


class ProjectServicer(project_service_pb2_grpc.ProjectServiceServicer):
    """Quotas and fair shares."""

    def __init__(self, projects: Projects) -> None:
        self._projects = projects

    async def CreateProject(self, request: pb.CreateProjectRequest, context: Context) -> project_pb2.Project:
        """See project_service.proto."""
        asked = request.project
        project = Project(
            names.parse_project(asked.name),
            _quota(asked.quota),
            check_weight(asked.weight),
            check_description(asked.description),
        )
        return project_to_message(await self._projects.create(project))

    async def GetProject(self, request: pb.GetProjectRequest, context: Context) -> project_pb2.Project:
        """See project_service.proto."""
        return project_to_message(await self._projects.get(names.parse_project(request.name)))

    async def ListProjects(
        self, request: pb.ListProjectsRequest, context: Context
    ) -> pb.ListProjectsResponse:
        """See project_service.proto."""
        size = page_size(request.page_size)
        found = await self._projects.page(decode_token(request.page_token), size + 1)
        page = found[:size]
        return pb.ListProjectsResponse(
            projects=[project_to_message(view) for view in page],
            next_page_token=encode_token(page[-1].project.name) if len(found) > size else "",
        )

    async def UpdateProject(self, request: pb.UpdateProjectRequest, context: Context) -> project_pb2.Project:
        """See project_service.proto."""
        asked = request.project
        changes = ProjectChanges(
            quota=_quota(asked.quota),
            weight=check_weight(asked.weight),
            description=check_description(asked.description),
            fields=_fields(list(request.update_mask.paths)),
            etag=asked.etag,
            allow_below_use=request.allow_below_use,
        )
        name = names.parse_project(asked.name)
        return project_to_message(await self._projects.update(name, changes, actor=principal()))

    async def DeleteProject(self, request: pb.DeleteProjectRequest, context: Context) -> Empty:
        """See project_service.proto."""
        await self._projects.delete(names.parse_project(request.name), actor=principal())
        return Empty()


def project_to_message(view: ProjectView) -> project_pb2.Project:
    """A project for callers."""
    project = view.project
    return project_pb2.Project(
        name=names.project_name(project.name),
        quota=_resources(project.quota),
        weight=project.weight,
        description=project.description,
        used=_resources(view.held),
        dominant_share=view.share,
        waiting=view.waiting,
        create_time=time_to_message(project.create_time),
        update_time=time_to_message(project.update_time),
        etag=project.etag,
    )


def _fields(paths: list[str]) -> frozenset[str]:
    """The fields that an update names; without a mask, all."""
    if not paths or paths == ["*"]:
        return frozenset(CHANGEABLE)
    for path in paths:
        if path not in CHANGEABLE:
            raise InvalidArgument(
                f"update_mask names {path!r}; use {', '.join(CHANGEABLE)}.", metadata={"field": "update_mask"}
            )
    return frozenset(paths)


def _quota(message: resources_pb2.Resources) -> Holding:
    return quota_of(
        Resources(
            cpu_millis=message.cpu_millis,
            memory_bytes=message.memory_bytes,
            gpus=message.gpus,
            gpu_memory_bytes=message.gpu_memory_bytes,
            gpu_memory_millis=message.gpu_memory_millis,
            disk_bytes=message.disk_bytes,
        )
    )


def _resources(holding: Holding) -> resources_pb2.Resources:
    resources = resources_of(holding)
    return resources_pb2.Resources(
        cpu_millis=resources.cpu_millis,
        memory_bytes=resources.memory_bytes,
        gpus=resources.gpus,
        gpu_memory_millis=resources.gpu_memory_millis,
    )
