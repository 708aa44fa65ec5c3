"""What a dataset is said to be: worked out from its rows when it is pushed, and kept beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.datasets.contents import Contents

# A table may have thousands of columns; a description names the first.
MAX_COLUMNS = 1000
HISTOGRAM_BINS = 20
# Texts looked at for their length.
_TEXTS = 10_000


def describe(contents: Contents, *, license: str = "", source: str = "") -> dict[str, Any]:  # noqa: A002 - its name in the contract
    """Return the description of a dataset, as JSON.

    =============  ==========================================================================================
    task           tabular, image, text or language_model
    rows           how many
    columns        the first 1000, as {"name", "dtype", "shape"}; columns_total if there are more
    features       names of the columns that make up a table's input `x`, in order, if at most 1000
    inputs         name → shape of one row
    label          name of the label, if there is one
    target         classes or numbers
    classes        their names, by index; class_counts: rows of each
    histogram      of a label that is a number: {"edges": 21 numbers, "counts": 20}
    characters     of texts: {"median", "most"} over the first 10,000 rows
    license        SPDX identifier
    source         where it comes from, for people
    =============  ==========================================================================================

    Args:
        contents: What was read.
        license: SPDX identifier of the data's licence.
        source: Where they come from.
    """
    found: dict[str, Any] = {
        "task": contents.task,
        "rows": contents.rows,
        "columns": [dict(column) for column in contents.columns[:MAX_COLUMNS]],
        "inputs": {name: list(array.shape[1:]) for name, array in contents.inputs.items()},
    }
    if len(contents.columns) > MAX_COLUMNS:
        found["columns_total"] = len(contents.columns)
    found |= {
        key: value for key, value in contents.notes.items() if key != "features" or len(value) <= MAX_COLUMNS
    }
    if contents.targets is not None:
        found["label"] = contents.label
        found["target"] = "classes" if contents.classes else "numbers"
        if contents.classes:
            counts = np.bincount(contents.targets, minlength=len(contents.classes))
            found["classes"] = list(contents.classes)
            found["class_counts"] = [int(count) for count in counts]
        else:
            counts, edges = np.histogram(contents.targets.astype(np.float64), HISTOGRAM_BINS)
            found["histogram"] = {
                "edges": [float(edge) for edge in edges],
                "counts": [int(count) for count in counts],
            }
    if contents.texts is not None:
        lengths = [len(contents.texts[row]) for row in range(min(contents.rows, _TEXTS))]
        found["characters"] = {"median": float(np.median(lengths)), "most": max(lengths)}
    if license:
        found["license"] = license
    if source:
        found["source"] = source
    return found
