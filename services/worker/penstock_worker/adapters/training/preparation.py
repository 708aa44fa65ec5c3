"""From a dataset and a recipe to what the loop works with: blueprint, rows, loss, score, first weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.train import Named, Plan, architecture_of
from penstock_kit.jobs.training import LOSSES
from penstock_worker.adapters.data import OpenedDataset, Part
from penstock_worker.adapters.training.architectures import Blueprint, build_model, new_head
from penstock_worker.adapters.training.architectures.blocks import Head, Standardize
from penstock_worker.adapters.training.architectures.image import Pixels
from penstock_worker.adapters.training.chain import Chain
from penstock_worker.adapters.training.objective import (
    CrossEntropy,
    Objective,
    Regression,
    balanced_weights,
    named_weights,
)
from penstock_worker.adapters.training.rebuild import rebuild
from penstock_worker.adapters.training.rows import (
    PartRows,
    Rows,
    TensorRows,
    TokenRows,
    TokenWindows,
    model_inputs,
)
from penstock_worker.adapters.training.scores import ClassScore, NumberScore, Score, TokenScore
from penstock_worker.adapters.training.texts import TOKENIZER_FILE, load_tokenizer, make_tokenizer
from penstock_worker.adapters.training.tokens import padded_of, stream_of
from penstock_worker.usecases.job_context import JobFailure

# Bytes of rows that are kept ready to be computed with; more are made batch by batch. On a CPU they would be
# in memory twice, and once more for each rank, so only what is nothing beside torch itself: those are the
# small datasets whose steps are so short that making a batch shows (a fifth of a linear model's).
_READY_BYTES = {"cpu": 2**24}
_READY_BYTES_ELSEWHERE = 2**30
# Rows that statistics are taken of at once, and their bytes.
_CHUNK = 4096
_CHUNK_BYTES = 8 << 20
_STATISTICS = "statistics.npz"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that follows from the data and the recipe; the same in every rank.

    Attributes:
        blueprint: The model.
        tokenizer: Of texts; else None.
        train: Rows to learn from.
        held_out: Rows to measure on.
        objective: The loss.
        score: What is measured.
        state: Weights and statistics to begin with, by name, on the CPU in fp32.
        bytes: Of the rows that this rank keeps for itself.
    """

    blueprint: Blueprint
    tokenizer: Tokenizer | None
    train: Rows
    held_out: Rows
    objective: Objective
    score: Score
    state: dict[str, torch.Tensor]
    bytes: int

    def build(self) -> Chain:
        """Build the model with the weights to begin with."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.blueprint)
        model.load_state_dict(self.state)
        return model


def prepare(
    opened: OpenedDataset, plan: Plan, *, seed: int, device: torch.device, base: Path | None = None
) -> Prepared:
    """Make everything of a dataset and a recipe.

    Args:
        opened: The dataset.
        plan: The recipe.
        seed: Of the weights.
        device: Where rows are kept.
        base: The bundle of the version to go on from.

    Raises:
        JobFailure: INVALID_RECIPE or INVALID_DATA if they do not fit together.
    """
    _check_target(opened, plan)
    origin = None if base is None else _origin(base, opened)
    tokenizer = None
    if opened.task in {"text", "language_model"}:
        tokenizer = _tokenizer(opened, plan) if base is None else load_tokenizer(base)
    blueprint = _blueprint(opened, plan, tokenizer) if origin is None else _descendant(origin, opened)
    train, held_out, size = _rows(opened, blueprint, tokenizer, device)
    objective = _objective(opened, plan, blueprint, device)
    score = _score(opened, tokenizer, objective)
    model = _first_model(blueprint, origin, base, seed)
    if base is None:
        _fit(model, opened, blueprint)
    elif opened.target_dtype == torch.float32:
        _fit_head(model, opened)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Prepared(blueprint, tokenizer, train, held_out, objective, score, state, size)


def _check_target(opened: OpenedDataset, plan: Plan) -> None:
    kind = "classes" if opened.classes or opened.task == "language_model" else "numbers"
    if plan.loss and LOSSES[plan.loss] != kind:
        usual = "cross_entropy" if kind == "classes" else "mse"
        raise JobFailure(
            f"The loss {plan.loss} is for {LOSSES[plan.loss]}, and {opened.label or 'what is learnt'} has "
            f"{kind}; leave it out for {usual}.",
            "INVALID_RECIPE",
        )
    if opened.task == "text" and kind == "numbers":
        raise JobFailure("Texts are learnt to be classified, and this label has numbers.", "INVALID_RECIPE")
    if opened.task != "language_model" and kind == "classes" and len(opened.classes) < 2:
        raise JobFailure(
            f"The label {opened.label!r} has one class only, {opened.classes[0]!r}: nothing can be learnt.",
            "INVALID_DATA",
        )
    if kind == "numbers" and (plan.class_weights or plan.balance_classes):
        raise JobFailure(
            "class_weights and balance_classes are for classes; this label has numbers.", "INVALID_RECIPE"
        )
    if opened.task == "language_model" and (plan.class_weights or plan.balance_classes):
        raise JobFailure("A language model has no classes to weigh.", "INVALID_RECIPE")
    if unknown := sorted(set(plan.class_weights) - set(opened.classes)):
        raise JobFailure(
            f"class_weights names {unknown[0]!r}, which is no class of {opened.label!r}; there are "
            f"{', '.join(opened.classes[:20])}.",
            "INVALID_RECIPE",
        )


def _origin(base: Path, opened: OpenedDataset) -> Blueprint:
    """Read what the version to go on from is, and refuse data that it cannot take."""
    try:
        origin = Blueprint.load(base)
    except (OSError, ValueError) as error:
        raise JobFailure(
            f"The version to go on from was not made by a recipe: {error}.", "UNSUPPORTED"
        ) from error
    if origin.task != opened.task:
        raise JobFailure(
            f"The version to go on from is for {origin.task}, and the dataset is {opened.task}.",
            "INVALID_RECIPE",
        )
    if not origin.of_tokens and origin.input_shape != _input_shape(opened):
        raise JobFailure(
            f"The version to go on from takes rows of shape {list(origin.input_shape)}, and the dataset has "
            f"{list(_input_shape(opened))}.",
            "INVALID_DATA",
        )
    return origin


def _descendant(origin: Blueprint, opened: OpenedDataset) -> Blueprint:
    """Return the blueprint of a model that goes on from another: its own, with as many outputs as needed."""
    if opened.task == "language_model":
        return origin
    return dataclasses.replace(origin, classes=opened.classes, outputs=max(1, len(opened.classes)))


def _tokenizer(opened: OpenedDataset, plan: Plan) -> Tokenizer:
    parameters = _architecture(opened, plan).parameters
    kind, vocabulary = parameters["tokenizer"], parameters["vocabulary"]

    def write(directory: Path) -> None:
        make_tokenizer(kind, vocabulary, opened.train.texts).save(str(directory / TOKENIZER_FILE))

    return load_tokenizer(opened.shared.once(f"tokenizer-{opened.key}-{kind}-{vocabulary}", write))


def _architecture(opened: OpenedDataset, plan: Plan) -> Named:
    named = plan.architecture
    try:
        given = {} if named is None else named.parameters
        return architecture_of(opened.task, "" if named is None else named.name, given)
    except InvalidArgument as error:
        raise JobFailure(str(error), "INVALID_RECIPE") from error


def _input_shape(opened: OpenedDataset) -> tuple[int, ...]:
    return Blueprint("", "", {}, 1, _inputs(opened)).input_shape


def _inputs(opened: OpenedDataset) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((spec.name, tuple(spec.shape)) for spec in opened.input_specs)


def _blueprint(opened: OpenedDataset, plan: Plan, tokenizer: Tokenizer | None) -> Blueprint:
    architecture = _architecture(opened, plan)
    vocabulary = 0 if tokenizer is None else tokenizer.get_vocab_size()
    inputs = (("tokens", (-1,)),) if tokenizer is not None else _inputs(opened)
    outputs = vocabulary if opened.task == "language_model" else max(1, len(opened.classes))
    return Blueprint(
        task=opened.task,
        architecture=architecture.name,
        parameters=architecture.parameters,
        outputs=outputs,
        inputs=inputs,
        classes=() if opened.task == "language_model" else opened.classes,
        vocabulary=vocabulary,
        features=opened.feature_names,
    )


def _rows(
    opened: OpenedDataset, blueprint: Blueprint, tokenizer: Tokenizer | None, device: torch.device
) -> tuple[Rows, Rows, int]:
    """Return both parts, and the bytes that they keep."""
    if tokenizer is not None:
        return _token_rows(opened, blueprint, tokenizer, device)
    total = _row_bytes(blueprint) * (len(opened.train) + len(opened.held_out))
    if total > _READY_BYTES.get(device.type, _READY_BYTES_ELSEWHERE):
        return (
            PartRows(opened.train, blueprint.inputs, device),
            PartRows(opened.held_out, blueprint.inputs, device),
            0,
        )
    parts = [
        TensorRows(model_inputs(batch.inputs, blueprint.inputs), batch.targets, device)
        for batch in (opened.train.all(), opened.held_out.all())
    ]
    return parts[0], parts[1], total


def _row_bytes(blueprint: Blueprint) -> int:
    return 4 * math.prod(blueprint.input_shape)


def _token_rows(
    opened: OpenedDataset, blueprint: Blueprint, tokenizer: Tokenizer, device: torch.device
) -> tuple[Rows, Rows, int]:
    length = int(blueprint.parameters["length"])
    if opened.task == "language_model":
        windows = [
            TokenWindows(_stream(opened, tokenizer, part), length, device)
            for part in (opened.train, opened.held_out)
        ]
        for name, part in zip(("to learn from", "held out"), windows, strict=True):
            if not len(part):
                raise JobFailure(
                    f"The text {name} is shorter than one window of {length} tokens: give more text, or a "
                    "smaller length in architecture_parameters.",
                    "INVALID_DATA",
                )
        own = device.type != "cpu"
        return windows[0], windows[1], 4 * length * sum(len(part) for part in windows) * own
    parts = (opened.train, opened.held_out)
    tokens = [padded_of(opened.shared, _key(opened, part), tokenizer, part.texts, length) for part in parts]
    targets = [part.targets for part in parts]
    if device.type == "cpu":
        return TokenRows(tokens[0], targets[0]), TokenRows(tokens[1], targets[1]), 0
    found = [TensorRows(*both, device) for both in zip((ids.long() for ids in tokens), targets, strict=True)]
    return found[0], found[1], 8 * sum(rows.inputs.numel() for rows in found)


def _key(opened: OpenedDataset, part: Part) -> str:
    return f"{opened.key}-{'train' if part is opened.train else 'held_out'}"


def _stream(opened: OpenedDataset, tokenizer: Tokenizer, part: Part) -> torch.Tensor:
    return stream_of(opened.shared, _key(opened, part), tokenizer, part.texts)


def _objective(opened: OpenedDataset, plan: Plan, blueprint: Blueprint, device: torch.device) -> Objective:
    if opened.task == "language_model":
        return CrossEntropy(tokens=int(blueprint.parameters["length"]))
    if opened.classes:
        weights = None
        if plan.balance_classes:
            weights = balanced_weights(opened.train.targets, len(opened.classes)).to(device)
        elif plan.class_weights:
            weights = named_weights(plan.class_weights, opened.classes).to(device)
        return CrossEntropy(weights)
    return Regression(plan.loss or "mse", _deviation(opened.train.targets))


def _deviation(targets: torch.Tensor) -> float:
    """Standard deviation of targets; 1 if they are all the same."""
    found = float(targets.double().std(unbiased=False)) if len(targets) else 0.0
    return found if found > 1e-12 else 1.0


def _score(opened: OpenedDataset, tokenizer: Tokenizer | None, objective: Objective) -> Score:
    if opened.task == "language_model" and tokenizer is not None:
        texts = opened.held_out.texts
        characters = sum(len(text.encode()) for text in texts)
        tokens = len(_stream(opened, tokenizer, opened.held_out))
        return TokenScore(objective, (characters + len(texts)) / max(1, tokens))
    if opened.classes:
        return ClassScore(objective, len(opened.classes))
    return NumberScore(objective, float(opened.train.targets.double().mean()))


def _first_model(blueprint: Blueprint, origin: Blueprint | None, base: Path | None, seed: int) -> Chain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base is None or origin is None:
            try:
                return build_model(blueprint)
            except ValueError as error:
                raise JobFailure(f"The model cannot be built: {error}.", "INVALID_RECIPE") from error
        model = rebuild(base)
        if (origin.classes, origin.outputs) != (blueprint.classes, blueprint.outputs):
            new_head(model, blueprint)
        return model


def _fit(model: Chain, opened: OpenedDataset, blueprint: Blueprint) -> None:
    """Set the statistics that the model standardizes with."""
    if not blueprint.of_tokens:
        first = next(iter(model))
        shape = blueprint.input_shape
        arrange = first.arrange if isinstance(first, Pixels) else None
        layer = first.standardize if isinstance(first, Pixels) else first
        if not isinstance(layer, Standardize):
            raise TypeError(
                f"the first block of {blueprint.architecture} for rows of {shape} standardizes nothing"
            )

        def write(directory: Path) -> None:
            chunks = _chunks(opened.train, blueprint)
            arranged = chunks if arrange is None else (arrange(chunk) for chunk in chunks)
            mean, deviation = _statistics(arranged, by_channel=arrange is not None)
            np.savez(directory / _STATISTICS, mean=mean.numpy(), deviation=deviation.numpy())

        way = "channels" if arrange is not None else "features"
        # A pass over all rows: one rank of the node makes it.
        found = np.load(opened.shared.once(f"statistics-{opened.key}-{way}", write) / _STATISTICS)
        layer.fit(torch.from_numpy(found["mean"]), torch.from_numpy(found["deviation"]))
    if opened.target_dtype == torch.float32:
        _fit_head(model, opened)


def _fit_head(model: Chain, opened: OpenedDataset) -> None:
    head = list(model)[-1]
    if isinstance(head, Head) and head.numbers:
        head.shift.fill_(float(opened.train.targets.double().mean()))
        head.scale.fill_(_deviation(opened.train.targets))


def _chunks(part: Part, blueprint: Blueprint) -> Iterator[torch.Tensor]:
    step = max(1, min(_CHUNK, _CHUNK_BYTES // _row_bytes(blueprint)))
    for start in range(0, len(part), step):
        batch = part.batch(torch.arange(start, min(start + step, len(part))))
        yield model_inputs(batch.inputs, blueprint.inputs)


def _statistics(chunks: Iterator[torch.Tensor], *, by_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation over rows (and pixels), in fp64 around the first chunk's mean."""
    count, shift = 0, torch.zeros(())
    total, squares = torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        rows = chunk.double()
        rows = rows.transpose(0, 1).flatten(1) if by_channel else rows.flatten(1).T
        if not count:
            shift = rows.mean(1, keepdim=True)
            total, squares = torch.zeros_like(shift[:, 0]), torch.zeros_like(shift[:, 0])
        away = rows - shift
        total, squares = total + away.sum(1), squares + away.square().sum(1)
        count += rows.shape[1]
    mean = total / count
    return (shift[:, 0] + mean).float(), (squares / count - mean.square()).clamp(min=0.0).sqrt().float()
