"""Which pages of a cache are free, which are held and by how many, and which hold a prefix that may come again."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np


class PagePool:
    """Ids of pages. Page 0 is never given out: rows without a request write there.

    A page is free, held by one or more requests, or cached: held by none, but published under a key, until somebody
    needs the room; the least recently used go first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders: Counter[int] = Counter()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> float:
        """The share of the pages that somebody holds."""
        return 1 - self.available / (self.num_pages - 1)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest published run of these keys, which the caller then holds."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            self._holders[page] += 1
            self._cached.pop(page, None)
            found.append(page)
        return found

    def take(self, count: int) -> list[int] | None:
        """That many pages to hold and to write, or None where there are fewer."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def publish(self, page: int, key: bytes) -> None:
        """Lets others find a held page, which must be full. The first page of a key is the one that is found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Holds pages no longer. Of one request the last go first when room is needed: the beginning is shared most."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Lets nobody find a page any more."""
        self._free += reversed(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._key_of.clear()

    def check(self) -> None:
        """Asserts what always holds."""
        free, held, cached = set(self._free), set(self._holders), set(self._cached)
        assert len(free) == len(self._free) and not free & held and not free & cached and not held & cached
        assert free | held | cached == set(range(1, self.num_pages))
        assert all(count > 0 for count in self._holders.values())
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        assert cached <= self._key_of.keys() <= cached | held


def page_keys(tokens: Sequence[int], size: int, salt: bytes = b"") -> Iterator[bytes]:
    """A key for each whole page of tokens, of them and of all before: equal keys hold equal keys and values."""
    parent = hashlib.sha256(salt).digest()
    for start in range(0, len(tokens) - size + 1, size):
        parent = hashlib.sha256(parent + np.asarray(tokens[start : start + size], np.int32).tobytes()).digest()
        yield parent
