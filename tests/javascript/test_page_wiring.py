"""facesnap_page.js in a browser, on as much of a page as it looks at: what is shown for which choice, and what becomes
of clicks, keys, and pasted and dropped photos."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from facesnap_ext.landmarks.poses import TEMPLATES, for_browser, make_rig
from facesnap_lab.miniature.render import head

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "javascript").glob("*.js"))
RIG = for_browser(make_rig(head()))
NUMBERS = ("face_index", "driving_face_index", "yaw", "pitch", "roll", "mouth", "brows", "eyes", "x", "y", "size")


def radios(name: str, choices: list[str]) -> str:
    """As gradio 4 makes them: each in a group of its own."""
    made = "".join(
        f"<label><input type='radio' name='{name}{i}' value='{choice}' {'' if i else 'checked'}"
        f" onclick='pick(this)'><span>{choice}</span></label>"
        for i, choice in enumerate(choices)
    )
    return f"<fieldset id='txt2img_{name}'><span>{name}</span><div class='wrap'>{made}</div></fieldset>"


def controls() -> str:
    boxes = "".join(
        f"<div id='txt2img_{name}' class='facesnap-hidden'><textarea></textarea></div>"
        for name in ("canvas_size", "canvas_init", "canvas_rig", "mask")
    )
    numbers = "".join(f"<div id='txt2img_{name}'><input type='number' value='0'></div>" for name in NUMBERS)
    return f"""
        <div id='txt2img_person'>
        <div id='txt2img_references'></div><div id='txt2img_report'></div>
        <div id='txt2img_identity'><input></div>
        {radios("pose", ["photo", "template", "sliders", "own"])}
        <div class='facesnap-when-photo'>driving<div id='txt2img_driving'></div></div>
        <div class='facesnap-when-template facesnap-templates'>{radios("template", list(TEMPLATES))}</div>
        <div class='facesnap-when-sliders'>sliders</div>
        {radios("region", ["image", "face", "mask"])}
        <div class='facesnap-when-face'>region scale</div>
        <div id='txt2img_placed'><input type='checkbox'></div>
        <div class='facesnap-canvas' data-ids='txt2img_{{}}' style='width: 320px'></div>
        {boxes}{numbers}
        <button data-facesnap-of='face_index' data-facesnap-face='2'><img alt='Face'> <span>2</span></button>
        </div>"""


# a file component that takes files only while it is empty, as gradio's
FILES = """
    window.gradioApp = () => document;
    window.onUiLoaded = wire => { window.wire = wire; };
    window.pick = radio => radio.closest("fieldset").querySelectorAll("input").forEach(
        other => { other.checked = other === radio; });
    window.draw = files => {
        const block = document.getElementById("txt2img_references");
        block.innerHTML = files.length ? "<button aria-label='Clear'>x</button>" : "<input type='file' multiple>";
        for (const file of files) {
            const link = Object.assign(document.createElement("a"), {href: URL.createObjectURL(file), textContent: file.name});
            link.download = file.name;
            block.append(link);
        }
        block.querySelector("button")?.addEventListener("click", () => draw([]));
        block.querySelector("input")?.addEventListener("change", event => draw([...event.target.files]));
    };
"""  # noqa: E501

HAND = """([kind, target, name, type, base64, words]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], name, {type}));
    if (words) transfer.setData("text/plain", words);
    const init = {bubbles: true, cancelable: true};
    const event = kind === "paste" ? new ClipboardEvent("paste", {...init, clipboardData: transfer})
        : new DragEvent("drop", {...init, dataTransfer: transfer});
    document.querySelector(target).dispatchEvent(event);
    return event.defaultPrevented;
}"""


def picture(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Page:
    def __init__(self, browser):
        self.page = browser.new_page(viewport={"width": 900, "height": 900})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        sizes = "".join(f"<div id='txt2img_{s}'><input type='number' value='512'></div>" for s in ("width", "height"))
        self.page.set_content(
            f"<body>{sizes}<p>elsewhere</p><div id='txt2img_enable'><input type='checkbox' checked>{controls()}</div>"
        )
        self.page.add_style_tag(content=(ROOT / "style.css").read_text(encoding="utf-8"))
        self.page.add_script_tag(content=FILES)
        for script in SCRIPTS:
            self.page.add_script_tag(content=script.read_text(encoding="utf-8"))
        self.page.evaluate("draw([]); wire()")
        self.page.wait_for_function("document.querySelector('#txt2img_canvas_size textarea').value")
        self.answer()

    def answer(self) -> None:
        """As the server does: the question's number, and a person's rig."""
        question = self.page.locator("#txt2img_canvas_size textarea").input_value().split()[1]
        self.page.evaluate(
            "text => facesnapType(document.querySelector('#txt2img_canvas_rig textarea'), text)",
            json.dumps({"question": question, "rig": RIG, "points": None, "in_init": False}),
        )
        self.look()

    def look(self) -> None:
        self.page.wait_for_timeout(200)

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"#txt2img_{name} input[value='{value}']").click(force=True)
        self.look()

    def hover(self, selector: str) -> None:
        self.page.locator(selector).hover()

    def chosen(self, name: str) -> str:
        return self.page.locator(f"#txt2img_{name} input:checked").get_attribute("value")

    def visible(self) -> set[str]:
        names = ("photo", "template", "sliders", "face")
        return {name for name in names if self.page.locator(f".facesnap-when-{name}").is_visible()}

    def hand(self, kind: str, name: str, target: str = "body", type: str = "image/png", words: str = "") -> bool:
        """Paste or drop a picture; whether it was taken."""
        return self.page.evaluate(HAND, [kind, target, name, type, picture("red"), words])

    def photos(self) -> list[str]:
        return self.page.locator("#txt2img_references a").all_inner_texts()

    def wait_for_photos(self, *names: str) -> None:
        wanted = json.dumps(list(names))
        self.page.wait_for_function(
            f"JSON.stringify([...document.querySelectorAll('#txt2img_references a')].map(a => a.textContent))"
            f" === JSON.stringify({wanted})"
        )


@pytest.fixture
def page(browser):
    one = Page(browser)
    yield one
    one.page.close()
    assert one.errors == []


def test_what_does_not_matter_for_the_choice_is_hidden(page) -> None:
    shown = {}
    for pose in ("photo", "template", "sliders", "own"):
        page.choose("pose", pose)
        shown[pose] = page.visible()
    assert shown == {"photo": {"photo"}, "template": {"template"}, "sliders": {"sliders"}, "own": set()}
    page.choose("region", "face")
    assert page.visible() == {"face"}
    assert not page.page.get_by_role("toolbar").is_visible()
    page.choose("region", "mask")
    assert page.visible() == set()
    assert page.page.get_by_role("toolbar", name="Region").is_visible()


def test_templates_are_pictures_chosen_by_click_and_keys(page) -> None:
    page.choose("pose", "template")
    group = page.page.get_by_role("radiogroup", name="template")
    assert group.get_by_role("radio").count() == len(TEMPLATES) == 10
    drawn = page.page.evaluate(
        "[...document.querySelectorAll('#txt2img_template label canvas')].map(canvas => canvas.toDataURL())"
    )
    assert len(set(drawn)) == 10, "each another picture"
    group.get_by_role("radio", name="tilted").click(force=True)
    assert page.chosen("template") == "tilted"
    names = list(TEMPLATES)
    for key, step in (("ArrowRight", 1), ("ArrowLeft", -1), ("ArrowUp", -1), ("ArrowDown", 1)):
        page.page.keyboard.press(key)
        expected = names[(names.index("tilted") + (step if key in ("ArrowRight", "ArrowUp") else 0)) % 10]
        assert page.chosen("template") == expected
        assert page.page.evaluate("document.activeElement.value") == expected


def test_a_picture_of_a_face_chooses_it(page) -> None:
    page.page.get_by_role("button", name="Face 2").click()
    assert page.page.locator("#txt2img_face input").input_value() == "2"


def test_pasted_pictures_join_the_photos_while_the_accordion_is_meant(page) -> None:
    assert not page.hand("paste", "a.png"), "the mouse and the focus are elsewhere"
    page.hover("#txt2img_pose")
    assert page.hand("paste", "a.png")
    page.wait_for_photos("a.png")
    assert page.hand("paste", "b.png")
    page.wait_for_photos("a.png", "b.png")
    page.hover("p")
    assert not page.hand("paste", "c.png")
    page.page.locator("#txt2img_yaw input").focus()
    assert page.hand("paste", "c.png")
    page.wait_for_photos("a.png", "b.png", "c.png")
    assert not page.hand("paste", "d.txt", type="text/plain")
    assert not page.hand("paste", "e.png", target="#txt2img_yaw input", words="25"), "words are pasted into their entry"
    page.look()
    assert page.photos() == ["a.png", "b.png", "c.png"]
    kept = page.page.evaluate(
        "Promise.all([...document.querySelectorAll('#txt2img_references a')].map(async a => "
        "(await (await fetch(a.href)).blob()).size))"
    )
    assert kept == [len(base64.b64decode(picture("red")))] * 3


def test_dropped_pictures_join_the_photos(page) -> None:
    assert not page.hand("drop", "a.png", target="#txt2img_references"), "an empty component takes them itself"
    page.hover("#txt2img_pose")
    page.hand("paste", "a.png")
    page.wait_for_photos("a.png")
    assert page.hand("drop", "b.png", target="#txt2img_references a")
    page.wait_for_photos("a.png", "b.png")


def test_what_is_painted_goes_into_the_mask_and_a_late_answer_is_passed_over(page) -> None:
    page.choose("region", "mask")
    canvas = page.page.locator(".facesnap-canvas canvas")
    box = canvas.bounding_box()
    page.page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.page.mouse.up()
    assert page.page.locator("#txt2img_mask textarea").input_value().startswith("data:image/png;base64,")

    page.page.locator("#txt2img_face input").fill("1")
    page.look()
    late = json.dumps({"question": "1", "error": "too late"})
    page.page.evaluate("text => facesnapType(document.querySelector('#txt2img_canvas_rig textarea'), text)", late)
    page.look()
    assert not page.page.get_by_text("too late").is_visible()
