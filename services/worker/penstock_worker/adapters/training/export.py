"""From trained weights to a bundle that replicas serve and trainings go on from.

=================  ===================================================================================
model.pt2          the whole model as torch.export has it, from what callers send to named outputs
model.safetensors  its weights and statistics
architecture.json  what it is built of
tokenizer.json     for texts: how they become the token ids that it takes
=================  ===================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from penstock.common.v1 import tensor_pb2
from penstock.registry.v1 import manifest_pb2
from penstock_worker.adapters.training.architectures import Blueprint
from penstock_worker.adapters.training.chain import Chain
from penstock_worker.adapters.training.rebuild import WEIGHTS_FILE
from penstock_worker.adapters.training.texts import TOKENIZER_FILE
from penstock_worker.usecases.job_context import JobFailure

PROGRAM_FILE = "model.pt2"
# Rows that a replica joins at most; of language models few, as each row has a vector for each token.
_BATCH, _BATCH_OF_TOKENS = 64, 8
# What an export is traced with.
_EXAMPLE_TOKENS = 5


class Served(nn.Module):
    """A model as callers see it: named inputs, and outputs that need no explanation.

    Args:
        model: Gives logits or numbers.
        blueprint: What it is.
    """

    def __init__(self, model: Chain, blueprint: Blueprint) -> None:
        super().__init__()
        self.model = model
        self._blueprint = blueprint

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs in the signature's order.

        Returns:
            Classes: logits and probabilities [B, C]; numbers: values [B]; language models: logits [B, T, V].
        """
        x = inputs[0] if len(inputs) == 1 else torch.cat([part.flatten(1) for part in inputs], dim=1)
        found = self.model(x)
        if self._blueprint.task == "language_model":
            return (found,)
        if self._blueprint.gives_numbers:
            return (found.squeeze(1),)
        return found, found.softmax(1)


def write_bundle(
    directory: Path, model: Chain, blueprint: Blueprint, tokenizer: Tokenizer | None = None
) -> manifest_pb2.Manifest:
    """Write the files of a version, and check that the program gives what the model gives.

    Args:
        directory: Where to; exists.
        model: On the CPU, with its final weights.
        blueprint: What it is.
        tokenizer: Of texts.

    Returns:
        The manifest, without metrics and lineage.

    Raises:
        JobFailure: NUMERICS if the program answers differently.
    """
    model.eval()
    most = _BATCH_OF_TOKENS if blueprint.task == "language_model" else _BATCH
    served = Served(model, blueprint).eval()
    examples = _examples(blueprint)
    dimensions: dict[int, object] = {0: torch.export.Dim("batch", min=1, max=most)}
    if blueprint.of_tokens:
        longest = int(blueprint.parameters["length"])
        dimensions[1] = torch.export.Dim("length", min=1, max=longest)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(served, examples, dynamic_shapes=(tuple(dimensions for _ in examples),))
        torch.export.save(program, directory / PROGRAM_FILE)
    _check_program(program, served, examples)
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    blueprint.save(directory)
    if tokenizer is not None:
        (directory / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=False))
    return manifest_of(blueprint, most)


def _examples(blueprint: Blueprint) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if blueprint.of_tokens:
        size = (2, min(_EXAMPLE_TOKENS, int(blueprint.parameters["length"])))
        return (torch.randint(1, blueprint.vocabulary, size, generator=generator),)
    return tuple(torch.randn(2, *shape, generator=generator) for _, shape in blueprint.inputs)


def _check_program(
    program: torch.export.ExportedProgram, served: Served, examples: tuple[Tensor, ...]
) -> None:
    one = tuple(example[:1] for example in examples)
    with torch.no_grad():
        for found, wanted in zip(program.module()(*one), served(*one), strict=True):
            off = float((found - wanted).abs().max())
            if not off <= 1e-3 * max(1.0, float(wanted.abs().max())):
                raise JobFailure(
                    f"The exported program answers differently from the trained model, by {off:g}.",
                    "NUMERICS",
                )


def manifest_of(blueprint: Blueprint, max_batch_size: int) -> manifest_pb2.Manifest:
    """Return the description of a recipe's version: what it takes and gives, and how it is batched."""
    manifest = manifest_pb2.Manifest(
        runtime="torch",
        format="pt2",
        entrypoint=PROGRAM_FILE,
        description=_words(blueprint),
        parameters={"task": blueprint.task, "architecture": blueprint.architecture},
    )
    manifest.batching.max_batch_size = max_batch_size
    # Filling means nothing to these, and their outputs have no axis of tokens.
    manifest.batching.pad_variable_dimensions = blueprint.task == "text"
    for name, shape in blueprint.inputs:
        manifest.signature.inputs.add(
            name=name,
            data_type=tensor_pb2.DATA_TYPE_INT64 if blueprint.of_tokens else tensor_pb2.DATA_TYPE_FP32,
            shape=[-1, *shape],
            description=_input_words(blueprint),
        )
    outputs: Mapping[str, list[int]]
    if blueprint.task == "language_model":
        outputs = {"logits": [-1, -1, blueprint.outputs]}
    elif blueprint.gives_numbers:
        outputs = {"values": [-1]}
    else:
        outputs = {"logits": [-1, blueprint.outputs], "probabilities": [-1, blueprint.outputs]}
    for name, sizes in outputs.items():
        manifest.signature.outputs.add(
            name=name, data_type=tensor_pb2.DATA_TYPE_FP32, shape=sizes, labels=blueprint.classes
        )
    return manifest


def _words(blueprint: Blueprint) -> str:
    kind = {
        "tabular": "rows of a table",
        "image": "images",
        "text": "texts",
        "language_model": "texts",
    }[blueprint.task]
    does = {
        "language_model": f"Predicts the next token of {kind}",
        "text": f"Classifies {kind}",
    }.get(blueprint.task, f"{'Predicts a number from' if blueprint.gives_numbers else 'Classifies'} {kind}")
    tokens = f" It takes token ids; {TOKENIZER_FILE} of the bundle makes them." if blueprint.of_tokens else ""
    return f"{does} ({blueprint.architecture}, trained by a recipe).{tokens}"


def _input_words(blueprint: Blueprint) -> str:
    if blueprint.of_tokens:
        longest = blueprint.parameters["length"]
        fill = "; 0 fills up shorter ones" if blueprint.task == "text" else ""
        return f"Token ids by {TOKENIZER_FILE} of the bundle, at most {longest}{fill}."
    if blueprint.features:
        shown = ", ".join(blueprint.features[:32]) + (" …" if len(blueprint.features) > 32 else "")
        return f"Columns: {shown}."
    return "As the dataset has them; standardized by the model." if blueprint.task != "image" else "Pixels."
