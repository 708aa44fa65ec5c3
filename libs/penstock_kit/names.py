"""Resource names: `models/{model}/versions/{version}` and the like, made and taken apart in one place.

An id is 1 to 63 letters, digits, '_', '.' and '-', a letter or digit first. An alias is an id that is not
a number, so that a number always means a version.
"""

from __future__ import annotations

import re

from penstock_kit.errors import InvalidArgument

ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
ANY = "-"
MAX_VERSION = 2**31 - 1

_ID = re.compile(ID_PATTERN)
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_ID_RULE = "1 to 63 letters, digits, '_', '.' and '-', a letter or digit first"


def check_id(value: str, what: str) -> str:
    """Return `value` if it is an id.

    Args:
        value: The id.
        what: What it names, for the message, such as "model".

    Raises:
        InvalidArgument: It is not.
    """
    if not _ID.fullmatch(value):
        raise InvalidArgument(
            f"{what} {_shown(value)} is not a valid name: {_ID_RULE}.", metadata={what: value[:63]}
        )
    return value


def check_alias(value: str) -> str:
    """Return `value` if it can be an alias.

    Raises:
        InvalidArgument: It cannot: not an id, or a number.
    """
    check_id(value, "alias")
    if value.isdecimal():
        raise InvalidArgument(
            f"alias {_shown(value)} is a number, which always means a version; choose a word.",
            metadata={"alias": value},
        )
    return value


def parse_number(value: str, name: str) -> int:
    """Return the version number written in `value`, a part of `name`.

    Raises:
        InvalidArgument: It is not a number from 1 to 2³¹ − 1.
    """
    if not _NUMBER.fullmatch(value) or int(value) > MAX_VERSION:
        raise InvalidArgument(f"{_shown(name)}: versions are numbered from 1, not {_shown(value)}.")
    return int(value)


def model_name(model: str) -> str:
    """Return models/{model}."""
    return f"models/{model}"


def version_name(model: str, number: int) -> str:
    """Return models/{model}/versions/{number}."""
    return f"models/{model}/versions/{number}"


def alias_name(model: str, alias: str) -> str:
    """Return models/{model}/aliases/{alias}."""
    return f"models/{model}/aliases/{alias}"


def artifact_name(artifact: str, number: int) -> str:
    """Return artifacts/{artifact}/versions/{version}."""
    return f"artifacts/{artifact}/versions/{number}"


def deployment_name(deployment: str) -> str:
    """Return deployments/{deployment}."""
    return f"deployments/{deployment}"


def node_name(node: str) -> str:
    """Return nodes/{node}."""
    return f"nodes/{node}"


def replica_name(replica: str) -> str:
    """Return replicas/{replica}."""
    return f"replicas/{replica}"


def job_name(job: str) -> str:
    """Return jobs/{job}."""
    return f"jobs/{job}"


def parse_job(name: str) -> str:
    """Return {job} of jobs/{job}.

    Raises:
        InvalidArgument: The name has another form.
    """
    (job,) = _parts(name, "jobs/{job}")
    return check_id(job, "job")


def task_name(job: str, number: int) -> str:
    """Return jobs/{job}/tasks/{task}."""
    return f"jobs/{job}/tasks/{number}"


def parse_task(name: str) -> tuple[str, int]:
    """Return ({job}, {task}) of jobs/{job}/tasks/{task}; tasks are numbered from 0.

    Raises:
        InvalidArgument: The name has another form.
    """
    job, number = _parts(name, "jobs/{job}/tasks/{task}")
    return check_id(job, "job"), 0 if number == "0" else parse_number(number, name)


def project_name(project: str) -> str:
    """Return projects/{project}."""
    return f"projects/{project}"


def parse_project(name: str) -> str:
    """Return {project} of projects/{project}.

    Raises:
        InvalidArgument: The name has another form.
    """
    (project,) = _parts(name, "projects/{project}")
    return check_id(project, "project")


def parse_model(name: str, *, wildcard: bool = False) -> str:
    """Return {model} of models/{model}; with `wildcard`, "-" is allowed and means all.

    Raises:
        InvalidArgument: The name has another form.
    """
    (model,) = _parts(name, "models/{model}")
    if wildcard and model == ANY:
        return model
    return check_id(model, "model")


def parse_version(name: str) -> tuple[str, int]:
    """Return ({model}, {version}) of models/{model}/versions/{version}.

    Raises:
        InvalidArgument: The name has another form.
    """
    model, number = _parts(name, "models/{model}/versions/{version}")
    return check_id(model, "model"), parse_number(number, name)


def parse_alias(name: str) -> tuple[str, str]:
    """Return ({model}, {alias}) of models/{model}/aliases/{alias}.

    Raises:
        InvalidArgument: The name has another form.
    """
    model, alias = _parts(name, "models/{model}/aliases/{alias}")
    return check_id(model, "model"), check_alias(alias)


def parse_artifact(name: str, *, wildcard: bool = False) -> str:
    """Return {artifact} of artifacts/{artifact}; with `wildcard`, "-" is allowed and means all.

    Raises:
        InvalidArgument: The name has another form.
    """
    (artifact,) = _parts(name, "artifacts/{artifact}")
    if wildcard and artifact == ANY:
        return artifact
    return check_id(artifact, "artifact")


def parse_artifact_version(name: str) -> tuple[str, int]:
    """Return ({artifact}, {version}) of artifacts/{artifact}/versions/{version}.

    Raises:
        InvalidArgument: The name has another form.
    """
    artifact, number = _parts(name, "artifacts/{artifact}/versions/{version}")
    return check_id(artifact, "artifact"), parse_number(number, name)


def parse_deployment(name: str) -> str:
    """Return {deployment} of deployments/{deployment}.

    Raises:
        InvalidArgument: The name has another form.
    """
    (deployment,) = _parts(name, "deployments/{deployment}")
    return check_id(deployment, "deployment")


def parse_node(name: str) -> str:
    """Return {node} of nodes/{node}.

    Raises:
        InvalidArgument: The name has another form.
    """
    (node,) = _parts(name, "nodes/{node}")
    return check_id(node, "node")


def parse_replica(name: str) -> str:
    """Return {replica} of replicas/{replica}.

    Raises:
        InvalidArgument: The name has another form.
    """
    (replica,) = _parts(name, "replicas/{replica}")
    return check_id(replica, "replica")


def rollout_name(deployment: str, number: int) -> str:
    """Return the resource name of a rollout."""
    return f"deployments/{deployment}/rollouts/{number}"


def parse_rollout(name: str) -> tuple[str, int]:
    """Return {deployment} and {rollout} of deployments/{deployment}/rollouts/{rollout}; 0 for `-`.

    Raises:
        InvalidArgument: The name has another form.
    """
    deployment, number = _parts(name, "deployments/{deployment}/rollouts/{rollout}")
    return check_id(deployment, "deployment"), 0 if number == "-" else parse_number(number, name)


def _parts(name: str, pattern: str) -> list[str]:
    """Return the parts of `name` at the places in braces of `pattern`."""
    given, wanted = name.split("/"), pattern.split("/")
    if len(given) != len(wanted) or any(
        not want.startswith("{") and have != want for have, want in zip(given, wanted, strict=True)
    ):
        raise InvalidArgument(f"{_shown(name)} is not a resource name of the form {pattern}.")
    return [have for have, want in zip(given, wanted, strict=True) if want.startswith("{")]


def _shown(value: str) -> str:
    """Return the value as a message may show it: quoted, printable, short."""
    return repr(value if len(value) <= 80 else value[:77] + "…")
