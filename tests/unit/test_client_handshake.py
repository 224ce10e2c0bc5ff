"""The client's handshake without a socket: every kind of server, good and bad.

What the client must send is written out from the specification; see `rawclient`
and `lying_origin` for the numbers.
"""

from __future__ import annotations

import struct
from typing import List, Tuple

import pytest
import rawclient as raw
from hypothesis import given
from hypothesis import strategies as st
from lying_origin import export_info, greeting, oldstyle_greeting, option_reply
from rawclient import GO, SET_META_CONTEXT, STRUCTURED_REPLY, context_data, go_data, pack_option, string

from xnbd.errors import ProtocolError
from xnbd.protocol.client_handshake import MAXIMUM_REPLIES, ClientHandshake, RemoteExport

SIZE = 123 << 20
NAME = "my disk"

META = option_reply(SET_META_CONTEXT, raw.REP_META_CONTEXT, struct.pack(">I", 9) + b"base:allocation")
STRUCTURED_OK = option_reply(STRUCTURED_REPLY, raw.ACK)
META_OK = META + option_reply(SET_META_CONTEXT, raw.ACK)
GO_OK = export_info(SIZE, 0x0101) + option_reply(GO, raw.ACK)
NO_STRUCTURED = option_reply(STRUCTURED_REPLY, raw.ERR_UNSUP)
NO_META = option_reply(SET_META_CONTEXT, raw.ERR_UNSUP)
NO_GO = option_reply(GO, raw.ERR_UNSUP)
EXPORT_REPLY = struct.pack(">QH", SIZE, 0x0101)

ASK_STRUCTURED = pack_option(STRUCTURED_REPLY)
ASK_META = pack_option(SET_META_CONTEXT, context_data(NAME, "base:allocation"))
ASK_GO = pack_option(GO, go_data(NAME, 3))
ASK_EXPORT = pack_option(raw.EXPORT_NAME, NAME.encode())


def hear(*said: bytes, name: str = NAME, tls: bool = False) -> Tuple[ClientHandshake, List[bytes]]:
    """A dialogue with a server that says *said*, one after the other; and the answer to each."""
    handshake = ClientHandshake(name, tls=tls)
    return handshake, [handshake.receive(words) for words in said]


def refusal(*said: bytes, name: str = NAME, tls: bool = False) -> str:
    """The message of the error that the last of *said* must cause, and only that."""
    handshake, _ = hear(*said[:-1], name=name, tls=tls)
    assert handshake.export is None
    with pytest.raises(ProtocolError) as failure:
        handshake.receive(said[-1])
    return str(failure.value)


def block_sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    return option_reply(GO, raw.REP_INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))


# Servers that are what they seem


def test_a_server_that_can_everything_is_asked_for_everything() -> None:
    handshake, answers = hear(greeting(), STRUCTURED_OK, META_OK, GO_OK)
    assert answers == [struct.pack(">I", 3) + ASK_STRUCTURED, ASK_META, ASK_GO, b""]
    assert handshake.export == RemoteExport(SIZE, 0x0101, structured=True, allocation_context=9)


def test_without_structured_replies_no_context_is_asked_for() -> None:
    handshake, answers = hear(greeting(), NO_STRUCTURED, GO_OK)
    assert answers[1] == ASK_GO
    assert handshake.export == RemoteExport(SIZE, 0x0101)


@pytest.mark.parametrize("reply", [NO_META, option_reply(SET_META_CONTEXT, raw.ACK)])
def test_a_server_without_the_context_is_used_without(reply: bytes) -> None:
    handshake, _ = hear(greeting(), STRUCTURED_OK, reply, GO_OK)
    assert handshake.export == RemoteExport(SIZE, 0x0101, structured=True)


def test_a_server_that_does_not_know_go_is_asked_by_export_name() -> None:
    handshake, answers = hear(greeting(), NO_STRUCTURED, NO_GO, EXPORT_REPLY)
    assert answers[2] == ASK_EXPORT
    assert handshake.export == RemoteExport(SIZE, 0x0101)


def test_a_server_that_is_not_fixed_gets_no_other_option_than_the_export_name() -> None:
    handshake, answers = hear(greeting(0), EXPORT_REPLY, bytes(124))
    assert answers[0] == struct.pack(">I", 0) + ASK_EXPORT
    assert handshake.export == RemoteExport(SIZE, 0x0101)


def test_zeroes_are_awaited_where_the_server_does_not_leave_them_out() -> None:
    handshake, answers = hear(greeting(1), NO_STRUCTURED, NO_GO, EXPORT_REPLY + bytes(123))
    assert answers[0].startswith(struct.pack(">I", 1))
    assert handshake.export is None
    handshake.receive(b"\0")
    assert handshake.export


def test_an_oldstyle_server_is_asked_nothing() -> None:
    handshake, answers = hear(oldstyle_greeting(SIZE, 0xABCD0003))
    assert answers == [b""]
    assert handshake.export == RemoteExport(SIZE, 3, oldstyle=True)


def test_a_name_that_is_no_utf8_goes_out_as_it_came() -> None:
    _, answers = hear(greeting(), NO_STRUCTURED, name="\udcff")
    assert answers[1] == pack_option(GO, struct.pack(">I", 1) + b"\xff" + struct.pack(">HH", 1, 3))


def test_a_smaller_limit_for_requests_is_kept() -> None:
    go = block_sizes(512, 4096, 1 << 20) + GO_OK
    assert hear(greeting(), NO_STRUCTURED, go)[0].export == RemoteExport(SIZE, 0x0101, maximum_payload=1 << 20)


def test_no_limit_for_requests_still_means_32_mib() -> None:
    export = hear(greeting(), NO_STRUCTURED, block_sizes(1, 4096, 0xFFFFFFFF) + GO_OK)[0].export
    assert export and export.maximum_payload == 32 << 20


def test_a_tiny_disk_may_have_a_tiny_limit() -> None:
    go = block_sizes(1, 4096, 512) + export_info(512) + option_reply(GO, raw.ACK)
    assert hear(greeting(), NO_STRUCTURED, go)[0].export


def test_information_that_nobody_asked_for_is_passed_over() -> None:
    name = option_reply(GO, raw.REP_INFO, struct.pack(">H", 1) + b"canonical name")
    unknown = option_reply(GO, raw.REP_INFO, struct.pack(">H", 999) + bytes(4096))
    assert hear(greeting(), NO_STRUCTURED, name + unknown + GO_OK)[0].export


WHOLE = [
    greeting() + STRUCTURED_OK + META_OK + block_sizes(1, 4096, 32 << 20) + GO_OK,
    greeting(1) + NO_STRUCTURED + NO_GO + EXPORT_REPLY + bytes(124),
    oldstyle_greeting(SIZE),
]


@pytest.mark.parametrize("said", WHOLE)
@given(st.data())
def test_however_the_words_are_cut_they_mean_the_same(said: bytes, data: st.DataObject) -> None:
    expected, answers = hear(said)
    handshake, answered, rest = ClientHandshake(NAME), b"", said
    while rest:
        count = data.draw(st.integers(1, handshake.wanted))
        answered += handshake.receive(rest[:count])
        rest = rest[count:]
    assert handshake.export == expected.export is not None
    assert answered == answers[0]


@pytest.mark.parametrize("said", WHOLE)
def test_until_the_last_byte_there_is_no_export(said: bytes) -> None:
    handshake = ClientHandshake(NAME)
    for byte in said:
        assert handshake.export is None
        assert handshake.wanted > 0
        handshake.receive(bytes([byte]))
    assert handshake.export


@given(st.binary(max_size=200), st.integers(0, 120))
def test_noise_at_any_place_is_an_export_or_a_protocol_error(noise: bytes, place: int) -> None:
    try:
        ClientHandshake(NAME).receive(WHOLE[0][:place] + noise)
    except ProtocolError as error:
        assert str(error)


# Refusals, in words for people


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (raw.ERR_UNKNOWN, "it has no export named 'my disk'"),
        (0x80000002, "it does not let us have the export 'my disk'"),
        (0x80000005, "it demands TLS"),
        (0x80000007, "it is shutting down"),
        (0x80000008, "it refuses the export 'my disk' (error 8)"),
    ],
)
def test_an_error_in_reply_to_go_is_explained(kind: int, message: str) -> None:
    assert refusal(greeting(), NO_STRUCTURED, option_reply(GO, kind)) == message


def test_the_servers_own_words_are_shown_but_cannot_spoil_the_log() -> None:
    words = b"no \x1b[31msuch\n thing" + b"\xff" + b"x" * 4000
    message = refusal(greeting(), NO_STRUCTURED, option_reply(GO, raw.ERR_UNKNOWN, words))
    assert message.startswith("it has no export named 'my disk' (it says: no ?[31msuch? thing")
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize("option", [STRUCTURED_REPLY, SET_META_CONTEXT])
def test_tls_demanded_for_any_option_is_told(option: int) -> None:
    said = [greeting(), STRUCTURED_OK] if option == SET_META_CONTEXT else [greeting()]
    assert "TLS" in refusal(*said, option_reply(option, 0x80000005))


def test_the_end_after_the_export_name_means_that_there_is_none() -> None:
    handshake, _ = hear(greeting(0))
    assert "an export named 'my disk': it seems to have none" in handshake.end_means()


def test_any_other_end_is_just_an_end() -> None:
    assert hear(greeting())[0].end_means() == "it closed the connection during the handshake"


# Lies


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.2\r\n", b"NBDMAGIC" + bytes(8), b"HTTP/1.1 400 Bad Request\r\n"])
def test_another_kind_of_server_is_recognised(words: bytes) -> None:
    assert refusal(words) == "it is no NBD server: its greeting begins with other bytes"


@pytest.mark.parametrize("size", [0, 1 << 63, (1 << 64) - 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    export = struct.pack(">QH", size, 1)
    message = f"a disk of {size} bytes is not possible"
    assert refusal(oldstyle_greeting(size)) == message
    assert refusal(greeting(2), export) == message
    assert refusal(greeting(), NO_STRUCTURED, export_info(size) + option_reply(GO, raw.ACK)) == message


@pytest.mark.parametrize("length", [5000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_replies_that_announce_too_much_are_refused_before_any_of_it_comes(length: int) -> None:
    said = option_reply(STRUCTURED_REPLY, raw.ACK)[:-4] + struct.pack(">I", length)
    assert refusal(greeting(), said) == f"reply to option 8 announces {length} bytes of data"


def test_endless_information_is_refused() -> None:
    info = option_reply(GO, raw.REP_INFO, struct.pack(">H", 1))
    hear(greeting(), NO_STRUCTURED, info * (MAXIMUM_REPLIES - 1) + GO_OK[:20])
    assert "more than" in refusal(greeting(), NO_STRUCTURED, info * MAXIMUM_REPLIES)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([b"\1" + STRUCTURED_OK[1:]], "wrong option reply magic"),
        ([GO_OK], "reply to option 7, which was not sent"),
        ([option_reply(STRUCTURED_REPLY, raw.REP_INFO, bytes(12)) + STRUCTURED_OK], "not asked for"),
        ([STRUCTURED_OK, META + META_OK], "not what it answers"),
        ([STRUCTURED_OK, META_OK.replace(b"base:", b"qemu:")], "meta context 'qemu:allocation' was not asked for"),
        ([STRUCTURED_OK, option_reply(SET_META_CONTEXT, 3, bytes(12)) + META_OK[-20:]], "not what it answers"),
        ([STRUCTURED_OK, option_reply(SET_META_CONTEXT, 4, b"abc") + META_OK[-20:]], "not what it answers"),
        ([NO_STRUCTURED, option_reply(GO, raw.ACK)], "without telling its size"),
        ([NO_STRUCTURED, option_reply(GO, raw.REP_SERVER, string("x")) + GO_OK], "no information"),
        ([NO_STRUCTURED, option_reply(GO, raw.REP_INFO, b"\0") + GO_OK], "no information"),
        ([NO_STRUCTURED, option_reply(GO, raw.REP_INFO, bytes(11)) + GO_OK[-20:]], "have 9 bytes"),
        ([NO_STRUCTURED, export_info(SIZE + 1) + GO_OK], "two sizes"),
        ([NO_STRUCTURED, block_sizes(0, 4096, 1 << 20) + GO_OK], "no power of two"),
        ([NO_STRUCTURED, block_sizes(768, 4096, 1 << 20) + GO_OK], "no power of two"),
        ([NO_STRUCTURED, block_sizes(65536, 65536, 1 << 20) + GO_OK], "65536 bytes at least"),
        ([NO_STRUCTURED, block_sizes(1, 4096, 512) + GO_OK], "512 bytes at most"),
        ([NO_STRUCTURED, option_reply(GO, raw.REP_INFO, bytes([0, 3, 0])) + GO_OK], "block sizes have 1 bytes"),
        ([NO_STRUCTURED, GO_OK + b"x"], "goes on talking"),
    ],
)
def test_answers_that_do_not_fit_are_refused(said: List[bytes], message: str) -> None:
    assert message in refusal(greeting(), *said)


# TLS

STARTTLS = 5
TLS_OK = option_reply(STARTTLS, raw.ACK)


def test_nothing_but_tls_is_asked_for_in_the_clear_and_all_else_after_it() -> None:
    handshake, answers = hear(greeting(), TLS_OK, tls=True)
    assert answers == [struct.pack(">I", 3) + pack_option(STARTTLS), b""]
    assert handshake.starts_tls
    assert handshake.on_tls() == ASK_STRUCTURED
    assert not handshake.starts_tls
    assert [handshake.receive(words) for words in (STRUCTURED_OK, META_OK, GO_OK)] == [ASK_META, ASK_GO, b""]
    assert handshake.export == RemoteExport(SIZE, 0x0101, True, 9)


@pytest.mark.parametrize("kind", [0x80000001, 0x80000002, 0x80000003])
def test_without_tls_there_is_no_way_to_who_does_not_offer_it(kind: int) -> None:
    message = refusal(greeting(), option_reply(STARTTLS, kind, b"no such thing"), tls=True)
    assert message == "it offers no TLS, which nbds:// insists on (it says: no such thing)"


@pytest.mark.parametrize("said", [oldstyle_greeting(SIZE), greeting(0), greeting(2)])
def test_who_is_too_old_for_tls_is_refused(said: bytes) -> None:
    message = refusal(said[:16], said[16:], tls=True) if said[8:16] == b"IHAVEOPT" else refusal(said[:16], tls=True)
    assert message == "its way of negotiating is too old for TLS, which nbds:// insists on"


@pytest.mark.parametrize("more", [b"x", STRUCTURED_OK, STRUCTURED_OK + META_OK + GO_OK])
def test_what_comes_in_the_clear_behind_the_consent_to_tls_ends_the_connection(more: bytes) -> None:
    assert refusal(greeting(), TLS_OK + more, tls=True) == "it goes on in the clear where TLS was agreed on"


def test_a_consent_to_tls_that_brings_something_is_none() -> None:
    assert "no TLS" in refusal(greeting(), option_reply(STARTTLS, raw.ACK, b"x"), tls=True)


def test_after_tls_nothing_is_left_to_demand_it_for() -> None:
    handshake, _ = hear(greeting(), TLS_OK, tls=True)
    handshake.on_tls()
    with pytest.raises(ProtocolError, match="it demands TLS where there is TLS already"):
        handshake.receive(option_reply(STRUCTURED_REPLY, 0x80000005))


def test_an_end_in_place_of_consent_to_tls_is_explained() -> None:
    handshake, _ = hear(greeting(), tls=True)
    assert handshake.end_means() == "it closed the connection when asked for TLS"
