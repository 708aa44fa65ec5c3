"""The model as a Mosec worker: raw fp32 in, raw fp32 out."""

import os

import compute
import numpy as np
from mosec import Server, Worker

# Mosec waits for a batch to fill, at least 1 ms. An echo is answered soonest one by one, by two processes.
ONE_BY_ONE = compute.WORKLOAD == "w1" and not os.environ.get("BENCH_JOIN")
MAX_BATCH = 1 if ONE_BY_ONE else compute.MAX_BATCH


class Model(Worker):
    """One stage, one process."""

    def __init__(self):
        super().__init__()
        self.compute = compute.load()

    def deserialize(self, data):
        return np.frombuffer(data, np.float32)

    def serialize(self, data):
        return data.tobytes()

    def forward(self, data):
        if MAX_BATCH == 1:
            return self.compute(data[None])[0]
        return list(self.compute(np.stack(data)))


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Model,
        num=2 if ONE_BY_ONE else 1,
        max_batch_size=MAX_BATCH,
        max_wait_time=max(1, round(compute.WAIT_SECONDS * 1000)),
    )
    server.run()
