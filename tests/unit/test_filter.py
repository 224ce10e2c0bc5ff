"""A filter in front of an image passes everything on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest

from xnbd.storage.filter import FilterImage
from xnbd.storage.image import Image
from xnbd.storage.target import TargetImage

SIZE = 1 << 20

METHODS = [name for name, what in vars(Image).items() if callable(what) and name[0] != "_"]


@pytest.fixture
def image(tmp_path: Path) -> Iterator[TargetImage]:
    path = tmp_path / "disk.img"
    path.write_bytes(b"o" * SIZE)
    image = TargetImage(os.open(path, os.O_RDWR), SIZE, readonly=False)
    yield image
    image.close()


ARGUMENTS = {
    "count_in": ([1, 2],),
    "take": (None,),
    "tell_coming_by": (print,),
    "wait_with": (print,),
    "write": (7, b"data"),
    "write_zeroes": (8, 9),
    "flush": (),
    "close": (),
    "data_until": (5,),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_passed_on(image: TargetImage, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: List[Tuple[object, ...]] = []
    answer = object()

    def note(*arguments: object, **_options: object) -> object:
        called.append(arguments)
        return answer

    arguments = ARGUMENTS.get(method, (3, 4))
    options = {"may_trim": True, "fast": True} if method == "write_zeroes" else {}
    with monkeypatch.context() as patch:
        patch.setattr(image, method, note)
        returned = getattr(FilterImage(image), method)(*arguments, **options)
    assert called == [arguments]
    assert returned in (answer, None)


def test_it_is_the_disk_behind_it(image: TargetImage) -> None:
    front = FilterImage(image)
    assert image.flat is not None
    assert (front.size, front.readonly, front.background) == (SIZE, False, None)
    assert front.flat is image.flat
    front.write(5, b"new")
    assert front.pread(4, 5) == bytes(image.flat[4:9]) == b"onewo"


def test_its_view_is_made_anew_with_that_of_the_disk_behind_it(image: TargetImage) -> None:
    os.truncate(image.fd, SIZE // 2)
    short = TargetImage(os.dup(image.fd), SIZE, readonly=False)
    front = FilterImage(short)
    readable: Callable[[], int] = front.readable
    assert readable() == SIZE // 2
    os.truncate(image.fd, SIZE)
    assert readable() == SIZE
    assert front.flat is short.flat
    front.close()
