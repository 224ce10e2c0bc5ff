"""Settings of a store that make no sense: one line that does not repeat them, and no panic of obstore."""

from __future__ import annotations

from pathlib import Path

import pytest

from xnbd.origin.address import parse_origin
from xnbd.origin.base import OriginLost
from xnbd.origin.objects.failures import PANIC, failure_of
from xnbd.origin.objects.settings import check_settings, is_server_url
from xnbd.origin.probe import probe

S3 = "s3://bucket/disk.raw?endpoint=http://127.0.0.1:1"
AZURE = "az://container/disk.raw?account=a&endpoint=http://127.0.0.1:1"
NO_SERVER, NO_REGION, BREAK = "is no URL of a server", "is no name of a region", "has a line break or another control"

VARIABLES = [
    (S3, "AWS_ACCESS_KEY_ID", "SeCrEt\n", BREAK),
    (S3, "AWS_SECRET_ACCESS_KEY", "SeCrEt\n", BREAK),
    (S3, "AWS_SESSION_TOKEN", "SeC\rrEt", BREAK),
    (S3, "AWS_REGION", "SeCrEt region", NO_REGION),
    (S3, "AWS_DEFAULT_REGION", "SeCrEt\n", NO_REGION),
    ("s3://bucket/disk.raw", "AWS_ENDPOINT_URL", "http://SeCrEt:zz", NO_SERVER),
    ("s3://bucket/disk.raw", "AWS_ENDPOINT_URL_S3", "http://SeC rEt/", NO_SERVER),
    ("s3://bucket/disk.raw", "AWS_ENDPOINT", "SeCrEt:9000", NO_SERVER),
    (S3, "AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://SeC rEt:1/", NO_SERVER),
    (AZURE, "AZURE_STORAGE_TOKEN", "SeCrEt\n", BREAK),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials that are as they should be."""
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("uri", "name", "value", "message"), VARIABLES)
def test_a_variable_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], uri: str, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(OriginLost) as lost:
        probe(parse_origin(uri), timeout=20)
    assert f"{name} {message}" in str(lost.value)
    assert lost.value.refused
    assert "SeC" not in str(lost.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("region = SeCrEt region", f"region of the profile {NO_REGION}"),
        ("endpoint_url = http://SeCrEt@127.0.0.1:1", f"endpoint_url of the profile {NO_SERVER}"),
        ("aws_session_token = SeCrEt\n  SeCrEt", f"aws_session_token of the profile {BREAK}"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, line: str, message: str
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "config").write_text(f"[default]\naws_access_key_id = a\naws_secret_access_key = b\n{line}\n")
    with pytest.raises(OriginLost) as lost:
        probe(parse_origin("s3://bucket/disk.raw"), timeout=20)
    assert message in str(lost.value)
    assert "SeC" not in str(lost.value)
    assert capfd.readouterr() == ("", "")


def test_what_does_not_count_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    monkeypatch.setenv("AWS_REGION", "")
    monkeypatch.setenv("AZURE_STORAGE_TOKEN", "\n")
    check_settings("s3", {"endpoint": "https://host", "region": "eu"})


@pytest.mark.parametrize("url", ["http://h", "https://H.example:8080/", "http://[::1]:80/a/b", "http://127.0.0.1"])
def test_urls_of_servers(url: str) -> None:
    assert is_server_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:80",
        "ftp://h",
        "http://",
        "http://h:zz",
        "http://h:99999",
        "http://h:0",
        "http://a b",
        "http://u@h",
        "http://[::1",
        "http://a<b",
        "http://a%20b",
        "http://h\n",
        "http://h?a=b",
        "http://h#a",
        "http://ä",
    ],
)
def test_what_is_no_url_of_a_server(url: str) -> None:
    assert not is_server_url(url)


def test_a_panic_is_a_refusal_in_plain_words() -> None:
    class PanicError(BaseException):
        pass

    assert failure_of(PanicError("called `Result::unwrap()` on an `Err` value: InvalidPort")) is PANIC
