"""The OpenAPI 3.1 description of the REST doors, and a page for people made out of it."""

from __future__ import annotations

import html
from typing import Any

from penstock_gateway.api.about import RELEASE
from penstock_gateway.api.rest.schemas import SCHEMAS

Json = dict[str, Any]

_ERRORS = {
    "400": "The request is wrong; the message says what.",
    "404": "No such path, deployment, version or alias.",
    "405": "The path does not take this method; Allow says which.",
    "413": "The body is over the limit.",
    "415": "The content type or encoding is not taken here.",
    "429": "The answer would come too late, or too much waits already; Retry-After says when to try again.",
    "500": "A fault of the server or of the model.",
    "501": "Known to the protocol, not offered here.",
    "503": "Not ready, or a part cannot be reached now.",
    "504": "The deadline passed before the answer.",
}
_MODEL = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "Name of a deployment; name@alias selects a version.",
    "schema": {"type": "string", "pattern": "^[^/:]+$"},
    "example": "digits",
}
_VERSION = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "Number or alias of a version that the deployment serves.",
    "schema": {"type": "string", "pattern": "^[^/:]+$"},
    "example": "1",
}
_TIMEOUT = {
    "name": "x-request-timeout-ms",
    "in": "header",
    "required": False,
    "description": (
        "Milliseconds after which the caller no longer waits; 60 s if not given. "
        "A proxy's x-envoy-expected-rq-timeout-ms shortens it."
    ),
    "schema": {"type": "integer", "minimum": 1, "maximum": 604800000},
}
_PRIORITY = {
    "name": "x-penstock-priority",
    "in": "header",
    "required": False,
    "description": "High goes first; low is refused first when there is too much to do.",
    "schema": {"type": "string", "enum": ["high", "normal", "low"], "default": "normal"},
}
_HEADER_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "Length of the JSON part where binary tensors follow it.",
    "schema": {"type": "integer", "minimum": 1},
}


def _schema(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(name: str) -> Json:
    return {"application/json": {"schema": _schema(name)}}


def _operation(
    identity: str,
    summary: str,
    answer: str,
    *,
    body: str = "",
    body_required: bool = True,
    parameters: tuple[Json, ...] = (),
    errors: tuple[str, ...] = (),
    tag: str,
) -> Json:
    out: Json = {
        "operationId": identity,
        "summary": summary,
        "tags": [tag],
        "parameters": [*parameters, _TIMEOUT, *([_PRIORITY] if tag == "inference" else [])],
        "responses": {
            "200": {"description": "The answer.", "content": _content(answer)},
            **{
                code: {"description": _ERRORS[code], "content": _content("Error")}
                for code in ("400", "404", "405", "413", "415", "500", "501", "503", "504", *errors)
            },
        },
    }
    if body:
        out["requestBody"] = {"required": body_required, "content": _content(body)}
    return out


def _for_models(prefix: str, suffix: str, parameters: tuple[Json, ...]) -> Json:
    """Return the paths of one model, and of one version of it."""
    get = {
        "": ("metadata", "Inputs and outputs", "ModelMetadata"),
        "/ready": ("ready", "Whether a replica would answer now", "ModelReady"),
        "/config": ("config", "Triton's configuration of the model", "ModelConfig"),
        "/stats": ("statistics", "Counters and durations", "Statistics"),
    }
    out: Json = {}
    for path, (identity, summary, answer) in get.items():
        out[prefix + path] = {
            "get": _operation(f"{identity}{suffix}", summary, answer, parameters=parameters, tag="models")
        }
    infer = _operation(
        f"infer{suffix}",
        "One inference",
        "InferResponse",
        body="InferRequest",
        parameters=(*parameters, _HEADER_LENGTH),
        errors=("429",),
        tag="inference",
    )
    for holder in (infer["requestBody"], infer["responses"]["200"]):
        holder["content"]["application/octet-stream"] = {
            "schema": {"type": "string", "format": "binary", "description": "JSON, then binary tensors."}
        }
    out[f"{prefix}/infer"] = {"post": infer}
    for path in ("generate", "generate_stream"):
        out[f"{prefix}/{path}"] = {
            "post": _operation(
                f"{path}{suffix}",
                "Text generation: answered 501 until a generative runtime is installed",
                "Object",
                body="Object",
                parameters=parameters,
                tag="inference",
            )
        }
    return out


def _predict_query(name: str, description: str, *, required: bool) -> Json:
    return {
        "name": name,
        "in": "query",
        "required": required,
        "description": description,
        "schema": {"type": "string", "minLength": 1},
    }


def _paths() -> Json:
    model, version = (_MODEL,), (_MODEL, _VERSION)
    predict = _operation(
        "predict",
        "One inference, the simplest way",
        "PredictResponse",
        body="PredictRequest",
        errors=("429",),
        tag="inference",
    )
    predict["requestBody"]["content"]["application/x-www-form-urlencoded"] = {
        "schema": _schema("PredictForm")
    }
    predict["requestBody"]["content"]["multipart/form-data"] = {"schema": _schema("PredictUpload")}
    paths: Json = {
        "/predict": {
            "post": predict,
            "get": _operation(
                "predictByQuery",
                "One inference out of query parameters",
                "PredictResponse",
                parameters=(
                    _predict_query("model_name", "Name of a deployment.", required=True),
                    _predict_query("input_data", "The input, as JSON.", required=True),
                    _predict_query("model_version", "Number or alias of a version.", required=False),
                ),
                errors=("429",),
                tag="inference",
            ),
        },
        "/v1/models": {"get": _operation("v1Models", "Names of all deployments", "Models", tag="v1")},
    }
    v1 = {
        "/v1/models/{model}": ("", model),
        "/v1/models/{model}/versions/{version}": ("Version", version),
        "/v1/models/{model}/labels/{version}": ("Label", version),
    }
    for path, (suffix, parameters) in v1.items():
        paths[path] = {
            "get": _operation(
                f"v1Status{suffix}", "Whether it is ready", "V1Status", parameters=parameters, tag="v1"
            )
        }
        paths[f"{path}:predict"] = {
            "post": _operation(
                f"v1Predict{suffix}",
                "One inference as TensorFlow Serving and KServe have it",
                "V1Response",
                body="V1Request",
                parameters=parameters,
                errors=("429",),
                tag="v1",
            )
        }
    plain = {
        "/v2": ("server", "Name, release and extensions", "Server", "server"),
        "/v2/health/live": ("live", "Whether the server runs", "Live", "server"),
        "/v2/health/ready": ("ready", "Whether inferences can be queued", "Ready", "server"),
        "/v2/models": ("models", "Names of all deployments", "Models", "models"),
        "/v2/models/stats": ("statisticsOfAll", "Counters of all deployments", "Statistics", "models"),
        "/healthz": ("healthz", "Whether the process lives", "Live", "server"),
        "/readyz": ("readyz", "Whether inferences can be queued", "Ready", "server"),
    }
    for path, (identity, summary, answer, tag) in plain.items():
        paths[path] = {"get": _operation(identity, summary, answer, tag=tag)}
    paths |= _for_models("/v2/models/{model}", "Model", model)
    paths |= _for_models("/v2/models/{model}/versions/{version}", "Version", version)
    paths["/v2/repository/index"] = {
        "post": _operation(
            "index",
            "What there is, deployed or not",
            "Index",
            body="IndexRequest",
            body_required=False,
            tag="repository",
        )
    }
    for verb, summary in (
        ("load", "Deploy the newest version of a model under its name"),
        ("unload", "Delete the deployment of that name"),
    ):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": _operation(
                verb,
                summary,
                "Loaded",
                body="Object",
                body_required=False,
                parameters=model,
                errors=("429",),
                tag="repository",
            )
        }
    return paths


def openapi() -> Json:
    """Return the whole description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock",
            "version": RELEASE,
            "summary": "Model serving over HTTP",
            "description": (
                "The Open Inference Protocol v2, TensorFlow Serving's v1 and /predict. "
                "The same port speaks gRPC: inference.GRPCInferenceService and the management services, "
                "all listed by reflection. "
                "Bodies may be compressed (content-encoding gzip or deflate)."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "inference", "description": "Ask a model"},
            {"name": "models", "description": "What is offered"},
            {"name": "server", "description": "The server itself"},
            {"name": "repository", "description": "Load and unload"},
            {"name": "v1", "description": "TensorFlow Serving and KServe v1"},
        ],
        "paths": _paths(),
        "components": {"schemas": SCHEMAS},
    }


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733 }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 }
h2 { margin-top: 2rem; border-bottom: 1px solid #cdd6df }
code, pre { font: 14px/1.5 ui-monospace, monospace }
pre { background: #f2f5f8; padding: 1rem; overflow: auto }
table { border-collapse: collapse; width: 100% }
td { padding: .25rem .75rem .25rem 0; vertical-align: top }
.m { font-weight: 600; color: #0b6bcb; width: 4rem }
@media (prefers-color-scheme: dark) {
  body { background: #12181f; color: #dde5ee }
  pre { background: #1c2530 }
  h2 { border-color: #33404d }
  .m, a { color: #6cb2ff }
}
"""
_EXAMPLES = """curl localhost:8080/v2/models

curl localhost:8080/predict -H 'content-type: application/json' \\
     -d '{"model_name": "digits", "input_data": [[0, 0, 5, 13]]}'

curl localhost:8080/v2/models/digits/infer -H 'content-type: application/json' \\
     -d '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 5, 13]}]}'"""


def docs_page() -> bytes:
    """Return the page: everything in one file, nothing fetched from elsewhere."""
    description = openapi()
    rows: dict[str, list[str]] = {tag["name"]: [] for tag in description["tags"]}
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            rows[operation["tags"][0]].append(
                f'<tr><td class="m">{method.upper()}</td><td><code>{html.escape(path)}</code></td>'
                f"<td>{html.escape(operation['summary'])}</td></tr>"
            )
    sections = "".join(
        f"<h2>{html.escape(tag['description'])}</h2><table>{''.join(rows[tag['name']])}</table>"
        for tag in description["tags"]
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Penstock</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><h1>Penstock</h1><p>{html.escape(description['info']['summary'])}, "
        f"release {html.escape(RELEASE)}. {html.escape(description['info']['description'])} "
        'For programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"<pre>{html.escape(_EXAMPLES)}</pre>{sections}"
        "<h2>Errors</h2><p>Every error is <code>{&quot;error&quot;: words, &quot;reason&quot;: a word that "
        "programs can test}</code>.</p></html>"
    )
    return page.encode()


DOCS_PAGE = docs_page()
