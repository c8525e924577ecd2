"""The ablations of the miniature's two editions: their tables, the measurements in them, and the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from facesnap_lab.ablation.rows import MIXER, TABLE_2, TABLE_3, Row, Training, all_rows, distinct


@dataclass(frozen=True)
class Table:
    """A table with the gain of each row over the row above."""

    key: str  # in results.json
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Prediction:
    """The expectation, made before any training, that one row is above another."""

    metric: str
    higher: str  # name of a row
    lower: str


@dataclass(frozen=True)
class Edition:
    """What is trained, and how it is reported."""

    tables: tuple[Table, ...]
    columns: Mapping[str, str]  # titles of the measurements in the tables
    with_references: bool = False  # whether rows with several references are added
    over_seeds: bool = False  # whether intervals are over people and seeds, and not over people alone
    predictions: tuple[Prediction, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    def rows(self, references: Sequence[int]) -> list[Row]:
        """Return the distinct rows of all tables, and of the numbers of references if they are reported."""
        own = distinct(row for table in self.tables for row in table.rows)
        return distinct((*own, *all_rows(references))) if self.with_references else own


FIRST = Edition(
    tables=(
        Table("table_2", "Table 2: Facial Attribute Mixer", TABLE_2),
        Table("table_3", "Table 3: FFRNet and spatial control", TABLE_3),
    ),
    columns={"face_sim": "judge", "inner": "inner-face judge", "clip_face": "CLIP-face"},
    with_references=True,
    notes=(
        (
            "Cosines × 100 to the reference; an image without a face counts as 0. Brackets contain bootstrap 95 % "
            "intervals over people; ± is the standard deviation between seeds."
        ),
        (
            "The judges are never used for conditioning. CLIP-face and FID use the same CLIP that conditions the "
            "images, so compare them between rows, not with the paper's values."
        ),
    ),
)


def _loss_row(name: str, title: str, **settings: Any) -> Row:
    return Row(name, title, Training(name, settings=tuple(settings.items())))


POOLED = Row("concat-16", "concat with projection, 16 tokens", Training("concat-16", mixer="pooled concatenation"))
PAPER_LOSSES = {
    "outside": 0.0,
    "snr_weights": False,
    "terminal": 0.0,
    "id_weight": 0.5,
    "lightning_grad_steps": 1,
    "lightning_scale": 1.0,
}
LOSSES = (
    _loss_row("paper-losses", "eqs. 3 to 5 as in the paper", **PAPER_LOSSES),
    _loss_row("no-id", "without L_id", id_rows=0),
    _loss_row("no-mask", "L_diff without the mask", outside=1.0),
    _loss_row("last-step", "L_id through the last step only", lightning_grad_steps=1),
    replace(MIXER, title="recommended losses"),
)
FACE_SIM, INNER, CLIP_FACE = "face_sim_unseen", "inner_unseen", "clip_face"

SECOND = Edition(
    tables=(
        Table(
            "table_2",
            "Table 2: Facial Attribute Mixer",
            (TABLE_2[1], TABLE_2[0], POOLED, replace(TABLE_2[2], title="concat with projection, 277 tokens"), MIXER),
        ),
        Table("table_3", "Table 3: FFRNet and spatial control", TABLE_3),
        Table("losses", "Training losses", LOSSES),
    ),
    columns={FACE_SIM: "FaceSim, other looks", INNER: "inner face, other looks", CLIP_FACE: "CLIP-face, same look"},
    over_seeds=True,
    predictions=(
        Prediction(FACE_SIM, "id", "clip"),
        Prediction(CLIP_FACE, "clip", "id"),
        Prediction(FACE_SIM, "concat-16", "clip"),
        Prediction(CLIP_FACE, "concat-16", "id"),
        Prediction(FACE_SIM, "concat", "clip"),
        Prediction(CLIP_FACE, "concat", "id"),
        Prediction(FACE_SIM, "mixer", "id"),
        Prediction(CLIP_FACE, "mixer", "clip"),
        Prediction(FACE_SIM, "mixer", "concat-16"),
        Prediction(CLIP_FACE, "mixer", "concat-16"),
        Prediction(FACE_SIM, "mixer", "concat"),
        Prediction(CLIP_FACE, "mixer", "concat"),
        Prediction(FACE_SIM, "no-landmarks", "no-ffrnet"),
        Prediction(FACE_SIM, "driving", "no-landmarks"),
        Prediction(FACE_SIM, "mixer", "driving"),
        Prediction(INNER, "mixer", "driving"),
        Prediction(FACE_SIM, "mixer", "paper-losses"),
        Prediction(FACE_SIM, "mixer", "no-id"),
        Prediction(FACE_SIM, "mixer", "no-mask"),
        Prediction(FACE_SIM, "mixer", "last-step"),
    ),
    notes=(
        (
            "Cosines × 100; an image without a face counts as 0. For FaceSim and the inner face, images are compared "
            "with photos of the person in other looks; for CLIP-face, with the reference, by a judge of details. "
            "Brackets contain bootstrap 95 % intervals over people and seeds; ± is the standard deviation of seeds."
        ),
        "The judges are never used for conditioning. FID uses the CLIP that conditions the images.",
    ),
)
