"""FaceSnap's axes in the host's X/Y/Z plot: each cell is the image of a job with its values, and later jobs are not
affected."""

from __future__ import annotations

import pytest

from tests.live.live_host import Host, Images, Job, Refused, astronaut, encode, equal, grace_hopper, with_facesnap

PEOPLE = [encode(astronaut()), encode(grace_hopper())]
PLOT = "X/Y/Z plot"
NOTHING = ("Nothing", "")


def plot(host: Host, job: Job, x: tuple[str, str], y: tuple[str, str] = NOTHING) -> Images:
    """Run a plot and return its cells row by row.

    Args:
        x, y: label of the axis in the host's list, and its values separated by commas.
    """
    described = host.script(PLOT)["args"]
    labels = described[0]["choices"]
    axes = [value for label, values in (x, y, NOTHING) for value in (labels.index(label), values, [])]
    options = {"Draw legend": False, "Include Sub Images": True, "Include Sub Grids": False, "Keep -1 for seeds": False}
    options["Use text inputs instead of dropdowns"] = True  # even on axes with a list of choices
    assert set(options) <= {argument["label"] for argument in described}
    others = [options.get(argument["label"], argument["value"]) for argument in described[len(axes) :]]
    cells = len(x[1].split(",")) * len(y[1].split(","))
    return host.images({**job, "script_name": PLOT, "script_args": [*axes, *others]})[-cells:]


def test_a_cell_equals_the_job_with_its_values(host: Host) -> None:
    job = with_facesnap({}, references=PEOPLE)
    before = host.images(job)
    cells = plot(host, job, ("[FaceSnap] weight", "0.4, 1.5"), ("[FaceSnap] reference", "1, 2"))
    expected = [
        host.images(with_facesnap({}, references=[person], weight=weight))[0]
        for person in PEOPLE
        for weight in (0.4, 1.5)
    ]
    assert equal(cells, expected)
    assert all(not equal([cell], [other]) for i, cell in enumerate(cells) for other in cells[:i])
    assert equal(host.images(job), before), "the plot's last values affect the next job"


def test_a_cell_can_activate_a_person_of_weight_0(host: Host) -> None:
    cells = plot(host, with_facesnap({}, weight=0), ("[FaceSnap] weight", "0, 1"))
    assert equal(cells, host.images({}) + host.images(with_facesnap({})))


def test_a_plot_does_not_enable_facesnap(host: Host) -> None:
    cells = plot(host, with_facesnap({}, enabled=False), ("[FaceSnap] weight", "0.5, 1.5"))
    assert equal(cells, host.images({}) * 2)


@pytest.mark.parametrize(
    ("axis", "values", "sentence"),
    [
        ("weight", "0.5, 3", r"weight is 3\.0; use a number from 0 to 2"),
        ("reference", "2", "uses reference 2, but the number of references is 1"),
    ],
)
def test_invalid_values_of_an_axis_are_refused(host: Host, axis: str, values: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        plot(host, with_facesnap({}), (f"[FaceSnap] {axis}", values))
