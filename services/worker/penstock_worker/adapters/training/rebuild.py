"""A recipe's model from the files of its version."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.adapters.training.chain import Chain
from penstock_worker.usecases.job_context import JobFailure

WEIGHTS_FILE = "model.safetensors"


def rebuild(directory: Path) -> Chain:
    """Build the model that `architecture.json` and `model.safetensors` of a bundle are.

    Returns:
        On the CPU, in fp32, in the mode for answering. It takes one tensor, rows first (token ids int64 for
        texts), and gives logits [B, C], numbers [B, 1] or, for language models, logits [B, T, vocabulary].

    Raises:
        JobFailure: UNSUPPORTED if the bundle is not one that a recipe made.
    """
    try:
        blueprint = Blueprint.load(directory)
        # Fresh weights are drawn and replaced: the job's random numbers shall not notice.
        with torch.random.fork_rng(devices=[]):
            model: Chain = build_model(blueprint)
        model.load_state_dict(load_file(directory / WEIGHTS_FILE))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise JobFailure(
            f"This version cannot be built again to be trained: {error}. Versions that a training recipe "
            f"made can, as they have {WEIGHTS_FILE} and architecture.json.",
            "UNSUPPORTED",
        ) from error
    model.eval()
    return model
