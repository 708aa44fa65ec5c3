"""The model as a BentoML service: JSON lists in and out, which is what it takes for arrays."""

import bentoml
import compute
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Served:
    """One worker; joins requests if the workload wants it."""

    def __init__(self) -> None:
        self.compute = compute.load()

    @bentoml.api(
        batchable=compute.WORKLOAD != "w1",
        max_batch_size=compute.MAX_BATCH,
        max_latency_ms=60_000,
    )
    def infer(self, x: np.ndarray) -> np.ndarray:
        return self.compute(x.astype(np.float32))
