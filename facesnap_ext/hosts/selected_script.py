"""The script that the user selected below the settings and that creates the jobs, such as Prompt matrix or X/Y/Z
plot."""

from __future__ import annotations

import textwrap
from typing import Any

from PIL import Image, ImageDraw

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.framing import label_font

PLOT = "X/Y/Z plot"
PROMPTS_FROM_FILE = "Prompts from file or textbox"
TAKES_ANY_NUMBER = (PROMPTS_FROM_FILE, PLOT)
"""Scripts that do not depend on the number of images in a job. The plot shows the grid of a cell's images."""


def selected_script(p: Any) -> str:
    """The title of the script that created this job; empty if there is no script."""
    index = next(iter(getattr(p, "script_args", None) or ()), 0)
    scripts = getattr(getattr(p, "scripts", None), "selectable_scripts", None) or ()
    return str(scripts[index - 1].title()) if type(index) is int and 0 < index <= len(scripts) else ""


def upscales(p: Any) -> bool:
    """Whether the selected script upscales the init image, in tiles that may be as large as the init image was."""
    return "upscale" in selected_script(p).lower()


def loops_back(p: Any) -> bool:
    """Whether the selected script starts from its own results, which may have another size than the init image."""
    return "loopback" in selected_script(p).lower()


def check_image_count(p: Any) -> None:
    """Check that a job in batch mode was not created by a script that depends on the number of images.

    Raises:
        FaceSnapError: the script depends on the number of images.
    """
    from modules import shared

    title = selected_script(p)
    if title and title not in TAKES_ANY_NUMBER:
        raise FaceSnapError(
            f"The script {title} depends on the number of images in a job, which several driving photos or one image "
            "per photo would multiply; keep one driving photo, and choose another option under Several photos."
        )
    if title == PLOT and (getattr(p, "do_not_save_grid", False) or not getattr(shared.opts, "return_grid", True)):
        raise FaceSnapError(
            "The plot shows only the first image of each cell unless the WebUI creates grids, so most people "
            "would be missing; turn on grids, or use the axis [FaceSnap] reference or [FaceSnap] driving."
        )


def stop_plot_cell(p: Any) -> None:
    """Make a refused cell of the plot end without any image, because the plot would swallow an error and show a black
    square."""
    if selected_script(p) == PLOT:
        p.n_iter = 0
        p.do_not_save_grid = True


def explain_job(p: Any, processed: Any, message: str) -> None:
    """Show the reason in place of the images of a script's job that ended without any: scripts read the first image."""
    if selected_script(p) and not processed.images:
        processed.images.append(_card(f"FaceSnap: {message}", p.width, p.height))


def _card(text: str, width: int, height: int) -> Image.Image:
    """An image of this size that shows a text."""
    image = Image.new("RGB", (width, height), (32, 32, 32))
    draw = ImageDraw.Draw(image)
    font = label_font(max(11, width // 24))
    letter = max(1.0, draw.textlength("x" * 20, font=font) / 20)
    lines = textwrap.wrap(text, max(8, int(0.9 * width / letter)))
    draw.multiline_text((width * 0.05, height * 0.05), "\n".join(lines), (235, 235, 235), font=font)
    return image
