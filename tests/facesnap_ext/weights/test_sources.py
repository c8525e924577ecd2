"""Counts of training images by source, licence and consent."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.weights.sources import (
    MAX_SOURCES,
    OTHERS,
    ImageSource,
    combine_sources,
    count_sources,
    parse_sources,
    to_json,
)

ORIGIN = st.tuples(st.integers(0, 400).map(str), st.sampled_from("ab"), st.sampled_from("xy"))


@given(origins=st.lists(ORIGIN, max_size=600))
@settings(max_examples=60, deadline=None)
def test_counts_are_complete_bounded_and_survive_the_metadata(origins):
    sources = count_sources(origins)
    assert len(sources) <= MAX_SOURCES
    assert sum(source.images for source in sources) == len(origins)
    assert parse_sources(to_json(sources)) == sources
    licenses = Counter()
    for source in sources:
        licenses[source.license, source.consent] += source.images
    assert licenses == Counter(origin[1:] for origin in origins)


def test_licences_of_many_sources_are_summed_up_only_if_there_are_too_many_of_them():
    sources = count_sources((str(number), str(number), "x") for number in range(500))
    assert sources[0] == ImageSource(OTHERS, OTHERS, OTHERS, 450)
    assert len(sources) == MAX_SOURCES // 2 + 1


def test_sources_of_a_start_file_are_kept_and_not_counted_twice():
    start = ImageSource("a", "l", "c", 5), ImageSource("b", "l", "c", 1)
    now = ImageSource("a", "l", "c", 2), ImageSource("d", "l", "c", 9)
    expected = ImageSource("d", "l", "c", 9), ImageSource("a", "l", "c", 5), ImageSource("b", "l", "c", 1)
    assert combine_sources(start, now) == expected
    assert combine_sources(expected, now) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        '[{"source": "a"}]',
        '[{"source": "a", "license": "l", "consent": "c", "images": true}]',
        '[{"source": "a", "license": "l", "consent": "c", "images": 0}]',
        '[{"source": 1, "license": "l", "consent": "c", "images": 1}]',
        "[" * 100_000,
        "[" + ", ".join(['{"source": "a", "license": "l", "consent": "c", "images": 1}'] * 101) + "]",
    ],
)
def test_invalid_metadata_is_rejected(text):
    with pytest.raises(ValueError, match=r"sources?|Expecting"):
        parse_sources(text)
