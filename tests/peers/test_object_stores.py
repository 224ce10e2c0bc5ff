"""A proxy of an object in a store: Ceph's gateway and SeaweedFS over S3, and what Google's and Azure's are asked."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
from caching import BLOCK, CacheFiles, Reading, bgctl, connect, query
from ceph import Ceph
from conftest import MIB, Start
from launch import fails
from model import Model, read_all
from object_store import KEYS, Store
from seaweed import Seaweed
from server_process import title_of
from web_origin import WebOrigin

SIZE = 6 * MIB + 1234


@pytest.fixture(params=["radosgw", "SeaweedFS"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """It takes ten seconds to come up: one test has all that is to be seen of it."""
    where = tmp_path / "store"
    with ExitStack() as stack:
        if request.param == "radosgw":
            found = Store(stack.enter_context(Ceph(where)).s3(*KEYS.values()))
        else:
            found = Store(stack.enter_context(Seaweed(where, *KEYS.values())).url)
        found.make_bucket()
        yield found


@pytest.fixture
def disk() -> bytes:
    return random.Random(3).randbytes(SIZE)


def env(variables: Dict[str, str]) -> List[str]:
    """A prefix that sets *variables*."""
    return ["env", *(f"{name}={value}" for name, value in variables.items())]


def check_data(start: Start, files: CacheFiles, store: Store, disk: bytes, seed: int) -> None:
    store.put("images/a disk.raw", disk)
    uri = store.uri("images/a%20disk.raw")
    proxy = start(*files.arguments(uri), env=KEYS)
    rng = random.Random(seed)
    model = Model([connect(proxy.uri) for _ in range(2)], disk, rng)
    model.play(20)
    bgctl("--cache-all", files.control)
    model.run(10)
    proxy.stop()
    again = start(*files.arguments(uri), env=KEYS)
    assert read_all(connect(again.uri)) == model.content


def check_change(start: Start, files: CacheFiles, store: Store, disk: bytes) -> None:
    store.put("changing.raw", disk)
    proxy = start(*files.arguments(store.uri("changing.raw"), "--readahead", "0"), env=KEYS)
    proxy.expected_errors = ["THE DISK THERE HAS CHANGED"]
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    store.put("changing.raw", disk[::-1])
    assert Reading(client, 3 * MIB, BLOCK).wait() == 5
    assert client.pread(BLOCK, BLOCK) == disk[BLOCK : 2 * BLOCK]
    assert query(files.control)["origin"]["changed"] is True


def check_profile(start: Start, tmp_path: Path, files: CacheFiles, store: Store, disk: bytes) -> None:
    store.put("disk.raw", disk)
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    keys = "".join(f"{name.lower()} = {value}\n" for name, value in KEYS.items())
    (home / ".aws" / "credentials").write_text(f"[default]\naws_access_key_id = x\n[reader]\n{keys}")
    (home / ".aws" / "config").write_text(f"[profile reader]\nregion = us-east-1\nendpoint_url = {store.url}\n")
    proxy = start(*files.arguments("s3://golden/disk.raw?profile=reader", "--verbose"), env={"HOME": str(home)})
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    told = bgctl("--query", "--json", files.control)[1]
    processes = [proxy.pid, *proxy.workers()]
    seen = [proxy.log(), told, *map(title_of, processes)]
    seen.append(files.state.read_bytes().decode("latin1"))
    assert not any(KEYS["AWS_SECRET_ACCESS_KEY"] in text for text in seen)


def check_refusals(files: CacheFiles, store: Store, disk: bytes) -> None:
    store.put("disk.raw", disk)
    uri, other = store.uri("disk.raw"), store.uri("nothing.raw")
    wrong = {**KEYS, "AWS_SECRET_ACCESS_KEY": "another"}
    assert fails(*files.arguments(uri), prefix=env(wrong))[1].startswith(
        f"xnbd-server: origin {uri}: HTTP status 403 Forbidden, SignatureDoesNotMatch: wrong credentials"
    )
    assert "404 Not Found, NoSuchKey: there is no such object" in fails(*files.arguments(other), prefix=env(KEYS))[1]
    anonymous = store.uri("disk.raw", "anonymous=yes")
    assert "403 Forbidden" in fails(*files.arguments(anonymous), prefix=env({}))[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_store_is_an_origin(start: Start, tmp_path: Path, store: Store, disk: bytes, seed: int) -> None:
    check_data(start, CacheFiles(tmp_path, "data"), store, disk, seed)
    check_change(start, CacheFiles(tmp_path, "change"), store, disk)
    check_profile(start, tmp_path, CacheFiles(tmp_path, "profile"), store, disk)
    check_refusals(CacheFiles(tmp_path, "refused"), store, disk)


# What there is no engine for to be had here: what is asked, of a server that minds nothing


@pytest.fixture
def web(disk: bytes) -> Iterator[WebOrigin]:
    server = WebOrigin(disk)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("uri", "variables", "target", "authorization"),
    [
        ("gs://golden/a/disk.raw?endpoint={}&anonymous=yes", {}, "/golden/a%2Fdisk%2Eraw", None),
        (
            "az://golden/a/disk.raw?account=corp&endpoint={}",
            {"AZURE_STORAGE_ACCOUNT_KEY": "QUJD"},
            "/golden/a/disk.raw",
            "SharedKey corp:",
        ),
        ("az://golden/a/disk.raw?account=corp&endpoint={}&anonymous=yes", {}, "/golden/a/disk.raw", None),
        (
            "s3://golden/a/disk.raw?endpoint={}&region=eu",
            KEYS,
            "/golden/a/disk.raw",
            "AWS4-HMAC-SHA256 Credential=AKID",
        ),
        ("s3://golden/a/disk.raw?endpoint={}&anonymous=yes", {}, "/golden/a/disk.raw", None),
        ("s3://golden/a/disk.raw?endpoint={}&anonymous=yes&virtual-host=yes", {}, "/a/disk.raw", None),
    ],
)
def test_each_store_is_asked_in_its_way(
    start: Start,
    files: CacheFiles,
    web: WebOrigin,
    disk: bytes,
    uri: str,
    variables: Dict[str, str],
    target: str,
    authorization: str,
) -> None:
    proxy = start(*files.arguments(uri.format(f"http://127.0.0.1:{web.port}")), env=variables)
    assert connect(proxy.uri).pread(BLOCK, MIB) == disk[MIB : MIB + BLOCK]
    assert {asked.target for asked in web.asked} == {target}
    given = [asked.headers.get("authorization") for asked in web.asked]
    assert all((told or "").startswith(authorization or "") and bool(told) == bool(authorization) for told in given)
    assert web.asked[-1].headers["if-match"] == web.etag


@pytest.mark.parametrize(
    ("uri", "variables", "message"),
    [
        ("s3://b/k?profile=nobody", {}, "there is no profile nobody in ~/.aws"),
        ("s3://b/k?profile=cloud", {}, "profile cloud has no keys, but a way to get some"),
        ("s3://b/k", {"AWS_SHARED_CREDENTIALS_FILE": "broken"}, "broken cannot be read: a line of it makes no sense"),
        ("http://127.0.0.1/k", {"NETRC": "broken"}, "broken cannot be read: a line of it makes no sense"),
        ("az://b/k", {}, "Say az://CONTAINER/KEY?account=NAME, or set AZURE_STORAGE_ACCOUNT_NAME"),
        ("s3://b/k", {"AWS_ACCESS_KEY_ID": "AKID"}, "a key without its secret: AWS_SECRET_ACCESS_KEY is missing"),
        ("s3://b/k", {"AWS_SECRET_ACCESS_KEY": "x"}, "a secret without its key: AWS_ACCESS_KEY_ID is missing"),
        ("https://127.0.0.1/k", {"SSL_CERT_FILE": "gone"}, "gone, which cannot be read or is not there"),
    ],
)
def test_credentials_that_make_no_sense_are_told_in_one_line(
    tmp_path: Path, files: CacheFiles, uri: str, variables: Dict[str, str], message: str
) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text("[profile cloud]\nsso_session = corp\n")
    (tmp_path / "broken").write_text("secret-of-mine without a section\n")
    paths = {name: str(tmp_path / value) for name, value in variables.items()}
    told = fails(*files.arguments(uri), prefix=env({"HOME": str(tmp_path), **paths}))[1]
    assert message in told
    assert "secret-of-mine" not in told
