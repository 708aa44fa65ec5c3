"""A real mesh for end-to-end tests: embedded servers and every service, each a process, on a free port.

`mesh` is one per test module; `start_mesh` makes others, with options of their own. `shared_mesh` is for
modules that harm nothing but what they have deployed: tests/conftest.py keeps them in one xdist worker.
When a test fails, the ends of the services' logs are in its report.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import pytest

import penstock
from penstock.errors import FailedPrecondition, NotFound
from support.mesh_process import Mesh

# A mesh takes some 5 s to start, and many times as long where others use the machine too.
_TIMEOUT_SECONDS = 300

_running: list[Mesh] = []


class _Shared:
    """The mesh of the last module that shared one, until another one needs other settings."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._env: dict[str, str] = {}
        self._mesh: Mesh | None = None

    def get(self, env: dict[str, str]) -> Mesh:
        if self._mesh is None or self._env != env or not self._mesh.runs():
            self.stop()
            self._mesh, self._env = Mesh(self._factory.mktemp("mesh") / "data", env=env), env
            _running.append(self._mesh)
        return self._mesh

    def clear(self) -> None:
        """Leave the next module all the room."""
        if self._mesh is None or not self._mesh.runs():
            return
        with penstock.Client(self._mesh.address) as client:

            def empty() -> bool:
                for each in client.list_deployments():
                    # A step of an ensemble goes after that, and some are on their way.
                    with contextlib.suppress(FailedPrecondition, NotFound):
                        client.undeploy(each.name.removeprefix("deployments/"))
                return not client.list_deployments() and not client.list_replicas()

            self._mesh.wait(empty, "there are no deployments any more", 60)

    def stop(self) -> None:
        if self._mesh is not None:
            mesh, self._mesh = self._mesh, None
            _running.remove(mesh)
            mesh.stop()


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Shared]:
    shared = _Shared(tmp_path_factory)
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def start_mesh(_shared: _Shared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Mesh]]:
    """Start a mesh, which is stopped after the module: `start_mesh(gateways=2, env={"PENSTOCK_…": "…"})`."""
    _shared.stop()  # no module after this one uses it
    started: list[Mesh] = []

    def start(*, gateways: int = 1, workers: int = 1, env: dict[str, str] | None = None) -> Mesh:
        mesh = Mesh(tmp_path_factory.mktemp("mesh") / "data", gateways=gateways, workers=workers, env=env)
        started.append(mesh)
        _running.append(mesh)
        return mesh

    yield start
    for mesh in started:
        _running.remove(mesh)
    for mesh in started:
        mesh.stop()


@pytest.fixture(scope="module")
def shared_mesh(_shared: _Shared) -> Iterator[Callable[..., Mesh]]:
    """Give a mesh that other modules have used and will use, without deployments: `shared_mesh(env={…})`."""
    yield lambda *, env=None: _shared.get(env or {})
    _shared.clear()


@pytest.fixture(scope="module")
def mesh(start_mesh: Callable[..., Mesh]) -> Mesh:
    """A mesh of one gateway and one worker, shared by the tests of a module."""
    return start_mesh()


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Give tests time to start a mesh."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the mesh with a test that failed."""
    report = yield
    if report.failed and item.path.is_relative_to(Path(__file__).parent):
        report.sections.extend((f"logs of {mesh.data_dir}", mesh.logs()) for mesh in _running)
    return report
