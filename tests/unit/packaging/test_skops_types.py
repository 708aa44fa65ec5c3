"""Compiled trees out of a file are checked before anything follows their indices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier
from skops import io as skops_io

from penstock.errors import InvalidArgument, Reason
from penstock.packaging.skops_types import load_skops

RNG = np.random.default_rng(1)
X = RNG.normal(size=(200, 4))
Y = (X[:, 0] + X[:, 1] > 0).astype(int)


# A process of its own: here, others have imported torch.
DESCRIBES = """
import sys
from pathlib import Path
from penstock.packaging.skops_types import load_skops
load_skops(Path(sys.argv[1]))
assert "torch" not in sys.modules
assert "sklearn.externals.array_api_compat.torch" not in sys.modules, "an import of it works as ever"
"""


def test_a_model_is_read_without_torch_which_others_may_import_later(tmp_path: Path) -> None:
    saved = save(tmp_path, LogisticRegression().fit(X, Y))
    subprocess.run([sys.executable, "-c", DESCRIBES, str(saved)], check=True, timeout=60)


def save(path: Path, model: Any) -> Path:
    skops_io.dump(model, path / "m.skops")
    return path / "m.skops"


@pytest.mark.parametrize(
    "model",
    [
        DecisionTreeClassifier(),
        RandomForestClassifier(4),
        HistGradientBoostingClassifier(max_iter=3),
        KNeighborsClassifier(algorithm="kd_tree", leaf_size=5),
        KNeighborsClassifier(algorithm="ball_tree", leaf_size=5),
    ],
    ids=lambda model: f"{type(model).__name__}-{getattr(model, 'algorithm', '')}",
)
def test_a_sound_model_is_loaded_and_predicts_the_same(tmp_path: Path, model: Any) -> None:
    model.fit(X, Y)
    np.testing.assert_array_equal(load_skops(save(tmp_path, model)).predict(X), model.predict(X))


@pytest.mark.parametrize("kind", [CountVectorizer, TfidfVectorizer, HashingVectorizer])
@pytest.mark.parametrize("how", ["filename", "file", "content"])
def test_a_model_that_opens_files_which_requests_name_is_refused(tmp_path: Path, kind: Any, how: str) -> None:
    model = make_pipeline(kind(analyzer="char"), LogisticRegression()).fit(["abc", "xyz"], [0, 1])
    model[0].input = how
    saved = save(tmp_path, model)
    if how == "content":
        assert load_skops(saved).predict(["xyz"]).tolist() == [1]
        return
    with pytest.raises(InvalidArgument, match="reads files") as caught:
        load_skops(saved)
    assert caught.value.reason is Reason.UNSAFE_FORMAT


def crafted_tree(field: str, value: int) -> DecisionTreeClassifier:
    model = DecisionTreeClassifier(max_depth=3).fit(X, Y)
    state = model.tree_.__getstate__()
    state["nodes"] = state["nodes"].copy()
    state["nodes"][field][0] = value
    model.tree_.__setstate__(state)
    return model


@pytest.mark.parametrize(
    ("field", "value"),
    [("left_child", 10_000), ("right_child", -7), ("left_child", 0), ("feature", 4), ("feature", -9)],
)
def test_a_tree_that_points_outside_of_itself_is_refused(tmp_path: Path, field: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match="point out of it") as caught:
        load_skops(save(tmp_path, crafted_tree(field, value)))
    assert caught.value.reason is Reason.BUNDLE_CORRUPT


def test_a_tree_deep_inside_an_ensemble_is_found(tmp_path: Path) -> None:
    forest = RandomForestClassifier(3, max_depth=3).fit(X, Y)
    forest.estimators_[2] = crafted_tree("left_child", 10_000)
    with pytest.raises(InvalidArgument, match="point out of it"):
        load_skops(save(tmp_path, forest))


def test_a_tree_for_fewer_features_than_the_estimator_checks_is_refused(tmp_path: Path) -> None:
    model = DecisionTreeClassifier().fit(X, Y)
    model.n_features_in_ = 2
    with pytest.raises(InvalidArgument, match="point out of it"):
        load_skops(save(tmp_path, model))


@pytest.mark.parametrize(("field", "value"), [("left", 10_000), ("feature_idx", -1), ("right", 0)])
def test_a_boosted_tree_that_points_outside_of_itself_is_refused(
    tmp_path: Path, field: str, value: int
) -> None:
    model = HistGradientBoostingClassifier(max_iter=2).fit(X, Y)
    model._predictors[0][0].nodes[field][0] = value
    with pytest.raises(InvalidArgument, match="point out of it"):
        load_skops(save(tmp_path, model))
