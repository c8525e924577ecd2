"""The cache keeps the most recently used results of each kind, and no more."""

from __future__ import annotations

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
