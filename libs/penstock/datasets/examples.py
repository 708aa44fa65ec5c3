"""Datasets that are on this machine already: those of scikit-learn, and texts that come with Python.

=======================  =================================================  ==============================
name                     what                                               licence
=======================  =================================================  ==============================
sklearn:digits           1,797 images of 8×8 grey pixels, 10 digits         CC-BY-4.0 (UCI)
sklearn:breast_cancer    569 rows of 30 numbers, 2 classes                  CC-BY-4.0 (UCI)
sklearn:wine             178 rows of 13 numbers, 3 classes                  CC-BY-4.0 (UCI)
sklearn:diabetes         442 rows of 10 numbers, a number to predict        none given (Efron et al. 2004)
corpus:python-functions  functions of Python's library, 9 packages to tell  PSF-2.0
corpus:python-topics     Python's reference, plain text                     PSF-2.0
=======================  =================================================  ==============================

Both corpora are read out of the interpreter that runs, so their bytes follow its release; the description
says which. `pydoc_data.topics` and the packages are in every Python, and in Debian's libpython3-stdlib.
"""

from __future__ import annotations

import ast
import csv
import importlib
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from penstock.errors import FailedPrecondition, NotFound

# Packages of the standard library with many functions each, that Debian does not split off.
FUNCTION_PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
_FUNCTION_CHARACTERS = (120, 4000)


@dataclass(frozen=True, slots=True)
class Example:
    """A dataset that can be written here.

    Attributes:
        license: SPDX identifier; NOASSERTION if its makers gave none.
        source: Where it comes from.
        write: Writes its files into an empty directory.
    """

    license: str
    source: str
    write: Callable[[Path], None]


def write_example(name: str, directory: Path) -> Example:
    """Write a built-in dataset into an empty directory, and return what is known of it.

    Raises:
        NotFound: There is none of that name; the words list all.
        FailedPrecondition: scikit-learn is not installed.
    """
    if name not in EXAMPLES:
        raise NotFound(f"There is no built-in dataset {name!r}; there are {', '.join(EXAMPLES)}.")
    example = EXAMPLES[name]
    example.write(directory)
    return example


def _load(name: str) -> Any:
    try:
        module = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise FailedPrecondition("This dataset comes with scikit-learn: pip install scikit-learn.") from error
    return getattr(module, f"load_{name}")()


def _write_digits(directory: Path) -> None:
    digits = _load("digits")
    np.savez(directory / "digits.npz", x=digits.images.astype(np.float32), y=digits.target)


def _write_table(name: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        data = _load(name)
        names = [str(feature).replace(" ", "_") for feature in data.feature_names]
        is_class = hasattr(data, "target_names")
        labels = [str(data.target_names[value]) for value in data.target] if is_class else data.target
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "label"])
            for row, label in zip(data.data.tolist(), labels, strict=True):
                writer.writerow([*row, label])

    return write


def _write_functions(directory: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    with (directory / "functions.jsonl").open("w") as file:
        for package in FUNCTION_PACKAGES:
            seen: set[str] = set()
            for path in sorted((root / package).rglob("*.py")):
                # Debian has the tests in a package of their own.
                if {"test", "tests"} & set(path.parts):
                    continue
                for text in _functions(path):
                    if text not in seen:
                        seen.add(text)
                        file.write(json.dumps({"text": text, "label": package}, ensure_ascii=False) + "\n")


def _functions(path: Path) -> Iterator[str]:
    """Yield the functions and methods of a module, without their place in it."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            indent = node.col_offset
            text = "\n".join(line[indent:] for line in lines[node.lineno - 1 : node.end_lineno])
            if _FUNCTION_CHARACTERS[0] <= len(text) <= _FUNCTION_CHARACTERS[1]:
                yield text


def _write_topics(directory: Path) -> None:
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n\n".join(topics[name].strip() for name in sorted(topics))
    (directory / "topics.txt").write_text(text + "\n", encoding="utf-8")


_PYTHON = f"Python {platform.python_version()}"
_UCI = "UCI Machine Learning Repository, as shipped with scikit-learn, doi.org/10.24432/"

EXAMPLES: Mapping[str, Example] = MappingProxyType(
    {
        "sklearn:digits": Example("CC-BY-4.0", _UCI + "C50P49", _write_digits),
        "sklearn:breast_cancer": Example("CC-BY-4.0", _UCI + "C5DW2B", _write_table("breast_cancer")),
        "sklearn:wine": Example("CC-BY-4.0", _UCI + "C5PC7J", _write_table("wine")),
        "sklearn:diabetes": Example(
            "NOASSERTION",
            "Efron, Hastie, Johnstone, Tibshirani: Least Angle Regression, 2004; shipped with scikit-learn",
            _write_table("diabetes"),
        ),
        "corpus:python-functions": Example(
            "PSF-2.0", f"functions of the standard library of {_PYTHON}", _write_functions
        ),
        "corpus:python-topics": Example(
            "PSF-2.0", f"pydoc_data.topics, the language reference of {_PYTHON}", _write_topics
        ),
    }
)
