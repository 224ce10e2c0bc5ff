"""The handshake's state machine without a server: every option with good data and with bad.

What the replies must be is written out from the specification, not taken from the
code under test; see `rawclient` for the numbers.
"""

from __future__ import annotations

import struct
from typing import List, Optional, Tuple

import pytest
import rawclient as raw
from hypothesis import given
from hypothesis import strategies as st
from rawclient import context_data, go_data, string

from xnbd.errors import ProtocolError, RequestError
from xnbd.protocol.server_handshake import (
    Agreement,
    Export,
    Exports,
    Security,
    ServerHandshake,
    export_flags,
    pack_greeting,
    pack_oldstyle,
    parse_option_header,
    unknown_export,
)

DISK = Export("disk", 0x0102030405060708, 0x056D, "a disk")
OTHER = Export("other", 512, 0x0003, "another")
SEND_DF = 1 << 7

ALLOCATION = (raw.REP_META_CONTEXT, struct.pack(">I", 1) + b"base:allocation")
OK = (raw.ACK, b"")


def find(name: str) -> Optional[Export]:
    return {"": DISK, "disk": DISK, "other": OTHER}.get(name)


def fresh(flags: int = 3, *, structured: bool = False) -> ServerHandshake:
    machine = ServerHandshake(Exports(names=lambda: ["disk", "other"], find=find))
    machine.on_client_flags(flags)
    if structured:
        assert ask(machine, raw.STRUCTURED_REPLY) == [OK]
    return machine


def split_replies(option: int, data: bytes) -> List[Tuple[int, bytes]]:
    """All replies in *data* as (type, data); they must be replies to *option*, and nothing may be left over."""
    replies = []
    while data:
        magic, answered, kind, length = struct.unpack(">QIII", data[:20])
        assert (magic, answered) == (0x3E889045565A9, option)
        assert len(data) >= 20 + length
        replies.append((kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return replies


def ask(machine: ServerHandshake, option: int, data: bytes = b"") -> List[Tuple[int, bytes]]:
    return split_replies(option, machine.on_option(option, data))


def error_of(replies: List[Tuple[int, bytes]]) -> int:
    """The type of the only reply."""
    ((kind, _),) = replies
    return kind


# What the server says by itself


def test_greeting_is_fixed_newstyle_with_no_zeroes() -> None:
    assert pack_greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_oldstyle_handshake_is_152_bytes_with_size_and_flags() -> None:
    expected = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(range(1, 9)) + b"\x00\x00\x05\x6d" + bytes(124)
    assert pack_oldstyle(DISK) == expected
    assert len(expected) == 152


# Option headers


def test_option_header_gives_number_and_length() -> None:
    assert parse_option_header(b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x01\x02") == (7, 0x102)


@pytest.mark.parametrize("magic", [b"IHAVEOPS", b"NBDMAGIC", bytes(8)])
def test_wrong_option_magic_is_fatal(magic: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_option_header(magic + bytes(8))


@pytest.mark.parametrize("option", [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 1 << 31, 1 << 20])
def test_data_longer_than_any_option_needs_is_fatal(option: int, length: int) -> None:
    with pytest.raises(ProtocolError):
        parse_option_header(b"IHAVEOPT" + struct.pack(">II", option, length))


@pytest.mark.parametrize("option", [raw.EXPORT_NAME, raw.GO, raw.INFO, raw.SET_META_CONTEXT])
def test_data_as_long_as_the_longest_name_is_taken(option: int) -> None:
    assert parse_option_header(b"IHAVEOPT" + struct.pack(">II", option, 4096)) == (option, 4096)


# Client flags


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_are_taken(flags: int) -> None:
    fresh(flags)


@pytest.mark.parametrize("flags", [4, 7, 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_are_fatal(flags: int) -> None:
    with pytest.raises(ProtocolError):
        fresh(flags)


# EXPORT_NAME


def test_export_name_answers_size_flags_and_zeros() -> None:
    machine = fresh(flags=1)
    assert machine.on_option(raw.EXPORT_NAME, b"disk") == bytes(range(1, 9)) + b"\x05\x6d" + bytes(124)
    assert machine.agreement == Agreement(DISK, ordered=False)


def test_export_name_leaves_the_zeros_out_if_the_client_wants_so() -> None:
    machine = fresh(flags=3)
    assert machine.on_option(raw.EXPORT_NAME, b"") == bytes(range(1, 9)) + b"\x05\x6d"
    assert machine.agreement == Agreement(DISK, ordered=False)


@pytest.mark.parametrize("name", [b"nothing", b"disk\0", b"\xff\xfe", b"d" * 4096])
def test_export_name_of_an_unknown_export_is_fatal(name: bytes) -> None:
    machine = fresh()
    with pytest.raises(ProtocolError):
        machine.on_option(raw.EXPORT_NAME, name)
    assert machine.agreement is None


def test_export_name_keeps_what_was_negotiated_before() -> None:
    machine = fresh(structured=True)
    ask(machine, raw.SET_META_CONTEXT, context_data("disk", "base:allocation"))
    assert machine.on_option(raw.EXPORT_NAME, b"disk")[8:] == struct.pack(">H", 0x056D | SEND_DF)
    assert machine.agreement == Agreement(DISK, structured=True, contexts=("base:allocation",), ordered=False)


# ABORT and LIST


def test_abort_is_acknowledged() -> None:
    machine = fresh()
    assert ask(machine, raw.ABORT) == [OK]
    assert machine.aborted
    assert machine.agreement is None


def test_list_has_every_name_and_nothing_behind_it() -> None:
    """Two clients in Go fail on a description there, which the protocol allows."""
    machine = fresh()
    names = [(raw.REP_SERVER, string("disk")), (raw.REP_SERVER, string("other"))]
    assert ask(machine, raw.LIST) == [*names, OK]
    assert machine.agreement is None


@pytest.mark.parametrize("option", [raw.LIST, raw.STRUCTURED_REPLY])
def test_data_where_none_belongs_is_invalid_and_the_next_option_works(option: int) -> None:
    machine = fresh()
    assert error_of(ask(machine, option, b"x")) == raw.ERR_INVALID
    assert ask(machine, option)[-1] == OK


def test_a_refused_structured_reply_negotiates_nothing() -> None:
    machine = fresh()
    ask(machine, raw.STRUCTURED_REPLY, b"x")
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, ordered=False)


@pytest.mark.parametrize("option", [0, 4, 5, 11, 12, 1000, 0x80000000, 0xFFFFFFFF])
def test_unknown_option_is_unsupported_and_the_next_one_works(option: int) -> None:
    machine = fresh()
    assert error_of(ask(machine, option, b"anything")) == raw.ERR_UNSUP
    assert ask(machine, raw.LIST)[-1] == OK


# INFO and GO

EXPORT_INFO = (raw.REP_INFO, b"\x00\x00" + bytes(range(1, 9)) + b"\x05\x6d")


@pytest.mark.parametrize("name", ["", "disk"])
def test_go_tells_of_the_export_and_agrees(name: str) -> None:
    machine = fresh()
    assert ask(machine, raw.GO, go_data(name)) == [EXPORT_INFO, OK]
    assert machine.agreement == Agreement(DISK, ordered=False)


def test_info_tells_the_same_and_agrees_on_nothing() -> None:
    machine = fresh()
    assert ask(machine, raw.INFO, go_data("disk")) == [EXPORT_INFO, OK]
    assert machine.agreement is None


@pytest.mark.parametrize("option", [raw.INFO, raw.GO])
def test_requested_information_comes_once_each_and_unknown_kinds_are_passed_over(option: int) -> None:
    replies = ask(fresh(), option, go_data("", 3, 1, 2, 1, 77, 0, 0xFFFF))
    assert sorted(replies[:-1]) == [
        EXPORT_INFO,
        (raw.REP_INFO, b"\x00\x01disk"),
        (raw.REP_INFO, b"\x00\x02a disk"),
        (raw.REP_INFO, b"\x00\x03" + struct.pack(">III", 1, 4096, 32 << 20)),
    ]
    assert replies[-1] == OK


def test_df_is_offered_only_with_structured_replies() -> None:
    machine = fresh(structured=True)
    assert ask(machine, raw.GO, go_data(""))[0] == (
        raw.REP_INFO,
        b"\x00\x00" + bytes(range(1, 9)) + struct.pack(">H", 0x056D | SEND_DF),
    )
    assert machine.agreement == Agreement(DISK, structured=True, ordered=False)


@pytest.mark.parametrize("option", [raw.INFO, raw.GO])
@pytest.mark.parametrize("name", ["nothing", "Disk", "disk\0", "d" * 4096])
def test_unknown_export_is_an_error_and_the_next_option_works(option: int, name: str) -> None:
    machine = fresh()
    assert error_of(ask(machine, option, go_data(name))) == raw.ERR_UNKNOWN
    assert (machine.agreement, machine.news()) == (None, [unknown_export(name)])
    assert ask(machine, option, go_data("disk"))[-1] == OK


BAD_GO = {
    "empty": b"",
    "half a length": b"\0\0\0",
    "no count": string("disk"),
    "half a count": string("disk") + b"\0",
    "name longer than the data": struct.pack(">I", 7) + b"disk\0\0",
    "name of 4 GiB": struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
    "fewer requests than counted": string("disk") + b"\0\2\0\1",
    "more requests than counted": string("disk") + b"\0\1\0\1\0\2",
    "half a request": string("disk") + b"\0\1\0",
    "trailing byte": go_data("disk") + b"\0",
}


@pytest.mark.parametrize("option", [raw.INFO, raw.GO])
@pytest.mark.parametrize("data", BAD_GO.values(), ids=BAD_GO.keys())
def test_malformed_go_is_invalid_and_the_next_option_works(option: int, data: bytes) -> None:
    machine = fresh()
    assert error_of(ask(machine, option, data)) == raw.ERR_INVALID
    assert machine.agreement is None
    assert ask(machine, option, go_data("disk"))[-1] == OK


@pytest.mark.parametrize("length", [4097, 5000, 60000])
@pytest.mark.parametrize("option", [raw.INFO, raw.GO, raw.LIST_META_CONTEXT, raw.SET_META_CONTEXT])
def test_a_name_above_the_limit_is_too_big_and_the_next_option_works(option: int, length: int) -> None:
    machine = fresh(structured=True)
    assert error_of(ask(machine, option, string("n" * length) + bytes(4))) == raw.ERR_TOO_BIG
    assert ask(machine, raw.GO, go_data("disk"))[-1] == OK


# Meta contexts


@pytest.mark.parametrize("option", [raw.LIST_META_CONTEXT, raw.SET_META_CONTEXT])
def test_contexts_need_structured_replies_first(option: int) -> None:
    machine = fresh()
    assert error_of(ask(machine, option, context_data("disk", "base:allocation"))) == raw.ERR_INVALID
    ask(machine, raw.STRUCTURED_REPLY)
    assert ask(machine, option, context_data("disk", "base:allocation"))[-1] == OK


@pytest.mark.parametrize("queries", [(), ("base:",), ("base:allocation",), ("x:y", "base:allocation")])
def test_list_offers_allocation(queries: Tuple[str, ...]) -> None:
    replies = ask(fresh(structured=True), raw.LIST_META_CONTEXT, context_data("disk", *queries))
    assert [(kind, data[4:]) for kind, data in replies] == [(raw.REP_META_CONTEXT, b"base:allocation"), OK]


@pytest.mark.parametrize("query", ["", "base", "base:alloc", "base:allocation2", "BASE:ALLOCATION", "qemu:", "\udcff"])
@pytest.mark.parametrize("option", [raw.LIST_META_CONTEXT, raw.SET_META_CONTEXT])
def test_other_queries_select_nothing_and_are_no_error(option: int, query: str) -> None:
    encoded = query.encode(errors="surrogateescape")
    data = string("disk") + struct.pack(">II", 1, len(encoded)) + encoded
    assert ask(fresh(structured=True), option, data) == [OK]


def test_list_selects_nothing() -> None:
    machine = fresh(structured=True)
    ask(machine, raw.LIST_META_CONTEXT, context_data("disk", "base:allocation"))
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, ordered=False)


def test_list_leaves_what_was_set() -> None:
    machine = fresh(structured=True)
    ask(machine, raw.SET_META_CONTEXT, context_data("disk", "base:allocation"))
    ask(machine, raw.LIST_META_CONTEXT, context_data("disk"))
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, contexts=("base:allocation",), ordered=False)


def test_set_selects_allocation_once_however_often_it_is_asked_for() -> None:
    machine = fresh(structured=True)
    data = context_data("disk", "base:allocation", "base:allocation")
    assert ask(machine, raw.SET_META_CONTEXT, data) == [ALLOCATION, OK]
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, contexts=("base:allocation",), ordered=False)


@pytest.mark.parametrize("queries", [(), ("base:",)])
def test_set_without_a_full_name_selects_nothing(queries: Tuple[str, ...]) -> None:
    machine = fresh(structured=True)
    assert ask(machine, raw.SET_META_CONTEXT, context_data("disk", *queries)) == [OK]
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, ordered=False)


@pytest.mark.parametrize("name", ["", "other"])
def test_contexts_set_for_another_name_than_that_of_go_are_not_active(name: str) -> None:
    machine = fresh(structured=True)
    assert ask(machine, raw.SET_META_CONTEXT, context_data(name, "base:allocation"))[-1] == OK
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, ordered=False)


FAILING_SETS = {
    "unknown export": (context_data("nothing", "base:allocation"), raw.ERR_UNKNOWN),
    "no data": (b"", raw.ERR_INVALID),
    "no count": (string("disk"), raw.ERR_INVALID),
    "fewer queries than counted": (string("disk") + struct.pack(">I", 2) + string("base:"), raw.ERR_INVALID),
    "4 G queries": (string("disk") + b"\xff" * 4, raw.ERR_INVALID),
    "more queries than counted": (string("disk") + bytes(4) + string("base:"), raw.ERR_INVALID),
    "query longer than the data": (string("disk") + struct.pack(">II", 1, 99) + b"base:", raw.ERR_INVALID),
    "query above the limit": (context_data("disk", "q" * 4097), raw.ERR_TOO_BIG),
}


@pytest.mark.parametrize(("data", "error"), FAILING_SETS.values(), ids=FAILING_SETS.keys())
def test_a_failed_set_clears_what_an_earlier_one_set(data: bytes, error: int) -> None:
    machine = fresh(structured=True)
    ask(machine, raw.SET_META_CONTEXT, context_data("disk", "base:allocation"))
    assert error_of(ask(machine, raw.SET_META_CONTEXT, data)) == error
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, ordered=False)


def test_a_later_set_replaces_an_earlier_one() -> None:
    machine = fresh(structured=True)
    ask(machine, raw.SET_META_CONTEXT, context_data("other", "base:allocation"))
    ask(machine, raw.SET_META_CONTEXT, context_data("disk", "base:allocation"))
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=True, contexts=("base:allocation",), ordered=False)


CACHED_AND_MORE = Export("cache", 4096, 0x056D, "a proxy", ("base:allocation", "xnbd:cached", "xnbd:written"))
ALL_CONTEXTS = [(1, b"base:allocation"), (2, b"xnbd:cached"), (3, b"xnbd:written")]


def of_a_proxy() -> ServerHandshake:
    machine = ServerHandshake(Exports(names=lambda: ["cache"], find=lambda name: CACHED_AND_MORE))
    machine.on_client_flags(3)
    ask(machine, raw.STRUCTURED_REPLY)
    return machine


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ((), [1, 2, 3], []),
        (("xnbd:",), [2, 3], []),
        (("base:", "xnbd:written"), [1, 3], [3]),
        (("xnbd:written", "base:allocation", "xnbd:written"), [1, 3], [1, 3]),
        (("xnbd:cached", "xnbd", "xnbd:cach", "other:cached", ""), [2], [2]),
    ],
)
def test_a_proxy_has_contexts_of_its_own(queries: Tuple[str, ...], listed: List[int], selected: List[int]) -> None:
    machine = of_a_proxy()
    for option, wanted in ((raw.LIST_META_CONTEXT, listed), (raw.SET_META_CONTEXT, selected)):
        *contexts, end = ask(machine, option, context_data("cache", *queries))
        told = [(struct.unpack(">I", data[:4])[0], data[4:]) for _, data in contexts]
        assert (told, end) == ([one for one in ALL_CONTEXTS if one[0] in wanted], OK)
    ask(machine, raw.GO, go_data("cache"))
    assert machine.agreement is not None
    assert machine.agreement.contexts == tuple(name.decode() for number, name in ALL_CONTEXTS if number in selected)


# Many options, and any


def test_repeated_options_in_odd_order_end_where_a_fresh_client_would() -> None:
    machine = fresh()
    for option in (raw.INFO, raw.STRUCTURED_REPLY, raw.INFO, raw.LIST, raw.STRUCTURED_REPLY, raw.LIST, raw.INFO):
        data = go_data("disk") if option == raw.INFO else b""
        assert ask(machine, option, data)[-1] == OK
    assert ask(machine, raw.GO, go_data("disk"))[-1] == OK
    assert machine.agreement == Agreement(DISK, structured=True, ordered=False)


def test_endless_options_are_fatal() -> None:
    machine = fresh()
    with pytest.raises(ProtocolError):
        for _ in range(10_000):
            ask(machine, raw.LIST)


lengths = st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF))
words = st.sampled_from([b"", b"disk", b"other", b"base:", b"base:allocation", b"\xff", b"x" * 4097])
strings = st.one_of(
    words.map(lambda text: struct.pack(">I", len(text)) + text),
    st.builds(lambda length, text: struct.pack(">I", length) + text, lengths, words),
)
requests = st.lists(st.integers(0, 5), max_size=4).map(
    lambda kinds: struct.pack(f">H{len(kinds)}H", len(kinds), *kinds)
)
queries = st.builds(
    lambda count, texts: struct.pack(">I", count) + b"".join(texts), lengths, st.lists(strings, max_size=3)
)
likely_data = st.one_of(words, st.tuples(strings, st.one_of(requests, queries, st.binary(max_size=8))).map(b"".join))
options = st.tuples(
    st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF)), st.one_of(st.binary(max_size=64), likely_data)
)


@given(st.lists(options, max_size=12))
def test_whatever_a_client_sends_gets_one_final_reply_or_ends_the_connection(sent: List[Tuple[int, bytes]]) -> None:
    machine = fresh()
    for option, data in sent:
        try:
            answer = machine.on_option(option, data)
        except ProtocolError:
            return
        if option == raw.EXPORT_NAME:
            assert machine.agreement is not None
            assert len(answer) == 10
            return
        replies = split_replies(option, answer)
        final = [kind == raw.ACK or bool(kind & 0x80000000) for kind, _ in replies]
        assert final == [False] * (len(final) - 1) + [True]
        if machine.agreement or machine.aborted:
            return


# What a wrapper needs more


def unavailable(name: str) -> Optional[Export]:
    raise RequestError(5, "not now")


def test_list_does_not_look_for_the_disks() -> None:
    machine = ServerHandshake(Exports(lambda: ["far"], unavailable))
    machine.on_client_flags(3)
    assert ask(machine, raw.LIST) == [(raw.REP_SERVER, string("far")), OK]


@pytest.mark.parametrize("option", [raw.INFO, raw.GO])
def test_a_disk_that_cannot_be_had_now_is_refused_with_the_reason(option: int) -> None:
    machine = ServerHandshake(Exports(lambda: ["far"], unavailable))
    machine.on_client_flags(3)
    assert ask(machine, option, go_data("far")) == [(raw.ERR_UNKNOWN, b"not now")]
    assert machine.agreement is None


def test_export_name_of_a_disk_that_cannot_be_had_now_ends_the_connection() -> None:
    machine = ServerHandshake(Exports(lambda: ["far"], unavailable))
    machine.on_client_flags(3)
    with pytest.raises(ProtocolError, match="not now"):
        machine.on_option(raw.EXPORT_NAME, b"far")


def test_without_structured_replies_their_options_are_unknown() -> None:
    machine = ServerHandshake(Exports(lambda: ["disk"], find, structured=False))
    machine.on_client_flags(3)
    for option in (raw.STRUCTURED_REPLY, raw.LIST_META_CONTEXT, raw.SET_META_CONTEXT):
        assert error_of(ask(machine, option)) == raw.ERR_UNSUP
    ask(machine, raw.GO, go_data("disk"))
    assert machine.agreement == Agreement(DISK, structured=False, ordered=False)


@pytest.mark.parametrize(
    ("readonly", "multi_conn", "flags"), [(False, True, 0xD6D), (True, True, 0x50F), (False, False, 0xC6D)]
)
def test_flags_of_a_disk(readonly: bool, multi_conn: bool, flags: int) -> None:
    assert export_flags(readonly=readonly, multi_conn=multi_conn) == flags


# TLS


STARTTLS, TLS_REQD = 5, 0x80000005


def with_tls(security: Security) -> ServerHandshake:
    machine = ServerHandshake(Exports(names=lambda: ["disk"], find=find), security)
    machine.on_client_flags(3)
    return machine


@pytest.mark.parametrize("option", [raw.LIST, raw.INFO, raw.GO, raw.STRUCTURED_REPLY, raw.SET_META_CONTEXT, 99])
def test_before_required_tls_options_are_refused_and_told_of_once(option: int) -> None:
    machine = with_tls(Security.REQUIRED)
    for _ in range(2):
        ((kind, _),) = ask(machine, option)
        assert kind == TLS_REQD
    assert len(machine.news()) == 1
    with pytest.raises(ProtocolError, match="without TLS"):
        machine.on_option(raw.EXPORT_NAME, b"disk")


def test_starttls_is_acknowledged_and_all_before_it_is_forgotten() -> None:
    machine = with_tls(Security.OFFERED)
    assert ask(machine, raw.STRUCTURED_REPLY) == [OK]
    assert ask(machine, raw.SET_META_CONTEXT, context_data("disk", "base:allocation"))[-1] == OK
    assert not machine.starttls
    assert ask(machine, STARTTLS) == [OK]
    assert machine.starttls
    secured = machine.secured(Exports(names=lambda: ["other"], find=find))
    assert ask(secured, STARTTLS)[0][0] == raw.ERR_INVALID
    assert ask(secured, raw.LIST)[0] == (raw.REP_SERVER, string("other"))
    assert len(secured.on_option(raw.EXPORT_NAME, b"disk")) == 10  # no zeros: the flags are remembered
    assert secured.agreement is not None
    assert not secured.agreement.structured
    assert not secured.agreement.contexts


def test_starttls_with_data_and_without_tls_is_refused() -> None:
    assert ask(with_tls(Security.REQUIRED), STARTTLS, b"x")[0][0] == raw.ERR_INVALID
    assert ask(fresh(), STARTTLS)[0][0] == raw.ERR_UNSUP
