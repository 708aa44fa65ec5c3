"""What is read as a dataset, and everything that nobody should learn from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from penstock.datasets import EXAMPLES, Contents, ReadOptions, describe, detect_format, read, write_example
from penstock.errors import InvalidArgument, NotFound


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def csv(path: Path, text: str, name: str = "data.csv") -> Path:
    (path / name).write_text(text)
    return path / name


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidArgument) as error:
        read(path, options=ReadOptions(**options))
    return str(error.value)


def test_arrays_are_rows_of_numbers_and_classes(tmp_path: Path) -> None:
    data = read(npz(tmp_path, x=np.arange(12).reshape(6, 2), y=np.array([7, 9] * 3)))
    assert (data.task, data.rows, data.classes) == ("tabular", 6, ("7", "9"))
    assert data.inputs["x"].dtype == np.float32
    assert data.targets is not None
    assert data.targets.tolist() == [0, 1] * 3


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3), (6, 3, 5, 4), (6, 1, 5, 4)])
def test_images_come_with_their_channels_first(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = read(npz(tmp_path, x=np.zeros(shape, np.uint8), y=np.array([0, 1] * 3)))
    assert data.task == "image"
    assert data.inputs["x"].shape == (6, 3 if 3 in shape else 1, 5, 4)
    assert data.inputs["x"].dtype == np.uint8


def test_labels_are_classes_or_numbers_as_they_look_unless_somebody_says(tmp_path: Path) -> None:
    def kind(values: Any, **options: Any) -> Contents:
        return read(
            npz(tmp_path, x=np.zeros((len(values), 1)), y=np.array(values)), options=ReadOptions(**options)
        )

    assert kind(["b", "a"] * 3).classes == ("a", "b")
    assert kind([True, False] * 3).classes == ("false", "true")
    assert kind([1.5, 2.5, 1.5]).classes == ()
    assert kind(list(range(50))).classes == ()
    assert kind([1, 2, 1, 2], target="numbers").classes == ()
    assert kind([1.0, 2.0, 1.0], target="classes").classes == ("1", "2")
    asked = kind(["b", "b"], classes=("a", "b", "c"))
    assert asked.targets is not None
    assert (asked.classes, asked.targets.tolist()) == (("a", "b", "c"), [1, 1])


X = np.zeros((4, 2))
Y = np.array([0, 1, 0, 1])
NAN = X.copy()
NAN[2, 1] = np.nan

WRONG_ARRAYS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"x": NAN, "y": Y}, {}, "row 2, column 1 is NaN"),
    ({"x": X + 1e300, "y": Y}, {}, "not finite in float32"),
    ({"x": X, "y": np.array([0, 1, np.nan, 1])}, {}, "missing in row 2"),
    ({"x": X, "y": np.array(["a", "", "b", "a"])}, {}, "missing in row 1"),
    ({"x": X, "y": np.zeros(4, int)}, {}, "in every row"),
    ({"x": X, "y": np.zeros(4)}, {}, "nothing to learn"),
    ({"x": X, "y": Y[:3]}, {}, "'y' has 3 rows and 'x' has 4"),
    ({"x": X, "y": np.eye(4)}, {}, "argmax"),
    ({"x": X[:1], "y": Y[:1]}, {}, "at least 2"),
    ({"x": X[:, :0], "y": Y}, {}, "no values"),
    ({"x": np.array(3.0)}, {}, "row axis"),
    ({"x": np.array([[1], [1, 2]], dtype=object), "y": Y}, {}, "pickles"),
    ({"x": X.astype(str), "y": Y}, {}, "inputs are numbers"),
    ({"x": X.astype(complex), "y": Y}, {}, "inputs are numbers"),
    ({"y": Y}, {}, "only the label"),
    ({"x": X, "y": Y}, {"label": "z"}, "no array 'z'"),
    ({"x": X, "y": Y}, {"features": ("w",)}, "no array 'w'"),
    ({"x": X, "y": Y}, {"task": "image"}, "not for image"),
    ({"x": X, "y": Y}, {"task": "poetry"}, "none of tabular"),
    ({"x": X, "y": np.array(["a", "b", "a", "z"])}, {"classes": ("a", "b")}, "row 3 is 'z'"),
]


@pytest.mark.parametrize(
    ("arrays", "options", "words"), WRONG_ARRAYS, ids=[words for *_, words in WRONG_ARRAYS]
)
def test_wrong_arrays_are_refused_with_the_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrays: dict[str, Any],
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr("penstock.datasets.arrays.MAX_BYTES", 1 << 24)
    assert words in refused(npz(tmp_path, **arrays), **options)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    for data in (b"", b"PK\x03\x04 broken", b"text"):
        path.write_bytes(data)
        assert "data.npz" in refused(path)
    np.save(tmp_path / "one.npy", X)
    (tmp_path / "one.npy").rename(path)
    assert "numpy.savez" in refused(path)


def test_a_table_whose_label_has_a_name_of_its_own_says_so(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,answer\n1,2,yes\n3,4,no\n")
    assert "If it is the label, say so: no column is called label, target, y, class." in refused(path)
    assert read(path, options=ReadOptions(label="answer")).classes == ("no", "yes")


def test_a_table_is_one_input_in_the_order_of_its_columns(tmp_path: Path) -> None:
    data = read(csv(tmp_path, "a,label,b\n1,yes,2\n3.5,no,true\n".replace("true", "4")))
    assert data.inputs["x"].tolist() == [[1, 2], [3.5, 4]]
    assert data.classes == ("no", "yes")
    assert data.notes["features"] == ["a", "b"]
    chosen = read(tmp_path / "data.csv", options=ReadOptions(label="b", features=("a",)))
    assert (chosen.inputs["x"].tolist(), chosen.classes) == ([[1], [3.5]], ("2", "4"))


def test_whole_numbers_may_have_a_point_later_in_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.datasets.tables._BLOCK_BYTES", 1024)
    lines = [f"{row},{row % 2}" for row in range(1000)] + ["0.5,1"]
    data = read(csv(tmp_path, "a,label\n" + "\n".join(lines)))
    assert data.rows == 1001
    assert data.inputs["x"][-1, 0] == 0.5


def test_what_does_not_fit_into_memory_lies_in_a_file_and_is_the_same(tmp_path: Path) -> None:
    table = pa.table({"a": np.arange(5000.0), "b": np.arange(5000.0) * 2, "label": np.arange(5000) % 3})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    within = read(tmp_path / "t.parquet")
    beyond = read(tmp_path / "t.parquet", options=ReadOptions(memory_bytes=1000, scratch=tmp_path))
    assert isinstance(beyond.inputs["x"], np.memmap)
    assert np.array_equal(within.inputs["x"], beyond.inputs["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_parquet_may_hold_lists_and_lie_in_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(3):
        values = [[float(part), float(row)] for row in range(4)]
        pq.write_table(pa.table({"v": values, "label": ["a", "b"] * 2}), folder / f"{part}.parquet")
    data = read(folder)
    assert data.inputs["v"].shape == (12, 2)
    assert data.inputs["v"][5].tolist() == [1, 1]


def test_a_table_whose_only_feature_is_text_is_for_texts(tmp_path: Path) -> None:
    data = read(csv(tmp_path, 'text,label\n"one, two",a\nthree,b\n'))
    assert data.task == "text"
    assert data.texts is not None
    assert list(data.texts) == ["one, two", "three"]


WRONG_TABLES = [
    ("a,label\n1,x\n,y\n", "row 1, column 'a' is missing"),
    ("a,label\n1,x\nnan,y\n", "row 1, column 'a'"),
    ("a,label\n1,x\ninf,y\n", "row 1, column 'a' is inf"),
    ("a,label\n1,x\n2,\n", "label 'label' is missing in row 1"),
    ("a,label\n1,x\n2\n", "line 3 has 1 values where the header has 2"),
    ("a,b,label\n1,2,x\nred,3,y\n", "row 1, column 'a' is 'red'"),
    ("a,a,label\n1,2,x\n", "two columns 'a'"),
    ("1.5,2.5\n3,4\n", "header line"),
    ("", "is empty"),
    ("a,label\n", "data.csv is empty"),
    ("a,label\n1,x\n2,x\n", "in every row"),
    ("label\nx\ny\n", "only the label"),
    ("text,label\nhello,x\n  ,y\n", "text is empty"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_TABLES, ids=[words for _, words in WRONG_TABLES])
def test_wrong_tables_are_refused_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(csv(tmp_path, text))


def test_a_label_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,label\n1,\xff\n2,x\n")
    assert "no UTF-8" in refused(tmp_path / "t.csv")


def test_wrong_parquet_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 no")
    assert "t.parquet cannot be read" in refused(path)
    pq.write_table(pa.table({"v": [[1.0], [1.0, 2.0]], "label": ["a", "b"]}), path)
    assert "row 1, column 'v' has 2 values where others have 1" in refused(path)
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.table({"a": [1.0], "label": ["a"]}), folder / "1.parquet")
    pq.write_table(pa.table({"b": [1.0], "label": ["b"]}), folder / "2.parquet")
    assert "other columns" in refused(folder)


def picture(path: Path, size: tuple[int, int] = (6, 4), mode: str = "L", value: Any = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_a_folder_of_images_is_read_with_its_classes(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.jpg"):
        picture(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    data = read(tmp_path)
    assert (data.task, data.classes, data.rows) == ("image", ("cat", "dog"), 3)
    assert data.inputs["image"].shape == (3, 1, 4, 6)
    assert data.inputs["image"][0, 0, 0, 0] == 7
    assert data.notes["scaled"] is False


def test_images_of_several_sizes_and_modes_come_in_one(tmp_path: Path) -> None:
    picture(tmp_path / "cat/1.png", (600, 400), "RGB", (1, 2, 3))
    picture(tmp_path / "cat/2.png", (600, 400), "RGBA", (1, 2, 3, 4))
    picture(tmp_path / "dog/1.png", (10, 10))
    picture(tmp_path / "dog/2.png", (700, 500), "I;16", 257 * 9)
    data = read(tmp_path)
    height, width = data.inputs["image"].shape[2:]
    assert max(height, width) == 256
    assert data.inputs["image"][:, :, 0, 0].tolist() == [[1, 2, 3], [1, 2, 3], [7, 7, 7], [9, 9, 9]]
    assert data.notes["scaled"] is True


def test_wrong_images_are_refused_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "cat/1.png")
    assert "at least 2" in refused(tmp_path)
    picture(tmp_path / "cat/2.png")
    assert "'cat' in every row" in refused(tmp_path)
    picture(tmp_path / "loose.png")
    assert "loose.png lies in no folder" in refused(tmp_path)
    (tmp_path / "loose.png").unlink()
    whole = (tmp_path / "cat/1.png").read_bytes()
    (tmp_path / "dog").mkdir()
    for data in (b"", b"no image", whole[:40], b"GIF89a" + whole):
        (tmp_path / "dog/1.png").write_bytes(data)
        assert "dog/1.png cannot be read" in refused(tmp_path)
    (tmp_path / "dog/1.png").unlink()
    (tmp_path / "dog/1.gif").write_bytes(b"GIF89a")
    assert "several kinds of files, such as 1.gif" in refused(tmp_path)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_lines_of_json_are_texts_with_labels(tmp_path: Path) -> None:
    rows = [{"text": "schön", "label": "a"}, {"label": "b", "text": "two\nlines"}]
    data = read(lines(tmp_path / "t.jsonl", *rows))
    assert (data.task, data.classes) == ("text", ("a", "b"))
    assert data.texts is not None
    assert data.texts[1] == "two\nlines"
    assert data.texts[0:2] == ["schön", "two\nlines"]
    without = read(lines(tmp_path / "t.jsonl", {"text": "one"}, {"text": "two"}))
    assert (without.task, without.targets) == ("language_model", None)


def test_folders_of_texts_are_classes(tmp_path: Path) -> None:
    for name in ("good/1.txt", "good/2.txt", "bad/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    data = read(tmp_path)
    assert (data.task, data.classes) == ("text", ("bad", "good"))
    assert data.texts is not None
    assert data.texts[0] == "bad/1.txt"
    assert read(tmp_path, options=ReadOptions(task="language_model")).task == "language_model"


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"Absatz {number}: " + "schöne Wörter " * (number % 40) for number in range(900))
    (tmp_path / "book.txt").write_text(text)
    data = read(tmp_path / "book.txt")
    assert data.task == "language_model"
    assert data.texts is not None
    assert data.rows > 50
    assert "".join(data.texts) == text
    assert max(len(row.encode()) for row in data.texts) <= 4 * 2048 + 2048


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "line 1 is no JSON"),
        (["[1]"], "is no object"),
        ([{"words": "x"}], "has no text/content"),
        ([{"text": "x"}, {"text": 5}], "line 2: 'text' is missing, or no text"),
        ([{"text": "x"}, {"text": " "}], "line 2: the text is empty"),
        ([{"text": "x", "label": "a"}, {"text": "y"}], "line 2: the label 'label' is missing"),
        ([{"text": "x"}, {"text": "y", "label": "a"}], "line 2 has a 'label'"),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": 3}], "'a' at first and 3"),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": ["b"]}], "missing"),
        ([{"text": "x", "label": "a"}], "at least 2"),
        ([{"text": "a\x00b", "label": "a"}], "NUL"),
        (['{"text": "cut \\ud83d"}'], r"'\ud83d' is no character but half of one"),
    ],
)
def test_wrong_lines_are_refused_with_their_number(tmp_path: Path, rows: list[Any], words: str) -> None:
    assert words in refused(lines(tmp_path / "t.jsonl", *rows))


def test_text_that_is_no_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"good \xff bad " * 20)
    assert "no UTF-8 at byte 5" in refused(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_bytes(b"")
    assert "at least 2" in refused(tmp_path / "t.txt")


def test_what_lies_there_decides_the_format(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        detect_format(tmp_path / "none")
    with pytest.raises(InvalidArgument, match="holds no files"):
        detect_format(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match="no dataset that is known"):
        detect_format(tmp_path)
    with pytest.raises(InvalidArgument, match="is none of npz"):
        read(tmp_path, "hdf5")
    with pytest.raises(InvalidArgument, match=r"x\.bin is no csv"):
        read(tmp_path, "csv")
    (tmp_path / "x.bin").unlink()
    (tmp_path / "out.csv").symlink_to("/etc/hostname")
    with pytest.raises(InvalidArgument, match="leads out"):
        detect_format(tmp_path)


def test_a_description_counts_classes_and_draws_numbers(tmp_path: Path) -> None:
    data = describe(read(npz(tmp_path, x=X, y=Y)), license="MIT", source="here")
    assert data["class_counts"] == [2, 2]
    assert (data["target"], data["label"], data["license"], data["inputs"]) == (
        "classes",
        "y",
        "MIT",
        {"x": [2]},
    )
    numbers = describe(read(npz(tmp_path, x=np.zeros((9, 1)), y=np.linspace(0, 1, 9))))
    assert sum(numbers["histogram"]["counts"]) == 9
    assert numbers["target"] == "numbers"
    json.dumps([data, numbers], allow_nan=False)


@pytest.mark.parametrize(
    ("name", "task", "rows", "classes"),
    [
        ("sklearn:digits", "image", 1797, 10),
        ("sklearn:breast_cancer", "tabular", 569, 2),
        ("sklearn:wine", "tabular", 178, 3),
        ("sklearn:diabetes", "tabular", 442, 0),
        ("corpus:python-functions", "text", None, 9),
        ("corpus:python-topics", "language_model", None, 0),
    ],
)
def test_every_built_in_dataset_can_be_learnt_from(
    tmp_path: Path, name: str, task: str, rows: int | None, classes: int
) -> None:
    example = write_example(name, tmp_path)
    data = read(tmp_path)
    assert (data.task, len(data.classes)) == (task, classes)
    assert data.rows == rows if rows else data.rows > 150
    assert describe(data, license=example.license)["license"]
    assert name in EXAMPLES
    if name == "corpus:python-functions":
        return  # it takes a second to write
    again = tmp_path / "again"
    again.mkdir()
    write_example(name, again)
    (file,) = again.iterdir()
    assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_a_built_in_dataset_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="sklearn:digits"):
        write_example("sklearn:mnist", tmp_path)


def test_tables_say_what_to_install_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.datasets.tables.pa", None)
    path = csv(tmp_path, "a,label\n1,x\n")
    call: Callable[[], Contents] = lambda: read(path)  # noqa: E731
    with pytest.raises(Exception, match=r"penstock\[data\]"):
        call()
