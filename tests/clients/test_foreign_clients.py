"""Clients that others wrote work unchanged."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import foreign

SCRIPTS = Path(__file__).parent / "scripts"
BUF = Path(sys.executable).parent / "buf"

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("environment", "script"),
    [
        ("triton", "triton_grpc.py"),
        ("triton", "triton_http.py"),
        ("kserve", "kserve_clients.py"),
        ("mlserver", "mlserver_stubs.py"),
    ],
)
def test_a_foreign_client_passes_its_script(address: str, environment: str, script: str) -> None:
    print(foreign.run_script(environment, SCRIPTS / script, address, timeout=180))


def run(*command: str, timeout: float = 60) -> str:
    """Run a program; return what it printed."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def test_buf_curl_lists_describes_and_calls_by_reflection(address: str) -> None:
    curl = (str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge")
    listed = run(*curl, "--list-methods", f"http://{address}")
    assert "inference.GRPCInferenceService/ModelInfer" in listed
    assert "penstock.registry.v1.RegistryService/ListModels" in listed
    assert "penstock.scheduler.v1.SchedulerService/CreateDeployment" in listed
    assert "grpc.health.v1.Health/Check" in listed
    row = {"fp32Contents": [float(n) for n in range(16)]}
    request = {
        "modelName": "echo",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 16], "contents": row}],
    }
    url = f"http://{address}/inference.GRPCInferenceService/ModelInfer"
    reply = json.loads(run(*curl, "--data", json.dumps(request), url))
    assert reply["outputs"][0]["contents"] == row
    models = json.loads(
        run(*curl, "--data", "{}", f"http://{address}/penstock.registry.v1.RegistryService/ListModels")
    )
    assert {m["name"] for m in models["models"]} >= {"models/echo", "models/strings"}


def test_buf_curl_speaks_health(address: str) -> None:
    url = f"http://{address}/grpc.health.v1.Health/Check"
    curl = (str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge")
    assert json.loads(run(*curl, "--data", '{"service": "echo"}', url)) == {"status": "SERVING"}


def test_plain_curl_reaches_every_way_to_predict(address: str) -> None:
    base = f"http://{address}"
    row = [float(n) for n in range(16)]
    curl = ("curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "20")
    as_json = ("--header", "Content-Type: application/json", "--data")

    body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 16], "data": row}]}
    reply = json.loads(run(*curl, *as_json, json.dumps(body), f"{base}/v2/models/echo/infer"))
    assert reply["outputs"][0]["data"] == row
    body = {"model_name": "echo", "input_data": [row]}
    assert json.loads(run(*curl, *as_json, json.dumps(body), f"{base}/predict")) == {"output_data": [row]}
    form = ("--data-urlencode", "model_name=echo", "--data-urlencode", f"input_data={json.dumps([row])}")
    assert json.loads(run(*curl, *form, f"{base}/predict")) == {"output_data": [row]}
    body = {"instances": [row]}
    reply = json.loads(run(*curl, *as_json, json.dumps(body), f"{base}/v1/models/echo:predict"))
    assert reply == {"predictions": [row]}
    assert "openapi" in json.loads(run(*curl, f"{base}/openapi.json"))
    assert "penstock" in run(*curl, f"{base}/metrics")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("concurrency", [1, 16, 64, 256])
def test_perf_analyzer_sees_no_error(address: str, protocol: str, concurrency: int, tmp_path: Path) -> None:
    try:
        program, environment = foreign.perf_analyzer()
    except RuntimeError as error:
        pytest.skip(f"perf_analyzer wants libb64, which cannot be fetched here: {error}")
    report = tmp_path / "report.csv"
    result = subprocess.run(
        [
            *(str(program), "-m", "echo", "-u", address, "-i", protocol, "-b", "1", "--shape", "input:16"),
            *("--concurrency-range", str(concurrency), "--measurement-interval", "1000"),
            *("--stability-percentage", "100", "--max-trials", "20", "-f", str(report)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with report.open() as lines:
        measured = next(csv.DictReader(lines))
    print(f"{protocol} c={concurrency}: {measured['Inferences/Second']}/s")
    assert float(measured["Inferences/Second"]) > 0
    assert "Failed" not in result.stdout, result.stdout
