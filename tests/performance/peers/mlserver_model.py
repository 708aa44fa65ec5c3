"""The model as MLServer loads it."""

import compute
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    """One input, one output; MLServer joins requests if its settings say so."""

    async def load(self) -> bool:
        self.compute = compute.load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output("y", self.compute(rows))
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
