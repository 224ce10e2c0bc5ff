"""An image in front of another one."""

from __future__ import annotations

from typing import Callable, Iterator, List, Optional

from .image import Buffer, Extent, Image, Parcel, Part


class FilterImage(Image):
    """*image*, unchanged: a subclass changes what it is for, and passes the rest on.

    Readers slice ``flat`` themselves where there is one. A filter that has to see
    every read therefore overrides `map_again` too, and leaves ``flat`` None.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self.size = image.size
        self.readonly = image.readonly
        self.background = image.background
        self.on_wait = image.on_wait
        self.readable: Callable[[], int] = self.map_again
        self.map_again()

    def map_again(self) -> int:
        """What ``readable`` tells; has ``flat`` be what the image behind has by now."""
        length = self.image.readable()
        self.flat = self.image.flat
        return length

    def count_in(self, counts: List[int]) -> None:
        self.image.count_in(counts)

    def tell_coming_by(self, tell: Callable[[int], None]) -> None:
        self.image.tell_coming_by(tell)

    def wait_with(self, on_wait: Callable[[], None]) -> None:
        self.on_wait = on_wait
        self.image.wait_with(on_wait)

    def read(self, offset: int, length: int) -> List[memoryview]:
        return self.image.read(offset, length)

    def read_fresh(self, offset: int, length: int) -> List[memoryview]:
        return self.image.read_fresh(offset, length)

    def pread(self, offset: int, length: int) -> bytes:
        return self.image.pread(offset, length)

    def on_unreadable(self, offset: int, length: int) -> None:
        self.image.on_unreadable(offset, length)

    def take(self, parcels: Optional[List[Parcel]]) -> None:
        self.image.take(parcels)

    def write(self, offset: int, data: Buffer) -> None:
        self.image.write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        self.image.write_zeroes(offset, length, may_trim=may_trim, fast=fast)

    def trim(self, offset: int, length: int) -> None:
        self.image.trim(offset, length)

    def flush(self) -> None:
        self.image.flush()

    def prefetch(self, offset: int, length: int) -> None:
        self.image.prefetch(offset, length)

    def fetch(self, offset: int, length: int) -> None:
        self.image.fetch(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self.image.extents(offset, length)

    def cached(self, offset: int, length: int) -> Iterator[Part]:
        return self.image.cached(offset, length)

    def written(self, offset: int, length: int) -> Iterator[Part]:
        return self.image.written(offset, length)

    def data_until(self, offset: int) -> int:
        return self.image.data_until(offset)

    def close(self) -> None:
        self.image.close()
