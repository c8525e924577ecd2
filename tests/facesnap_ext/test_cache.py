"""What the engine keeps: of each kind the latest used, and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.cache import Cache

KEPT = {"small": 5, "large": 2}


@given(st.lists(st.tuples(st.sampled_from(sorted(KEPT)), st.integers(0, 7)), max_size=60))
def test_of_each_kind_the_latest_used_are_kept_whatever_other_kinds_do(asked):
    """Against a plain list of what was used last."""
    cache = Cache()
    latest = {kind: [] for kind in KEPT}
    for kind, number in asked:
        computed = []
        result = cache.remember((kind, number), lambda: computed.append(1) or (kind, number), KEPT[kind])  # noqa: B023
        assert result == (kind, number)
        assert bool(computed) == (number not in latest[kind])
        latest[kind] = [*(n for n in latest[kind] if n != number), number][-KEPT[kind] :]
