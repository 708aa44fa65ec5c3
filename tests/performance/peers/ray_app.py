"""The model as a Ray Serve deployment: raw fp32 in, raw fp32 out."""

import sys
import time

import compute
import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

JOINING = compute.WORKLOAD != "w1"


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Served:
    """One replica; joins requests if the workload wants it."""

    def __init__(self):
        self.compute = compute.load()

    @serve.batch(max_batch_size=compute.MAX_BATCH, batch_wait_timeout_s=max(compute.WAIT_SECONDS, 0.002))
    async def joined(self, rows):
        return list(self.compute(np.stack(rows)))

    async def __call__(self, request: Request) -> Response:
        row = np.frombuffer(await request.body(), np.float32)
        result = await self.joined(row) if JOINING else self.compute(row[None])[0]
        return Response(result.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    port, folder = int(sys.argv[1]), sys.argv[2]
    ray.init(include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port, "access_log": False})
    serve.run(Served.bind())
    while True:
        time.sleep(3600)
