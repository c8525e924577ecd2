"""The rows of the paper's Tables 2 and 3 and of its open question about several references, and the training runs they
need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Training:
    """How a training run differs from the full method. landmarks and tokens: see `TrainConfig`.

    settings: further fields of `TrainConfig` with their values.
    """

    name: str
    mixer: str = "facial attributes"  # a key of `facesnap_file.MIXERS`
    landmarks: str = "drawn"
    tokens: str = "ffrnet"
    settings: tuple[tuple[str, Any], ...] = ()


FULL = Training("mixer")
NO_LANDMARKS = Training("no-landmarks", landmarks="none")
NO_FFRNET = Training("no-ffrnet", tokens="text")


@dataclass(frozen=True)
class Row:
    """One way to generate an image of a person.

    landmarks: predicted (the reference's face in the driving photo's pose), driving (the driving photo's own), or none
    (a black image). references: number of photos of the person that are used. average: average the references instead
    of fusing them. paper: the paper's CLIP-face, FaceSim and FID.
    """

    name: str
    title: str
    training: Training
    landmarks: str = "predicted"
    references: int = 1
    average: bool = False
    paper: tuple[float, float, float] | None = None


MIXER = Row("mixer", "Facial Attribute Mixer", FULL, paper=(79.2, 70.6, 212.3))
TABLE_2 = (
    Row("id", "Face ID embeddings", Training("id", mixer="id only"), paper=(74.4, 67.2, 216.9)),
    Row("clip", "CLIP image features", Training("clip", mixer="clip only"), paper=(76.4, 66.1, 217.2)),
    Row("concat", "concat with projection", Training("concat", mixer="concatenation"), paper=(77.6, 68.8, 214.8)),
    MIXER,
)
TABLE_3 = (
    Row("no-ffrnet", "without FFRNet", NO_FFRNET, "none", paper=(70.2, 59.8, 225.2)),
    Row("no-landmarks", "FFRNet without landmark", NO_LANDMARKS, "none", paper=(72.6, 61.3, 218.5)),
    Row("driving", "FFRNet with drive landmark", FULL, "driving", paper=(77.8, 69.3, 213.7)),
    replace(MIXER, title="FFRNet with Landmark Predictor"),
)


def reference_rows(counts: Sequence[int]) -> tuple[Row, ...]:
    """The rows with each number of references, averaged and fused; with one reference, both are the Mixer's row."""
    rows = []
    for count in counts:
        if count == 1:
            rows.append(replace(MIXER, title="1 reference"))
        else:
            for word, average in (("averaged", True), ("fused", False)):
                rows.append(
                    Row(
                        f"{count}-{word}",
                        f"{count} references, {word}",
                        FULL,
                        references=count,
                        average=average,
                    )
                )
    return tuple(rows)


def all_rows(references: Sequence[int]) -> list[Row]:
    """Return the distinct rows of both tables and the rows with these numbers of references."""
    return distinct((*TABLE_2, *TABLE_3, *reference_rows(references)))


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Remove duplicate rows; a row may appear in several tables under different titles."""
    return list({row.name: row for row in rows}.values())


def trainings(rows: Iterable[Row]) -> list[Training]:
    """Return the distinct training runs that the rows need."""
    return list(dict.fromkeys(row.training for row in rows))
