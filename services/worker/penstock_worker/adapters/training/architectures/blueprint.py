"""What a model is, as `architecture.json` beside its weights says it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE_FILE = "architecture.json"
_FORMAT = "penstock-recipe-1"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All that decides the shapes of a recipe's model; with its weights it is the model.

    Attributes:
        task: tabular, image, text or language_model.
        architecture: Its name in `penstock_kit.jobs.training.ARCHITECTURES`.
        parameters: All its parameters.
        outputs: Numbers that it gives for a row (or a token): classes, the vocabulary, or 1.
        inputs: Names of what callers send and the shapes of one row of it, without the batch axis; (-1,) for
            texts, which come as token ids.
        classes: Names of the classes, by index; empty for numbers and language models.
        vocabulary: Tokens that it knows; 0 where there are none.
        features: Names of the columns of a table's row, in order.
    """

    task: str
    architecture: str
    parameters: Mapping[str, Any]
    outputs: int
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    classes: tuple[str, ...] = ()
    vocabulary: int = 0
    features: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a row as the model takes it: several inputs are laid side by side."""
        if len(self.inputs) == 1:
            return self.inputs[0][1]
        return (sum(math.prod(shape) for _, shape in self.inputs),)

    @property
    def of_tokens(self) -> bool:
        """Whether its input are token ids."""
        return self.task in {"text", "language_model"}

    @property
    def gives_numbers(self) -> bool:
        """Whether it gives a number instead of the logits of classes."""
        return not self.classes and self.task != "language_model"

    def save(self, directory: Path) -> None:
        """Write `architecture.json`."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2)
        (directory / ARCHITECTURE_FILE).write_text(text + "\n")

    @staticmethod
    def load(directory: Path) -> Blueprint:
        """Read `architecture.json`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not what `save` writes.
        """
        found = json.loads((directory / ARCHITECTURE_FILE).read_text())
        if not isinstance(found, dict) or found.pop("format", "") != _FORMAT:
            raise ValueError(f"{ARCHITECTURE_FILE} is not of the format {_FORMAT}")
        try:
            found["inputs"] = tuple((str(name), tuple(shape)) for name, shape in found["inputs"])
            for name in ("classes", "features"):
                found[name] = tuple(found[name])
            return Blueprint(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{ARCHITECTURE_FILE}: {error}") from error
