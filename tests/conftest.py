"""Servers and seeds that every test may use.

One PostgreSQL and one Redis per pytest process (so per xdist worker), started when a test first asks for
one; a fresh database and an empty Redis per test.
"""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from psycopg import sql

from penstock_local.embedded import EmbeddedPostgres, EmbeddedRedis

# Those who run side by side share the processors: threads that one starts for each of them spin against those
# of the others, which took a third of all the time. Processes that tests start have it from here.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Kept in the environment, so that the workers of xdist have the seed that the header shows.
_SEED = int(os.environ.setdefault("PENSTOCK_TEST_SEED", str(random.SystemRandom().randrange(2**32))))

# A shell that runs us in the background has SIGINT ignored, and all that we start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test that talks to a server is as slow as the machine is busy: pytest-timeout is the limit, not a
# deadline.
hypothesis.settings.register_profile("penstock", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "penstock"))


# Modules of end-to-end tests that use one mesh after another.
_TOGETHER = {
    f"tests/e2e/test_{module}.py": mesh
    for mesh, modules in {
        "a mesh without code": ("ensembles", "every_format_is_served", "readme"),
        "a mesh with code": (
            *("damage_is_noticed", "equal_requests", "shadows_and_first_requests"),
            *("tensors_go_round", "too_much_to_do"),
        ),
    }.items()
    for module in modules
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Keep the tests of a module in one worker of xdist: what they share is then made once.

    The marks of `--dist loadgroup` do not reach pytest-xdist 3.8 on pytest 9.2, and `--dist loadscope`
    would part the classes of a module. Modules start in their order: meshes first, short unit tests last, so
    that no worker ends long before the other.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return _TOGETHER.get(module, module)

    if config.getvalue("dist") != "load":  # what -n means, unless told otherwise
        return None
    config.option.loadscopereorder = False
    return ByModule(config, log)


def pytest_report_header() -> str:
    """Say how to replay the run."""
    return f"random seed: {_SEED} (PENSTOCK_TEST_SEED={_SEED} replays it; Hypothesis prints its own)"


@pytest.fixture(autouse=True)
def _seeded_random() -> None:
    """Every test begins with the seed in the header, whatever ran before it."""
    random.seed(_SEED)


@pytest.fixture
def seed() -> int:
    """The seed in the header, for a test's own generator."""
    return _SEED


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL for this pytest process. Tests that stop or kill it must start it again."""
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        # It takes transaction numbers, which a test counts, and time; no database here lives long.
        with psycopg.connect(server.dsn_of("postgres"), autocommit=True, connect_timeout=10) as connection:
            connection.execute("ALTER SYSTEM SET autovacuum = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A Redis for this pytest process, not persistent. Tests that stop or kill it must start it again."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), persist=False) as server:
        yield server


class Databases:
    """Makes and drops databases of one server.

    A template is a database that `prepare` filled once (with migrations, say) and that every later one is
    copied from, which takes some 20 ms.
    """

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._numbers = itertools.count(1)
        self._templates: dict[str, str] = {}

    def create(self, template: str = "template0") -> str:
        """Create a database as a copy of `template`; give its URL."""
        return self._server.url_of(self._create(f"test_{next(self._numbers)}", template))

    def create_from(self, key: str, prepare: Callable[[str], None]) -> str:
        """Create a copy of the database that `prepare(url)` filled when `key` was first asked for."""
        if key not in self._templates:
            name = self._create(f"template_{key}", "template0")
            prepare(self._server.url_of(name))
            self._templates[key] = name
        return self.create(self._templates[key])

    def drop(self, url: str) -> None:
        """Drop a database, whoever is still connected to it."""
        name = sql.Identifier(url.partition("@/")[2].partition("?")[0])
        with self._connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))

    def _create(self, name: str, template: str) -> str:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with self._connect() as connection:
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self._server.dsn_of("postgres"), autocommit=True, connect_timeout=10)


@pytest.fixture(scope="session")
def databases(postgres_server: EmbeddedPostgres) -> Databases:
    """Makes databases, for a test that needs several or one that is migrated already."""
    return Databases(postgres_server)


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """The URL of a fresh, empty database, in SQLAlchemy's form."""
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The URL of an empty Redis."""
    redis_server.flush()
    return redis_server.url


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary directory for unix sockets with names as short as pytest gives."""
    return tmp_path_factory.mktemp("s")
