"""What is read out of a large JSON object, or out of an upload, is what a full reader reads."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_gateway.api.rest import multipart, peek
from penstock_gateway.api.rest.multipart import Part, read_parts
from penstock_gateway.api.rest.peek import members
from penstock_kit.errors import InvalidArgument

WANTED = ("model_name", "model_version")

texts = st.one_of(st.text(max_size=12), st.sampled_from(['"', "\\", '\\"', "[{", "model_name", "a\\\\", ":"]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
names = st.one_of(st.sampled_from([*WANTED, "input_data"]), texts)
layouts = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False}])


def read(data: bytes) -> dict[str, Any]:
    return asyncio.run(members(data, WANTED))


@pytest.fixture(params=[1, 64, 2 << 20], ids=["bytewise", "short", "as it is"])
def _slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peek, "_SLICE_BYTES", request.param)
    monkeypatch.setattr(multipart, "_SLICE_BYTES", 3 * request.param)


@pytest.mark.usefixtures("_slices")
class TestLikeTheFullReader:
    """In slices of any length."""

    @given(st.dictionaries(names, values, max_size=6), layouts)
    def test_members_are_found_wherever_they_stand(
        self, body: dict[str, Any], layout: dict[str, Any]
    ) -> None:
        try:
            data = json.dumps(body, **layout).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which only \\u can name
            data = json.dumps(body).encode()
        expected = {
            name: [] if isinstance(value, list | dict) else value
            for name, value in body.items()
            if name in WANTED
        }
        assert read(data) == expected

    @given(st.binary(max_size=60))
    def test_what_is_no_json_is_refused_or_read_without_harm(self, data: bytes) -> None:
        with contextlib.suppress(InvalidArgument):
            read(b"{" + data)

    @given(
        st.lists(
            st.tuples(st.sampled_from(["file", "input_data", "näme", "a b"]), st.binary(max_size=40)),
            min_size=1,
            max_size=4,
        )
    )
    def test_the_parts_of_an_upload_come_out_as_they_went_in(self, given_: list[tuple[str, bytes]]) -> None:
        request = httpx.Request("POST", "http://x", files=[(name, ("f.bin", data)) for name, data in given_])
        body, kind = request.read(), request.headers["content-type"].encode()
        assert asyncio.run(read_parts(body, kind)) == [Part(name, data, file=True) for name, data in given_]

    @given(st.binary(max_size=80))
    def test_a_broken_upload_is_refused(self, data: bytes) -> None:
        try:
            parts = asyncio.run(read_parts(b"--b" + data, b"multipart/form-data; boundary=b"))
        except InvalidArgument:
            return
        assert not parts or b"--b" in data


def test_of_repeated_members_the_last_counts() -> None:
    assert read(b'{"model_name":"a","x":[{"model_name":"b"}],"model\\u005fname" : "c"}') == {
        "model_name": "c"
    }


@pytest.mark.parametrize(
    "kind",
    [b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=other"],
)
def test_an_upload_whose_boundary_is_not_there_is_refused(kind: bytes) -> None:
    with pytest.raises(InvalidArgument, match="boundary"):
        asyncio.run(
            read_parts(b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n', kind)
        )


def test_very_many_parts_are_refused() -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n'
    with pytest.raises(InvalidArgument, match="more than 256 parts"):
        asyncio.run(read_parts(part * 300 + b"--b--", b"multipart/form-data; boundary=b"))
