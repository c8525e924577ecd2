"""The gallery's page, and its section in README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import user_write
from facesnap_lab.gallery.make import Result
from facesnap_lab.gallery.plan import PACKAGED, Picture, Plan

BEGIN, END = "<!-- gallery: begin -->", "<!-- gallery: end -->"
COLUMNS = 4  # images in README
COMMAND = "facesnap gallery http://127.0.0.1:7860"

_NOTHING = (
    "**There are no full-size portraits here yet.** No machine on which FaceSnap was developed had both a GPU and the "
    "published model files. One command on such a machine fills this page."
)
_NOTHING_IN_README = (
    "*Full-size portraits are not shown here yet. [docs/gallery.md](docs/gallery.md) explains why, and gives the "
    "command that creates them.*"
)
_HOW_TO = f"""## How to fill this page

You need a WebUI that was started with `--api`, has FaceSnap and its model files, and has loaded an SDXL checkpoint. In
a clone of this repository, on any machine that can reach the WebUI, run

```
pip install -e . scikit-image
{COMMAND}
```

The command generates the images planned in [plan.json](gallery/plan.json) with fixed seeds, writes them to
`docs/gallery`, and updates this page and the gallery in README. Existing images are skipped, so an interrupted run
resumes where it stopped. An image is generated again if its prompt, settings, photos, checkpoint or FaceSnap file has
changed. If the WebUI has no FaceSnap, or FaceSnap has no model files, the command stops and tells you what to do.

The astronaut's photo comes with scikit-image. The other photos are not part of the repository, and git ignores them.
Use photos in the public domain, or photos of people who have agreed to appear here. Images that need a missing photo
are skipped:

"""


def page(plan: Plan, results: Mapping[str, Result]) -> str:
    """The text of docs/gallery.md."""
    done = [picture for picture in plan.pictures if picture.name in results]
    lines = ["# Gallery", ""]
    if done:
        lines += [
            *_summary(done, results),
            "",
            *_photos(plan),
            *(line for one in done for line in _entry(one, results)),
        ]
    else:
        lines += [_NOTHING, ""]
    if missing := [f"- {picture.title}" for picture in plan.pictures if picture.name not in results]:
        lines += [f"Planned{', but not generated yet' if done else ''}:", "", *missing, ""]
    asked = [photo for photo in plan.photos.values() if not photo.file.startswith(PACKAGED)]
    photos = [f"- `docs/gallery/{photo.file}`: {photo.credit}" for photo in asked]
    return "\n".join([*lines, f"{_HOW_TO}{chr(10).join(photos)}", ""])


def readme_section(plan: Plan, results: Mapping[str, Result]) -> str:
    """The text between `BEGIN` and `END` in README: up to `COLUMNS` images in one row."""
    shown = [picture for picture in plan.pictures if picture.readme and picture.name in results][:COLUMNS]
    if not shown:
        return _NOTHING_IN_README
    cells = [f'<img src="docs/gallery/{one.name}.jpg" width="200" alt="{escape(one.title)}">' for one in shown]
    titles = [picture.title for picture in shown]
    table = [f"| {' | '.join(cells)} |", f"|{'---|' * len(shown)}", f"| {' | '.join(titles)} |"]
    return "\n".join([*table, "", "All images, with settings and times: [docs/gallery.md](docs/gallery.md)."])


def in_readme(text: str, section: str) -> str:
    """The text of README with this section.

    Raises:
        FaceSnapError: README does not contain the markers.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.S)
    if not pattern.search(text):
        raise FaceSnapError(f"README.md has no section for the gallery; add the lines {BEGIN} and {END}.")
    return pattern.sub(lambda found: f"{BEGIN}\n{section}\n{END}", text, count=1)


def write_pages(plan: Plan, results: Mapping[str, Result], docs: Path) -> None:
    """Write gallery.md into the folder `docs`, and the section of the README.md next to that folder."""
    readme = docs.parent / "README.md"
    text = in_readme(readme.read_text("utf-8"), readme_section(plan, results))
    for file, content in ((readme, text), (docs / "gallery.md", page(plan, results))):
        with user_write(file) as part:
            part.write_text(content, encoding="utf-8", newline="\n")


def _summary(done: Sequence[Picture], results: Mapping[str, Result]) -> list[str]:
    made = [results[picture.name] for picture in done]
    rows = {
        "Checkpoint": [result.checkpoint for result in made],
        "FaceSnap": [f"{result.facesnap} with {result.model}" for result in made],
        "WebUI": [result.webui for result in made],
        "GPU": [result.device for result in made],
    }
    lines = ["Nothing was selected or retouched: each image is the first one for its seed.", "", "| | |", "|---|---|"]
    for title, values in rows.items():
        if cell := ", ".join(dict.fromkeys(filter(None, values))):
            lines.append(f"| {title} | {_cell(cell)} |")
    seconds = sorted(result.seconds for result in made)
    return [*lines, f"| Time per image | {seconds[0]:g} to {seconds[-1]:g} s |"]


def _photos(plan: Plan) -> list[str]:
    shown = [photo for photo in plan.photos.values() if photo.shown]
    return [
        line
        for photo in shown
        for line in (f"![Reference photo](gallery/photo-{photo.name}.jpg)", "", f"Reference photo: {photo.credit}.", "")
    ]


def _entry(picture: Picture, results: Mapping[str, Result]) -> list[str]:
    result = results[picture.name]
    settings = escape(result.infotext, quote=False)
    return [
        f"## {picture.title}",
        "",
        f"![{picture.title}](gallery/{picture.name}.jpg)",
        "",
        f"{result.seconds:g} s. <details><summary>Settings</summary><pre>{settings}</pre></details>".replace(
            "\n", "<br>"
        ),
        "",
    ]


def _cell(text: str) -> str:
    return escape(text.replace("|", "\\|"), quote=False)
