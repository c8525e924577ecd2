// The page's own wiring of the pose canvas: what its sliders and choices say goes to the canvas within a frame or two,
// what is dragged there goes back into them, and the server is asked only for a person's rig.

"use strict";

const facesnapEvery = 50;  // milliseconds between two looks at the page's controls, which send no common event

onUiLoaded(() => gradioApp().querySelectorAll(".facesnap-canvas").forEach(facesnapWire));

function facesnapWire(root) {
    const control = (name, input) => gradioApp().querySelector(`#${root.dataset.ids.replace("{}", name)} ${input}`);
    const tab = root.dataset.ids.includes("img2img") ? "img2img" : "txt2img";
    const side = name => Number(gradioApp().querySelector(`#${tab}_${name} input[type=number]`)?.value) || 512;
    const number = name => Number(control(name, "input[type=number]").value);
    const message = root.appendChild(document.createElement("div"));
    message.className = "facesnap-problem";

    let preview = null, seen = "", answer = "", found = {};

    function shown() {
        const values = {pose: control("pose", "input:checked")?.value, template: control("template", "input").value};
        for (const name of facesnapTurned) values[name] = number(name);
        const placed = control("placed", "input[type=checkbox]").checked;
        for (const name of facesnapPlaced) values[name] = placed ? number(name) : null;
        return values;
    }

    function write(changed) {
        if (changed.pose) control("pose", `input[value="${changed.pose}"]`).click();
        const placed = control("placed", "input[type=checkbox]");
        if (facesnapPlaced.some(name => name in changed)) {
            const wanted = facesnapPlaced.every(name => changed[name] !== null);  // null: a drag was taken back
            if (wanted && !placed.checked) {
                const {pose} = facesnapShown({...found, values: shown(), width: side("width"), height: side("height")});
                changed = {x: pose.x, y: pose.y, size: pose.size, ...changed};  // what was not dragged stays as it was
            }
            if (wanted !== placed.checked) placed.click();
        }
        for (const name of [...facesnapTurned, ...facesnapPlaced]) {
            if (Number.isFinite(changed[name])) facesnapType(control(name, "input[type=number]"), changed[name].toFixed(3));
        }
    }

    function look() {
        if (!root.offsetParent) return;  // the accordion is closed
        const size = `${side("width")}x${side("height")}`;
        const box = control("canvas_size", "textarea");
        if (box.value !== size || !answer && !box.dataset.asked) {
            box.dataset.asked = "yes";
            facesnapType(box, size);
        }
        const text = control("canvas_rig", "textarea").value;
        if (text && text !== answer) {
            answer = text;
            found = JSON.parse(text);
            message.textContent = found.error || "";
        }
        if (!found.rig) return;
        const values = shown();
        const now = JSON.stringify([values, size]) + answer.length;
        const all = {rig: found.rig, points: found.points, values, width: side("width"), height: side("height")};
        if (!preview) preview = facesnapAttach(root, {...all, label: "Pose of the face", change: write});
        else if (now !== seen) preview.set(all);
        seen = now;
    }

    setInterval(look, facesnapEvery);
}

// As if somebody had typed it.
function facesnapType(input, value) {
    input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
}
