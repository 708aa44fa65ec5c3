# Made from _async/inference.py by libs/make_sync.py; edit that and run it again.
"""Inference over the Open Inference Protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penstock._sync import io
from penstock._sync.rollouts import Rollouts
from penstock.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PenstockError,
    Reason,
    Unavailable,
)
from penstock.names import resource, short
from penstock.oip.v2 import inference_pb2 as oip
from penstock.scheduler.v1 import scheduler_service_pb2 as scheduler
from penstock.tensors import Array, Prediction, Priority, as_array, infer_request
from penstock.traffic import describe_state

# How long the signature of a deployment is believed without asking again.
_METADATA_SECONDS = 60.0
_WAIT_PAUSE_SECONDS = 0.05

Inputs = Mapping[str, Any] | Sequence[Any] | Array


class Inference(Rollouts):
    """What callers of a deployment use."""

    def predict(
        self,
        deployment: str,
        inputs: Inputs,
        *,
        version: str | int = "",
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        priority: Priority = "normal",
        request_id: str = "",
    ) -> Prediction:
        """Send one inference; return its outputs by name as numpy arrays.

        Args:
            deployment: Name of the deployment; ``digits@champion`` selects inside it.
            inputs: Arrays by input name, sent as they are; lists take the type of the signature. One bare
                array or list stands for the only input and takes its type.
            version: Number or alias to select inside the deployment.
            outputs: Only these outputs; without any, all.
            timeout: Seconds to answer in; beyond them the work is dropped wherever it is, and what could
                not be answered within them is refused at once.
            priority: High goes first, low is refused first when there is too much to do.
            request_id: An id of the caller's that comes back with the answer.

        Raises:
            NotFound: There is no such deployment, or no such version in it.
            InvalidArgument: The inputs do not match the signature.
            Unavailable: No replica would answer.
            ResourceExhausted: The queue is full, or the deadline cannot be met; ``retry_after_seconds`` says
                when to come back.
            DeadlineExceeded: There was no answer in time.
        """
        deployment = short(deployment)
        arrays, datatypes = self._as_arrays(deployment, str(version), inputs)
        request = infer_request(
            deployment,
            arrays,
            version=str(version),
            request_id=request_id,
            datatypes=datatypes,
            outputs=outputs,
            priority=priority,
        )
        try:
            response = self._unary(self._inference.ModelInfer, request, timeout=timeout)
        except InvalidArgument:
            # A signature that changed since it was read may be why: read it anew next time.
            self._signatures.pop((deployment, str(version)), None)
            raise
        return Prediction(response)

    def get_metadata(self, deployment: str, version: str | int = "") -> oip.ModelMetadataResponse:
        """Return the names, datatypes and shapes of a deployment's inputs and outputs."""
        request = oip.ModelMetadataRequest(name=short(deployment), version=str(version))
        return self._unary(self._inference.ModelMetadata, request)

    def is_ready(self, deployment: str = "", version: str | int = "") -> bool:
        """Return whether a deployment would answer now; without a name, whether the gateway would."""
        try:
            if not deployment:
                answer = self._unary(self._inference.ServerReady, oip.ServerReadyRequest(), retry=False)
                return answer.ready
            request = oip.ModelReadyRequest(name=short(deployment), version=str(version))
            return (self._unary(self._inference.ModelReady, request, retry=False)).ready
        except Unavailable:
            return False

    def wait_ready(self, deployment: str = "", *, timeout: float = 60.0) -> None:
        """Wait until a deployment would answer; without a name, until the gateway would.

        Raises:
            DeadlineExceeded: It still would not.
        """
        start = time.monotonic()
        while not self._ready_or_missing(deployment):
            if time.monotonic() - start > timeout:
                what = f"Deployment {short(deployment)}" if deployment else f"The gateway at {self.endpoint}"
                why = self._why_not_ready(deployment) if deployment else "."
                raise DeadlineExceeded(
                    f"{what} is not ready after {timeout:g} s{why}", reason=Reason.NOT_READY
                )
            io.sleep(_WAIT_PAUSE_SECONDS)

    def _why_not_ready(self, deployment: str) -> str:
        """Where a deployment stands, to end a sentence with; as good as can be told now."""
        try:
            request = scheduler.GetDeploymentRequest(
                name=resource("deployments", short(deployment).partition("@")[0])
            )
            found = self._unary(self._scheduler.GetDeployment, request, timeout=2.0, retry=False)
            return f": {describe_state(found)}"
        except NotFound:
            return ": there is no such deployment."
        except PenstockError:
            return "."

    def _ready_or_missing(self, deployment: str) -> bool:
        """Whether it is ready; a deployment just made may not have reached the gateway's table yet."""
        try:
            return self.is_ready(deployment)
        except PenstockError as error:
            if error.reason == Reason.DEPLOYMENT_NOT_FOUND:
                return False
            raise

    @property
    def _signatures(self) -> dict[tuple[str, str], tuple[float, oip.ModelMetadataResponse]]:
        cache: dict[tuple[str, str], tuple[float, oip.ModelMetadataResponse]] = self.__dict__.setdefault(
            "_signature_cache", {}
        )
        return cache

    def _signature(self, deployment: str, version: str) -> oip.ModelMetadataResponse:
        known = self._signatures.get((deployment, version))
        if known is not None and time.monotonic() - known[0] < _METADATA_SECONDS:
            return known[1]
        signature = self.get_metadata(deployment, version)
        self._signatures[deployment, version] = (time.monotonic(), signature)
        return signature

    def _as_arrays(
        self, deployment: str, version: str, inputs: Inputs
    ) -> tuple[dict[str, Array], dict[str, str]]:
        """Return arrays by name, and the datatypes of those whose own would not say it."""
        if isinstance(inputs, Mapping) and all(isinstance(value, np.ndarray) for value in inputs.values()):
            return dict(inputs), {}
        signature = self._signature(deployment, version)
        wanted = {tensor.name: tensor.datatype for tensor in signature.inputs}
        if not isinstance(inputs, Mapping):
            if len(wanted) != 1:
                raise InvalidArgument(
                    f"{deployment} takes {len(wanted)} inputs: give them by name ({', '.join(wanted)}).",
                    reason=Reason.INVALID_TENSOR,
                )
            inputs = {next(iter(wanted)): inputs}
            given_as_is: frozenset[str] = frozenset()
        else:
            given_as_is = frozenset(name for name, value in inputs.items() if isinstance(value, np.ndarray))
        unknown = sorted(set(inputs) - set(wanted))
        if unknown:
            raise InvalidArgument(
                f"{deployment} has no input {', '.join(unknown)}; it takes {', '.join(wanted)}.",
                reason=Reason.INVALID_TENSOR,
            )
        arrays = {
            name: value if name in given_as_is else as_array(value, wanted[name], name)
            for name, value in inputs.items()
        }
        return arrays, {name: wanted[name] for name in inputs if name not in given_as_is}
