"""All scripts in a browser, on a page with just the elements that they use: which controls are visible, and the effect
of clicks, keys, and pasted and dropped photos."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.landmarks.movements import EXPRESSIONS
from facesnap_ext.landmarks.poses import TEMPLATES, for_browser
from facesnap_ext.landmarks.rigs import flame_rig
from facesnap_ext.photos import Photo
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.unit import PRESETS, from_values
from facesnap_ext.ui import people, settings_html
from facesnap_ext.ui.photo_cards import Card, cards_html
from facesnap_lab.miniature.render import head

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "javascript").glob("*.js"))
RIG = for_browser(flame_rig(head()))


def ident(name: str) -> str:
    return f"txt2img_{name}"


def controls() -> str:
    boxes = "".join(
        f"<div id='txt2img_{name}' class='facesnap-hidden'><textarea></textarea></div>"
        for name in ("settings", "canvas_size", "canvas_init", "canvas_rig", "mask", "task")
    )
    return f"""
        <div id='txt2img_person'>
        <div id='txt2img_references' class='facesnap-photos'></div>
        <div id='txt2img_seen' class='facesnap-seen'></div>
        {settings_html.reference_mode(ident)}{people.form(ident)}{settings_html.identity(ident)}
        <div id='txt2img_chosen'></div><div id='txt2img_people_report' class='facesnap-report'></div>
        <div class='facesnap-columns'>
        <div class='facesnap-when-shown' style='width: 320px'>{settings_html.canvas(ident)}</div>
        </div>
        {settings_html.pose(ident)}
        <div class='facesnap-when-photo'>driving<div id='txt2img_driving'></div></div>
        <div id='txt2img_driving_more'></div>
        <div id='txt2img_pose_report' class='facesnap-report'></div>
        {settings_html.strength(ident)}{settings_html.advanced(ident).replace("<details", "<details open")}
        {boxes}
        <button data-facesnap-of='face_index' data-facesnap-face='2'><img alt='Face'> <span>2</span></button>
        </div>"""


# a file component that accepts files only while it is empty, as gradio's does
FILES = """
    window.gradioApp = () => document;
    window.onUiLoaded = wire => { window.wire = wire; };
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
        const names = files.map(file => file.name), seen = document.getElementById("txt2img_seen");
        seen.textContent = names.join();
        window.drawCards?.(names).then(html => { seen.innerHTML = html; });
    };
"""  # noqa: E501

TRANSFER = """([kind, target, name, type, base64, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], name, {type}));
    if (text) transfer.setData("text/plain", text);
    const init = {bubbles: true, cancelable: true};
    const event = kind === "paste" ? new ClipboardEvent("paste", {...init, clipboardData: transfer})
        : new DragEvent("drop", {...init, dataTransfer: transfer});
    document.querySelector(target).dispatchEvent(event);
    return event.defaultPrevented;
}"""


def png(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Page:
    def __init__(self, browser):
        self.page = browser.new_page(viewport={"width": 900, "height": 900})
        self.page.set_default_timeout(10_000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        sizes = "".join(f"<div id='txt2img_{s}'><input type='number' value='512'></div>" for s in ("width", "height"))
        self.page.set_content(
            f"<body>{sizes}<p>outside</p><div id='txt2img_enable'><input type='checkbox' checked>{controls()}</div>"
        )
        self.page.add_style_tag(content=(ROOT / "style.css").read_text(encoding="utf-8"))
        self.page.add_script_tag(content=FILES)
        for script in SCRIPTS:
            self.page.add_script_tag(content=script.read_text(encoding="utf-8"))
        self.page.evaluate("draw([]); wire()")
        self.page.wait_for_function("document.querySelector('#txt2img_canvas_size textarea').value")
        self.answer()

    def answer(self) -> None:
        """Respond as the server does, with the number of the request and a rig."""
        question = str(self.question())
        self.page.evaluate(
            "text => facesnapType(document.querySelector('#txt2img_canvas_rig textarea'), text)",
            json.dumps({"question": question, "rig": RIG, "points": None, "in_init": False}),
        )
        self.wait_for_poll()

    def question(self) -> int:
        """The number of the last request for the canvas."""
        return int(self.page.locator("#txt2img_canvas_size textarea").input_value().split()[1])

    def wait_for_poll(self) -> None:
        self.page.wait_for_timeout(200)

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"#txt2img_{name} input[value='{value}']").check()
        self.wait_for_poll()

    def hover(self, selector: str) -> None:
        self.page.locator(selector).hover()

    def settings(self) -> dict[str, Any]:
        """What the page sends to the server, by API names."""
        return page_settings.parse(self.page.locator("#txt2img_settings textarea").input_value())

    def write(self, name: str, text: str) -> None:
        """Write into a text box, as the server does."""
        self.page.evaluate(
            "([name, text]) => facesnapType(document.querySelector(`#txt2img_${name} textarea`), text)", [name, text]
        )
        self.wait_for_poll()

    def task(self) -> dict[str, Any]:
        """The task that the server receives. Like the server, it empties the text box."""
        self.page.wait_for_function("document.querySelector('#txt2img_task textarea').value")
        task = json.loads(self.page.locator("#txt2img_task textarea").input_value())
        self.write("task", "")
        return task

    def number(self, name: str) -> float:
        return float(self.page.locator(f"#txt2img_{name} input[type=number]").input_value())

    def chosen(self, name: str) -> str:
        return self.page.locator(f"#txt2img_{name} input:checked").get_attribute("value")

    def visible(self) -> set[str]:
        names = ("photo", "sliders", "saved", "custom", "moved", "face", "posed")
        return {name for name in names if self.page.locator(f".facesnap-when-{name}").is_visible()}

    def transfer(self, kind: str, name: str, target: str = "body", type: str = "image/png", text: str = "") -> bool:
        """Paste or drop a file, and return whether the page accepted it."""
        return self.page.evaluate(TRANSFER, [kind, target, name, type, png("red"), text])

    def photos(self) -> list[str]:
        return self.page.locator("#txt2img_references a").all_inner_texts()

    def wait_for_photos(self, *names: str) -> None:
        expected = json.dumps(list(names))
        self.page.wait_for_function(
            f"JSON.stringify([...document.querySelectorAll('#txt2img_references a')].map(a => a.textContent))"
            f" === JSON.stringify({expected})"
        )


@pytest.fixture
def page(browser):
    one = Page(browser)
    yield one
    one.page.close()
    assert one.errors == []


def test_controls_without_effect_are_hidden(page) -> None:
    shown = {}
    for pose in ("photo", "sliders", "saved"):
        page.choose("pose", pose)
        shown[pose] = page.visible()
    page.choose("template", "front")
    shown["template"] = page.visible()
    sliders = {"sliders", "moved", "posed"}
    assert shown == {"photo": {"photo"}, "sliders": sliders, "saved": {"saved", "posed"}, "template": {"posed"}}
    page.choose("expression_source", "custom")
    assert page.visible() == {"custom", "moved", "posed"}
    page.choose("expression_source", "driving")
    assert page.visible() == {"photo", "posed"}
    page.choose("expression_source", "pose")
    page.choose("region", "face")
    assert page.visible() == {"face", "posed"}
    assert not page.page.get_by_role("toolbar").is_visible()
    page.choose("region", "mask")
    assert page.visible() == {"posed"}
    assert page.page.get_by_role("toolbar", name="Region").is_visible()


def test_nothing_is_drawn_before_there_is_something_to_show(page) -> None:
    canvas = page.page.locator(".facesnap-canvas canvas")
    assert not canvas.is_visible()
    page.choose("template", "front")
    assert canvas.is_visible()
    assert page.page.get_by_text("Drag the face to move it").is_visible()
    page.choose("pose", "photo")
    assert not canvas.is_visible()
    page.choose("region", "mask")
    assert canvas.is_visible(), "a mask can be painted"


def test_a_saved_person_is_chosen_from_the_current_list(page) -> None:
    def offer(*names: str) -> None:
        lists = json.dumps({"identity": names, "saved_pose": []})
        page.page.evaluate(
            """lists => {
                const drawn = Object.assign(document.createElement("span"), {hidden: true});
                drawn.dataset.facesnapLists = lists;
                document.getElementById("txt2img_chosen").replaceChildren(drawn);
            }""",
            lists,
        )
        page.wait_for_poll()

    people = page.page.locator("#txt2img_identity select")
    shown = "all => all.map(option => option.value)"
    assert page.task() == {"do": "list", "number": 1}, "a new page asks for the names"
    assert not people.is_visible(), "no person has been saved yet"
    offer("Ada", "Bea")
    assert people.is_visible()
    assert people.locator("option").evaluate_all(shown) == ["", "Ada", "Bea"]
    question = page.question()
    people.select_option("Bea")
    page.wait_for_poll()
    assert page.settings()["identity"] == "Bea"
    assert page.task() == {"do": "choose", "number": 2}
    assert page.question() == question + 1, "the canvas shows the person"
    page.write("settings", json.dumps(page_settings.initial() | {"identity": "Cleo"}))
    assert people.input_value() == "Cleo", "also if it was pasted and there is no such person"
    assert page.task() == {"do": "list", "number": 3}
    offer("Ada")
    assert people.locator("option").evaluate_all(shown) == ["", "Ada", "Cleo"]
    assert people.input_value() == "Cleo"


def test_every_change_of_an_input_reaches_the_server(page) -> None:
    page.choose("template", "tilted")
    page.choose("expression_source", "custom")
    page.choose("expression", "wink")
    page.page.locator("#txt2img_smile_left input[type=number]").fill("0.35")
    page.page.locator("#txt2img_start input[type=range]").fill("0.25")
    page.page.locator("#txt2img_placed input").check()
    page.page.locator("#txt2img_cond_only input").check()
    page.page.locator("#txt2img_block_weights input").fill("1 0.5")
    page.choose("hires", "second")
    expected = {"pose": "template", "template": "tilted", "expression_source": "custom", "expression": "wink"}
    expected |= {"smile_left": 0.35, "start": 0.25, "cond_only": True, "block_weights": (1, 0.5), "hires": "second"}
    before = page_settings.parse(json.dumps(page_settings.initial() | {"placed": True}))
    assert page.settings() == before | expected
    from_values(page.settings())
    for name, value in (("smile_left", "0.35"), ("start", "0.25")):
        values = page.page.locator(f"#txt2img_{name} input").evaluate_all("all => all.map(one => one.value)")
        assert values == [value] * 2, "number and range are in step"


@pytest.mark.parametrize(("typed", "used"), [("500", 75), ("", 0), ("-76", -75), ("12.5", 12.5)])
def test_a_typed_number_stays_in_its_range(page, typed, used) -> None:
    page.choose("pose", "sliders")
    entry = page.page.locator("#txt2img_yaw input[type=number]")
    entry.fill(typed)
    assert -75 <= page.settings()["yaw"] <= 75
    entry.press("Tab")
    assert page.number("yaw") == page.settings()["yaw"] == used


def test_settings_from_the_server_appear_in_the_inputs(page) -> None:
    given = page_settings.initial() | {"pose": "template", "template": "far", "x": 0.2, "placed": True, "yaw": -20}
    page.write("settings", json.dumps(given | {"hires": "first", "cond_only": True, "block_weights": "1 2"}))
    assert page.chosen("template") == "far"
    assert page.page.locator("#txt2img_pose input:checked").count() == 1
    assert (page.number("x"), page.number("yaw"), page.chosen("hires")) == (0.2, -20, "first")
    assert page.page.locator("#txt2img_placed input").is_checked()
    assert page.page.locator("#txt2img_cond_only input").is_checked()
    assert page.page.locator("#txt2img_block_weights input").input_value() == "1 2"
    page.write("settings", json.dumps(page_settings.initial()))
    assert page.chosen("pose") == "photo"
    assert page.number("yaw") == 0


def test_place_and_pose_can_be_reset_next_to_the_canvas(page) -> None:
    reset = {name: page.page.get_by_role("button", name=f"Reset {name}") for name in ("position", "pose")}
    page.choose("template", "tilted")
    assert not reset["position"].is_visible()
    page.page.locator(".facesnap-canvas canvas").focus()
    page.page.keyboard.press("ArrowRight")
    page.wait_for_poll()
    assert page.page.get_by_text("Position and size are not taken from the pose.").is_visible()
    assert page.settings()["x"] is not None
    reset["position"].click()
    page.wait_for_poll()
    assert page.settings()["x"] is None
    assert not reset["position"].is_visible()
    page.page.locator(".facesnap-canvas canvas").focus()
    page.page.keyboard.press("Shift+ArrowRight")
    page.wait_for_poll()
    assert page.settings()["pose"] == "sliders"
    reset["pose"].click()
    page.wait_for_poll()
    assert {page.settings()[name] for name in ("yaw", "pitch", "roll")} == {0}
    assert page.chosen("pose") == "photo"
    assert not reset["pose"].is_visible()


def test_the_preset_shows_custom_if_it_differs(page) -> None:
    assert page.chosen("preset") == "faithful"
    page.choose("preset", "stylised")
    chosen = (page.number("weight"), page.settings()["start"], page.settings()["end"])
    assert chosen == PRESETS["stylised"]
    for name, value, expected in (
        ("weight", "0.65", "custom"),
        ("weight", "0.6", "stylised"),
        ("end", "0.7", "custom"),
    ):
        page.page.locator(f"#txt2img_{name} input[type=number]").fill(value)
        page.wait_for_poll()
        assert page.chosen("preset") == expected
    assert page.page.locator("#txt2img_preset").get_by_text("custom").is_visible()


def test_templates_are_pictures_chosen_by_click_and_keys(page) -> None:
    radios = page.page.get_by_role("radiogroup", name="Pose")
    assert radios.get_by_role("radio").count() >= len(TEMPLATES) + 3
    drawn = page.page.evaluate(
        "[...document.querySelectorAll('#txt2img_template label canvas')].map(canvas => canvas.toDataURL())"
    )
    assert len(set(drawn)) == len(TEMPLATES) == 10, "all are different"
    radios.get_by_role("radio", name="tilted").check()
    names = list(TEMPLATES)
    for key, step in (("ArrowRight", 1), ("ArrowLeft", -1), ("ArrowUp", -1), ("ArrowDown", 1)):
        before = names.index(page.settings()["template"])
        page.page.keyboard.press(key)
        assert page.settings()["template"] == names[before + step]
        assert page.page.evaluate("document.activeElement.value") == names[before + step]


def test_named_expressions_are_pictures_of_the_persons_face(page) -> None:
    page.choose("expression_source", "custom")
    group = page.page.get_by_role("radiogroup", name="Named expression")
    assert group.get_by_role("radio").count() == len(EXPRESSIONS) == 10
    drawn = page.page.evaluate(
        "[...document.querySelectorAll('#txt2img_expression label canvas')].map(canvas => canvas.toDataURL())"
    )
    assert len(set(drawn)) == 10, "all are different"
    group.get_by_role("radio", name="wink").check()
    page.page.keyboard.press("ArrowRight")
    assert page.chosen("expression") == "kiss"


def test_a_click_on_a_face_sets_the_face_index(page) -> None:
    page.page.get_by_role("button", name="Face 2").click()
    assert page.settings()["face_index"] == 2


def test_pasted_images_are_added_while_the_accordion_has_mouse_or_focus(page) -> None:
    assert not page.transfer("paste", "a.png"), "mouse and focus are outside"
    page.hover("#txt2img_pose")
    assert page.transfer("paste", "a.png")
    page.wait_for_photos("a.png")
    assert page.transfer("paste", "b.png")
    page.wait_for_photos("a.png", "b.png")
    page.hover("p")
    assert not page.transfer("paste", "c.png")
    page.page.locator("#txt2img_start input[type=number]").focus()
    assert page.transfer("paste", "c.png")
    page.wait_for_photos("a.png", "b.png", "c.png")
    assert not page.transfer("paste", "d.txt", type="text/plain")
    assert not page.transfer("paste", "e.png", target="#txt2img_start input", text="25"), "text goes into the field"
    page.wait_for_poll()
    assert page.photos() == ["a.png", "b.png", "c.png"]
    kept = page.page.evaluate(
        "Promise.all([...document.querySelectorAll('#txt2img_references a')].map(async a => "
        "(await (await fetch(a.href)).blob()).size))"
    )
    assert kept == [len(base64.b64decode(png("red")))] * 3


def test_dropped_images_are_added(page) -> None:
    assert not page.transfer("drop", "a.png", target="#txt2img_references"), "an empty component accepts drops itself"
    page.hover("#txt2img_pose")
    page.transfer("paste", "a.png")
    page.wait_for_photos("a.png")
    assert page.transfer("drop", "b.png", target="#txt2img_references a")
    page.wait_for_photos("a.png", "b.png")
    assert page.transfer("drop", "notes.txt", target="#txt2img_seen", type="text/plain"), "the browser would open it"
    page.wait_for_photos("a.png", "b.png")


def test_a_job_waits_for_photos_that_are_uploaded_again(page) -> None:
    """While photos are changed, gradio's component is empty. Two clicks start one job."""
    page.page.evaluate(
        """() => {
            window.jobs = [];
            const button = Object.assign(document.createElement("button"), {id: "txt2img_generate"});
            const photos = () => document.querySelectorAll("#txt2img_references a").length;
            button.addEventListener("click", () => jobs.push(photos()));
            document.body.append(button);
            const files = window.facesnapFilesOf;
            window.facesnapFilesOf = async block => {
                await new Promise(done => setTimeout(done, 1000));
                return files(block);
            };
        }"""
    )
    page.hover("#txt2img_pose")
    page.transfer("paste", "a.png")
    page.wait_for_photos("a.png")
    page.page.wait_for_function("!document.querySelector('.facesnap-busy')")
    page.transfer("paste", "b.png")
    for _ in range(2):
        page.page.evaluate("document.querySelector('#txt2img_generate').click()")
    assert page.page.evaluate("jobs") == []
    page.page.wait_for_function("jobs.length")
    page.page.evaluate("document.querySelector('#txt2img_generate').click()")
    assert page.page.evaluate("jobs") == [2, 2]


def test_strokes_set_the_mask_and_late_answers_are_ignored(page) -> None:
    page.choose("region", "mask")
    canvas = page.page.locator(".facesnap-canvas canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.page.mouse.up()
    assert page.page.locator("#txt2img_mask textarea").input_value().startswith("data:image/png;base64,")

    page.page.get_by_role("button", name="Face 2").click()
    page.wait_for_poll()
    assert page.question() == 2
    late = json.dumps({"question": "1", "error": "too late"})
    page.page.evaluate("text => facesnapType(document.querySelector('#txt2img_canvas_rig textarea'), text)", late)
    page.wait_for_poll()
    assert not page.page.get_by_text("too late").is_visible()


def test_questions_and_tasks_wait_for_the_answer_to_the_one_before(page) -> None:
    """gradio 3 ignores an event while the server handles the same component's event before."""
    first = page.question()
    page.page.get_by_role("button", name="Face 2").click()
    page.wait_for_poll()
    page.choose("pose", "sliders")
    assert page.question() == first + 1
    page.answer()
    page.wait_for_poll()
    assert page.question() == first + 2, "nothing is forgotten"
    page.page.locator("#txt2img_pose_name input").fill("Nod")
    for _ in range(2):
        page.page.locator("#txt2img_save_pose").click()
    assert [page.task()["do"] for _ in range(3)] == ["list", "save_pose", "save_pose"]


def with_photos(page, *names: str) -> None:
    """Add photos, with the cards that the server draws. The unusable ones have "bad" in their names."""
    page.page.expose_function("drawCards", cards_of)
    page.hover("#txt2img_pose")
    for i, name in enumerate(names, 1):
        page.transfer("paste", name)
        page.wait_for_photos(*names[:i])
    page.page.locator(".facesnap-seen:not(.facesnap-busy) .facesnap-card").nth(len(names) - 1).wait_for()


def cards_of(names: list[str]) -> str:
    photo = Photo(np.zeros((8, 8, 3), np.uint8), "photo")
    cards = [Card(name, None if "bad" in name else photo, error="unreadable") for name in names]
    return cards_html(cards) if cards else ""


@pytest.mark.parametrize(
    ("button", "remaining", "focused"),
    [
        ("Remove a.png", ["bad.png", "c.png"], "Remove bad.png"),
        ("Remove c.png", ["a.png", "bad.png"], "Remove bad.png"),
        ("Move right a.png", ["bad.png", "a.png", "c.png"], "Move right a.png"),
        ("Move right bad.png", ["a.png", "c.png", "bad.png"], "Remove bad.png"),
        ("Move left c.png", ["a.png", "c.png", "bad.png"], "Move left c.png"),
        ("Remove unusable photos (1)", ["a.png", "c.png"], "Remove a.png"),
    ],
)
def test_buttons_on_the_cards_remove_and_move_photos_and_keep_the_focus(page, button, remaining, focused) -> None:
    with_photos(page, "a.png", "bad.png", "c.png")
    page.page.get_by_role("button", name=button, exact=True).press("Enter")
    page.wait_for_photos(*remaining)
    page.page.get_by_role("button", name=focused, exact=True).wait_for()
    page.page.wait_for_function("label => document.activeElement.innerText.endsWith(label)", arg=focused)
    assert page.errors == []


def test_two_changes_in_a_row_are_both_made(page) -> None:
    with_photos(page, "a.png", "b.png")
    page.hover("#txt2img_pose")
    page.transfer("paste", "c.png")
    page.transfer("paste", "d.png")
    page.wait_for_photos("a.png", "b.png", "c.png", "d.png")


def test_the_last_photo_can_be_removed_and_the_file_component_comes_back(page) -> None:
    with_photos(page, "a.png")
    assert not page.page.locator("#txt2img_references").is_visible()
    page.page.get_by_role("button", name="Remove a.png").click()
    page.page.locator("#txt2img_references input").wait_for()
    assert page.page.locator(".facesnap-card").count() == 0


def test_photos_are_added_by_button_and_by_drop_on_the_cards(page) -> None:
    with_photos(page, "a.png")
    with page.page.expect_file_chooser() as chooser:
        page.page.get_by_role("button", name="Add photos").click()
    chooser.value.set_files({"name": "b.png", "mimeType": "image/png", "buffer": base64.b64decode(png("blue"))})
    page.wait_for_photos("a.png", "b.png")
    page.page.locator(".facesnap-seen:not(.facesnap-busy) .facesnap-card").nth(1).wait_for()
    assert page.transfer("drop", "c.png", target=".facesnap-card")
    page.wait_for_photos("a.png", "b.png", "c.png")


def test_controls_for_several_photos_appear_with_them(page) -> None:
    page.page.expose_function("drawCards", cards_of)
    page.hover("#txt2img_pose")
    states = []
    for name in ("a.png", "b.png"):
        save, mode = (page.page.locator(f".facesnap-when-{name}").is_visible() for name in ("photos", "several"))
        states.append((save, mode))
        page.transfer("paste", name)
        page.page.get_by_role("button", name=f"Remove {name}").wait_for()
    assert states == [(False, False), (True, False)]
    page.page.locator(".facesnap-when-several").wait_for()


def test_forms_about_people_send_their_values(page) -> None:
    form = (
        "<details open><summary>Rename</summary><div class='facesnap-form'>"
        "<input data-facesnap-field='name' value='Ada'><input type='checkbox' data-facesnap-field='picture'>"
        "<button data-facesnap-task='rename' data-facesnap-person='A &quot;b&quot;'>Rename</button></div></details>"
    )
    page.page.evaluate("form => { document.getElementById('txt2img_chosen').innerHTML = form; }", form)
    page.page.locator("#txt2img_chosen input[type=checkbox]").check()
    page.page.locator("#txt2img_chosen input").first.fill("Bea")
    page.page.locator("#txt2img_chosen input").first.press("Enter")
    assert page.task() == {"do": "list", "number": 1}
    task = page.task()
    assert task == {"do": "rename", "person": 'A "b"', "name": "Bea", "picture": True, "number": 2}
    page.page.get_by_role("button", name="Rename").click()
    assert page.task()["number"] == 3
