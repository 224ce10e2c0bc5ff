"""The handshake as a state machine without I/O: options in, replies out.

Source: ``doc/proto.md``, sections "Handshake phase" and "Option types".  Every
option that a client may repeat leaves the machine where a fresh client would be;
an option that is wrong is answered and forgotten, so that the next one works.
Whoever feeds the machine reads the bytes, and gives up when it raises
`ProtocolError`.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import Callable, List, NamedTuple, Optional, Sequence, Set, Tuple

from ..errors import ProtocolError, RequestError
from . import constants as c

OPTION_HEADER = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_EXPORT_TAIL = struct.Struct(">QH")
_U32 = struct.Struct(">I")
_U16 = struct.Struct(">H")

MAXIMUM_OPTION_DATA = 64 << 10
"""More data than any option needs; a client that announces more is dropped."""

MAXIMUM_OPTIONS = 1000
"""Options that one client may send before it has to choose an export."""

MAXIMUM_QUERIES = 100
"""Meta contexts that one option may ask for."""

_SHOWN_NAME = 200

CONTEXTS = {c.BASE_ALLOCATION: 1, c.XNBD_CACHED: 2, c.XNBD_WRITTEN: 3}
"""All meta contexts, with the ids under which they are negotiated."""


class Export(NamedTuple):
    """A disk as the handshake tells of it: *size* in bytes, *flags* without DF, the names of its meta *contexts*."""

    name: str
    size: int
    flags: int
    description: str
    contexts: Tuple[str, ...] = (c.BASE_ALLOCATION,)


class Agreement(NamedTuple):
    """What client and server agreed on; the default is what an old client gets.

    *contexts* are the names of the meta contexts that were set. Old clients count on
    replies in the order of their requests: *ordered*. A client to which the disk was
    offered as *readonly* cannot write, whether or not the disk can be written.
    """

    export: Optional[Export] = None
    structured: bool = False
    contexts: Tuple[str, ...] = ()
    ordered: bool = True
    readonly: bool = False


class Denied(Exception):
    """There is a disk, and this client is not to know: it is answered as if there were none. The text is for us."""


class Exports(NamedTuple):
    """Where one client's negotiation finds disks: *names* for LIST, *find* for all the rest.

    *find* may raise `RequestError` for a disk that is there but cannot be had now, and
    `Denied` for one that this client is not to know of. Without *structured* clients are offered simple replies only.
    """

    names: Callable[[], Sequence[str]]
    find: Callable[[str], Optional[Export]]
    structured: bool = True


class Security(Enum):
    """Whether a client can have TLS (``doc/proto.md``: NOTLS, SELECTIVETLS, FORCEDTLS), or has it."""

    NONE = 0
    OFFERED = 1
    REQUIRED = 2
    ESTABLISHED = 3


def export_flags(*, readonly: bool, multi_conn: bool = True) -> int:
    """The transmission flags of a disk that xnbd-server serves; *multi_conn*: its clients all see the same disk."""
    flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_CACHE | _WRITERS_FLAGS
    if multi_conn:
        flags |= c.FLAG_CAN_MULTI_CONN
    return readonly_flags(flags) if readonly else flags


def feature_of(context: str) -> str:
    """What ``--negotiated`` calls a meta context."""
    return context.partition(":")[2]


def contexts_of(mode: str) -> Tuple[str, ...]:
    """The meta contexts of a disk that is served in this mode."""
    return tuple(CONTEXTS) if mode == "proxy" else (c.BASE_ALLOCATION,)


_WRITERS_FLAGS = c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO


def readonly_flags(flags: int) -> int:
    """The transmission flags of a disk that has *flags*, for a client that may only read it."""
    return flags & ~_WRITERS_FLAGS | c.FLAG_READ_ONLY


def unknown_export(name: str) -> str:
    """What the log says of a name that no disk has."""
    return f"unknown export {name[:_SHOWN_NAME]!r}"


class _Refused(Exception):
    """An option gets the error reply *kind* with *message*; the negotiation goes on."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def pack_oldstyle(export: Export) -> bytes:
    """The whole oldstyle handshake: it asks nothing of the client."""
    header = struct.pack(">QQQI", c.NBDMAGIC, c.OLDSTYLE_MAGIC, export.size, export.flags)
    return header + bytes(124)


def pack_greeting() -> bytes:
    return struct.pack(">QQH", c.NBDMAGIC, c.IHAVEOPT, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)


def parse_option_header(header: bytes) -> Tuple[int, int]:
    """Number and data length of an option.

    Raises `ProtocolError` for a wrong magic and for data that no option needs.
    """
    magic, option, length = OPTION_HEADER.unpack(header)
    if magic != c.IHAVEOPT:
        raise ProtocolError("wrong option magic")
    limit = c.MAXIMUM_STRING if option == c.OPT_EXPORT_NAME else MAXIMUM_OPTION_DATA
    if length > limit:
        raise ProtocolError(f"option {option} announces {length} bytes of data")
    return option, length


class ServerHandshake:
    """One client's way to an `Agreement`.

    ``agreement`` is None until an export was chosen; ``aborted`` tells that the
    client has given up. The reply that `on_option` returns has to be sent in
    either case. `news` has what the log should be told of. After ``starttls`` that
    reply is the last thing in the clear, and `secured` goes on.
    """

    def __init__(self, exports: Exports, security: Security = Security.NONE) -> None:
        self.agreement: Optional[Agreement] = None
        self.aborted = False
        self.starttls = False
        self._security = security
        self._news: List[str] = []
        self._told: Set[str] = set()
        self._exports = exports
        self._structured = False
        self._context_name = ""
        self._contexts: Tuple[str, ...] = ()
        self._no_zeroes = False
        self._options = 0
        self._handlers = {
            c.OPT_ABORT: self._on_abort,
            c.OPT_LIST: self._on_list,
            c.OPT_INFO: self._on_info,
            c.OPT_GO: self._on_go,
        }
        if security is not Security.NONE:
            self._handlers[c.OPT_STARTTLS] = self._on_starttls
        if exports.structured:
            self._handlers[c.OPT_STRUCTURED_REPLY] = self._on_structured_reply
            self._handlers[c.OPT_LIST_META_CONTEXT] = self._on_list_meta_context
            self._handlers[c.OPT_SET_META_CONTEXT] = self._on_set_meta_context

    def on_client_flags(self, flags: int) -> None:
        """Raises `ProtocolError` for flags that the server does not know."""
        if flags & ~(c.FLAG_C_FIXED_NEWSTYLE | c.FLAG_C_NO_ZEROES):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & c.FLAG_C_NO_ZEROES)

    def secured(self, exports: Exports) -> ServerHandshake:
        """What goes on over TLS, for a client that may have *exports*: nothing but its flags is remembered."""
        machine = ServerHandshake(exports, Security.ESTABLISHED)
        machine._no_zeroes = self._no_zeroes
        return machine

    def on_option(self, option: int, data: bytes) -> bytes:
        """The reply to one option; raises `ProtocolError` where there can be none."""
        self._options += 1
        if self._options > MAXIMUM_OPTIONS:
            raise ProtocolError(f"more than {MAXIMUM_OPTIONS} options")
        if self._security is Security.REQUIRED and option not in (c.OPT_STARTTLS, c.OPT_ABORT):
            return self._refuse_plain(option)
        if option == c.OPT_EXPORT_NAME:
            return self._on_export_name(data)
        handler = self._handlers.get(option)
        if handler is None:
            return _pack_reply(option, c.REP_ERR_UNSUP, b"option not supported")
        try:
            return handler(option, data)
        except _Refused as refusal:
            return _pack_reply(option, refusal.kind, str(refusal).encode())

    def _refuse_plain(self, option: int) -> bytes:
        if option == c.OPT_EXPORT_NAME:
            raise ProtocolError("it asks for an export without TLS, which is required (nbds:// in its URI)")
        self._tell("refused as long as it does not begin TLS, which is required (nbds:// in its URI)", "plain")
        return _pack_reply(option, c.REP_ERR_TLS_REQD, b"this server requires TLS")

    def news(self) -> List[str]:
        """What went wrong since the last call, of each kind the first: a client may ask often."""
        news, self._news = self._news, []
        return news

    # One method an option

    def _on_export_name(self, data: bytes) -> bytes:
        name = _decode(data)
        try:
            export = self._exports.find(name)
        except RequestError as error:
            raise ProtocolError(f"export {name!r}: {error}") from error
        except Denied as denial:
            raise ProtocolError(str(denial)) from denial
        if export is None:
            raise ProtocolError(unknown_export(name))
        self._agree(name, export)
        return _EXPORT_TAIL.pack(export.size, self._flags(export)) + bytes(0 if self._no_zeroes else 124)

    def _on_abort(self, option: int, data: bytes) -> bytes:
        self.aborted = True
        return _pack_reply(option, c.REP_ACK)

    def _on_starttls(self, option: int, data: bytes) -> bytes:
        _refuse_data(data)
        if self._security is Security.ESTABLISHED:
            raise _Refused(c.REP_ERR_INVALID, "TLS is in use already")
        self.starttls = True
        return _pack_reply(option, c.REP_ACK)

    def _on_list(self, option: int, data: bytes) -> bytes:
        """The names alone: some clients fail on a description behind one, which INFO_DESCRIPTION brings as well."""
        _refuse_data(data)
        servers = []
        for name in self._exports.names():
            encoded = _encode(name)
            servers.append(_pack_reply(option, c.REP_SERVER, _U32.pack(len(encoded)) + encoded))
        return b"".join(servers) + _pack_reply(option, c.REP_ACK)

    def _on_info(self, option: int, data: bytes) -> bytes:
        return self._describe(option, data)[2]

    def _on_go(self, option: int, data: bytes) -> bytes:
        name, export, reply = self._describe(option, data)
        self._agree(name, export)
        return reply

    def _describe(self, option: int, data: bytes) -> Tuple[str, Export, bytes]:
        """INFO and GO: the name asked for, its export, and the replies that tell of it."""
        name, rest = _parse_string(data)
        if len(rest) < 2 or len(rest) != 2 + 2 * _U16.unpack_from(rest)[0]:
            raise _Refused(c.REP_ERR_INVALID, "number of information requests does not fit the data")
        requests = [kind for (kind,) in _U16.iter_unpack(rest[2:])]
        export = self._find(name)
        details = {
            c.INFO_NAME: _encode(export.name),
            c.INFO_DESCRIPTION: _encode(export.description),
            c.INFO_BLOCK_SIZE: struct.pack(">III", c.MINIMUM_BLOCK, c.PREFERRED_BLOCK, c.MAXIMUM_PAYLOAD),
        }
        infos = [_U16.pack(c.INFO_EXPORT) + _EXPORT_TAIL.pack(export.size, self._flags(export))]
        infos += [_U16.pack(kind) + details[kind] for kind in sorted(set(requests)) if kind in details]
        replies = [_pack_reply(option, c.REP_INFO, info) for info in infos]
        return name, export, b"".join(replies) + _pack_reply(option, c.REP_ACK)

    def _on_structured_reply(self, option: int, data: bytes) -> bytes:
        _refuse_data(data)
        self._structured = True
        return _pack_reply(option, c.REP_ACK)

    def _on_list_meta_context(self, option: int, data: bytes) -> bytes:
        return self._select_contexts(option, data)[2]

    def _on_set_meta_context(self, option: int, data: bytes) -> bytes:
        self._contexts = ()
        self._context_name, self._contexts, reply = self._select_contexts(option, data)
        return reply

    def _select_contexts(self, option: int, data: bytes) -> Tuple[str, Tuple[str, ...], bytes]:
        """The export's name, those of its contexts that are asked for, and the replies."""
        if not self._structured:
            raise _Refused(c.REP_ERR_INVALID, "structured replies have to be negotiated first")
        name, rest = _parse_string(data)
        queries = _parse_queries(rest)
        there = self._find(name).contexts
        chosen = tuple(context for context in there if context in queries)
        if option == c.OPT_LIST_META_CONTEXT:
            chosen = tuple(context for context in there if not queries or _is_listed(context, queries))
        replies = [
            _pack_reply(option, c.REP_META_CONTEXT, _U32.pack(CONTEXTS[context]) + context.encode())
            for context in chosen
        ]
        return name, chosen, b"".join(replies) + _pack_reply(option, c.REP_ACK)

    # What they share

    def _find(self, name: str) -> Export:
        try:
            export = self._exports.find(name)
        except RequestError as error:
            raise _Refused(c.REP_ERR_UNKNOWN, str(error)) from error
        except Denied as denial:
            self._tell(str(denial), "denied")
        else:
            if export is not None:
                return export
            self._tell(unknown_export(name), "unknown")
        raise _Refused(c.REP_ERR_UNKNOWN, "no such export")

    def _tell(self, line: str, kind: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._news.append(line)

    def _flags(self, export: Export) -> int:
        return export.flags | c.FLAG_SEND_DF if self._structured else export.flags

    def _agree(self, name: str, export: Export) -> None:
        contexts = self._contexts if self._context_name == name else ()
        self.agreement = agreement_on(export)._replace(structured=self._structured, contexts=contexts, ordered=False)


def agreement_on(export: Export) -> Agreement:
    """That *export* is what the client uses, and no more than that."""
    return Agreement(export, readonly=bool(export.flags & c.FLAG_READ_ONLY))


def _is_listed(context: str, queries: Sequence[str]) -> bool:
    """By its name, or by its namespace alone."""
    return context in queries or context.partition(":")[0] + ":" in queries


def _pack_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _refuse_data(data: bytes) -> None:
    if data:
        raise _Refused(c.REP_ERR_INVALID, "this option takes no data")


def _decode(raw: bytes) -> str:
    """Names are UTF-8; one that is not stands for the file name of the same bytes."""
    return raw.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _parse_string(data: bytes) -> Tuple[str, bytes]:
    """A string with its 32-bit length in front, and what follows it."""
    if len(data) < 4:
        raise _Refused(c.REP_ERR_INVALID, "data too short")
    (length,) = _U32.unpack_from(data)
    if length > len(data) - 4:
        raise _Refused(c.REP_ERR_INVALID, "a string is longer than the data")
    if length > c.MAXIMUM_STRING:
        raise _Refused(c.REP_ERR_TOO_BIG, f"a string is longer than {c.MAXIMUM_STRING} bytes")
    return _decode(data[4 : 4 + length]), data[4 + length :]


def _parse_queries(data: bytes) -> List[str]:
    if len(data) < 4:
        raise _Refused(c.REP_ERR_INVALID, "data too short")
    (count,), rest = _U32.unpack_from(data), data[4:]
    if count > len(rest) // 4:
        raise _Refused(c.REP_ERR_INVALID, "number of queries does not fit the data")
    if count > MAXIMUM_QUERIES:
        raise _Refused(c.REP_ERR_TOO_BIG, f"more than {MAXIMUM_QUERIES} queries")
    queries: List[str] = []
    while rest and len(queries) < count:
        query, rest = _parse_string(rest)
        queries.append(query)
    if rest or len(queries) != count:
        raise _Refused(c.REP_ERR_INVALID, "number of queries does not fit the data")
    return queries
