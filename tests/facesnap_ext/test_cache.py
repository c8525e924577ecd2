"""The cache keeps the most recently used results of each kind, and no more."""

from __future__ import annotations

from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.cache import Cache

LIMITS = {"small": 5, "large": 2}


@given(st.lists(st.tuples(st.sampled_from(sorted(LIMITS)), st.integers(0, 7)), max_size=60))
def test_cache_keeps_the_most_recently_used_results_of_each_kind(requests):
    """The cache is compared with a plain list of the most recently used results."""
    cache = Cache()
    recent = {kind: [] for kind in LIMITS}
    for kind, number in requests:
        computed = []
        result = cache.get_or_compute((kind, number), lambda: computed.append(1) or (kind, number), LIMITS[kind])  # noqa: B023
        assert result == (kind, number)
        assert bool(computed) == (number not in recent[kind])
        recent[kind] = [*(n for n in recent[kind] if n != number), number][-LIMITS[kind] :]


@pytest.mark.parametrize("slow", ["result", "model"])
def test_something_slow_delays_only_those_who_wait_for_it(tmp_path, slow):
    cache, started, finish = Cache(), Event(), Event()
    path = tmp_path / "model"
    path.touch()

    def wait(*_):
        started.set()
        assert finish.wait(30)
        return "slow"

    results = []
    request = (lambda: cache.get_or_compute(("faces", 1), wait)) if slow == "result" else None
    request = request or (lambda: cache.load("face_pack", path, wait))
    threads = [Thread(target=lambda: results.append(request())) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    assert cache.get_or_compute(("faces", 2), lambda: "fast") == "fast"
    assert cache.load("clip", path, lambda path: "fast") == "fast"
    assert cache.load_variant("facesnap", path, lambda path: "fast", 2) == "fast"
    assert results == []
    finish.set()
    for thread in threads:
        thread.join(30)
    assert results == ["slow", "slow"]


def test_one_result_is_computed_once_by_many_threads():
    cache, computed, results = Cache(), [], []

    def compute():
        computed.append(1)
        return cache.get_or_compute(("inner", 1), lambda: len(computed))

    threads = [Thread(target=lambda: results.append(cache.get_or_compute(("outer", 1), compute))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (computed, results) == ([1], [1] * 8)


def test_a_failure_is_not_cached_and_frees_the_key():
    cache = Cache()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get_or_compute(("x", 1), lambda: 1 // 0)
    assert cache.get_or_compute(("x", 1), lambda: 5) == 5
