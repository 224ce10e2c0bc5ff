"""Every option, command and flag that libnbd knows, through its Python bindings."""

from __future__ import annotations

import errno
import os
import re
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import nbd
import pytest
from conftest import MIB, Start
from launch import launched
from model import block_status, read_all, wait_for_all
from server_process import Server, children_of, command, wait_until

KIB = 1 << 10

ALLOCATION = nbd.CONTEXT_BASE_ALLOCATION
DATA, HOLE = 0, nbd.STATE_HOLE | nbd.STATE_ZERO


@contextmanager
def connected(
    server: Server, *, structured: bool = True, contexts: Sequence[str] = (ALLOCATION,), export: str = ""
) -> Iterator[nbd.NBD]:
    """A client of *server* in its transmission phase."""
    client = nbd.NBD()
    client.set_request_structured_replies(structured)
    client.set_export_name(export)
    for context in contexts:
        client.add_meta_context(context)
    client.connect_unix(str(server.socket))
    yield client
    if client.aio_is_ready():
        client.shutdown()


@contextmanager
def negotiating(server: Server) -> Iterator[nbd.NBD]:
    """A client of *server* that chooses its options itself."""
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(str(server.socket))
    yield client
    if client.aio_is_negotiating():
        client.opt_abort()
    elif client.aio_is_ready():
        client.shutdown()


@pytest.fixture
def client(server: Server) -> Iterator[nbd.NBD]:
    with connected(server) as client:
        yield client


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """1 MiB with data from 256 KiB to 512 KiB, holes elsewhere."""
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(MIB)
        file.seek(256 * KIB)
        file.write(b"\xa5" * 256 * KIB)
    return path


@pytest.fixture
def full_image(tmp_path: Path) -> Path:
    """4 MiB without holes."""
    path = tmp_path / "full.img"
    path.write_bytes(b"\xa5" * 4 * MIB)
    return path


def errno_of(call: Callable[..., Any], *arguments: Any) -> int:
    """The error that libnbd reports for the call."""
    with pytest.raises(nbd.Error) as caught:
        call(*arguments)
    return int(caught.value.errnum)


def space_of(path: Path) -> int:
    """Bytes that the file takes on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_blocks * 512


def read_structured(
    client: nbd.NBD, offset: int, length: int, flags: int = 0
) -> Tuple[bytes, List[Tuple[int, int, int]]]:
    """The data of a READ and its chunks: offset, length, LIBNBD_READ_*."""
    chunks: List[Tuple[int, int, int]] = []

    def collect(data: bytes, at: int, status: int, _error: Any) -> int:
        chunks.append((at, len(data), status))
        return 0

    data = client.pread_structured(length, offset, collect, flags)
    return bytes(data), chunks


# Handshake


def test_size_is_the_image_s(client: nbd.NBD, image: Path) -> None:
    assert client.get_size() == image.stat().st_size


@pytest.mark.parametrize("structured", [True, False])
def test_structured_replies_are_the_client_s_choice(server: Server, structured: bool) -> None:
    with connected(server, structured=structured) as client:
        assert client.get_structured_replies_negotiated() is structured
        assert client.can_df() is structured


CAPABILITIES = ["flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_writable_export_can_everything(client: nbd.NBD, capability: str) -> None:
    assert getattr(client, f"can_{capability}")()
    assert not client.is_read_only()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_read_only_export_can_what_changes_nothing(start: Start, image: Path, capability: str) -> None:
    with connected(start("--target", "--readonly", image)) as client:
        assert client.is_read_only()
        assert getattr(client, f"can_{capability}")() is (capability not in ("trim", "zero", "fast_zero"))


def test_block_sizes(server: Server) -> None:
    with connected(server) as client:
        sizes = [client.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    assert sizes == [1, 4096, 32 * MIB]


def test_handshake_is_fixed_newstyle_without_padding(client: nbd.NBD) -> None:
    assert client.get_protocol() == "newstyle-fixed"
    assert client.get_handshake_flags() == nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES


@pytest.mark.parametrize("flags", [0, nbd.HANDSHAKE_FLAG_NO_ZEROES])
def test_export_name_with_and_without_padding(server: Server, image: Path, flags: int) -> None:
    client = nbd.NBD()
    client.set_handshake_flags(flags)
    client.set_export_name("disk.img")
    client.connect_unix(str(server.socket))
    assert client.get_protocol() == "newstyle"
    assert client.get_size() == image.stat().st_size
    assert bytes(client.pread(4099, 1)) == image.read_bytes()[1:4100]
    client.shutdown()


def test_oldstyle_server_serves(start: Start, image: Path) -> None:
    with connected(start("--target", "--oldstyle", image)) as client:
        assert client.get_protocol() == "oldstyle"
        assert read_all(client) == image.read_bytes()


def test_list_names_the_export(server: Server) -> None:
    names: List[str] = []
    with negotiating(server) as client:
        client.opt_list(lambda name, _description: names.append(name) or 0)  # type: ignore[func-returns-value]
    assert names == ["disk.img"]


def test_info_tells_of_the_export_before_it_is_chosen(server: Server, image: Path) -> None:
    with negotiating(server) as client:
        client.set_full_info(True)
        client.opt_info()
        assert client.get_size() == image.stat().st_size
        assert client.get_canonical_export_name() == "disk.img"
        assert client.get_export_description() == "disk image disk.img"
        client.opt_go()
        assert len(client.pread(10, 0)) == 10


def test_unknown_export_leaves_room_for_another_choice(server: Server) -> None:
    with negotiating(server) as client:
        client.set_export_name("nothing like that")
        assert errno_of(client.opt_go) == errno.ENOENT
        assert errno_of(client.opt_info) == errno.ENOENT
        client.set_export_name("disk.img")
        client.opt_go()
        assert len(client.pread(10, 0)) == 10
    assert server.log().count("unknown export 'nothing like that'") == 1


def test_meta_contexts_are_listed(server: Server) -> None:
    contexts: List[str] = []
    with negotiating(server) as client:
        client.opt_list_meta_context(lambda name: contexts.append(name) or 0)  # type: ignore[func-returns-value]
    assert contexts == [ALLOCATION]


def test_abort_ends_the_handshake(server: Server) -> None:
    with negotiating(server) as client:
        client.opt_abort()
        assert client.aio_is_closed()
    wait_until(lambda: not server.busy_workers(), "the worker to be free")


def test_shutdown_frees_the_worker(server: Server) -> None:
    with connected(server):
        wait_until(lambda: len(server.busy_workers()) == 1, "the client's worker")
    wait_until(lambda: not server.busy_workers(), "the worker to be free")


# READ


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("offset, length", [(0, 1), (0, 512), (4095, 2), (1, 32 * KIB), (5, 3 * MIB + 7)])
def test_read(server: Server, image: Path, structured: bool, offset: int, length: int) -> None:
    with connected(server, structured=structured) as client:
        assert bytes(client.pread(length, offset)) == image.read_bytes()[offset : offset + length]


def test_last_bytes_are_read(client: nbd.NBD, image: Path) -> None:
    assert bytes(client.pread(5, client.get_size() - 5)) == image.read_bytes()[-5:]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("megabytes", [32, 64])
def test_large_read(start: Start, tmp_path: Path, structured: bool, megabytes: int) -> None:
    path = tmp_path / "large.img"
    path.write_bytes(os.urandom(MIB) * 65)
    with connected(start("--target", path), structured=structured) as client:
        client.set_strict_mode(0)
        assert bytes(client.pread(megabytes * MIB, 12_345)) == path.read_bytes()[12_345 : 12_345 + megabytes * MIB]


def test_large_read_of_a_hole_carries_no_data(start: Start, sparse: Path) -> None:
    with connected(start("--target", sparse)) as client:
        data, chunks = read_structured(client, 0, 256 * KIB)
    assert data == bytes(256 * KIB)
    assert chunks == [(0, 256 * KIB, nbd.READ_HOLE)]


def test_read_over_holes_and_data_is_in_chunks_of_both(start: Start, sparse: Path) -> None:
    with connected(start("--target", sparse)) as client:
        data, chunks = read_structured(client, 1, MIB - 2)
    assert data == sparse.read_bytes()[1 : MIB - 1]
    assert sorted(chunks) == [
        (1, 256 * KIB - 1, nbd.READ_HOLE),
        (256 * KIB, 256 * KIB, nbd.READ_DATA),
        (512 * KIB, 512 * KIB - 1, nbd.READ_HOLE),
    ]


def test_df_makes_one_chunk_of_data(start: Start, sparse: Path) -> None:
    with connected(start("--target", sparse)) as client:
        data, chunks = read_structured(client, 0, MIB, nbd.CMD_FLAG_DF)
    assert data == sparse.read_bytes()
    assert chunks == [(0, MIB, nbd.READ_DATA)]


def test_df_without_structured_replies_is_an_error(server: Server) -> None:
    with connected(server, structured=False) as client:
        client.set_strict_mode(0)
        assert errno_of(client.pread, 512, 0, nbd.CMD_FLAG_DF) == errno.EINVAL
        assert len(client.pread(512, 0)) == 512


@pytest.mark.parametrize("structured", [True, False])
def test_many_reads_in_flight(server: Server, image: Path, structured: bool) -> None:
    content = image.read_bytes()
    with connected(server, structured=structured) as client:
        reads = [(offset, nbd.Buffer(4096)) for offset in range(0, 8 * MIB - 4096, 4099) for _ in range(2)]
        for offset, buffer in reads:
            client.aio_pread(buffer, offset, retire)
        wait_for_all([client])
    assert len(reads) > 4000
    for offset, buffer in reads:
        assert bytes(buffer.to_bytearray()) == content[offset : offset + 4096]


def retire(_error: Any) -> int:
    return 1


# WRITE


@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_FUA])
@pytest.mark.parametrize("offset, length", [(0, 1), (4095, 2), (1000, 70_001), (3, 2 * MIB + 5), (8 * MIB + 1234, 1)])
def test_write(client: nbd.NBD, image: Path, offset: int, length: int, flags: int) -> None:
    before = image.read_bytes()
    data = os.urandom(length)
    client.pwrite(data, offset, flags)
    assert image.read_bytes() == before[:offset] + data + before[offset + length :]


@pytest.mark.parametrize("megabytes", [32, 64])
def test_large_write(start: Start, tmp_path: Path, megabytes: int) -> None:
    path = tmp_path / "large.img"
    data = os.urandom(MIB) * megabytes
    with connected(start("--target", "--create", "65M", path)) as client:
        client.set_strict_mode(0)
        client.pwrite(data, 777)
    assert path.read_bytes() == bytes(777) + data + bytes(65 * MIB - 777 - len(data))


def test_many_writes_in_flight(client: nbd.NBD, image: Path) -> None:
    data = os.urandom(8 * MIB)
    tail = image.read_bytes()[8 * MIB :]
    for offset in range(0, 8 * MIB, 4096):
        client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[offset : offset + 4096])), offset, retire)
    wait_for_all([client])
    assert image.read_bytes() == data + tail


@pytest.fixture
def traced(image: Path, tmp_path: Path) -> Iterator[Tuple[Path, Path]]:
    """Socket of a server under strace, and the file with the calls that make data durable, written as they return."""
    sock, calls = tmp_path / "traced.sock", tmp_path / "calls"
    strace = ["strace", "-f", "-e", "trace=fsync,fdatasync", "-o", calls]
    server = ["--target", "--unix", sock, image]
    with launched([*strace, *command(*server)], tmp_path / "traced.log") as tracer:
        tracer.wait_for_log("INFO: serving ")
        yield sock, calls
        # strace passes no signal on; it ends with the server.
        (master,) = children_of(tracer.process.pid)
        os.kill(master, signal.SIGTERM)
        tracer.process.wait(60)


def test_flush(client: nbd.NBD, image: Path) -> None:
    client.pwrite(b"before the flush", 100)
    client.flush()
    assert image.read_bytes()[100:116] == b"before the flush"


DURABLE: List[Callable[[nbd.NBD], Any]] = [
    lambda client: client.flush(),
    lambda client: client.pwrite(b"x" * 10, 0, nbd.CMD_FLAG_FUA),
    lambda client: client.pwrite(b"x" * MIB, 5, nbd.CMD_FLAG_FUA),
    lambda client: client.trim(5000, 1, nbd.CMD_FLAG_FUA),
    lambda client: client.zero(5000, 1, nbd.CMD_FLAG_FUA),
    lambda client: client.zero(5000, 1, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE),
]


def test_flush_and_fua_are_durable_before_the_reply(traced: Tuple[Path, Path]) -> None:
    sock, calls = traced
    client = nbd.NBD()
    client.connect_unix(str(sock))
    client.pwrite(b"not yet", 0)
    client.trim(4096, 4096)
    assert calls.read_text().count("sync(") == 0
    for number, request in enumerate(DURABLE, 1):
        request(client)
        assert len(re.findall(r"sync\(.*= 0$|sync resumed.*= 0$", calls.read_text(), re.MULTILINE)) == number
    client.shutdown()


# TRIM and WRITE_ZEROES


def trim(client: nbd.NBD, length: int, offset: int, flags: int) -> None:
    client.trim(length, offset, flags)


def zero(client: nbd.NBD, length: int, offset: int, flags: int) -> None:
    client.zero(length, offset, flags)


@pytest.mark.parametrize("command", [trim, zero])
@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_FUA])
def test_space_is_given_back(start: Start, full_image: Path, command: Callable[..., None], flags: int) -> None:
    before = space_of(full_image)
    with connected(start("--target", full_image)) as client:
        command(client, 2 * MIB, MIB, flags)
        assert bytes(client.pread(2 * MIB, MIB)) == bytes(2 * MIB)
        assert (2 * MIB, HOLE) in block_status(client, 0, 4 * MIB)
    assert space_of(full_image) <= before - 2 * MIB
    assert full_image.stat().st_size == 4 * MIB


@pytest.mark.parametrize("flags", [nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA])
def test_no_hole_keeps_the_space(start: Start, full_image: Path, flags: int) -> None:
    before = space_of(full_image)
    with connected(start("--target", full_image)) as client:
        client.zero(2 * MIB, MIB, flags)
        assert bytes(client.pread(2 * MIB, MIB)) == bytes(2 * MIB)
    assert space_of(full_image) >= before


@pytest.mark.parametrize("command", [trim, zero])
@pytest.mark.parametrize("offset, length", [(1, 1), (4095, 4098), (777, 3 * MIB), (0, 8 * MIB + 1235)])
def test_zeros_are_exact_to_the_byte(
    client: nbd.NBD, image: Path, command: Callable[..., None], offset: int, length: int
) -> None:
    before = image.read_bytes()
    command(client, length, offset, 0)
    assert image.read_bytes() == before[:offset] + bytes(length) + before[offset + length :]


def test_no_hole_zeros_are_exact_to_the_byte(client: nbd.NBD, image: Path) -> None:
    before = image.read_bytes()
    client.zero(3 * MIB + 1, 777, nbd.CMD_FLAG_NO_HOLE)
    assert image.read_bytes() == before[:777] + bytes(3 * MIB + 1) + before[777 + 3 * MIB + 1 :]


def test_fast_zero_makes_a_hole(start: Start, full_image: Path) -> None:
    with connected(start("--target", full_image)) as client:
        client.zero(4 * MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert block_status(client, 0, 4 * MIB) == [(4 * MIB, HOLE)]


def test_fast_zero_that_would_have_to_write_is_refused_and_changes_nothing(start: Start) -> None:
    """A tmpfs can punch holes, but not zero a range and keep its space."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="xnbd-test-") as file:
        file.write(b"\xa5" * MIB)
        file.flush()
        with connected(start("--target", file.name)) as client:
            flags = nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE
            assert errno_of(client.zero, MIB, 0, flags) == errno.ENOTSUP
            assert read_all(client) == b"\xa5" * MIB
            client.zero(MIB, 0, nbd.CMD_FLAG_NO_HOLE)
            assert read_all(client) == bytes(MIB)


# CACHE and BLOCK_STATUS


def test_cache(client: nbd.NBD, image: Path) -> None:
    client.cache(client.get_size(), 0)
    client.cache(1, 4097)
    assert read_all(client) == image.read_bytes()


def test_block_status_tells_data_from_holes(start: Start, sparse: Path) -> None:
    with connected(start("--target", sparse)) as client:
        assert block_status(client, 0, MIB) == [(256 * KIB, HOLE), (256 * KIB, DATA), (512 * KIB, HOLE)]
        assert block_status(client, 256 * KIB - 1, 3) == [(1, HOLE), (2, DATA)]


def test_req_one_is_one_extent_within_the_request(start: Start, sparse: Path) -> None:
    with connected(start("--target", sparse)) as client:
        assert block_status(client, 0, MIB, nbd.CMD_FLAG_REQ_ONE) == [(256 * KIB, HOLE)]
        assert block_status(client, 300 * KIB, 1, nbd.CMD_FLAG_REQ_ONE) == [(1, DATA)]


def test_block_status_without_the_context_is_an_error(server: Server) -> None:
    with connected(server, contexts=()) as client:
        client.set_strict_mode(0)
        assert not client.can_meta_context(ALLOCATION)
        assert errno_of(block_status, client, 0, 512) == errno.EINVAL
        assert len(client.pread(512, 0)) == 512


def test_unknown_context_is_not_granted(server: Server) -> None:
    with connected(server, contexts=["x-nobody:knows", ALLOCATION]) as client:
        assert not client.can_meta_context("x-nobody:knows")
        assert client.can_meta_context(ALLOCATION)


# Several connections


def test_what_one_connection_wrote_the_others_read_at_once(server: Server) -> None:
    with connected(server) as first, connected(server) as second, connected(server) as third:
        for number in range(200):
            data = number.to_bytes(2, "big") * 5000
            first.pwrite(data, 4096 * number)
            assert bytes(second.pread(10_000, 4096 * number)) == data
            second.zero(100, 4096 * number)
            assert bytes(third.pread(200, 4096 * number)) == bytes(100) + data[100:200]


def test_hole_that_one_connection_makes_the_others_see_at_once(start: Start, full_image: Path) -> None:
    server = start("--target", full_image)
    with connected(server) as first, connected(server) as second:
        first.trim(MIB, MIB)
        assert block_status(second, 0, 4 * MIB) == [(MIB, DATA), (MIB, HOLE), (2 * MIB, DATA)]
