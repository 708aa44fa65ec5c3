"""Any graph, answered in any order, gives what computing it step by step gives."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.ensembles import Step, check_graph, needed, stages
from penstock_kit.errors import Internal, PenstockError
from penstock_worker.hotpath.graph import PlannedStep, Plans, Run

Value = tuple[object, ...]
Waiting = tuple[Run[Value], PlannedStep, dict[str, Value]]


@dataclass(frozen=True)
class Graph:
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: frozenset[str]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    inputs = tuple(f"in{n}" for n in range(draw(st.integers(1, 3))))
    known = list(inputs)
    steps = []
    for number in range(draw(st.integers(1, 12))):
        takes = draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
        gives = [f"t{number}.{n}" for n in range(draw(st.integers(1, 3)))]
        steps.append(
            Step(
                f"s{number}",
                f"m{number}",
                {f"i{n}": tensor for n, tensor in enumerate(takes)},
                {f"o{n}": tensor for n, tensor in enumerate(gives)},
            )
        )
        known += gives
    produced = [tensor for step in steps for tensor in step.outputs.values()]
    outputs = draw(st.lists(st.sampled_from(produced), min_size=1, max_size=5, unique=True))
    optional = draw(st.frozensets(st.sampled_from(inputs)))
    return Graph(tuple(draw(st.permutations(steps))), inputs, tuple(outputs), optional)


def compute(step: Step, inputs: dict[str, Value]) -> dict[str, Value]:
    """What the model of a step gives: something that tells all that went into it."""
    return {name: (step.model, name, *sorted(inputs.items())) for name in step.outputs}


def naive(graph: Graph, given_inputs: dict[str, Value], outputs: tuple[str, ...]) -> dict[str, Value]:
    tensors = dict(given_inputs)
    for stage in stages(graph.steps):
        for step in stage:
            inputs = {name: tensors[tensor] for name, tensor in step.inputs.items() if tensor in tensors}
            tensors |= {step.outputs[name]: value for name, value in compute(step, inputs).items()}
    return {name: tensors[name] for name in outputs}


@settings(max_examples=300, deadline=None)
@given(graph=graphs(), data=st.data())
def test_a_graph_gives_what_its_steps_give_one_after_the_other(graph: Graph, data: st.DataObject) -> None:
    check_graph(graph.steps, graph.inputs, graph.outputs)
    there = [name for name in graph.inputs if name not in graph.optional or data.draw(st.booleans())]
    given_inputs: dict[str, Value] = {name: (name,) for name in there}
    asked = data.draw(
        st.one_of(
            st.none(),
            st.lists(st.sampled_from(graph.outputs), min_size=1, unique=True).map(tuple),
        )
    )
    waiting: list[Waiting] = []
    called: list[str] = []
    done: list[dict[str, Value] | PenstockError] = []
    at_once = data.draw(st.booleans())

    def call(run: Run[Value], planned: PlannedStep, inputs: dict[str, Value]) -> None:
        called.append(planned.step.name)
        if at_once:
            run.answered(planned, compute(planned.step, inputs))
        else:
            waiting.append((run, planned, inputs))

    Run(Plans(graph.steps, graph.outputs).get(asked), given_inputs, call, done.append).start()
    while waiting:
        assert not done
        run, planned, inputs = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        run.answered(planned, compute(planned.step, inputs))
    outputs = asked or graph.outputs
    assert done == [naive(graph, given_inputs, outputs)]
    assert sorted(called) == sorted(step.name for step in needed(graph.steps, outputs))


@settings(max_examples=200, deadline=None)
@given(graph=graphs(), data=st.data())
def test_a_graph_ends_once_whatever_fails_when(graph: Graph, data: st.DataObject) -> None:
    waiting: list[Waiting] = []
    done: list[dict[str, Value] | PenstockError] = []
    plan = Plans(graph.steps, graph.outputs).get(None)
    run = Run(
        plan,
        {name: (name,) for name in graph.inputs},
        lambda run, planned, inputs: waiting.append((run, planned, inputs)),
        done.append,
    )
    run.start()
    failed = False
    while waiting:
        _, planned, inputs = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        if data.draw(st.integers(0, 3)) == 0:
            run.failed(Internal(planned.step.name))
            failed = True
        else:
            run.answered(planned, compute(planned.step, inputs))
    assert len(done) == 1
    assert isinstance(done[0], Internal) is failed
    assert run.ended
