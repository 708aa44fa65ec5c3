"""`penstock projects`, against a server of the real stubs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf import empty_pb2

from penstock.common.v1 import resources_pb2
from penstock.errors import FailedPrecondition, NotFound, Reason
from penstock.scheduler.v1 import project_pb2, project_service_pb2, project_service_pb2_grpc
from penstock_cli.__main__ import main
from support.fake_mesh import FakeMesh

Run = Callable[..., tuple[int, str, str]]


class ProjectMesh(FakeMesh, project_service_pb2_grpc.ProjectServiceServicer):
    """Keeps projects; each holds a core and a half of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        project_service_pb2_grpc.add_ProjectServiceServicer_to_server(self, self._server)
        self.projects: dict[str, project_pb2.Project] = {}
        self.updates: list[project_service_pb2.UpdateProjectRequest] = []
        self._keep(project_pb2.Project(name="projects/default", weight=1.0))

    def _keep(self, project: project_pb2.Project) -> project_pb2.Project:
        project.used.CopyFrom(
            resources_pb2.Resources(cpu_millis=1000, memory_bytes=2_000_000_000, gpu_memory_millis=500)
        )
        project.dominant_share, project.waiting, project.etag = 0.125, 3, "1-1"
        self.projects[project.name] = project
        return project

    def CreateProject(self, request: Any, context: Any) -> project_pb2.Project:
        return self._keep(request.project)

    def GetProject(self, request: Any, context: Any) -> project_pb2.Project:
        if request.name not in self.projects:
            raise NotFound(f"There is no project {request.name}.")
        return self.projects[request.name]

    def ListProjects(self, request: Any, context: Any) -> project_service_pb2.ListProjectsResponse:
        return project_service_pb2.ListProjectsResponse(projects=self.projects.values())

    def UpdateProject(self, request: Any, context: Any) -> project_pb2.Project:
        self.updates.append(request)
        present = self.projects[request.project.name]
        if 0 < request.project.quota.cpu_millis < present.used.cpu_millis and not request.allow_below_use:
            raise FailedPrecondition("Project x holds 1 cores.", reason=Reason.QUOTA_BELOW_USE)
        request.update_mask.MergeMessage(request.project, present, True, False)
        return present

    def DeleteProject(self, request: Any, context: Any) -> empty_pb2.Empty:
        del self.projects[request.name]
        return empty_pb2.Empty()


@pytest.fixture
def mesh() -> Iterator[ProjectMesh]:
    with ProjectMesh() as mesh:
        yield mesh


@pytest.fixture
def penstock(mesh: ProjectMesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process; its exit status, output and errors."""
    monkeypatch.setenv("PENSTOCK_ENDPOINT", mesh.address)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_projects_are_listed_with_what_they_hold_of_what_they_may(penstock: Run) -> None:
    code, out, _ = penstock("projects", "create", "x", "--cpu", "4", "--memory", "8GB", "--gpus", "2.5")
    assert (code, out.strip()) == (0, "Made project x.")
    heading, _, line = penstock("projects")[1].splitlines()
    assert heading.split() == ["PROJECT", "CORES", "MEMORY", "GPUS", "WEIGHT", "SHARE", "WAITING"]
    assert " ".join(line.split()) == "x 1 of 4 2.0 GB of 8.0 GB 0.5 of 2.5 0 12.5% 3"
    shown = penstock("projects", "x")[1]
    assert "0.5 of 2.5" in shown
    assert "3 replicas and tasks" in shown
    (project,) = [p for p in json.loads(penstock("projects", "--json")[1]) if p["name"] == "projects/x"]
    assert project["quota"] == {
        "cpuMillis": "4000",
        "memoryBytes": "8000000000",
        "gpus": 2,
        "gpuMemoryMillis": 500,
    }


def test_an_update_changes_the_parts_that_are_given_and_says_what_it_read(
    penstock: Run, mesh: ProjectMesh
) -> None:
    penstock("projects", "create", "x", "--cpu", "4", "--gpus", "1")
    code, out, _ = penstock("projects", "update", "x", "--cpu", "8", "--weight", "2")
    assert (code, out.strip()) == (0, "Project x may hold 8 cores, 1 GPUs.")
    (sent,) = mesh.updates
    assert (list(sent.update_mask.paths), sent.project.etag) == (["quota", "weight"], "1-1")
    assert penstock("projects", "update", "x", "--gpus", "0", "--cpu", "0")[1].strip() == (
        "Project x may hold anything."
    )
    code, _, err = penstock("projects", "update", "x", "--cpu", "0.5")
    assert code != 0
    assert "holds 1 cores" in err
    assert penstock("projects", "update", "x", "--cpu", "0.5", "--allow-below-use")[0] == 0


def test_a_project_is_deleted_and_one_that_is_unknown_is_said_to_be(penstock: Run, mesh: ProjectMesh) -> None:
    penstock("projects", "create", "x")
    assert penstock("projects", "delete", "x")[0] != 0
    assert penstock("projects", "delete", "x", "--yes")[1].strip() == "Deleted x."
    assert set(mesh.projects) == {"projects/default"}
    code, _, err = penstock("projects", "show", "y")
    assert code != 0
    assert "no project" in err


def test_a_deployment_is_put_into_a_project(penstock: Run, mesh: ProjectMesh) -> None:
    penstock("deploy", "d", "--model", "digits:1", "--project", "x", "--no-wait", "--json")
    assert mesh.requests["CreateDeployment"].deployment.project == "projects/x"
