"""RFC 9113, section by section, in the manner of h2spec, and RFC 7541 as far as a server decides it."""

import pytest

from penstock_gateway.hotpath.http import control, frames
from support.http_world import GRPC, Peer, Reset, ToyWorld, data, exchange, grpc

OK = frames.END_HEADERS | frames.END_STREAM


def padded(
    kind: int, flags: int, stream: int, payload: bytes, padding: int, said: int | None = None
) -> bytes:
    body = bytes((padding if said is None else said,)) + payload + bytes(padding)
    return frames.frame(kind, flags | frames.PADDED, stream, body)


async def test_the_server_greets_with_its_settings_and_acknowledges_ours(world: ToyWorld) -> None:
    peer = await Peer.connect(world)
    await peer.until(lambda: peer.settings and peer.acks)
    assert peer.settings[frames.MAX_CONCURRENT_STREAMS] == 4096
    assert peer.settings[frames.INITIAL_WINDOW_SIZE] == 1 << 20


async def test_what_is_no_preface_is_read_as_http_1(world: ToyWorld) -> None:
    assert (await exchange(world, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n")).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize(
    "first",
    [
        frames.frame(frames.PING, 0, 0, bytes(8)),
        frames.frame(frames.SETTINGS, frames.ACK, 0),
        frames.window_update(0, 1),
        frames.frame(frames.HEADERS, OK, 1, b"\x83\x86\x84"),
        data(1, b"x"),
        frames.frame(0x42, 0, 0, b"unknown"),
    ],
)
async def test_the_first_frame_must_be_settings(world: ToyWorld, first: bytes) -> None:
    peer = await Peer.connect(world, greet=False)
    peer.send(frames.PREFACE, first)
    assert await peer.end_code() == frames.PROTOCOL_ERROR


async def test_unknown_frames_and_flags_are_ignored(world: ToyWorld) -> None:
    peer = await Peer.connect(world)
    peer.send(frames.frame(0x42, 0xFF, 7, b"x" * 100), frames.frame(frames.PING, 0xFE, 0, b"8 bytes!"))
    await peer.until(lambda: peer.pongs)


async def test_a_large_unknown_frame_is_not_kept(world: ToyWorld) -> None:
    peer = await Peer.connect(world)
    peer.send(frames.frame(0x42, 0, 0, bytes(1 << 18)), frames.frame(0x42, 0, 0, bytes(200_000)))
    await peer.is_alive()


async def test_the_reserved_bit_of_a_stream_is_ignored(world: ToyWorld) -> None:
    peer = await Peer.connect(world)
    high = 1 << 31
    block = peer.block("/plan/echo")
    peer.send(frames.HEADER.pack(0, len(block), frames.HEADERS, frames.END_HEADERS, 1 | high), block)
    peer.send(data(1 | high, b"one", end=True))
    assert (await peer.answer(1)).body == b"one"
    # The same head once more: with the bit, it looks like a higher number than all before.
    block = peer.block("/plan/echo")
    peer.send(frames.frame(frames.HEADERS, OK, 3, block))
    await peer.answer(3)
    peer.send(frames.HEADER.pack(0, len(block), frames.HEADERS, OK, 3 | high), block)
    assert await peer.end_code() == frames.STREAM_CLOSED


async def test_a_frame_of_the_largest_size_is_taken_and_a_larger_one_ends_the_connection(
    world: ToyWorld,
) -> None:
    peer = await Peer.connect(world)
    largest = peer.settings.get(frames.MAX_FRAME_SIZE, 1 << 18)
    peer.send(peer.head(1, "/plan/echo"), data(1, bytes(largest), end=True))
    peer.send(frames.window_update(0, 1 << 20), frames.window_update(1, 1 << 20))
    assert len((await peer.answer(1)).body) == largest
    peer.send(peer.head(3, "/plan/echo"), data(3, bytes(largest + 1)))
    assert await peer.end_code() == frames.FRAME_SIZE_ERROR


class TestStreams:
    @pytest.mark.parametrize(
        "frame",
        [
            data(1, b"x"),
            data(2, b"x"),
            frames.window_update(1, 1),
            frames.window_update(2, 1),
            frames.reset(1, 8),
            frames.reset(2, 8),
            data(0, b"x"),
            frames.reset(0, 8),
        ],
    )
    async def test_frames_for_idle_streams_end_the_connection(self, world: ToyWorld, frame: bytes) -> None:
        peer = await Peer.connect(world)
        peer.send(frame)
        assert await peer.end_code() == frames.PROTOCOL_ERROR

    async def test_priority_is_allowed_on_an_idle_stream(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.PRIORITY, 0, 9, bytes(5)))
        await peer.is_alive()

    async def test_data_after_the_end_resets_an_open_call(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold", end=True), data(1, b"late"))
        assert await peer.reset_code(1) == frames.STREAM_CLOSED

    async def test_a_second_head_after_the_end_resets_an_open_call(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold", end=True), peer.head(1, "/plan/hold", end=True))
        with pytest.raises(Reset):
            await peer.answer(1)

    @pytest.mark.parametrize("late", [data(1, b"late"), frames.frame(frames.HEADERS, OK, 1, b"\x83\x86\x84")])
    async def test_frames_for_a_closed_stream_end_the_connection(self, world: ToyWorld, late: bytes) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", end=True))
        await peer.answer(1)
        peer.send(late)
        assert await peer.end_code() == frames.STREAM_CLOSED

    async def test_frames_after_the_callers_own_reset_end_the_connection(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold"), frames.reset(1, frames.CANCEL), data(1, b"late"))
        assert await peer.end_code() == frames.STREAM_CLOSED

    async def test_windows_and_resets_for_a_closed_stream_are_ignored(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", end=True))
        await peer.answer(1)
        peer.send(
            frames.window_update(1, 5), frames.reset(1, 8), frames.frame(frames.PRIORITY, 0, 1, bytes(5))
        )
        await peer.is_alive()

    async def test_what_was_on_its_way_to_a_stream_that_we_reset_is_ignored(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/app/early"))
        answer = await peer.answer(1)
        assert (answer.status, answer.body) == (413, b"no need")
        trailers = bytes(peer.encoder.encode([(b"x-sum", b"1")]))
        peer.send(data(1, b"x" * 1000), data(1, b""), frames.frame(frames.HEADERS, OK, 1, trailers))
        # Its trailers changed the table, which must not be lost.
        peer.send(peer.head(3, "/plan/echo", (b"x-sum", b"1"), end=True))
        assert (await peer.answer(3)).status == 200
        peer.send(data(1, b"x"))
        assert await peer.end_code() == frames.STREAM_CLOSED

    async def test_a_caller_that_was_answered_early_may_send_on_for_a_while(self, world: ToyWorld) -> None:
        """Some read no answer before they have sent all, some take a reset for a failure."""
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/app/early"), peer.head(3, "/app/early", GRPC))
        await peer.until(lambda: 3 in peer.answers and peer.answers[3].code == frames.NO_ERROR)
        assert peer.answers[1].ended
        for _ in range(64):
            peer.send(data(1, bytes(16_384)))
        await peer.until(lambda: peer.credit.get(1, 0) >= 1 << 19)
        assert peer.answers[1].code is None
        world.pass_time(control.SPARE_SECONDS + 1)
        await peer.until(lambda: peer.answers[1].code == frames.NO_ERROR)
        assert peer.answers[1].status == 413
        peer.send(data(1, b"x"))
        await peer.is_alive()

    async def test_even_and_falling_numbers_end_the_connection(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(2, "/plan/echo", end=True))
        assert await peer.end_code() == frames.PROTOCOL_ERROR
        peer = await Peer.connect(world)
        peer.send(peer.head(5, "/plan/echo", end=True), peer.head(3, "/plan/echo", end=True))
        assert await peer.end_code() == frames.STREAM_CLOSED

    async def test_more_streams_than_allowed_are_refused_and_may_be_tried_again(
        self, world: ToyWorld
    ) -> None:
        peer = await Peer.connect(world)
        for number in range(4096):
            peer.send(peer.head(2 * number + 1, "/plan/hold", end=True))
        peer.send(peer.head(8193, "/plan/hold", end=True))
        assert await peer.reset_code(8193) == frames.REFUSED_STREAM
        peer.send(frames.reset(1, frames.CANCEL), peer.head(8195, "/plan/echo", end=True))
        assert (await peer.answer(8195)).status == 200
        assert world.cancelled == 1

    async def test_calls_that_were_left_count_until_the_application_ends_them(self, world: ToyWorld) -> None:
        """Rapid reset (CVE-2023-44487): the work of a call that was reset counts as well."""
        peer = await Peer.connect(world)
        for number in range(1000):
            peer.send(peer.head(2 * number + 1, "/app/unread", end=True), frames.reset(2 * number + 1, 8))
        await peer.is_alive()
        assert world.server.open_calls == 1000
        world.go_on.set()


class TestHeads:
    @pytest.mark.parametrize(
        "fields",
        [
            [(b":method", b"POST"), (b":scheme", b"http")],
            [(b":method", b"POST"), (b":path", b"/")],
            [(b":scheme", b"http"), (b":path", b"/")],
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"")],
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"x")],
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a b")],
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"*")],
            [(b":method", b"CONNECT"), (b":authority", b"x:1")],
            [(b":method", b"P T"), (b":scheme", b"http"), (b":path", b"/")],
            [(b":method", b"A"), (b":method", b"B"), (b":scheme", b"http"), (b":path", b"/")],
            [(b":method", b"A"), (b":scheme", b"http"), (b":path", b"/"), (b":status", b"200")],
            [(b":method", b"A"), (b":scheme", b"http"), (b":path", b"/"), (b":new", b"1")],
            [(b":method", b"A"), (b":scheme", b"http"), (b"a", b"b"), (b":path", b"/")],
            *(
                [(b":method", b"A"), (b":scheme", b"http"), (b":path", b"/"), extra]
                for extra in [
                    (b"Upper", b"x"),
                    (b"", b"x"),
                    (b"a b", b"x"),
                    (b"a:b", b"x"),
                    (b"x\x00", b"x"),
                    (b"connection", b"close"),
                    (b"keep-alive", b"1"),
                    (b"proxy-connection", b"x"),
                    (b"transfer-encoding", b"chunked"),
                    (b"upgrade", b"h2c"),
                    (b"te", b"gzip"),
                    (b"x", b"a\r\nb: c"),
                    (b"x", b"a\x00"),
                    (b"x", b" a"),
                    (b"x", b"a "),
                    (b"content-length", b"+1"),
                    (b"content-length", b"-1"),
                    (b"content-length", b"1, 1"),
                    (b"content-length", b""),
                    (b"content-length", b"9" * 16),
                    (b"content-length", b"5"),
                ]
            ),
            [
                (b":method", b"A"),
                (b":scheme", b"http"),
                (b":path", b"/"),
                (b"content-length", b"0"),
                (b"content-length", b"1"),
            ],
        ],
    )
    async def test_malformed_heads_reset_their_stream(
        self, world: ToyWorld, fields: list[tuple[bytes, bytes]]
    ) -> None:
        peer = await Peer.connect(world)
        block = bytes(peer.encoder.encode(fields))
        peer.send(frames.frame(frames.HEADERS, OK, 1, block))
        assert await peer.reset_code(1) == frames.PROTOCOL_ERROR
        peer.send(peer.head(3, "/plan/echo", end=True))
        assert (await peer.answer(3)).status == 200

    async def test_te_trailers_and_options_of_all_are_allowed(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", (b"te", b"trailers"), end=True))
        peer.send(peer.head(3, "*", method="OPTIONS", end=True))
        assert (await peer.answer(1)).status == (await peer.answer(3)).status == 200

    async def test_the_authority_is_the_host(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/app/echo?a=%20b", end=True))
        await peer.answer(1)
        scope = world.scopes[0]
        assert (b"host", b"toy") in scope["headers"]
        assert (scope["path"], scope["query_string"]) == ("/app/echo", b"a=%20b")

    @pytest.mark.parametrize("path", ["/plan/echo", "/app/echo"])
    @pytest.mark.parametrize(("announced", "sent"), [(3, 2), (3, 4), (0, 1), (5, 0)])
    async def test_a_body_must_be_as_long_as_announced(
        self, world: ToyWorld, path: str, announced: int, sent: int
    ) -> None:
        peer = await Peer.connect(world)
        peer.call(1, path, bytes(sent), (b"content-length", b"%d" % announced))
        with pytest.raises(Reset) as caught:
            await peer.answer(1)
        assert caught.value.code == frames.PROTOCOL_ERROR
        assert await peer.reset_code(1) == frames.PROTOCOL_ERROR

    @pytest.mark.parametrize("path", ["/plan/echo", "/app/echo"])
    async def test_trailers_end_a_body(self, world: ToyWorld, path: str) -> None:
        peer = await Peer.connect(world)
        trailers = bytes(peer.encoder.encode([(b"x-sum", b"1")]))
        head = peer.head(1, path)
        peer.send(head, data(1, b"abc"), frames.frame(frames.HEADERS, OK, 1, trailers))
        assert (await peer.answer(1)).body == b"abc"

    @pytest.mark.parametrize(
        ("fields", "flags"),
        [([(b":path", b"/")], OK), ([(b"x", b"y")], frames.END_HEADERS), ([(b"X", b"y")], OK)],
    )
    async def test_malformed_trailers_reset_their_stream(
        self, world: ToyWorld, fields: list[tuple[bytes, bytes]], flags: int
    ) -> None:
        peer = await Peer.connect(world)
        head = peer.head(1, "/plan/echo")
        peer.send(head, frames.frame(frames.HEADERS, flags, 1, bytes(peer.encoder.encode(fields))))
        assert await peer.reset_code(1) == frames.PROTOCOL_ERROR

    async def test_heads_come_in_several_frames_with_padding_and_priority(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        block = peer.block("/plan/echo", (b"x-long", b"v" * 500))
        first = frames.frame(
            frames.HEADERS,
            frames.PADDED | frames.HAS_PRIORITY,
            1,
            b"\x03" + bytes(5) + block[:10] + bytes(3),
        )
        peer.send(first, frames.frame(frames.CONTINUATION, 0, 1, block[10:200]))
        peer.send(
            frames.frame(frames.CONTINUATION, 0, 1), frames.frame(frames.CONTINUATION, 4, 1, block[200:])
        )
        peer.send(padded(frames.DATA, 0, 1, b"ab", 200), padded(frames.DATA, 1, 1, b"c", 0))
        assert (await peer.answer(1)).body == b"abc"

    async def test_a_head_may_not_be_interrupted(self, world: ToyWorld) -> None:
        for other in (
            frames.frame(frames.PING, 0, 0, bytes(8)),
            data(1, b""),
            frames.frame(0x42, 0, 0),
            frames.frame(frames.CONTINUATION, 4, 3),
        ):
            peer = await Peer.connect(world)
            peer.send(frames.frame(frames.HEADERS, 0, 1, peer.block("/plan/echo")), other)
            assert await peer.end_code() == frames.PROTOCOL_ERROR

    async def test_a_large_frame_may_not_interrupt_a_head_even_in_its_first_bytes(
        self, world: ToyWorld
    ) -> None:
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.HEADERS, 0, 1, peer.block("/plan/echo")), data(1, bytes(99))[:20])
        assert await peer.end_code() == frames.PROTOCOL_ERROR

    async def test_a_continuation_of_nothing_ends_the_connection(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold"), frames.frame(frames.CONTINUATION, 4, 1))
        assert await peer.end_code() == frames.PROTOCOL_ERROR

    @pytest.mark.parametrize(
        "frame",
        [
            padded(frames.HEADERS, OK, 1, b"\x83\x86\x84", 0, said=4),
            frames.frame(frames.HEADERS, OK | frames.PADDED, 1),
            frames.frame(frames.HEADERS, OK | frames.HAS_PRIORITY, 1, bytes(4)),
            frames.frame(frames.HEADERS, OK, 0, b"\x83\x86\x84"),
        ],
    )
    async def test_malformed_frames_of_heads_end_the_connection(self, world: ToyWorld, frame: bytes) -> None:
        peer = await Peer.connect(world)
        peer.send(frame)
        assert await peer.end_code() == frames.PROTOCOL_ERROR

    @pytest.mark.parametrize("said", [5, 255])
    async def test_padding_longer_than_its_frame_ends_the_connection(
        self, world: ToyWorld, said: int
    ) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold"), padded(frames.DATA, 0, 1, b"abc", 1, said=said))
        assert await peer.end_code() == frames.PROTOCOL_ERROR

    async def test_a_caller_that_waits_for_a_word_before_its_body_gets_it(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/echo", (b"expect", b"100-continue")))
        await peer.until(lambda: 1 in peer.answers and peer.answers[1].informal)
        peer.send(data(1, b"body", end=True))
        assert (await peer.answer(1)).body == b"body"

    async def test_an_answer_to_head_has_no_body(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        for number, path in ((1, "/app/big?bytes=100000"), (3, "/app/early")):
            peer.send(peer.head(number, path, method="HEAD", end=True))
            assert (await peer.answer(number)).body == b""


class TestCompression:
    @pytest.mark.parametrize(
        "block",
        [
            b"\x80",  # index 0
            b"\xff\x80\x01",  # an index that is not in the table
            b"\x83\x86\x84\x40\x01",  # cut short
            b"\x83\x86\x84\x40\x01a\x85\xff\xff\xff\xff\xff",  # Huffman: padding too long, or EOS
            b"\x83\x86\x84\x3f\xe2\x1f",  # a size update that is not at the beginning
            b"\x3f\xe2\x1f\x83\x86\x84",  # a table larger than allowed (4097)
            b"\x83\x86\x84\x7f" + b"\xff" * 60,  # an integer without end
        ],
    )
    async def test_blocks_that_cannot_be_read_end_the_connection(self, world: ToyWorld, block: bytes) -> None:
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.HEADERS, OK, 1, block))
        assert await peer.end_code() == frames.COMPRESSION_ERROR

    async def test_a_smaller_table_of_ours_is_respected(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.call(1, "/plan/echo", grpc(b"a"), GRPC)
        assert (await peer.answer(1)).trailers == {b"grpc-status": b"0"}
        peer.decoder.max_allowed_table_size = 0  # insists on a size update
        peer.send(frames.settings((frames.HEADER_TABLE_SIZE, 0)))
        for number in (3, 5):
            peer.call(number, "/plan/echo", grpc(b"a"), GRPC)
            answer = await peer.answer(number)
            assert (answer.fields[b"content-type"], answer.trailers) == (GRPC[1], {b"grpc-status": b"0"})
        assert peer.decoder.header_table_size == 0

    async def test_a_table_that_is_none_from_the_beginning_is_respected(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.HEADER_TABLE_SIZE, 0))
        peer.decoder.max_allowed_table_size = 0
        for number in (1, 3):
            peer.call(number, "/plan/echo", grpc(b"a"), GRPC)
            assert (await peer.answer(number)).body == grpc(b"a")


class TestSettings:
    @pytest.mark.parametrize(
        ("frame", "code"),
        [
            (frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6)), frames.FRAME_SIZE_ERROR),
            (frames.frame(frames.SETTINGS, 0, 0, bytes(5)), frames.FRAME_SIZE_ERROR),
            (frames.frame(frames.SETTINGS, 0, 1, bytes(6)), frames.PROTOCOL_ERROR),
            (frames.settings((frames.ENABLE_PUSH, 2)), frames.PROTOCOL_ERROR),
            (frames.settings((frames.INITIAL_WINDOW_SIZE, 1 << 31)), frames.FLOW_CONTROL_ERROR),
            (frames.settings((frames.MAX_FRAME_SIZE, 16_383)), frames.PROTOCOL_ERROR),
            (frames.settings((frames.MAX_FRAME_SIZE, 1 << 24)), frames.PROTOCOL_ERROR),
            (frames.settings(*[(0x99, 1)] * 33), frames.ENHANCE_YOUR_CALM),
            (frames.settings(*[(0x99, 1)] * 40_000), frames.ENHANCE_YOUR_CALM),
            (frames.frame(frames.PING, 0, 0, bytes(7)), frames.FRAME_SIZE_ERROR),
            (frames.frame(frames.PING, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
            (frames.frame(frames.GOAWAY, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
            (frames.frame(frames.GOAWAY, 0, 0, bytes(7)), frames.FRAME_SIZE_ERROR),
            (frames.frame(frames.PRIORITY, 0, 0, bytes(5)), frames.PROTOCOL_ERROR),
            (frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(8)), frames.PROTOCOL_ERROR),
            (frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)), frames.FRAME_SIZE_ERROR),
            (frames.frame(frames.RST_STREAM, 0, 1, bytes(3)), frames.FRAME_SIZE_ERROR),
            (frames.window_update(0, 0), frames.PROTOCOL_ERROR),
            (frames.window_update(0, frames.MAX_WINDOW), frames.FLOW_CONTROL_ERROR),
        ],
    )
    async def test_malformed_frames_end_the_connection(
        self, world: ToyWorld, frame: bytes, code: int
    ) -> None:
        peer = await Peer.connect(world)
        peer.send(frame)
        assert await peer.end_code() == code

    async def test_a_malformed_priority_resets_its_stream(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold"), frames.frame(frames.PRIORITY, 0, 1, bytes(4)))
        assert await peer.reset_code(1) == frames.FRAME_SIZE_ERROR

    async def test_unknown_settings_are_ignored_and_every_frame_of_them_acknowledged(
        self, world: ToyWorld
    ) -> None:
        peer = await Peer.connect(world)
        peer.send(frames.settings((0x99, 5)), frames.settings(), frames.settings((0x4D44, 1)))
        await peer.until(lambda: peer.acks == 4)

    async def test_pings_are_answered_with_their_payload_and_acknowledged_ones_are_not(
        self, world: ToyWorld
    ) -> None:
        peer = await Peer.connect(world)
        peer.send(frames.frame(frames.PING, frames.ACK, 0, b"not this"))
        peer.send(frames.frame(frames.PING, 0, 0, b"but this"))
        await peer.until(lambda: peer.pongs)
        assert peer.pongs == [b"but this"]

    async def test_a_caller_that_says_goodbye_is_still_answered(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/later"), frames.goaway(0, 0, b"bye" * 99), data(1, b"x", end=True))
        assert (await peer.answer(1)).body == b"x"


class TestWindows:
    async def test_an_answer_waits_for_the_window_of_its_stream(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 10))
        peer.call(1, "/plan/echo", b"0123456789abcdef")
        await peer.until(lambda: 1 in peer.answers and len(peer.answers[1].body) == 10)
        await peer.is_alive()
        assert bytes(peer.answers[1].body) == b"0123456789"
        peer.send(frames.window_update(1, 2))
        await peer.until(lambda: len(peer.answers[1].body) == 12)
        peer.send(frames.settings((frames.INITIAL_WINDOW_SIZE, 13)))
        await peer.until(lambda: len(peer.answers[1].body) == 15)
        peer.send(frames.window_update(1, 1000))
        assert (await peer.answer(1)).body == b"0123456789abcdef"

    async def test_an_answer_waits_for_the_window_of_the_connection(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 1 << 20))
        peer.call(1, "/plan/big?bytes=100000", b"")
        await peer.until(lambda: 1 in peer.answers and len(peer.answers[1].body) == 65_535)
        peer.call(3, "/plan/echo", grpc(b"small"), GRPC)
        await peer.is_alive()
        assert 3 not in peer.answers or not peer.answers[3].ended
        peer.send(frames.window_update(0, 100_000))
        assert (await peer.answer(3)).body == grpc(b"small")
        assert len((await peer.answer(1)).body) == 100_000

    @pytest.mark.parametrize("path", ["/plan/echo", "/app/stream"])
    async def test_a_window_may_become_negative(self, world: ToyWorld, path: str) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 10))
        peer.send(peer.head(1, path, GRPC), data(1, grpc(b"0123456789"), end=True))
        await peer.until(lambda: 1 in peer.answers and len(peer.answers[1].body) == 10)
        peer.send(frames.settings((frames.INITIAL_WINDOW_SIZE, 0)), frames.window_update(1, 10))
        await peer.is_alive()
        assert len(peer.answers[1].body) == 10
        peer.send(frames.window_update(1, 5))
        answer = await peer.answer(1)
        assert answer.body == grpc(b"0123456789")
        assert answer.trailers[b"grpc-status"] == b"0"

    async def test_an_empty_end_needs_no_window(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 4))
        peer.send(peer.head(1, "/app/stream", GRPC), data(1, b"0123"))
        await peer.until(lambda: 1 in peer.answers and len(peer.answers[1].body) == 4)
        peer.send(frames.settings((frames.INITIAL_WINDOW_SIZE, 0)), data(1, b"", end=True))
        assert (await peer.answer(1)).trailers[b"grpc-status"] == b"0"

    async def test_windows_that_overflow_are_faults_of_stream_or_connection(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/plan/hold"), frames.window_update(1, frames.MAX_WINDOW))
        assert await peer.reset_code(1) == frames.FLOW_CONTROL_ERROR
        peer.send(peer.head(3, "/plan/hold"), frames.window_update(3, 0))
        assert await peer.reset_code(3) == frames.PROTOCOL_ERROR
        peer.send(peer.head(5, "/plan/hold"), frames.window_update(5, 100))
        peer.send(frames.settings((frames.INITIAL_WINDOW_SIZE, frames.MAX_WINDOW)))
        assert await peer.end_code() == frames.FLOW_CONTROL_ERROR

    async def test_a_body_beyond_the_window_resets_its_stream(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/app/unread"))
        for _ in range(65):
            peer.send(data(1, bytes(16_384)))
        assert await peer.reset_code(1) == frames.FLOW_CONTROL_ERROR
        world.go_on.set()

    async def test_a_body_is_allowed_on_as_it_is_read(self, world: ToyWorld) -> None:
        """The window counts padding too."""
        peer = await Peer.connect(world, (frames.INITIAL_WINDOW_SIZE, 1 << 24))
        peer.send(frames.window_update(0, 1 << 24), peer.head(1, "/app/unread"))
        await peer.until(lambda: peer.settings)
        for _ in range(64):
            peer.send(padded(frames.DATA, 0, 1, bytes(16_128), 255))
        await peer.is_alive()
        assert peer.credit.get(1, 0) < 1 << 20
        world.go_on.set()
        await peer.until(lambda: peer.credit.get(1, 0) >= 1 << 19)
        peer.send(data(1, b"", end=True))
        assert len((await peer.answer(1)).body) == 64 * 16_128

    async def test_the_connection_is_allowed_on_for_streams_that_are_gone(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world)
        peer.send(peer.head(1, "/app/early"))
        await peer.answer(1)
        before = peer.credit.get(0, 0)
        for _ in range(2049):
            peer.send(data(1, bytes(16_384)))
            await peer.writer.drain()
        await peer.until(lambda: peer.credit.get(0, 0) > before)

    async def test_frames_are_as_large_as_the_caller_takes_and_no_larger(self, world: ToyWorld) -> None:
        for limit, biggest in ((16_384, 16_384), (20_000, 20_000), (1 << 20, 1 << 18)):
            peer = await Peer.connect(
                world, (frames.INITIAL_WINDOW_SIZE, 1 << 21), (frames.MAX_FRAME_SIZE, limit)
            )
            peer.send(frames.window_update(0, 1 << 21))
            peer.call(1, "/plan/big?bytes=1000000", b"")
            assert len((await peer.answer(1)).body) == 1_000_000
            assert peer.biggest == biggest
            await peer.close()

    async def test_a_long_head_of_an_answer_is_continued(self, world: ToyWorld) -> None:
        peer = await Peer.connect(world, (frames.MAX_FRAME_SIZE, 16_384))
        peer.send(peer.head(1, "/app/longhead", end=True))
        assert (await peer.answer(1)).fields[b"x-long"] == b"v" * 40_000
