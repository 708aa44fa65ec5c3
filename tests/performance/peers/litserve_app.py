"""The model as a LitServe API: its bodies are JSON, so the numbers travel as base64 of raw fp32."""

import base64
import sys

import compute
import litserve
import numpy as np


class Api(litserve.LitAPI):
    """One worker process; joins requests if told."""

    def setup(self, device):
        self.compute = compute.load()

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["x"]), np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self.compute(x) if x.ndim == 2 else self.compute(x[None])[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"y": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    joining = compute.WORKLOAD != "w1"
    api = Api(
        max_batch_size=compute.MAX_BATCH if joining else 1,
        batch_timeout=max(compute.WAIT_SECONDS, 0.002) if joining else 0.0,
    )
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=60)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
