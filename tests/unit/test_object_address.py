"""Addresses of objects: what is understood, what is told of them, and what is refused."""

from __future__ import annotations

import pytest

from xnbd.errors import ConfigurationError
from xnbd.origin.address import overrules, parse_origin, place_of
from xnbd.origin.objects.address import redacted


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/disk.raw",
        "https://host:8443/a/b%20c.raw",
        "http://[::1]:80/x",
        "s3://bucket/a/b.raw",
        "s3://bucket/k%C3%BC?endpoint=http://rgw:8080&region=eu&profile=me&virtual-host=yes&anonymous=yes",
        "gs://bucket/k?anonymous=yes",
        "az://container/k?account=corp",
    ],
)
def test_an_address_is_told_as_it_was_given(uri: str) -> None:
    address = parse_origin(uri)
    assert str(address) == uri
    assert parse_origin(str(address)) == address
    assert address.fetch_size == 256 << 10
    assert address.starts_threads


def test_a_place_is_where_the_object_is_and_not_how_it_is_reached() -> None:
    uri = "s3://b/k?endpoint=http://rgw&region=eu&profile=me"
    assert place_of(uri) == "s3://b/k?endpoint=http://rgw"
    assert overrules("s3://b/k?endpoint=http://rgw&profile=other", uri)
    assert not overrules("s3://b/other?endpoint=http://rgw", uri)
    assert place_of("HTTPS://Host/X") == "https://host/X"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host", "expected the path of an object"),
        ("http://host/a//b", "expected the path of an object"),
        ("http://host/a/../b", "expected the path of an object"),
        ("http:///x", "expected a host"),
        ("http://host/%ff", "expected a path in UTF-8"),
        ("http://host/100%", "written as %20"),
        ("http://host/a b", "written as %20"),
        ("http://host:x/a", "Port could not be cast"),
        ("http://host/x?y=secret", "a signature would be seen by all"),
        ("http://host/x#secret", "a signature would be seen by all"),
        ("http://user:secret@host/x", "~/.netrc has them"),
        ("s3://AKID:secret@bucket/x", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY have them, or ~/.aws/credentials"),
        ("gs://me:secret@bucket/x", "GOOGLE_APPLICATION_CREDENTIALS names a file"),
        ("az://me:secret@container/x", "AZURE_STORAGE_ACCOUNT_KEY have them"),
        ("s3://bucket", "expected the path of an object"),
        ("s3:///key", "expected s3://BUCKET/KEY"),
        ("s3://b/k#secret", "written as %23"),
        ("s3://b/k?access_key_id=secret", "expected endpoint, region, profile, virtual-host, anonymous, each once"),
        ("s3://b/k?region=a&region=b", "each once"),
        ("s3://b/k?anonymous=no", "anonymous is yes or not there"),
        ("s3://b/k?region=", "region is a name"),
        ("s3://b/k?endpoint=rgw:8080", "endpoint is the URL"),
        ("s3://b/k?endpoint=http://user:secret@rgw", "no user and no password|endpoint is the URL"),
        ("s3://b/k?endpoint=http://rgw/?x=secret", "endpoint is the URL"),
        ("az://c/k?sas=secret", "expected account, endpoint, anonymous"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_its_secrets_are_not_repeated(uri: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as failure:
        parse_origin(uri)
    assert failure.value.exit_status == 2
    assert "secret" not in str(failure.value)


def test_a_port_and_an_export_have_no_place_beside_it() -> None:
    with pytest.raises(ConfigurationError, match="leave out the port"):
        parse_origin("http://host/x", "80")
    with pytest.raises(ConfigurationError, match="an object has no exports"):
        parse_origin("http://host/x", None, "disk")


def test_what_may_be_secret_is_left_out() -> None:
    assert redacted("https://me:pw@host/x?sig=1#y") == "https://***@host/x?…"
    assert redacted("https://host/x") == "https://host/x"
