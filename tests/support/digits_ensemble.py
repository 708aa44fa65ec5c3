"""An ensemble on real data: project, two classifiers side by side, one that weighs their opinions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TRAINED_ON = 1200

DESCRIPTION = """\
description: Digits, by a forest and by neighbours, weighed.
outputs: [label, probabilities]
steps:
- {model: project, inputs: {input: image}, outputs: {transformed: projected}}
- {model: forest, inputs: {input: projected}, outputs: {probabilities: by_forest}}
- {model: neighbours, inputs: {input: projected}, outputs: {probabilities: by_neighbours}}
- name: weigh
  model: weigh
  inputs: {first: by_forest, second: by_neighbours}
  outputs: {label: label, probabilities: probabilities}
"""


@dataclass(frozen=True)
class Digits:
    """The trained parts, and images that none of them has seen."""

    project: Any
    forest: Any
    neighbours: Any
    weigh: Any
    images: Any
    labels: Any

    def by_hand(self, images: Any) -> Any:
        """The labels that the parts give when they are called one after the other."""
        projected = self.project.transform(images)
        opinions = [part.predict_proba(projected) for part in (self.forest, self.neighbours)]
        return self.weigh.predict(np.concatenate(opinions, axis=1))

    def probabilities_by_hand(self, images: Any) -> Any:
        """The probabilities behind them."""
        projected = self.project.transform(images)
        opinions = [part.predict_proba(projected) for part in (self.forest, self.neighbours)]
        return self.weigh.predict_proba(np.concatenate(opinions, axis=1))

    def save(self, folder: Path) -> dict[str, Path]:
        """Write the parts as files; returns them by the names under which the description knows them."""
        paths = {}
        for name in ("project", "forest", "neighbours", "weigh"):
            paths[name] = folder / f"{name}.skops"
            skops.io.dump(getattr(self, name), paths[name])
        (folder / "ensemble.yaml").write_text(DESCRIPTION)
        return paths


def train() -> Digits:
    """Train all parts; the one that weighs learns from opinions on images that the others had not seen."""
    images, labels = load_digits(return_X_y=True)
    seen, taught = images[:TRAINED_ON], labels[:TRAINED_ON]
    project = make_pipeline(StandardScaler(), PCA(24, random_state=0)).fit(seen)
    projected = project.transform(seen)
    parts = [RandomForestClassifier(30, random_state=0), KNeighborsClassifier(5)]
    opinions = [cross_val_predict(part, projected, taught, method="predict_proba", cv=3) for part in parts]
    forest, neighbours = (part.fit(projected, taught) for part in parts)
    weigh = LogisticRegression(max_iter=1000).fit(np.concatenate(opinions, axis=1), taught)
    return Digits(project, forest, neighbours, weigh, images[TRAINED_ON:], labels[TRAINED_ON:])
