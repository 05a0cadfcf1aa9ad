"""The pool of pages against a model of it: every page is free, held or cached, and found by its key."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from infer.engine.pages import PagePool, page_keys


class Pool(RuleBasedStateMachine):
    """Requests that match, take, publish and release; `held` and `content` say what they must find."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(9)
        self.requests: list[tuple[list[int], list[bytes]]] = []
        self.content: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def add(self, tokens: list[int]) -> None:
        keys = list(page_keys(tokens, 2))
        known = self.pool.match(keys)
        assert [self.content[page] for page in known] == keys[: len(known)]
        taken = self.pool.take(len(keys) - len(known))
        if taken is None:
            assert len(keys) - len(known) > self.pool.available
            self.pool.release(known)
            return
        assert 0 not in taken and len(set(taken)) == len(taken)
        assert not any(page in pages for page in taken for pages, _ in self.requests)
        self.content |= dict(zip(taken, keys[len(known) :], strict=True))
        self.requests.append((known + taken, keys))

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        if self.requests:
            pages, keys = data.draw(st.sampled_from(self.requests))
            for page, key in zip(pages, keys, strict=True):
                self.pool.publish(page, key)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.requests:
            pages, _ = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
            self.pool.release(pages)

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        held = {page for pages, _ in self.requests for page in pages}
        assert self.pool.available == 8 - len(held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_keys_are_of_all_tokens_before() -> None:
    keys = list(page_keys(range(10), 4))
    assert len(keys) == 2 == len(set(keys))
    assert list(page_keys([*range(9), 77], 4)) == keys
    assert list(page_keys([9, *range(1, 10)], 4))[1] != keys[1]
    assert list(page_keys(range(10), 4, b"other")) != keys


def test_the_beginning_of_a_request_stays_longest() -> None:
    pool = PagePool(5)
    keys = list(page_keys(range(6), 2))
    pages = pool.take(3)
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.release(pages)
    assert pool.take(2) == [4, pages[2]]  # what was free, then the end of the request
    assert pool.match(keys) == pages[:2]


def test_there_is_no_more_than_there_is() -> None:
    pool = PagePool(4)
    assert pool.take(4) is None and pool.available == 3
    pages = pool.take(3)
    assert sorted(pages or []) == [1, 2, 3] and pool.take(1) is None and pool.take(0) == []
    with pytest.raises(AssertionError):
        pool._holders[1] = 0
        pool.check()
