"""The rows of the paper's Tables 2 and 3 and of its open question, and the trainings that they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Training:
    """What is trained otherwise than the whole of FaceSnap. landmarks and tokens are `TrainConfig`'s."""

    name: str
    mixer: str = "facial attributes"  # kind, see `facesnap_file.MIXERS`
    landmarks: str = "drawn"
    tokens: str = "ffrnet"


WHOLE = Training("mixer")
NO_LANDMARKS = Training("no-landmarks", landmarks="none")
NO_FFRNET = Training("no-ffrnet", tokens="text")


@dataclass(frozen=True)
class Row:
    """One way to draw a person.

    landmarks: predicted (the reference's face in the driving photo's pose), driving (the driving photo's own), or none,
    a black picture. references: how many photos of the person are given. average: averaged in place of mixed.
    paper: its own CLIP-face, FaceSim and FID.
    """

    name: str
    title: str
    training: Training
    landmarks: str = "predicted"
    references: int = 1
    average: bool = False
    paper: tuple[float, float, float] | None = None


MIXER = Row("mixer", "Facial Attribute Mixer", WHOLE, paper=(79.2, 70.6, 212.3))
TABLE_2 = (
    Row("id", "Face ID embeddings", Training("id", mixer="id only"), paper=(74.4, 67.2, 216.9)),
    Row("clip", "CLIP image features", Training("clip", mixer="clip only"), paper=(76.4, 66.1, 217.2)),
    Row("concat", "concat with projection", Training("concat", mixer="concatenation"), paper=(77.6, 68.8, 214.8)),
    MIXER,
)
TABLE_3 = (
    Row("no-ffrnet", "without FFRNet", NO_FFRNET, "none", paper=(70.2, 59.8, 225.2)),
    Row("no-landmarks", "FFRNet without landmark", NO_LANDMARKS, "none", paper=(72.6, 61.3, 218.5)),
    Row("driving", "FFRNet with drive landmark", WHOLE, "driving", paper=(77.8, 69.3, 213.7)),
    replace(MIXER, title="FFRNet with Landmark Predictor"),
)


def reference_rows(counts: Sequence[int]) -> tuple[Row, ...]:
    """Rows with so many references, averaged and fused; with one, both are the Mixer's row."""
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
                        WHOLE,
                        references=count,
                        average=average,
                    )
                )
    return tuple(rows)


def all_rows(references: Sequence[int]) -> list[Row]:
    """The rows of both tables and of so many references, each once."""
    return distinct((*TABLE_2, *TABLE_3, *reference_rows(references)))


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Each row once; a row may stand in several tables under other titles."""
    return list({row.name: row for row in rows}.values())


def trainings(rows: Iterable[Row]) -> list[Training]:
    """The trainings that rows need, each once."""
    return list(dict.fromkeys(row.training for row in rows))
