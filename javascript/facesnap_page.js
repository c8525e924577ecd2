// The page's own wiring: what its sliders and choices say goes to the pose's canvas within a frame or two, what is
// dragged or painted there goes back into them, and the server is asked only for a person's rig and for faces.

"use strict";

const facesnapEvery = 50;  // milliseconds between two looks at the page: much of what changes there sends no event
const facesnapInitSide = 1024;  // of the init picture as the server sees it, to find the face in it
const facesnapThumbnail = 64;  // units of a template's picture, whose lines are one wide

onUiLoaded(() => {
    gradioApp().querySelectorAll(".facesnap-canvas").forEach(facesnapWire);
    setInterval(facesnapNames, 10 * facesnapEvery);
});

function facesnapWire(root) {
    const element = name => gradioApp().querySelector(`#${root.dataset.ids.replace("{}", name)}`);
    const control = (name, input) => element(name).querySelector(input);
    const tab = root.dataset.ids.includes("img2img") ? "img2img" : "txt2img";
    const person = Number(root.dataset.ids.match(/\{\}_(\d+)$/)?.[1] ?? 1);
    const number = name => Number(control(name, "input[type=number]").value);
    const chosen = name => control(name, "input:checked")?.value;
    const message = root.appendChild(document.createElement("div"));
    message.className = "facesnap-problem";
    const notes = ["masked", "others"].map(() => Object.assign(document.createElement("div"), {className: "facesnap-note"}));

    let preview = null, seen = "", answer = "", found = {}, output = null, asked = "", asks = 0;

    const everybody = facesnapRegions[tab] ||= {};
    const region = everybody[person] = facesnapRegion();
    const tools = facesnapTools(region, painted, () => preview && preview.set({brush: brush()}));
    const brush = () => region.wanted ? tools.brush() : null;
    const initial = () => found.in_init ? output.window : facesnapWhole;  // what places are parts of

    function shown() {
        const values = {pose: chosen("pose"), template: chosen("template")};
        for (const name of facesnapTurned) values[name] = number(name);
        const placed = control("placed", "input[type=checkbox]").checked;
        for (const name of facesnapPlaced) values[name] = placed ? number(name) : null;
        return values.pose === "photo" ? facesnapPlaceSeen(values, initial()) : values;
    }

    function write(changed) {
        if (changed.pose) control("pose", `input[value="${changed.pose}"]`).click();
        const placed = control("placed", "input[type=checkbox]");
        if (facesnapPlaced.some(name => name in changed)) {
            const wanted = facesnapPlaced.every(name => changed[name] !== null);  // null: a drag was taken back
            if (wanted && !placed.checked) {
                const {pose} = facesnapShown({...seenBy(), values: shown()});
                changed = {x: pose.x, y: pose.y, size: pose.size, ...changed};  // what was not dragged stays as it was
            }
            if (wanted !== placed.checked) placed.click();
        }
        if (shown().pose === "photo") changed = facesnapPlaceMeant(changed, initial());
        for (const name of [...facesnapTurned, ...facesnapPlaced]) {
            if (Number.isFinite(changed[name])) facesnapType(control(name, "input[type=number]"), changed[name].toFixed(3));
        }
    }

    function painted(text) {
        facesnapType(control("mask", "textarea"), text);
    }

    // What the server found, as the output shows it.
    function seenBy() {
        const [left, top, w, h] = initial();
        const points = found.points && found.points.map(([x, y]) => [(x - left) / w, (y - top) / h]);
        return {...found, points, ...output};
    }

    function overlay(context) {
        for (const [other, theirs] of Object.entries(everybody)) {
            if (theirs === region || !theirs.wanted) continue;
            theirs.show(context, facesnapTints[(other - 1) % facesnapTints.length], 0.2, output, other);
        }
        if (!region.wanted) return;
        region.show(context, facesnapTints[person - 1], 0.45, output);
        tools.outline(context);
    }

    // Ask the server anew when something changed that the answer depends on. The number of the question, which it
    // repeats, tells its last answer from one that took longer.
    function ask() {
        const init = facesnapInitText(output.picture);
        const size = `${output.width}x${output.height}`;
        const photos = [...element("references").querySelectorAll("a[href]")].map(link => link.href);
        const driving = control("driving", "img")?.getAttribute("src")?.slice(-80);
        const question = JSON.stringify([
            size, init.length, init.slice(-80), chosen("pose"), number("face_index"), number("driving_face_index"),
            control("identity", "input")?.value, photos, driving,
        ]);
        if (question === asked) return;
        asked = question;
        const box = control("canvas_init", "textarea");
        if (box.value !== init) facesnapType(box, init);
        facesnapType(control("canvas_size", "textarea"), `${size} ${++asks}`);
    }

    function look(asking) {
        if (!root.offsetParent) return;  // the accordion is closed
        const where = chosen("region");
        Object.assign(element("person").dataset, {facesnapPose: chosen("pose"), facesnapRegion: where});
        region.wanted = where === "mask" && control("enable", "input[type=checkbox]").checked;
        output = facesnapOutput(tab);
        tools.frame(output);
        tools.element.hidden = where !== "mask";
        if (asking) ask();
        const text = control("canvas_rig", "textarea").value;
        if (text && text !== answer) {
            answer = text;
            const answered = JSON.parse(text);
            if (answered.question === String(asks)) {
                found = answered;
                message.textContent = found.error || "";
            }
        }
        if (found.rig) facesnapThumbnails(element("template"), found.rig, found.question);
        if (!found.rig && where !== "mask") return;
        const others = Object.entries(everybody).filter(([, theirs]) => theirs !== region && theirs.wanted);
        notes[0].textContent = output.note || "";
        notes[1].textContent = others.length ? "The other people's regions are shown with their numbers." : "";
        const values = shown();
        const now = JSON.stringify([values, output.width, output.height, output.window, output.key, where, region.wanted,
            others.map(([, theirs]) => theirs.steps())]) + answer;
        const all = {...seenBy(), values, overlay, brush: brush()};
        if (!preview) {
            preview = facesnapAttach(root, {...all, change: write});
            preview.canvas.addEventListener("keydown", event => {
                if (region.wanted && (event.ctrlKey || event.metaKey) && event.key === "z") tools.undo();
            });
            root.append(tools.element, ...notes);
        } else if (now !== seen) {
            preview.set(all);
        }
        seen = now;
    }

    setInterval(look, facesnapEvery, true);
    document.addEventListener("input", event => {  // sliders do not wait for that, questions do; what we write is drawn
        if (!event.isTrusted || !event.target.matches?.("input")) return;
        queueMicrotask(() => look(false));  // gradio has set the number beside the slider by then
    });
    facesnapArrows(element("template"));
    facesnapTakePhotos(root, element);
    element("person").addEventListener("click", event => {
        const face = event.target.closest("[data-facesnap-face]");
        if (face) facesnapType(control(face.dataset.facesnapOf, "input[type=number]"), face.dataset.facesnapFace);
    });
}

// As if somebody had typed it.
function facesnapType(input, value) {
    input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
}

// ---- the output, and what of the init picture it shows

// {width, height, window, picture, key, note}: of the tab's output; without an init picture a plain ground.
function facesnapOutput(tab) {
    const side = name => Number(gradioApp().querySelector(`#${tab}_${name} input[type=number]`)?.value) || 512;
    const plain = {width: side("width"), height: side("height"), window: facesnapWhole, picture: null, key: ""};
    const picture = tab === "img2img" ? facesnapInit() : null;
    if (!picture) return plain;
    const size = [picture.naturalWidth, picture.naturalHeight];
    const by = gradioApp().querySelector("#img2img_scale input[type=number]");  // shown where the size is "by", not "to"
    const output = by?.offsetParent ? size.map(pixels => Math.floor(pixels * by.value)) : [plain.width, plain.height];
    const choice = (id, otherwise) => {
        const inputs = [...gradioApp().querySelectorAll(`#${id} input[type=radio]`)];
        return Math.max(otherwise, inputs.findIndex(input => input.checked));
    };
    const area = gradioApp().querySelector("#img2img_inpaint_full_res");
    const masked = Boolean(area?.offsetParent) && choice("img2img_inpaint_full_res", 0) === 1;
    const source = picture.getAttribute("src");
    return {
        width: output[0], height: output[1], picture,
        window: facesnapInitWindow(masked ? 2 : choice("resize_mode", 0), size, output),
        key: `${size} ${source.length} ${source.slice(-80)}`,
        note: masked ? "Only the masked part is inpainted: a template or sliders place the face in that part." : "",
    };
}

// The init picture that stands in the open one of img2img's tabs.
function facesnapInit() {
    const pictures = [...gradioApp().querySelectorAll("#mode_img2img img")];
    const open = picture => picture.closest(".tabitem")?.style.display !== "none";
    return pictures.find(picture => open(picture) && picture.complete && picture.naturalWidth > 32) || null;
}

let facesnapInitSeen = {source: null, text: ""};

// An init picture as a JPEG of limited size, for the server to find the face in it.
function facesnapInitText(picture) {
    const source = picture && picture.getAttribute("src");
    if (source === facesnapInitSeen.source) return facesnapInitSeen.text;
    let text = "";
    if (picture) {
        const scale = Math.min(1, facesnapInitSide / Math.max(picture.naturalWidth, picture.naturalHeight));
        const [width, height] = [picture.naturalWidth, picture.naturalHeight].map(side => Math.max(1, Math.round(side * scale)));
        const canvas = Object.assign(document.createElement("canvas"), {width, height});
        const context = canvas.getContext("2d");
        context.fillStyle = "white";  // under what is transparent, as the host fills it
        context.fillRect(0, 0, width, height);
        context.drawImage(picture, 0, 0, width, height);
        text = canvas.toDataURL("image/jpeg", 0.9);
    }
    facesnapInitSeen = {source, text};
    return text;
}

// ---- templates as pictures

// Each template's points in its label, in the shape of the person's face.
function facesnapThumbnails(group, rig, version) {
    for (const input of group.querySelectorAll("input[type=radio]")) {
        const label = input.closest("label");
        if (!rig.templates[input.value]) continue;
        let canvas = label.querySelector("canvas");
        if (!canvas) {
            canvas = Object.assign(document.createElement("canvas"), {width: 160, height: 160});
            canvas.setAttribute("aria-hidden", "true");  // the name beside it says the same
            label.prepend(canvas);
        }
        if (canvas.dataset.version === String(version)) continue;
        canvas.dataset.version = version;
        facesnapPose(canvas, rig, {pose: "template", template: input.value}, facesnapThumbnail, facesnapThumbnail);
    }
}

// Gradio 3 gives no name to the number beside a slider, nor to a gallery's small pictures; screen readers want one.
function facesnapNames() {
    const ours = "[id^=script_][id*=_facesnap_]";
    for (const number of gradioApp().querySelectorAll(`${ours} input[type=number]:not([aria-label])`)) {
        const block = number.closest(ours), label = block.querySelector("label span, span")?.textContent.trim();
        if (label && block.querySelector("input[type=range]")) number.setAttribute("aria-label", label);
    }
    for (const button of gradioApp().querySelectorAll(`${ours} button.thumbnail-item:not([aria-label])`)) {
        const number = [...button.parentElement.querySelectorAll("button.thumbnail-item")].indexOf(button) + 1;
        button.setAttribute("aria-label", `Photo ${number}`);
    }
}

// Gradio 4 gives each radio button a group of its own, in which arrow keys have nowhere to go.
function facesnapArrows(group) {
    group.setAttribute("role", "radiogroup");
    group.setAttribute("aria-label", group.querySelector("span")?.textContent.trim() || "");
    group.addEventListener("keydown", event => {
        const inputs = [...group.querySelectorAll("input[type=radio]")], at = inputs.indexOf(event.target);
        const step = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
        if (at < 0 || !step) return;
        event.preventDefault();
        const next = inputs[(at + step + inputs.length) % inputs.length];
        next.focus();
        next.click();
    });
}

// ---- photos by paste and drop

function facesnapPictures(transfer) {
    return [...transfer?.files || []].filter(file => file.type.startsWith("image/"));
}

// A pasted picture becomes a reference photo of the person who is open, while the accordion has the focus or the mouse;
// so does one that is dropped on photos which are there already.
function facesnapTakePhotos(root, element) {
    const accordion = element("person").closest('[id$="_enable"]') || element("person");
    const block = element("references");
    let over = false;  // the mouse
    accordion.addEventListener("pointerover", () => { over = true; });
    accordion.addEventListener("pointerleave", () => { over = false; });

    document.addEventListener("paste", event => {
        const pictures = facesnapPictures(event.clipboardData);
        const meant = over || accordion.contains(document.activeElement);
        if (!root.offsetParent || !meant || !pictures.length) return;
        if (event.clipboardData.getData("text/plain") && event.target.closest?.("textarea, input")) return;  // words
        event.preventDefault();
        event.stopPropagation();  // the host would put it into some picture's place
        facesnapAddPhotos(block, element("report"), pictures);
    }, true);

    block.addEventListener("dragover", event => event.preventDefault());  // else the browser opens what is dropped
    block.addEventListener("drop", event => {
        const pictures = facesnapPictures(event.dataTransfer);
        if (!pictures.length) return;
        const empty = () => block.querySelector("input[type=file]");
        if (empty()) {  // which takes them itself, and may lose them
            facesnapUntil(() => block.querySelector("a[href]"), 4).then(there => {
                if (!there && !empty()) facesnapAddPhotos(block, element("report"), pictures);
            });
            return;
        }
        event.preventDefault();
        event.stopPropagation();
        facesnapAddPhotos(block, element("report"), pictures);
    }, true);

    block.addEventListener("change", event => {
        if (event.facesnap || event.target.type !== "file" || !event.target.files.length) return;
        event.stopPropagation();
        facesnapAddPhotos(block, element("report"), [...event.target.files]);
    }, true);
}

// Put files beside those that a file component has: it takes files only while it is empty, so all go in anew. Gradio 3
// loses an upload during which anything on the page is answered, such as what follows from emptying: hence the waits,
// and another try, longer after the emptying each time.
async function facesnapAddPhotos(block, report, files) {
    const links = () => [...block.querySelectorAll("a[href]")];
    const there = await Promise.all(links().map(async (link, i) => {
        const blob = await (await fetch(link.href)).blob();
        return new File([blob], link.getAttribute("download") || `photo${i}.png`, {type: blob.type});
    }));
    const transfer = new DataTransfer();
    for (const file of [...there, ...files]) transfer.items.add(file);
    for (let seconds = 4; seconds < 100; seconds *= 2) {
        block.querySelector("button[aria-label=Clear]")?.click();
        await facesnapUntil(() => !report.textContent.trim(), 5);
        if (seconds > 4) await facesnapUntil(() => false, seconds / 8);
        const input = await facesnapUntil(() => block.querySelector("input[type=file]"), 5);
        if (!input) continue;
        input.files = transfer.files;
        input.dispatchEvent(Object.assign(new Event("change", {bubbles: true}), {facesnap: true}));
        if (await facesnapUntil(() => links().length === transfer.files.length, seconds)) return;
    }
}

// What `find` gives as soon as it gives anything, or after so many seconds whatever that is.
async function facesnapUntil(find, seconds) {
    const end = performance.now() + 1000 * seconds;
    while (!find() && performance.now() < end) await new Promise(done => setTimeout(done, facesnapEvery));
    return find();
}
