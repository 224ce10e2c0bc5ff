"""The wrapper's database: what is understood, what is refused and left alone, and how it is replaced."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, Tuple

import pytest
from server_process import ROOT

from xnbd.errors import ConfigurationError
from xnbd.wrapper.database import Database, pack_database, parse_database
from xnbd.wrapper.exports import ProxyExport, StoredExport, TargetExport, check_name, check_room, fields_of, find_export

PROXY = ProxyExport("/c/cache.img", "/c/cache.bitmap", "/run/p.ctl", "origin.example", "8520", "disk one")
NEAR = ProxyExport("/c/near.img", "/c/near.bitmap", "/run/n.ctl", "", "", remote_uri="nbd+unix:///x?socket=/run/n.s")
EXPORTS: Dict[str, StoredExport] = {
    "disk.img": TargetExport("/srv/disk.img"),
    "ünï/cödé 磁盘 \n\t\"'": TargetExport("/srv/\udcff not UTF-8"),
    "p": PROXY,
    "n": NEAR,
}
PROXY_FIELDS, NEAR_FIELDS = fields_of(PROXY), fields_of(NEAR)
TARGET_FIELDS = {"mode": "target", "image_path": "/a"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "xnbd.state"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(str(path))
    yield database
    database.close()


def refusal(data: bytes) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse_database(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_entry(entry: object, name: str = "x") -> bytes:
    return json.dumps({"version": 2, "images": {name: entry}}).encode()


# The format


def test_content_survives_packing() -> None:
    assert parse_database(pack_database(EXPORTS)) == EXPORTS


def test_format_is_that_of_version_2() -> None:
    assert json.loads(pack_database({"a": TargetExport("/a"), "p": PROXY})) == {
        "version": 2,
        "images": {
            "a": {"mode": "target", "image_path": "/a"},
            "p": {
                "mode": "proxy",
                "image_path": "/c/cache.img",
                "bitmap_path": "/c/cache.bitmap",
                "control_socket_path": "/run/p.ctl",
                "remote_host": "origin.example",
                "remote_port": "8520",
                "remote_export_name": "disk one",
            },
        },
    }


def test_an_origin_on_a_unix_socket_is_a_uri() -> None:
    assert json.loads(pack_database({"n": NEAR}))["images"]["n"] == {
        "mode": "proxy",
        "image_path": "/c/near.img",
        "bitmap_path": "/c/near.bitmap",
        "control_socket_path": "/run/n.ctl",
        "remote_uri": "nbd+unix:///x?socket=/run/n.s",
    }


@pytest.mark.parametrize(
    ("remote", "stored"),
    [
        ({"remote_uri": "nbd://h"}, ("h", "10809", "", "")),
        ({"remote_uri": "nbd://[fe80::1%25eth0]:99/a%20b"}, ("fe80::1%eth0", "99", "a b", "")),
        ({"remote_uri": "nbd://h", "remote_export_name": "x"}, ("h", "10809", "x", "")),
        (
            {"remote_uri": "nbd+unix:///?socket=%00s", "remote_export_name": "x"},
            ("", "", "", "nbd+unix:///x?socket=%00s"),
        ),
    ],
)
def test_a_uri_is_taken_apart_as_far_as_possible(remote: Dict[str, str], stored: Tuple[str, ...]) -> None:
    paths = {key: value for key, value in PROXY._asdict().items() if key.endswith("path")}
    found = parse_database(with_entry({**paths, **remote, "mode": "proxy"}))["x"]
    assert found[3:] == stored
    assert parse_database(pack_database({"x": found})) == {"x": found}


def test_every_truncation_is_refused() -> None:
    data = pack_database(EXPORTS)
    for length in range(len(data) - 1):  # the last byte is a newline, without which nothing is missing
        refusal(data[:length])
    assert parse_database(data[:-1]) == EXPORTS


def test_a_flipped_bit_is_refused_or_gives_a_valid_database(seed: int) -> None:
    data = pack_database(EXPORTS)
    chance = random.Random(seed)
    for _ in range(2000):
        broken = bytearray(data)
        broken[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            found = parse_database(bytes(broken))
        except ConfigurationError:
            continue
        assert parse_database(pack_database(found)) == found


def test_port_as_a_number_and_no_export_name_are_understood() -> None:
    fields: Dict[str, Any] = {**PROXY_FIELDS, "remote_port": 8520, "remote_export_name": None}
    assert parse_database(with_entry(fields)) == {"x": PROXY._replace(remote_export_name="")}
    del fields["remote_export_name"]
    assert parse_database(with_entry(fields)) == {"x": PROXY._replace(remote_export_name="")}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no complete JSON"),
        (b"disk.img\t/srv/disk.img\n", "no complete JSON"),
        (b"\xff\xfe", "no complete JSON"),
        (b"[" * 100_000, "no complete JSON"),
        (b"[]", "no version"),
        (b'{"images": {}}', "no version"),
        (b'{"version": true, "images": {}}', "no version"),
        (b'{"version": "2", "images": {}}', "no version"),
        (b'{"version": 1, "images": {}}', "version 1"),
        (b'{"version": 3, "images": {}}', "version 3"),
        (b'{"version": 2, "images": []}', "images"),
        (b'{"version": 2, "images": null}', "images"),
        (b'{"version": 2, "images": {"a": {}, "a": {}}}', "twice"),
        (with_entry([]), "'x'"),
        (with_entry({}), "mode"),
        (with_entry({"mode": ["target"], "image_path": "/a"}), "mode"),
        (with_entry({"mode": "cow", "image_path": "/a"}), "mode"),
        (with_entry({"mode": "target"}), "'image_path' is missing"),
        (with_entry({"mode": "target", "image_path": 5}), "no text"),
        (with_entry({"mode": "target", "image_path": ""}), "no absolute path"),
        (with_entry({"mode": "target", "image_path": "a\0b"}), "no text"),
        (with_entry({"mode": "target", "image_path": "/a\0b"}), "no text"),
        (with_entry({**PROXY_FIELDS, "remote_port": "70000"}), "70000"),
        (with_entry({**PROXY_FIELDS, "remote_port": True}), "no text"),
        (with_entry({**PROXY_FIELDS, "remote_host": "nbd://h"}), "not a URI"),
        (with_entry({**PROXY_FIELDS, "remote_uri": "nbd://h"}), "'remote_uri' stands in place of"),
        (with_entry({**NEAR_FIELDS, "remote_uri": ""}), "expected an NBD URI"),
        (with_entry({**NEAR_FIELDS, "remote_uri": "/run/n.s"}), "expected an NBD URI"),
        (with_entry({**NEAR_FIELDS, "remote_uri": "nbd://h?tls-hostname=h"}), "tls-hostname needs TLS"),
        (with_entry({**NEAR_FIELDS, "remote_export_name": "y"}), "names another export than 'y'"),
        (with_entry({**NEAR_FIELDS, "remote_port": "1"}), "'remote_uri' stands in place of"),
        (with_entry({**PROXY_FIELDS, "bitmap_path": "/c/cache.img"}), "three different"),
        (with_entry(TARGET_FIELDS, name=""), "name"),
        (with_entry(TARGET_FIELDS, name="a\0b"), "NUL"),
        (with_entry(TARGET_FIELDS, name="\udcff"), "UTF-8"),
        (with_entry(TARGET_FIELDS, name="ü" * 2049), "4096"),
    ],
)
def test_what_makes_no_sense_is_refused(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


# What a C xNBD writes and reads

OF_C = b"""{
    "images": {
        "/srv/disk1": {
            "image_path": "/srv/disk1",
            "mode": "target"
        },
        "far": {
            "bitmap_path": "/c/far.bitmap",
            "control_socket_path": "/run/far.ctl",
            "image_path": "/c/far.img",
            "mode": "proxy",
            "remote_export_name": null,
            "remote_host": "192.0.2.1",
            "remote_port": "8520"
        }
    },
    "version": 2
}"""
"""As its wrapper writes it, byte by byte."""


def test_what_a_c_xnbd_has_written_it_gets_back(path: Path) -> None:
    """It takes an empty name for a name, and asks its origin for that."""
    path.write_bytes(OF_C)
    database = Database(str(path))
    assert database.exports == {
        "/srv/disk1": TargetExport("/srv/disk1"),
        "far": ProxyExport("/c/far.img", "/c/far.bitmap", "/run/far.ctl", "192.0.2.1", "8520"),
    }
    database.change(database.exports)
    database.close()
    assert json.loads(path.read_bytes()) == json.loads(OF_C)
    assert b'"remote_export_name": null' in path.read_bytes()


def test_all_that_a_c_xnbd_needs_is_text_or_null() -> None:
    port_as_number = {**PROXY_FIELDS, "remote_port": 8520, "remote_export_name": ""}
    (entry,) = json.loads(pack_database(parse_database(with_entry(port_as_number))))["images"].values()
    assert entry == {**PROXY_FIELDS, "remote_export_name": None}


def test_no_images_are_none() -> None:
    assert parse_database(b'{"version": 2}') == {}


def test_relative_paths_are_those_of_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    entry = {**PROXY_FIELDS, "image_path": "a", "bitmap_path": "./b/c", "control_socket_path": "../d"}
    (export,) = parse_database(with_entry(entry)).values()
    assert export[:3] == (f"{tmp_path}/a", f"{tmp_path}/b/c", f"{tmp_path.parent}/d")


def test_a_relative_path_without_a_working_directory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "working directory is gone" in refusal(with_entry({"mode": "target", "image_path": "a"}))
    assert parse_database(with_entry(TARGET_FIELDS)) == {"x": TargetExport("/a")}


def test_what_is_not_known_is_kept_as_long_as_its_export_is_there(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {**TARGET_FIELDS, "remote_host": "h", "comment": ["a", {"b": None}]}
    content = {"version": 2, "made by": {"x": 1.5}, "images": {"x": entry, "y": TARGET_FIELDS}}
    path.write_text(json.dumps(content))
    database = Database(str(path))
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"database {path}: the file has what is not known, and keeps it: ['made by']",
        f"database {path}: the export 'x' has what is not known, and keeps it: ['remote_host', 'comment']",
    ]
    exports = dict(database.exports)
    database.change({**exports, "z": TargetExport("/z")})
    content["images"]["z"] = {**TARGET_FIELDS, "image_path": "/z"}  # type: ignore[index]
    assert json.loads(path.read_text()) == content
    database.change({})
    database.change(exports)
    database.close()
    assert json.loads(path.read_text()) == {**content, "images": {"x": TARGET_FIELDS, "y": TARGET_FIELDS}}


# Names and files


def test_own_names_go_before_aliases_and_an_alias_means_its_image() -> None:
    one, other = TargetExport("/1"), TargetExport("/2")
    assert find_export({"a": one}, {"./a": one}, "./a") == "a"
    assert find_export({"a": one, "./a": other}, {"./a": one}, "./a") == "./a"
    assert find_export({"a": other}, {"./a": one}, "./a") is None
    assert find_export({"b": one}, {"./a": one}, "./a") == "b"
    assert find_export({"a": one}, {}, "./a") is None


def test_names_up_to_the_protocol_s_limit_are_fine() -> None:
    assert check_name("ü" * 2048) == "ü" * 2048


def test_targets_may_share_an_image() -> None:
    check_room({"a": TargetExport("/i")}, "b", TargetExport("/i"))


@pytest.mark.parametrize("other", [TargetExport("/c/cache.img"), PROXY, PROXY._replace(image_path="/other")])
def test_a_proxy_shares_its_files_with_nobody(other: StoredExport) -> None:
    with pytest.raises(ConfigurationError, match="in use by the export 'a'"):
        check_room({"a": other}, "b", PROXY)


def test_a_target_on_a_proxy_s_cache_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="in use"):
        check_room({"a": PROXY}, "b", TargetExport(PROXY.image_path))


# The file


def test_missing_file_is_made_and_empty(path: Path, database: Database) -> None:
    assert database.exports == {}
    assert parse_database(path.read_bytes()) == {}


def test_missing_directory_is_made(tmp_path: Path) -> None:
    Database(str(tmp_path / "new" / "xnbd.state")).close()
    assert (tmp_path / "new" / "xnbd.state").exists()


def test_changes_are_found_by_the_next_one(path: Path) -> None:
    first = Database(str(path))
    first.change(EXPORTS)
    first.close()
    second = Database(str(path))
    assert second.exports == EXPORTS
    second.close()


def test_nothing_but_the_file_is_left(path: Path, database: Database) -> None:
    database.change(EXPORTS)
    assert list(path.parent.iterdir()) == [path]


def test_mode_of_the_file_is_kept(path: Path, database: Database) -> None:
    path.chmod(0o600)
    database.change(EXPORTS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@contextmanager
def nobody() -> Iterator[None]:
    """Root may read any directory."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_directory_that_cannot_be_read_is_no_failure_of_a_change() -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "xnbd.state"
        if os.geteuid() == 0:
            os.chown(directory, 65_534, -1)
        Path(directory).chmod(0o300)
        with nobody():
            database = Database(str(path))
            database.change(EXPORTS)
            database.close()
        assert parse_database(path.read_bytes()) == EXPORTS
        Path(directory).chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 1, "images": {}}'])
def test_what_is_refused_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before = path.stat()
    with pytest.raises(ConfigurationError, match="left alone"):
        Database(str(path))
    assert path.read_bytes() == content
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_symbolic_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(pack_database({}))
    path.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigurationError, match="symbolic link"):
        Database(str(path))


def test_fifos_and_directories_are_refused_without_waiting(path: Path, tmp_path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match="regular file"):
        Database(str(path))
    with pytest.raises(ConfigurationError):
        Database(str(tmp_path))


def test_somebody_else_s_change_is_not_written_over(path: Path, database: Database) -> None:
    database.change(EXPORTS)
    theirs = pack_database({"theirs": TargetExport("/t")})
    path.write_bytes(theirs)
    with pytest.raises(ConfigurationError, match="somebody else"):
        database.change({})
    assert path.read_bytes() == theirs
    assert database.exports == EXPORTS


def test_a_removed_file_is_written_again(path: Path, database: Database) -> None:
    path.unlink()
    database.change(EXPORTS)
    assert parse_database(path.read_bytes()) == EXPORTS


def test_a_failed_change_changes_nothing(path: Path, database: Database) -> None:
    (path.parent / (path.name + ".new")).mkdir()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="cannot write database"):
        database.change(EXPORTS)
    assert (path.read_bytes(), database.exports) == (before, {})


HOLDER = """
import sys
from xnbd.errors import ConfigurationError
from xnbd.wrapper.database import Database
try:
    database = Database(sys.argv[1])
except ConfigurationError as error:
    sys.exit(str(error))
"""


def test_one_wrapper_at_a_time_also_after_changes(path: Path, database: Database) -> None:
    for exports in ({}, EXPORTS):
        database.change(exports)
        other = subprocess.run(
            [sys.executable, "-c", HOLDER, path], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        assert other.returncode == 1
        assert "another wrapper uses it" in other.stderr


def test_a_forked_process_sees_later_changes(database: Database) -> None:
    told, tell = os.pipe()
    answer, answered = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(answered, b"1" if database.current() == {} else b"0")
        os.read(told, 1)
        os.write(answered, b"1" if database.current() == EXPORTS else b"0")
        os._exit(0)
    assert os.read(answer, 1) == b"1"
    database.change(EXPORTS)
    os.write(tell, b"x")
    assert os.read(answer, 1) == b"1"
    os.waitpid(pid, 0)
    for fd in (told, tell, answer, answered):
        os.close(fd)


def test_random_changes_keep_file_and_memory_alike(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    shadow: Dict[str, Any] = {}
    database = Database(str(path))
    for step in range(150):
        exports = dict(database.exports)
        name = f"export {chance.randrange(8)}"
        action = chance.random()
        if action < 0.5:
            target: StoredExport = TargetExport(f"/t/{step}")
            exports[name] = chance.choice([target, PROXY._replace(remote_port=str(step + 1))])
        else:
            exports.pop(name, None)
        database.change(exports)
        shadow = dict(exports)
        assert parse_database(path.read_bytes()) == shadow == database.exports
        if chance.random() < 0.1:
            database.close()
            database = Database(str(path))
    database.close()
