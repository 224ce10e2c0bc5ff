"""TLS in xnbd-wrapper: the process of a client begins it, and goes on as its server."""

from __future__ import annotations

from pathlib import Path

from caching import CacheFiles
from certificates import Certificates
from conftest import Start, StartWrapper
from rawclient import RawClient
from server_process import ROOT, title_of, wait_until
from tls_client import context_of, start_tls
from wrapper_process import Wrapper, fails


def connect(wrapper: Wrapper, directory: Path) -> RawClient:
    return start_tls(wrapper.connect(), context_of(directory))


def test_a_client_reads_and_writes(start_wrapper: StartWrapper, image: Path, certificates: Certificates) -> None:
    wrapper = start_wrapper("--imgfile", image, "--tls", certificates.server)
    with connect(wrapper, certificates.alice) as client:
        client.go("disk.img")
        before = image.read_bytes()
        assert client.read(0, 300_000) == before[:300_000]
        assert client.write(7, b"over TLS") == 0
        wrapper.wait_for_log("connected as CN=alice,O=xnbd tests over TLSv1.3")
    assert image.read_bytes()[7:15] == b"over TLS"


def test_the_titles_tell_who_a_client_is(start_wrapper: StartWrapper, image: Path, certificates: Certificates) -> None:
    wrapper = start_wrapper("--imgfile", image, "--tls", certificates.server)
    with connect(wrapper, certificates.bob) as client:
        client.go("disk.img")
        assert client.works()
        titles = [title_of(pid) for pid in wrapper.servers()]
        assert any("CN=bob,O=xnbd tests" in title for title in titles), titles


def test_without_tls_a_client_is_shown_nothing(
    start_wrapper: StartWrapper, image: Path, certificates: Certificates
) -> None:
    wrapper = start_wrapper("--imgfile", image, "--tls", certificates.server)
    with wrapper.connect() as client:
        client.greet()
        assert client.go("disk.img")[-1][0] == 0x80000005
        assert client.option(3)[-1][0] == 0x80000005
    wrapper.wait_for_log("refused as long as it does not begin TLS")


def test_a_proxy_with_its_steward_serves_over_tls(
    start_wrapper: StartWrapper, start: Start, image: Path, files: CacheFiles, certificates: Certificates
) -> None:
    """The steward is forked beside the client's process, and lets go of the connection without a word to the client."""
    origin = start("--target", image, tcp=True)
    wrapper = start_wrapper("--tls", certificates.server)
    wrapper.ctl("--add-proxy", "far", "127.0.0.1", origin.port, files.image, files.bitmap, files.control)
    with connect(wrapper, certificates.alice) as client:
        client.go("far")
        content = image.read_bytes()
        for offset in range(0, len(content), 1 << 20):
            length = min(1 << 20, len(content) - offset)
            assert client.read(offset, length) == content[offset : offset + length]
    wait_until(lambda: ": left" in wrapper.log(), "the end of the client")


def test_a_program_of_the_users_choice_cannot_go_on_with_tls(tmp_path: Path, certificates: Certificates) -> None:
    status, line = fails(tmp_path, "--tls", certificates.server, "--xnbd-server", ROOT / "bin" / "xnbd-server")
    assert status == 2
    assert "--tls and --xnbd-server do not go together" in line
    assert "no such directory" in fails(tmp_path, "--tls", tmp_path / "nowhere")[1]
