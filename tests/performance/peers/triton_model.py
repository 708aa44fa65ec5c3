"""The model as Triton's Python backend loads it."""

import os

import compute
import numpy as np
import triton_python_backend_utils as pb_utils

WORKLOAD = os.environ["BENCH_WORKLOAD"]


class TritonPythonModel:
    """Joins the requests of a batch, as dynamic batching hands them over, and computes once."""

    def initialize(self, arguments):
        self.compute = compute.load(WORKLOAD)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        if WORKLOAD == "w1":
            outputs = inputs
        else:
            results = self.compute(inputs[0] if len(inputs) == 1 else np.concatenate(inputs))
            ends = np.cumsum([len(rows) for rows in inputs])[:-1]
            outputs = np.split(results, ends) if len(inputs) > 1 else [results]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", rows)]) for rows in outputs]
