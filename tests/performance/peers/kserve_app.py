"""The model as a KServe server."""

import sys

import compute
from kserve import InferOutput, InferResponse, Model, ModelServer


class Served(Model):
    """One input, one output; KServe's Python server does not join requests."""

    def __init__(self, name):
        super().__init__(name)
        self.compute = compute.load()
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        rows = self.compute(payload.inputs[0].as_numpy())
        output = InferOutput("y", list(rows.shape), "FP32")
        output.set_data_from_numpy(rows, binary_data=True)
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    name, http, grpc = sys.argv[1:]
    server = ModelServer(
        http_port=int(http), grpc_port=int(grpc), workers=1, enable_docs_url=False, access_log_format=None
    )
    server.start([Served(name)])
