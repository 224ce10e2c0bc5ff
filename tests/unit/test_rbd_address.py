"""Addresses of images in Ceph: what is understood, what is told of them, and what is refused."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.errors import ConfigurationError
from xnbd.origin.address import is_uri, overrules, parse_origin, place_of
from xnbd.origin.rbd.address import RbdAddress
from xnbd.system.process import whole_path


@pytest.mark.parametrize(
    "uri",
    [
        "rbd:pool/image",
        "rbd:pool/image@snap",
        "rbd:pool/name%20space/image@snap",
        "rbd:pool/image@snap?conf=/etc/ceph/ceph.conf&id=xnbd",
        "rbd:pool/a%3Ab%C3%BC?id=xnbd",
    ],
)
def test_an_address_is_told_as_it_was_given(uri: str) -> None:
    address = parse_origin(uri)
    assert str(address) == uri
    assert parse_origin(str(address)) == address
    assert address.fetch_size == 64 << 10
    assert address.starts_threads
    assert bool(address.warnings()) == ("@" not in uri)


def test_its_parts_are_understood() -> None:
    address = parse_origin("RBD:pool/space/image@snap?id=xnbd&conf=ceph.conf")
    conf = whole_path("ceph.conf", "conf")
    assert address == RbdAddress("pool", "space", "image", "snap", conf, "xnbd")
    assert address.local_files == {conf: os.R_OK}
    assert parse_origin("rbd:pool/image").local_files == {}


def test_a_place_is_where_the_image_is_and_not_who_asks() -> None:
    uri = "rbd:pool/image@snap?conf=/etc/ceph/ceph.conf&id=xnbd"
    assert place_of(uri) == "rbd:pool/image@snap?conf=/etc/ceph/ceph.conf"
    assert overrules("rbd:pool/image@snap?conf=/etc/ceph/ceph.conf&id=other", uri)
    assert not overrules("rbd:pool/image@other?conf=/etc/ceph/ceph.conf", uri)


def test_a_host_may_be_called_as_the_scheme() -> None:
    assert str(parse_origin("rbd", "8520")) == "nbd://rbd:8520/"
    assert not any(map(is_uri, ("rbd", "::1", "fe80::1%eth0", "host:8520")))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("rbd:", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:image", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:a/b/c/d", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd://pool/image", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:pool/image@", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:pool/image@a@b", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:pool/a%2Fb", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:pool/a%00", "expected rbd:POOL/IMAGE@SNAPSHOT"),
        ("rbd:pool/%ff", "expected names in UTF-8"),
        ("rbd:pool/a b", "written as %20"),
        ("rbd:pool/100%", "written as %20"),
        ("rbd:pool/a#secret", "written as %20"),
        ("rbd:pool/image:id=xnbd:key=secret", "options stand behind a '?'"),
        ("rbd:pool/image?key=secret", "keys are in keyrings"),
        ("rbd:pool/image?id=a&id=b", "each once"),
        ("rbd:pool/image?conf=", "expected conf=PATH"),
        ("rbd:pool/image?conf=%0a", "conf is the path"),
        ("rbd:pool/image?id=client.xnbd", "without client."),
        ("rbd:pool/image?id=a/b", "name of a client"),
    ],
)
def test_what_is_no_address_is_refused_and_no_key_repeated(uri: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_origin(uri)
    assert message in str(refused.value)
    assert refused.value.exit_status == 2
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("port", "name", "message"), [("6789", None, "the port 6789"), (None, "x", "no exports")])
def test_what_belongs_to_an_nbd_server_is_refused(port: str, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_origin("rbd:pool/image", port, name)


NAMES = st.text(st.characters(blacklist_characters="/@", blacklist_categories=["C", "Z"]), min_size=1, max_size=50)


@given(NAMES, NAMES, NAMES, NAMES)
def test_an_address_written_as_a_uri_is_read_back_the_same(pool: str, space: str, image: str, snapshot: str) -> None:
    address = RbdAddress(pool, space, image, snapshot, "/etc/ceph/ceph.conf", "xnbd")
    assert parse_origin(str(address)) == address
