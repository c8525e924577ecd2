"""The script that the user selected below the settings, such as Prompt matrix or X/Y/Z plot, which makes the jobs."""

from __future__ import annotations

import textwrap
from typing import Any

from PIL import Image, ImageDraw

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.framing import label_font

PLOT = "X/Y/Z plot"
TAKES_ANY_NUMBER = ("Prompts from file or textbox", PLOT)
"""Scripts that do not depend on how many images a job makes. The plot shows the grid of a cell's images."""


def selected_script(p: Any) -> str:
    """The title of the script that makes this job; empty if there is none."""
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
    """Check that a job whose images are made once for each reference photo was not made by a script that counts them.

    Raises:
        FaceSnapError: it was.
    """
    from modules import shared

    title = selected_script(p)
    if title and title not in TAKES_ANY_NUMBER:
        raise FaceSnapError(
            f"The script {title} counts the images of a job, which reference mode batch multiplies; choose another "
            "reference mode, or keep one reference photo."
        )
    if title == PLOT and (getattr(p, "do_not_save_grid", False) or not getattr(shared.opts, "return_grid", True)):
        raise FaceSnapError(
            "The plot shows only the first image of each cell unless the WebUI makes grids of them, so most people of "
            "reference mode batch would be missing; turn on grids, or use the axis [FaceSnap] reference."
        )


def stop_plot_cell(p: Any) -> None:
    """Let a refused cell of the plot end without any image. The plot swallows errors and shows a black square."""
    if selected_script(p) == PLOT:
        p.n_iter = 0
        p.do_not_save_grid = True


def explain_plot_cell(p: Any, processed: Any, message: str) -> None:
    """Show in a cell that `stop_plot_cell` ended why it has no image."""
    if selected_script(p) == PLOT and not processed.images:
        processed.images.append(_card(f"FaceSnap: {message}", p.width, p.height))


def _card(text: str, width: int, height: int) -> Image.Image:
    """An image of this size with a text on it."""
    image = Image.new("RGB", (width, height), (32, 32, 32))
    draw = ImageDraw.Draw(image)
    font = label_font(max(11, width // 24))
    letter = max(1.0, draw.textlength("x" * 20, font=font) / 20)
    lines = textwrap.wrap(text, max(8, int(0.9 * width / letter)))
    draw.multiline_text((width * 0.05, height * 0.05), "\n".join(lines), (235, 235, 235), font=font)
    return image
