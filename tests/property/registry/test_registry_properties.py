"""Is there any input that breaks paths, digests, filters, tokens, manifests or the pickle reader?"""

import io
import pickle
import random
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.v1 import resources_pb2, tensor_pb2
from penstock.registry.v1 import gate_pb2, manifest_pb2
from penstock_kit.artifacts import canonical_manifest, check_bundle_path, check_bundle_paths, tree_digest
from penstock_kit.errors import InvalidArgument
from penstock_registry.api.convert import manifest_from_proto, manifest_to_proto
from penstock_registry.domain.archives import Archive
from penstock_registry.domain.manifest import Manifest
from penstock_registry.domain.onnx import check_onnx
from penstock_registry.domain.pickles import foreign_globals, looks_like_pickle
from penstock_registry.domain.query import (
    VERSION_FIELDS,
    VERSION_ORDERS,
    Cursor,
    decode_token,
    encode_token,
    parse_filter,
    parse_order,
)

PARTS = st.text("abcXYZ012._- é", min_size=1, max_size=8)
PATHS = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(PARTS, st.sampled_from(["..", ".", "", "a"])), max_size=5).map("/".join),
)
FILES = st.lists(
    st.tuples(PARTS, st.integers(0, 2**40), st.text("0123456789abcdef", min_size=64, max_size=64)),
    max_size=8,
    unique_by=lambda file: file[0],
)
KEYS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./@-]{0,10}", fullmatch=True)


@given(PATHS)
def test_an_accepted_path_stays_inside_any_folder(path: str) -> None:
    try:
        check_bundle_path(path)
    except InvalidArgument:
        return
    root = PurePosixPath("/srv/bundle")
    joined = root / path
    assert joined.is_relative_to(root)
    assert ".." not in joined.parts
    assert str(joined) == f"/srv/bundle/{path}"
    assert "\x00" not in path
    assert "\\" not in path


@given(st.lists(PATHS, max_size=6))
def test_accepted_paths_can_all_be_files_of_one_tree(paths: list[str]) -> None:
    try:
        check_bundle_paths(paths)
    except InvalidArgument:
        return
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert not any(other.startswith(path + "/") for other in paths)


@given(FILES, st.randoms(use_true_random=False))
def test_the_tree_digest_does_not_depend_on_the_order_of_files(files: list[Any], rng: random.Random) -> None:
    shuffled = list(files)
    rng.shuffle(shuffled)
    assert tree_digest(b"m", shuffled) == tree_digest(b"m", files)


@given(FILES, FILES)
def test_different_trees_have_different_digests(one: list[Any], other: list[Any]) -> None:
    assert (tree_digest(b"m", one) == tree_digest(b"m", other)) == (sorted(one) == sorted(other))


def texts() -> Any:
    return st.dictionaries(KEYS, st.text(max_size=10), max_size=3)


@st.composite
def manifests(draw: Any) -> manifest_pb2.Manifest:
    def spec() -> tensor_pb2.TensorSpec:
        return tensor_pb2.TensorSpec(
            name=draw(st.text(max_size=8)),
            data_type=draw(st.sampled_from(range(1, 15))),
            shape=draw(st.lists(st.integers(-1, 2**62), max_size=4)),
            optional=draw(st.booleans()),
            description=draw(st.text(max_size=8)),
            labels=draw(st.lists(st.text(max_size=4), max_size=3)),
        )

    message = manifest_pb2.Manifest(
        runtime="torch",
        format=draw(st.text(max_size=8)),
        entrypoint=draw(st.text(max_size=8)),
        signature=tensor_pb2.Signature(
            inputs=[spec() for _ in range(draw(st.integers(0, 3)))],
            outputs=[spec() for _ in range(draw(st.integers(0, 3)))],
        ),
        metrics=draw(st.dictionaries(KEYS, st.floats(allow_nan=False), max_size=3)),
        license=draw(st.text(max_size=8)),
        description=draw(st.text(max_size=8)),
        parameters=draw(texts()),
    )
    if draw(st.booleans()):
        batching = resources_pb2.Batching(
            max_batch_size=draw(st.integers(0, 100)),
            max_delay_microseconds=draw(st.integers(0, 2**40)),
            pad_variable_dimensions=draw(st.booleans()),
        )
        message.batching.CopyFrom(batching)
    if draw(st.booleans()):
        message.resources.CopyFrom(
            resources_pb2.Resources(cpu_millis=draw(st.integers(0, 2**40)), gpus=draw(st.integers(0, 9)))
        )
    if draw(st.booleans()):
        message.lineage.CopyFrom(
            manifest_pb2.Lineage(
                parents=draw(st.lists(st.text(max_size=8), max_size=3)),
                operation=draw(st.text(max_size=8)),
                parameters=draw(texts()),
                job=draw(st.text(max_size=8)),
                datasets=draw(st.lists(st.text(max_size=8), max_size=2)),
                seed=draw(st.integers(-(2**63), 2**63 - 1)),
                environment=draw(texts()),
            )
        )
    if draw(st.booleans()):
        bound = st.none() | st.floats(0, 1e9)
        message.gate.CopyFrom(
            gate_pb2.GateVerdict(
                gate=gate_pb2.Gate(
                    metric=draw(st.text(max_size=8)),
                    max_metric_loss=draw(bound),
                    min_speed_up=draw(bound),
                    max_size_ratio=draw(bound),
                ),
                passed=draw(st.booleans()),
                failures=draw(st.lists(st.text(max_size=8), max_size=2)),
                measured=draw(st.dictionaries(KEYS, st.floats(-1e9, 1e9), max_size=3)),
            )
        )
    return message


@given(manifests())
def test_a_manifest_goes_through_the_registry_unchanged_and_with_one_identity(
    message: manifest_pb2.Manifest,
) -> None:
    domain = manifest_from_proto(message)
    stored = Manifest.from_dict(domain.to_dict())
    assert manifest_to_proto(stored) == message
    # The worker has the message, the registry its own object: both must see one identity.
    assert canonical_manifest(stored.to_dict()) == canonical_manifest(message)
    assert canonical_manifest(message) == canonical_manifest(
        MessageToDict(message, preserving_proto_field_name=True)
    )


@given(manifests(), st.floats(allow_nan=False), st.text(max_size=8))
def test_metrics_and_description_are_no_part_of_the_identity(
    message: manifest_pb2.Manifest, metric: float, words: str
) -> None:
    before = canonical_manifest(message)
    message.metrics["later"] = metric
    message.description = words
    assert canonical_manifest(message) == before


@given(st.text(max_size=60))
def test_any_filter_is_understood_or_refused(text: str) -> None:
    try:
        parse_filter(text, VERSION_FIELDS)
    except InvalidArgument:
        return


@given(
    st.lists(
        st.tuples(st.sampled_from(["labels", "metrics"]), KEYS, st.integers(-1000, 1000)),
        min_size=1,
        max_size=5,
    )
)
def test_a_written_filter_is_read_as_it_was_meant(terms: list[tuple[str, str, int]]) -> None:
    text = "  ".join(f'{field}.{key}="{value}"' for field, key, value in terms)
    parsed = parse_filter(text, VERSION_FIELDS)
    assert [(term.field, term.key) for term in parsed] == [(field, key) for field, key, _ in terms]
    assert [float(term.value) for term in parsed] == [float(value) for *_, value in terms]


@given(st.text(max_size=30))
def test_any_order_is_understood_or_refused(text: str) -> None:
    try:
        parse_order(text, VERSION_ORDERS)
    except InvalidArgument:
        return


VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20),
    st.integers(0, 2**31 - 1),
    st.floats(allow_nan=False),
    st.datetimes(timezones=st.just(UTC)),
)


@given(VALUES, st.integers(0, 2**62))
def test_a_page_token_says_where_the_page_ended(value: str | float | datetime, uid: int) -> None:
    assert decode_token(encode_token("list", Cursor(value, uid)), "list") == Cursor(value, uid)


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda data: data.hex())))
def test_any_other_token_is_refused(token: str) -> None:
    try:
        decode_token(token, "list")
    except InvalidArgument:
        return
    raise AssertionError("a token that nobody made was taken")


@given(st.binary(max_size=200))
def test_any_bytes_are_no_archive_or_read_strictly(data: bytes) -> None:
    try:
        Archive(io.BytesIO(data), "model", "an archive")
    except InvalidArgument:
        return


@given(st.binary(max_size=200))
def test_any_bytes_are_an_onnx_model_or_refused(data: bytes) -> None:
    try:
        check_onnx(io.BytesIO(data), "model", len(data), {"model"})
    except InvalidArgument:
        return


class Imported:
    def __reduce__(self) -> Any:
        return (print, ())


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=5)), lambda inner: st.lists(inner, max_size=3)
    ),
    st.integers(0, 5),
)
def test_a_pickle_that_imports_is_seen_whatever_surrounds_it(around: object, protocol: int) -> None:
    data = pickle.dumps([around, Imported(), around], protocol=protocol)
    assert looks_like_pickle(data)
    assert foreign_globals(data, frozenset())
