// Wiring of the page: the accordion's controls update the canvas within a frame or two, and drags and strokes on the
// canvas update the controls. Only a person's rig and faces are requested from the server.

"use strict";

const facesnapPollInterval = 50;  // milliseconds; the page is polled because many of its changes do not send an event
const facesnapPatience = 60;  // seconds to wait for an answer of the server before asking again
const facesnapThumbnailSide = 64;  // side of a template's thumbnail in units of the line width

const facesnapMaskNote = "The canvas shows the largest face; the job changes the face under the mask.";

onUiLoaded(() => {
    gradioApp().querySelectorAll(".facesnap-canvas").forEach(facesnapWire);
});

const facesnapPeopleInTab = {};  // by tab and number

// Wire up one person's canvas. Its data-ids is the id of that person's controls, with {} for the control's name.
function facesnapWire(root) {
    const element = name => gradioApp().querySelector(`#${root.dataset.ids.replace("{}", name)}`);
    const control = (name, input) => element(name).querySelector(input);
    const tab = root.dataset.ids.includes("img2img") ? "img2img" : "txt2img";
    const person = Number(root.dataset.ids.match(/\{\}_(\d+)$/)?.[1] ?? 1);
    const message = document.createElement("div");
    root.closest(".facesnap-columns").after(message);  // visible even if there is nothing to show on the canvas
    message.className = "facesnap-report facesnap-problem";
    message.lang = "en";  // the server's sentences
    const settings = facesnapSettings(element, () => queueMicrotask(() => update(false)));
    const showPreset = facesnapPresets(element("preset"), settings);
    const [outputNote, peopleNote] = [0, 1].map(() =>
        Object.assign(document.createElement("div"), {className: "facesnap-note"}));

    const poseSettings = facesnapPoseSettings(element);
    let preview = null, lastState = "", lastAnswer = "", found = {}, output = null;
    let lastQuestion = "", questionNumber = 0, asked = 0, answered = true, opened = false, hadDriving = false;
    const questionSettings = [
        "pose", "saved_pose", "face_index", "driving_face_index", "identity", "reference_mode", "expression_source",
    ];

    const regions = facesnapRegions[tab] ||= {};
    const region = regions[person] = facesnapRegion();
    const tools = facesnapTools(region, writeMask, () => preview && preview.set({brush: brush()}));
    const brush = () => region.active ? tools.brush() : null;
    const placeWindow = () => found.in_init ? output.window : facesnapFullWindow;  // the frame of x, y and size

    // The preview's settings, as set in the controls.
    function readValues() {
        const values = {...settings.values()};
        if (!values.placed) for (const name of facesnapPlaceFields) values[name] = null;
        return values.pose === "photo" ? facesnapPlaceInOutput(values, placeWindow()) : values;
    }

    // Write settings that were changed on the canvas into the controls.
    function writeValues(changed) {
        const {placed} = settings.values();
        const written = changed.pose ? {pose: changed.pose} : {};
        if (facesnapPlaceFields.some(name => name in changed)) {
            const place = facesnapPlaceFields.every(name => changed[name] !== null);  // null: a drag was cancelled
            if (place && !placed) {
                const {pose} = facesnapPreviewOf({...foundInOutput(), values: readValues()});
                changed = {x: pose.x, y: pose.y, size: pose.size, ...changed};  // keep values that were not dragged
            }
            written.placed = place;
        }
        if (settings.values().pose === "photo") changed = facesnapPlaceInInit(changed, placeWindow());
        for (const name of [...facesnapSliderNames(found.rig), ...facesnapPlaceFields]) {
            if (Number.isFinite(changed[name])) written[name] = Number(changed[name].toFixed(3));
        }
        settings.set(written);
    }

    function writeMask(url) {
        facesnapType(control("mask", "textarea"), url);
    }

    // The server's response, with points relative to the output.
    function foundInOutput() {
        const [left, top, w, h] = placeWindow();
        const [points, neutral] = [found.points, found.neutral].map(
            all => all && all.map(([x, y]) => [(x - left) / w, (y - top) / h]));
        const camera = found.camera && found.camera.map((row, axis) => row.map(value => value / (axis ? h : w)));
        return {...found, points, neutral, camera, ...output};
    }

    function overlay(context) {
        for (const [other, theirs] of Object.entries(regions)) {
            if (theirs === region || !theirs.active) continue;
            theirs.draw(context, facesnapTints[(other - 1) % facesnapTints.length], 0.2, output, other);
        }
        if (!region.active) return;
        region.draw(context, facesnapTints[person - 1], 0.45, output);
        tools.outline(context);
    }

    // Send a request to the server if anything that its response depends on has changed. Requests are numbered, and the
    // server repeats the number, so that late responses to earlier requests can be ignored. gradio 3 ignores a request
    // while it waits for the response to another one.
    function ask() {
        if (!answered && performance.now() < asked + 1000 * facesnapPatience) return;
        const init = facesnapInitUrl(output.image);
        const size = `${output.width}x${output.height}`;
        const photos = [...element("references").querySelectorAll("a[href]")].map(link => link.href);
        const driving = control("driving", "img")?.getAttribute("src")?.slice(-80);
        const question = JSON.stringify([
            size, init.length, init.slice(-80), photos, driving, questionSettings.map(name => settings.values()[name]),
        ]);
        if (question === lastQuestion) return;
        lastQuestion = question;
        [answered, asked] = [false, performance.now()];
        const box = control("canvas_init", "textarea");
        if (box.value !== init) facesnapType(box, init);
        facesnapType(control("canvas_size", "textarea"), `${size} ${++questionNumber}`);
    }

    function readAnswer() {
        const text = control("canvas_rig", "textarea").value;
        if (!text || text === lastAnswer) return;
        lastAnswer = text;
        const answer = JSON.parse(text);
        if (answer.question === String(questionNumber)) {
            answered = true;
            found = answer;
            message.textContent = found.error || found.note || "";
        }
    }

    // Show the controls that matter now; style.css has the rules for the attributes.
    function show(regionKind) {
        const {pose, expression_source, placed} = settings.values();
        const points = facesnapIsRigged({pose}) || found.points;
        const dataset = {
            facesnapPose: pose, facesnapExpression: expression_source, facesnapRegion: regionKind,
            facesnapPlaced: placed, facesnapPosed: !settings.isInitial(poseSettings),
            facesnapShown: Boolean(found.rig && points || regionKind === "mask"),
        };
        for (const [name, value] of Object.entries(dataset)) {
            if (element("person").dataset[name] !== String(value)) element("person").dataset[name] = value;
        }
        const driving = control("driving", "img");
        const more = element("driving_more").querySelector("a[href]");  // these are used without the first one, too
        element("driving_more").classList.toggle("facesnap-off", !driving && !more);
        if (hadDriving && !driving) settings.set({driving_face_index: 0});  // its faces can no longer be chosen
        hadDriving = Boolean(driving);
        const own = control("pose", "label[data-value=own]");  // otherwise it is the same as "photo"
        own.classList.toggle("facesnap-off", !(driving || tab === "img2img" || pose === "own"));
    }

    // Bring the canvas up to date with the page.
    function update(mayAsk) {
        if (!element("pose").offsetParent) return;  // the accordion is closed
        settings.read();
        if (!opened) {
            opened = true;
            tasks.send({do: "list"});
        }
        tasks.update();
        takePart();
        showPreset();
        const regionKind = settings.values().region;
        show(regionKind);
        region.active = regionKind === "mask" && control("enable", "input[type=checkbox]").checked;
        output = facesnapOutput(tab);
        tools.setFrame(output);
        tools.element.hidden = regionKind !== "mask";
        if (mayAsk) ask();
        readAnswer();
        if (found.rig) facesnapThumbnails(element, found.rig, found.question);
        if (!found.rig && regionKind !== "mask") return;
        const others = Object.entries(regions).filter(([, theirs]) => theirs !== region && theirs.active);
        outputNote.textContent = [
            output.note, output.inpaints && found.init_faces > 1 ? facesnapMaskNote : "",
        ].filter(Boolean).join(" ");
        peopleNote.textContent = others.length ? "The other people's regions are shown with their numbers." : "";
        const values = readValues();
        const state = JSON.stringify([
            values, output.width, output.height, output.window, output.key, regionKind, region.active,
            others.map(([, theirs]) => theirs.steps()),
        ]) + lastAnswer;
        const options = {...foundInOutput(), values, overlay, brush: brush()};
        if (!preview) {
            preview = facesnapAttach(root, {...options, change: writeValues});
            root.prepend(preview.canvas);
            preview.canvas.addEventListener("keydown", event => {
                if (region.active && (event.ctrlKey || event.metaKey) && event.key === "z") tools.undo();
            });
            root.append(tools.element, outputNote, peopleNote);
        } else if (state !== lastState) {
            preview.set(options);
        }
        lastState = state;
    }

    setInterval(update, facesnapPollInterval, true);
    // Follow sliders without waiting for the poll, but do not send requests. Our own writes are already drawn.
    document.addEventListener("input", event => {
        if (!event.isTrusted || !event.target.matches?.("input")) return;
        queueMicrotask(() => update(false));  // by then gradio has updated the number next to the slider
    });
    facesnapAcceptPhotos(element("pose"), element);
    const panel = root.dataset.ids.replace(/\{\}.*/, "models_table");  // one for all people
    const tasks = facesnapTasks(element, settings, () => gradioApp().querySelector(`#${panel}`));
    const takePart = facesnapJoin(facesnapPeopleInTab[tab] ||= {}, person, tab, {element, settings});
    element("person").addEventListener("click", event => {
        const reset = event.target.closest("[data-facesnap-reset]");
        if (reset) settings.reset(reset.dataset.facesnapReset);
        const face = event.target.closest("[data-facesnap-face]");
        if (face) settings.set({[face.dataset.facesnapOf]: Number(face.dataset.facesnapFace)});
    });
}

// Set an input's value as if it had been typed.
function facesnapType(input, value) {
    input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
}

// Draw each template and each named expression into its label, with the shape of the person's face.
function facesnapThumbnails(element, rig, version) {
    const side = facesnapThumbnailSide;
    const closeUp = {pose: "template", template: "front", x: 0.5, y: 0.5, size: 0.8, expression_source: "custom"};
    for (const [name, known, values] of [
        ["template", rig.templates, template => ({pose: "template", template})],
        ["expression", rig.expressions, expression => ({...closeUp, expression})],
    ]) {
        for (const input of element(name).querySelectorAll("input[type=radio]")) {
            const label = input.closest("label");
            if (input.dataset.facesnapSetting !== name || !known[input.value]) continue;
            let canvas = label.querySelector("canvas");
            if (!canvas) {
                canvas = Object.assign(document.createElement("canvas"), {width: 160, height: 160});
                canvas.setAttribute("aria-hidden", "true");  // the label already has an accessible name
                label.prepend(canvas);
            }
            if (canvas.dataset.version === String(version)) continue;
            canvas.dataset.version = version;
            facesnapDrawPose(canvas, rig, values(input.value), side, side);
        }
    }
}
