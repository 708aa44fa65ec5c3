# Made from _async/projects.py by libs/make_sync.py; edit that and run it again.
"""Projects: quotas, and shares of the cluster."""

from __future__ import annotations

from google.protobuf import field_mask_pb2

from penstock._sync.core import Core
from penstock.common.v1 import resources_pb2
from penstock.names import resource
from penstock.scheduler.v1 import project_pb2
from penstock.scheduler.v1 import project_service_pb2 as service


class Projects(Core):
    """Whose deployments and jobs share a quota. ``default`` is always there."""

    def create_project(
        self,
        name: str,
        *,
        quota: resources_pb2.Resources | None = None,
        weight: float = 0.0,
        description: str = "",
    ) -> project_pb2.Project:
        """Make a project.

        Args:
            name: Its name.
            quota: What its replicas and tasks may hold together: ``cpu_millis``, ``memory_bytes``, ``gpus``
                (and ``gpu_memory_millis`` for a part of one more); what is 0 is unbounded.
            weight: Its share beside other projects when all want more than there is; 0 means 1.
            description: What it is for.

        Raises:
            AlreadyExists: There is one of that name.
            InvalidArgument: A number is negative or absurd, or bounds what cannot be bounded.
        """
        project = project_pb2.Project(
            name=resource("projects", name), quota=quota, weight=weight, description=description
        )
        return self._unary(
            self._projects.CreateProject, service.CreateProjectRequest(project=project), retry=False
        )

    def get_project(self, name: str) -> project_pb2.Project:
        """Return a project with what it holds.

        Raises:
            NotFound: There is none of that name.
        """
        request = service.GetProjectRequest(name=resource("projects", name))
        return self._unary(self._projects.GetProject, request)

    def list_projects(self, *, limit: int | None = None) -> list[project_pb2.Project]:
        """Return all projects."""
        return self._list(
            self._projects.ListProjects, service.ListProjectsRequest(), lambda page: page.projects, limit
        )

    def update_project(
        self,
        name: str,
        *,
        quota: resources_pb2.Resources | None = None,
        weight: float | None = None,
        description: str | None = None,
        etag: str = "",
        allow_below_use: bool = False,
    ) -> project_pb2.Project:
        """Change a project; what is None stays as it is.

        Args:
            name: Its name.
            quota: The whole of its quota: what is 0 becomes unbounded.
            weight: Its share beside other projects.
            description: What it is for.
            etag: That of the project as it was read; refused if it changed since.
            allow_below_use: Take a quota below what is held: what runs stays, nothing new is placed until
                enough has ended.

        Raises:
            NotFound: There is none of that name.
            Aborted: Somebody changed it since it was read.
            FailedPrecondition: The quota is below what is held; the words say what is.
        """
        given = {"quota": quota, "weight": weight, "description": description}
        paths = [path for path, value in given.items() if value is not None]
        if not paths:
            return self.get_project(name)
        project = project_pb2.Project(
            name=resource("projects", name),
            quota=quota,
            weight=weight or 0.0,
            description=description or "",
            etag=etag,
        )
        request = service.UpdateProjectRequest(
            project=project,
            update_mask=field_mask_pb2.FieldMask(paths=paths),
            allow_below_use=allow_below_use,
        )
        # Somebody who says which one was read must not be told that his own change was another's.
        return self._unary(self._projects.UpdateProject, request, retry=not etag)

    def delete_project(self, name: str) -> None:
        """Remove a project.

        Raises:
            NotFound: There is none of that name.
            FailedPrecondition: A deployment or an unfinished job names it, or it is the default one.
        """
        self._delete(
            self._projects.DeleteProject, service.DeleteProjectRequest(name=resource("projects", name))
        )
