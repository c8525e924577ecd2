"""Generate the images of the gallery with a running WebUI.

Each image is written as soon as it is finished, and `results.json` records its recipe. If the command is interrupted,
it resumes where it stopped. An image is generated again if its prompt, settings, photos or model files have changed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import sha256, user_write
from facesnap_lab.gallery.client import Client, webui_version
from facesnap_lab.gallery.plan import Picture, Plan

RESULTS = "results.json"
QUALITY = 90  # of the JPEG files
THUMBNAIL = 256  # longest side of a photo on the page, in pixels


@dataclass(frozen=True)
class Result:
    """How an image was made.

    Args:
        recipe: hash of everything that determines it; see `recipe`.
        file_hash: SHA-256 of the JPEG file.
        seconds: duration of the job, with all networks loaded.
        device: name of the GPU, as given by the user; may be empty.
    """

    recipe: str
    file_hash: str
    seconds: float
    checkpoint: str
    model: str
    facesnap: str
    webui: str
    device: str
    infotext: str


def read_results(folder: Path) -> dict[str, Result]:
    """The results in a folder by the name of the image; those whose image is missing or was changed are left out."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        results = {name: Result(**values) for name, values in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FaceSnapError(f"{path} cannot be read ({reason_of(error)}); delete it to start again.") from error
    files = {name: folder / f"{name}.jpg" for name in results}
    return {
        name: result
        for name, result in results.items()
        if files[name].is_file() and sha256(files[name]) == result.file_hash
    }


def make(plan: Plan, client: Client, folder: Path, device: str = "", report: Callable[[str], None] = print) -> None:
    """Generate all images of a plan into `folder`, except those that are there already.

    Raises:
        FaceSnapError: the WebUI does not answer, has no FaceSnap or no model files, or refuses a job. Everything that
            was finished before is kept.
    """
    version, model, checkpoint = client.facesnap_version(), client.model(), client.checkpoint()
    report(f"{client.url}: FaceSnap {version} with {model}, checkpoint {checkpoint}")
    _save_photos(plan, folder)
    results, warm = read_results(folder), False
    for picture in plan.pictures:
        if missing := [plan.photos[name] for name in picture.photos if plan.photos[name].content is None]:
            report(f"{picture.name}: skipped, because there is no photo {missing[0].path}")
            continue
        made_with = recipe(plan, picture, checkpoint, model)
        if picture.name in results and results[picture.name].recipe == made_with:
            report(f"{picture.name}: already there")
            continue
        job = request(plan, picture)
        if not warm:
            report("loading the models")
            client.generate({**job, "steps": 1})
            warm = True
        start = time.monotonic()
        generated = _generate(client, picture, job)
        seconds = round(time.monotonic() - start, 1)
        file = folder / f"{picture.name}.jpg"
        _save(_image(generated.image, picture.name), file)
        webui = webui_version(generated.infotext)
        results[picture.name] = Result(
            made_with, sha256(file), seconds, checkpoint, model, version, webui, device, generated.infotext
        )
        _write_results(folder, results)
        report(f"{picture.name}: {seconds} s")


def request(plan: Plan, picture: Picture) -> dict[str, Any]:
    """The body of the request to the WebUI's API."""

    def encoded(name: str) -> str:
        return base64.b64encode(plan.photos[name].content or b"").decode()

    people = [_with_photos(person, encoded) for person in picture.people]
    return {
        **picture.job,
        "save_images": False,
        "alwayson_scripts": {"FaceSnap": {"args": people}} if people else {},
    }


def recipe(plan: Plan, picture: Picture, checkpoint: str, model: str) -> str:
    """Hash of everything that determines an image. Photos are identified by their contents, files by their names."""

    def content_hash(name: str) -> str:
        return hashlib.sha256(plan.photos[name].content or b"").hexdigest()

    people = [_with_photos(person, content_hash) for person in picture.people]
    text = json.dumps([picture.job, people, checkpoint, model], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _with_photos(person: Mapping[str, Any], value_of: Callable[[str], str]) -> dict[str, Any]:
    values = {**person, "references": list(map(value_of, person.get("references", [])))}
    return {**values, "driving": value_of(values["driving"])} if values.get("driving") else values


def _generate(client: Client, picture: Picture, job: dict[str, Any]) -> Any:
    try:
        return client.generate(job)
    except FaceSnapError as error:
        raise FaceSnapError(f"The image {picture.name} could not be generated: {error}") from error


def _image(content: str | bytes, name: str) -> Any:
    from PIL import Image

    try:
        data = base64.b64decode(content, validate=True) if isinstance(content, str) else content
        return Image.open(BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow raises various exceptions for damaged files
        raise FaceSnapError(f"The image {name} cannot be read ({reason_of(error)}); try again.") from error


def _save(image: Any, file: Path) -> None:
    with user_write(file) as part:
        image.save(part, "JPEG", quality=QUALITY)


def _save_photos(plan: Plan, folder: Path) -> None:
    """Write thumbnails of the photos that the page shows."""
    for photo in plan.photos.values():
        if photo.shown and photo.content is not None:
            thumbnail = _image(photo.content, photo.name)
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
            _save(thumbnail, folder / f"photo-{photo.name}.jpg")


def _write_results(folder: Path, results: Mapping[str, Result]) -> None:
    text = json.dumps({name: asdict(result) for name, result in results.items()}, indent=1, ensure_ascii=False)
    with user_write(folder / RESULTS) as part:
        part.write_text(f"{text}\n", encoding="utf-8")
