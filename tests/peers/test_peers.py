"""The programs that people use: libnbd's tools, qemu, fio, nbdkit and nbd-client."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from conftest import MIB, Start
from server_process import Server, run

KIB = 1 << 10

FIO_JOBS = 4
FIO_REGION = 2 * MIB


def nbdinfo(uri: str, *options: object) -> Any:
    """What ``nbdinfo --json`` says."""
    return json.loads(run("nbdinfo", "--json", *options, uri)[1])


def nbdinfo_map(uri: str) -> List[Tuple[int, int, int]]:
    """Offset, length and ``base:allocation`` flags of the disk's extents."""
    return [(e["offset"], e["length"], e["type"]) for e in nbdinfo(uri, "--map")]


def export(uri: str, size: int, name: str = "disk.img", *, readonly: bool = False) -> Dict[str, object]:
    """All that nbdinfo has to say of an export, as we want it."""
    return {
        "export-name": name,
        "description": "disk image disk.img",
        "uri": uri,
        "contexts": ["base:allocation"],
        "is_rotational": False,
        "is_read_only": readonly,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": not readonly,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": not readonly,
        "can_zero": not readonly,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
        "export-size": size,
    }


def info(uri: str, *exports: Dict[str, object]) -> Dict[str, object]:
    return {"protocol": "newstyle-fixed", "TLS": False, "structured": True, "exports": list(exports)}


def without_strings(answer: Dict[str, Any]) -> Dict[str, Any]:
    """*answer* without the sizes for people, which depend on libnbd's version."""
    for entry in answer["exports"]:
        entry.pop("export-size-str", None)
    return answer


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """8 MiB and a byte: noise at both ends and at 4 MiB, holes between."""
    path = tmp_path / "sparse.img"
    noise = random.Random(3).randbytes
    with path.open("wb") as file:
        file.truncate(8 * MIB + 1)
        file.write(noise(64 * KIB))
        file.seek(4 * MIB)
        file.write(noise(128 * KIB))
        file.seek(8 * MIB)
        file.write(b"x")
    return path


def space_of(path: Path) -> int:
    return path.stat().st_blocks * 512


# nbdinfo


@pytest.mark.parametrize("size", [1, 511, 512, 4096, 4097, 3 * MIB + 5])
def test_nbdinfo_is_right_for_any_size(start: Start, tmp_path: Path, size: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(size))
    uri = start("--target", image).uri
    assert without_strings(nbdinfo(uri, "--no-content")) == info(uri, export(uri, size))


def test_nbdinfo_is_right_for_a_sparse_disk_larger_than_memory(start: Start, tmp_path: Path) -> None:
    uri = start("--target", "--create", "8T", tmp_path / "disk.img").uri
    assert without_strings(nbdinfo(uri, "--no-content")) == info(uri, export(uri, 8 << 40))
    assert nbdinfo_map(uri) == [(0, 8 << 40, 3)]


def test_nbdinfo_is_right_for_a_read_only_disk(start: Start, image: Path) -> None:
    uri = start("--target", "--readonly", image).uri
    expected = info(uri, export(uri, image.stat().st_size, readonly=True))
    assert without_strings(nbdinfo(uri, "--no-content")) == expected
    run("nbdinfo", "--is", "read-only", uri)


def test_nbdinfo_is_right_over_tcp(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    uri = f"nbd://127.0.0.1:{server.port}"
    answer = without_strings(nbdinfo(uri, "--no-content"))
    assert answer["exports"][0].pop("uri").rstrip("/") == uri
    expected = export(uri, image.stat().st_size)
    del expected["uri"]
    assert answer == info(uri, expected)


def test_nbdinfo_knows_the_content(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"\x1f\x8b\x08\x00" + bytes(10_000))
    assert nbdinfo(start("--target", image).uri)["exports"][0]["content"].startswith("gzip compressed data")


@pytest.mark.parametrize("asked", ["", "root-disk"])
def test_nbdinfo_is_right_for_an_export_with_a_name(start: Start, image: Path, asked: str) -> None:
    server = start("--target", "--exportname", "root-disk", image)
    uri = f"nbd+unix:///{asked}?socket={server.socket}"
    expected = info(uri, export(uri, image.stat().st_size, "root-disk"))
    assert without_strings(nbdinfo(uri, "--no-content")) == expected


@pytest.mark.parametrize("asked", ["disk.img", "root-dis", "root-disk2"])
def test_nbdinfo_is_told_of_an_unknown_export(start: Start, image: Path, asked: str) -> None:
    server = start("--target", "--exportname", "root-disk", image)
    status, _, message = run("nbdinfo", f"nbd+unix:///{asked}?socket={server.socket}", check=False)
    assert status == 1
    assert "No such file or directory for export" in message


def test_nbdinfo_lists_the_export(server: Server, image: Path) -> None:
    answer = without_strings(nbdinfo(server.uri, "--list", "--no-content"))
    named = f"nbd+unix:///disk.img?socket={server.socket}"
    expected = export(named, image.stat().st_size)
    # Only a description that came with OPT_LIST itself is shown here.
    answer["exports"][0].setdefault("description", expected["description"])
    assert answer == info(named, expected)


def test_nbdinfo_maps_data_and_holes(start: Start, sparse: Path) -> None:
    extents = nbdinfo_map(start("--target", sparse).uri)
    assert extents == [
        (0, 64 * KIB, 0),
        (64 * KIB, 4 * MIB - 64 * KIB, 3),
        (4 * MIB, 128 * KIB, 0),
        (4 * MIB + 128 * KIB, 4 * MIB - 128 * KIB, 3),
        (8 * MIB, 1, 0),
    ]


@pytest.mark.parametrize(
    "question", ["cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero"]
)
def test_nbdinfo_answers_what_the_disk_can(server: Server, question: str) -> None:
    run("nbdinfo", "--can", question, server.uri)


def test_nbdinfo_tells_the_size(server: Server, image: Path) -> None:
    assert int(run("nbdinfo", "--size", server.uri)[1]) == image.stat().st_size


# nbdcopy

COPY_OPTIONS = [(), ("--connections=4", "--requests=64"), ("--synchronous",), ("--request-size=33554432",)]


@pytest.mark.parametrize("options", COPY_OPTIONS)
def test_nbdcopy_out(server: Server, image: Path, tmp_path: Path, options: Tuple[str, ...]) -> None:
    copy = tmp_path / "copy.img"
    run("nbdcopy", *options, server.uri, copy)
    assert copy.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("options", COPY_OPTIONS)
def test_nbdcopy_in(start: Start, image: Path, tmp_path: Path, options: Tuple[str, ...]) -> None:
    copy = tmp_path / "copy.img"
    server = start("--target", "--create", image.stat().st_size, copy)
    run("nbdcopy", *options, "--flush", image, server.uri)
    assert copy.read_bytes() == image.read_bytes()


def test_nbdcopy_out_keeps_holes(start: Start, sparse: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    run("nbdcopy", start("--target", sparse).uri, copy)
    assert copy.read_bytes() == sparse.read_bytes()
    assert space_of(copy) <= 256 * KIB


def test_nbdcopy_in_makes_holes_in_what_was_full(start: Start, sparse: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.img"
    full.write_bytes(b"\xa5" * sparse.stat().st_size)
    server = start("--target", full)
    run("nbdcopy", sparse, server.uri)
    assert full.read_bytes() == sparse.read_bytes()
    assert nbdinfo_map(server.uri) == nbdinfo_map(start("--target", sparse).uri)


def test_nbdcopy_from_server_to_server(start: Start, sparse: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    source, destination = start("--target", sparse), start("--target", "--create", sparse.stat().st_size, copy)
    run("nbdcopy", source.uri, destination.uri)
    assert copy.read_bytes() == sparse.read_bytes()


# qemu


@pytest.fixture
def sectors(tmp_path: Path) -> Path:
    """A sparse image of whole sectors, as qemu wants them: 6 MiB, data in the middle third."""
    path = tmp_path / "sectors.img"
    with path.open("wb") as file:
        file.truncate(6 * MIB)
        file.seek(2 * MIB)
        file.write(random.Random(4).randbytes(2 * MIB))
    return path


def test_qemu_img_info(start: Start, sectors: Path) -> None:
    answer = json.loads(run("qemu-img", "info", "--output=json", start("--target", sectors).uri)[1])
    assert answer["virtual-size"] == 6 * MIB
    assert answer["format"] == "raw"


def test_qemu_img_info_rounds_an_odd_size_up_to_sectors(server: Server, image: Path) -> None:
    answer = json.loads(run("qemu-img", "info", "--output=json", server.uri)[1])
    assert answer["virtual-size"] == -(-image.stat().st_size // 512) * 512


def test_qemu_img_map(start: Start, sectors: Path) -> None:
    extents = json.loads(run("qemu-img", "map", "--output=json", start("--target", sectors).uri)[1])
    assert [(e["start"], e["length"], e["zero"], e["data"]) for e in extents] == [
        (0, 2 * MIB, True, False),
        (2 * MIB, 2 * MIB, False, True),
        (4 * MIB, 2 * MIB, True, False),
    ]


def test_qemu_img_convert_out_and_compare(start: Start, sectors: Path, tmp_path: Path) -> None:
    uri = start("--target", sectors).uri
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", uri, copy)
    assert "Images are identical" in run("qemu-img", "compare", uri, copy)[1]
    assert copy.stat().st_size < 3 * MIB


def test_qemu_img_convert_in(start: Start, sectors: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.img"
    full.write_bytes(b"\xa5" * 6 * MIB)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", sectors, start("--target", full).uri)
    assert full.read_bytes() == sectors.read_bytes()
    assert space_of(full) <= 3 * MIB


def test_qemu_img_compare_finds_a_difference(start: Start, sectors: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(sectors.read_bytes()[:-1] + b"x")
    status, out, _ = run("qemu-img", "compare", start("--target", sectors).uri, other, check=False)
    assert status == 1
    assert "mismatch" in out


QEMU_IO_PATTERNS = """
write -P 0x11 0 1M
read -P 0x11 0 1M
write -P 0x22 65536 4096
read -P 0x11 0 65536
read -P 0x22 65536 4096
aio_write -P 0x33 1M 512k
aio_write -P 0x44 1536k 512k
aio_flush
aio_read -P 0x33 1M 512k
aio_read -P 0x44 1536k 512k
aio_flush
writev -P 0x55 2M 4k 8k 64k
readv -P 0x55 2M 4k 8k 64k
write -f -P 0x66 3M 4k
read -P 0x66 3M 4k
discard 4M 1M
read -P 0 4M 1M
write -z -u 65536 8192
read -P 0 65536 8192
read -P 0x11 73728 4096
write -z 1M 64k
read -P 0 1M 64k
read -P 0x33 1114112 64k
write -z -f 5M 512
read -P 0 5M 512
flush
"""


def test_qemu_io_patterns(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "qemu.img"
    image.write_bytes(b"\xa5" * 6 * MIB)
    commands = [option for line in QEMU_IO_PATTERNS.strip().splitlines() for option in ("-c", line)]
    _, out, _ = run("qemu-io", "-f", "raw", *commands, start("--target", image).uri)
    assert not re.search("failed|error", out, re.IGNORECASE), out
    content = image.read_bytes()
    assert content[4 * MIB : 5 * MIB] == bytes(MIB)
    assert content[3 * MIB : 3 * MIB + 4096] == b"\x66" * 4096
    assert content[5 * MIB + 512 :] == b"\xa5" * (MIB - 512)


@pytest.mark.parametrize("option, keeps_space", [("-u", False), ("", True)])
def test_qemu_io_chooses_whether_zeros_take_space(start: Start, tmp_path: Path, option: str, keeps_space: bool) -> None:
    image = tmp_path / "qemu.img"
    image.write_bytes(b"\xa5" * 2 * MIB)
    run(
        "qemu-io",
        "-f",
        "raw",
        "-d",
        "unmap",
        "-c",
        f"write -z {option} 0 2M",
        "-c",
        "flush",
        start("--target", image).uri,
    )
    assert image.read_bytes() == bytes(2 * MIB)
    assert (space_of(image) >= 2 * MIB) is keeps_space


# fio


def test_fio_verifies_what_four_connections_wrote(start: Start, tmp_path: Path) -> None:
    server = start("--target", "--create", FIO_JOBS * FIO_REGION, tmp_path / "fio.img")
    report = tmp_path / "fio.json"
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw", "--bsrange=512-64k",
        "--bs_unaligned=1", "--iodepth=16", "--verify=crc32c", "--verify_state_save=0",
        "--verify_fatal=1", "--do_verify=1", "--fsync=64",
        f"--numjobs={FIO_JOBS}", f"--size={FIO_REGION}", f"--offset_increment={FIO_REGION}",
        "--output-format=json", f"--output={report}",
    )  # fmt: skip
    jobs = json.loads(report.read_text())["jobs"]
    assert [job["error"] for job in jobs] == [0] * FIO_JOBS
    assert sum(job["write"]["total_ios"] for job in jobs) > 0
    assert sum(job["read"]["total_ios"] for job in jobs) > 0


# nbdkit and nbd-client


def through_nbdkit(uri: str, command: str) -> str:
    """Output of a shell command for which ``$uri`` is nbdkit, whose origin is *uri*."""
    return run("nbdkit", "--exit-with-parent", "-U", "-", "nbd", f"uri={uri}", "--run", command)[1]


def test_nbdinfo_through_nbdkit(server: Server, image: Path) -> None:
    (seen,) = json.loads(through_nbdkit(server.uri, 'nbdinfo --json --no-content "$uri"'))["exports"]
    assert seen["export-size"] == image.stat().st_size
    assert not seen["is_read_only"]
    capabilities = ["cache", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"]
    assert all(seen[f"can_{capability}"] for capability in capabilities)


def test_copies_through_nbdkit(start: Start, sparse: Path, tmp_path: Path) -> None:
    copy, copy_of_copy = tmp_path / "copy.img", tmp_path / "copy2.img"
    uri = start("--target", "--create", sparse.stat().st_size, copy).uri
    through_nbdkit(uri, f'nbdcopy "{sparse}" "$uri"')
    assert copy.read_bytes() == sparse.read_bytes()
    through_nbdkit(uri, f'nbdcopy "$uri" "{copy_of_copy}"')
    assert copy_of_copy.read_bytes() == sparse.read_bytes()


def test_nbdkit_passes_on_holes(start: Start, sparse: Path) -> None:
    uri = start("--target", sparse).uri
    through = json.loads(through_nbdkit(uri, 'nbdinfo --map --json "$uri"'))
    assert [(e["offset"], e["length"], e["type"]) for e in through] == nbdinfo_map(uri)


def test_nbd_client_lists_the_export(server: Server) -> None:
    assert "disk.img" in run("nbd-client", "-unix", server.socket, "-l")[1].splitlines()
