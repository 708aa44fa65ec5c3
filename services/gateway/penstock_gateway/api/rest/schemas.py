"""JSON Schemas of the REST bodies."""

from __future__ import annotations

from typing import Any

_STRING = {"type": "string"}
_NAME = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_DATATYPE = {
    "type": "string",
    "enum": [
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "BF16",
        "FP32",
        "FP64",
        "BYTES",
    ],
}
_SHAPE = {"type": "array", "items": {"type": "integer"}}
_PARAMETERS = {"type": "object", "description": "binary_data_size, classification, priority, timeout …"}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TENSOR = _object(["name", "datatype", "shape"], name=_STRING, datatype=_DATATYPE, shape=_SHAPE)
_DATA_TENSOR = _object(
    ["name", "datatype", "shape"],
    name=_STRING,
    datatype=_DATATYPE,
    shape=_SHAPE,
    parameters=_PARAMETERS,
    data={"type": "array", "description": "Elements in row-major order, flat or nested."},
)
_DURATION = _object(["count", "ns"], count=_COUNT, ns=_COUNT)

SCHEMAS: dict[str, Any] = {
    "Error": _object(
        ["error", "reason"],
        error={"type": "string", "description": "What is wrong and what to do."},
        reason={"type": "string", "description": "The same, for programs."},
        metadata={"type": "object", "additionalProperties": _STRING},
    ),
    "Object": {"type": "object"},
    "Server": _object(
        ["name", "version", "extensions"], name=_STRING, version=_STRING, extensions=_array(_STRING)
    ),
    "Live": _object(["live"], live={"type": "boolean"}, gateway=_STRING),
    "Ready": _object(["ready"], ready={"type": "boolean"}),
    "Models": _object(["models"], models=_array(_STRING)),
    "ModelReady": _object(["name", "ready"], name=_STRING, ready={"type": "boolean"}),
    "ModelMetadata": _object(
        ["name", "versions", "platform", "inputs", "outputs"],
        name=_STRING,
        versions=_array(_STRING),
        platform=_STRING,
        inputs=_array(_TENSOR),
        outputs=_array(_TENSOR),
        properties={"type": "object", "additionalProperties": _STRING},
    ),
    "ModelConfig": _object(
        ["name", "max_batch_size", "input", "output"],
        name=_STRING,
        platform=_STRING,
        backend=_STRING,
        max_batch_size=_COUNT,
        input=_array({"type": "object"}),
        output=_array({"type": "object"}),
    ),
    "Statistics": _object(
        ["model_stats"],
        model_stats=_array(
            _object(
                ["name", "version", "inference_count", "execution_count", "inference_stats"],
                name=_STRING,
                version=_STRING,
                last_inference=_COUNT,
                inference_count=_COUNT,
                execution_count=_COUNT,
                inference_stats={"type": "object", "additionalProperties": _DURATION},
                batch_stats=_array({"type": "object"}),
            )
        ),
    ),
    "InferRequest": _object(
        ["inputs"],
        id=_STRING,
        parameters=_PARAMETERS,
        inputs=_array(_DATA_TENSOR),
        outputs=_array(_object(["name"], name=_STRING, parameters=_PARAMETERS)),
    ),
    "InferResponse": _object(
        ["model_name", "outputs"],
        id=_STRING,
        model_name=_STRING,
        model_version=_STRING,
        parameters=_PARAMETERS,
        outputs=_array(_DATA_TENSOR),
    ),
    "PredictRequest": _object(
        ["model_name", "input_data"],
        model_name=_NAME,
        model_version={"type": ["string", "integer"]},
        input_data={
            "description": "One row, rows, or {input name: rows}; nested arrays of numbers or strings."
        },
    ),
    "PredictForm": _object(
        ["model_name", "input_data"],
        model_name=_NAME,
        model_version=_STRING,
        input_data={"type": "string", "minLength": 1, "contentMediaType": "application/json"},
    ),
    "PredictUpload": {
        **_object(["model_name"], model_name=_NAME, model_version=_STRING),
        "description": (
            "Parts called file or input_data are for the only input, others for the input of their name. "
            "A file goes to an input of datatype BYTES, several of one name are rows; a text is JSON."
        ),
        "additionalProperties": {"type": "string"},
    },
    "PredictResponse": _object(["output_data"], output_data={}),
    "V1Request": {
        "type": "object",
        "properties": {"instances": {"type": "array"}, "inputs": {}, "signature_name": _STRING},
        "anyOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
    },
    "V1Response": {"type": "object", "properties": {"predictions": {"type": "array"}, "outputs": {}}},
    "V1Status": _object(
        ["name", "ready", "model_version_status"],
        name=_STRING,
        ready={"type": "boolean"},
        model_version_status=_array(
            _object(["version", "state"], version=_STRING, state=_STRING, status={"type": "object"})
        ),
    ),
    "IndexRequest": _object([], ready={"type": "boolean"}),
    "Index": _array(
        _object(
            ["name", "version", "state", "reason"],
            name=_STRING,
            version=_STRING,
            state=_STRING,
            reason=_STRING,
        )
    ),
    "Loaded": _object(["name"], name=_STRING, load={"type": "boolean"}, unload={"type": "boolean"}),
}
