"""The most GPU memory that can be given out, by OR-tools' CP-SAT. Cases as JSON on stdin, answers on stdout.

Run by `performance.simulation.packing` in an environment of its own: OR-tools wants another protobuf than
the mesh.
"""

import json
import sys

from ortools.sat.python import cp_model

SECONDS = 20.0


def solve(case: dict) -> int:
    """Return the optimum of one case in GiB; if time ran out, the proven bound."""
    model = cp_model.CpModel()
    used = [[[] for _ in node["gpus"]] for node in case["nodes"]]
    cpu = [[] for _ in case["nodes"]]
    memory = [[] for _ in case["nodes"]]
    gains = []
    for needs in case["replicas"]:
        here = []
        for n, node in enumerate(case["nodes"]):
            on = model.new_bool_var("")
            here.append(on)
            cpu[n].append(needs["cpu"] * on)
            memory[n].append(needs["memory"] * on)
            held = []
            for g, size in enumerate(node["gpus"]):
                has = model.new_bool_var("")
                held.append(has)
                share = needs["share"] or size
                used[n][g].append(share * has)
                gains.append(share * has)
            model.add(sum(held) == needs["gpus"] * on)
        model.add(sum(here) <= 1)
    for n, node in enumerate(case["nodes"]):
        model.add(sum(cpu[n]) <= node["cpu"])
        model.add(sum(memory[n]) <= node["memory"])
        for g, size in enumerate(node["gpus"]):
            model.add(sum(used[n][g]) <= size)
    model.maximize(sum(gains))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = SECONDS
    solver.parameters.num_workers = 2
    solver.solve(model)
    return round(solver.best_objective_bound)


print(json.dumps([solve(case) for case in json.load(sys.stdin)]))
