// A person's painted mask, and the tools below the canvas with which it is painted.
//
//     const region = facesnapRegion();
//     region.begin(); region.stroke(from, to, size, erase, frame);  // in pixels of the output image
//     region.url();  // for the `mask` of settings.Unit: a PNG as data URL, white on black; "" if nothing is painted
//
// The mask is stored as a square, stretched over the init image in img2img and over the output image otherwise, as
// facesnap_ext/regions.py samples it. `frame` is {width, height, window}: the output, and the part of the stretched
// square that it shows.

"use strict";

const facesnapMaskSide = 512;  // in pixels; equal to the side of the finest residual for an image of 4096 pixels
const facesnapUndoSteps = 20;
const facesnapTints = ["rgb(255,176,0)", "rgb(72,149,239)", "rgb(80,200,120)", "rgb(226,110,200)"];  // one per person
const facesnapRegions = {};  // regions by tab and number of the person

function facesnapMaskCanvas() {
    return Object.assign(document.createElement("canvas"), {width: facesnapMaskSide, height: facesnapMaskSide});
}

function facesnapRegion() {
    const layer = facesnapMaskCanvas();
    const context = layer.getContext("2d", {willReadFrequently: true});
    const pixels = () => context.getImageData(0, 0, facesnapMaskSide, facesnapMaskSide);
    let history = [], tinted = null, middle = null;  // `tinted` and `middle` cache the last drawing

    function clear() {
        tinted = null;
        context.resetTransform();
        context.globalCompositeOperation = "source-over";
        context.clearRect(0, 0, facesnapMaskSide, facesnapMaskSide);
    }

    return {
        active: false,  // whether the region is set to the mask and the person is enabled

        // Begin a change that `undo` reverts in one step.
        begin() {
            history = [...history, pixels()].slice(-facesnapUndoSteps);
        },
        undo() {
            const last = history.pop();
            if (last) context.putImageData(last, 0, 0);
            tinted = null;
        },
        steps: () => history.length,
        stroke(from, to, size, erase, {width, height, window: [left, top, w, h]}) {
            tinted = null;
            const [across, down] = [facesnapMaskSide * w / width, facesnapMaskSide * h / height];
            context.setTransform(across, 0, 0, down, facesnapMaskSide * left, facesnapMaskSide * top);
            context.globalCompositeOperation = erase ? "destination-out" : "source-over";
            context.strokeStyle = context.fillStyle = "white";
            context.lineWidth = size;
            context.beginPath();
            context.moveTo(...from);
            context.lineTo(...to);
            context.stroke();
            for (const [x, y] of [from, to]) {
                context.beginPath();
                context.arc(x, y, size / 2, 0, 2 * Math.PI);
                context.fill();
            }
        },
        clear,

        // Replace the mask by the luminance of an image, weighted as in regions.py.
        load(image) {
            clear();
            context.fillStyle = "black";
            context.fillRect(0, 0, facesnapMaskSide, facesnapMaskSide);  // transparent pixels become black
            context.drawImage(image, 0, 0, facesnapMaskSide, facesnapMaskSide);
            const mask = pixels();
            for (let i = 0; i < mask.data.length; i += 4) {
                const [red, green, blue] = mask.data.subarray(i, i + 3);
                mask.data.set([255, 255, 255, (299 * red + 587 * green + 114 * blue) / 1000], i);
            }
            context.putImageData(mask, 0, 0);
        },
        url() {
            if (!pixels().data.some((value, i) => i % 4 === 3 && value)) return "";
            const flat = facesnapMaskCanvas(), on = flat.getContext("2d");
            on.fillRect(0, 0, facesnapMaskSide, facesnapMaskSide);  // black
            on.drawImage(layer, 0, 0);
            return flat.toDataURL("image/png");
        },

        // Draw the mask over a canvas in pixels of the output, with a number in its middle if one is given.
        draw(on, tint, alpha, {width, height, window}, number) {
            if (!tinted) {
                tinted = facesnapMaskCanvas();
                const paint = tinted.getContext("2d");
                paint.drawImage(layer, 0, 0);
                paint.globalCompositeOperation = "source-in";
                paint.fillStyle = tint;
                paint.fillRect(0, 0, facesnapMaskSide, facesnapMaskSide);
                middle = null;
            }
            const [left, top, w, h] = facesnapImageRect(window, [width, height]);
            on.globalAlpha = alpha;
            on.drawImage(tinted, left, top, w, h);
            on.globalAlpha = 1;
            if (!number) return;
            middle ||= facesnapMiddle(pixels().data, facesnapMaskSide);
            if (!middle) return;
            on.font = `bold ${Math.min(width, height) / 14}px sans-serif`;
            on.textAlign = "center";
            on.textBaseline = "middle";
            on.fillStyle = tint;
            on.fillText(String(number), left + middle[0] * w, top + middle[1] * h);
        },
    };
}

// The centroid of the alpha of a square RGBA image, as fractions of its side; null if all of it is transparent.
function facesnapMiddle(data, side) {
    let sum = 0, x = 0, y = 0;
    for (let i = 3, k = 0; i < data.length; i += 4, k++) {
        sum += data[i];
        x += data[i] * (k % side + 0.5);
        y += data[i] * (Math.floor(k / side) + 0.5);
    }
    return sum ? [x / sum / side, y / sum / side] : null;
}

// The tools below a canvas: {element, undo(), brush(), setFrame(frame), outline(context)}. `onChange(url)` is called
// with each new mask, and `redraw()` whenever the canvas must be redrawn.
function facesnapTools(region, onChange, redraw) {
    const element = document.createElement("div");
    element.className = "facesnap-tools";
    element.setAttribute("role", "toolbar");
    element.setAttribute("aria-label", facesnapTranslate("Region"));
    let tool = "Paint", frame = null, last = null, hovered = null, drawing = false;

    const button = (text, click) => {
        const node = Object.assign(document.createElement("button"), {type: "button", textContent: text});
        node.addEventListener("click", click);
        element.append(node);
        return node;
    };
    const choices = ["Paint", "Erase", "Move the face"].map(text => [text, button(text, () => choose(text))]);
    const size = Object.assign(document.createElement("input"), {type: "range", min: 2, max: 60, value: 20});
    const label = document.createElement("label");
    const caption = Object.assign(document.createElement("span"), {textContent: "Brush size"});
    label.append(caption, size);
    element.append(label);
    const undo = button("Undo", () => change(() => region.undo()));
    button("Clear", () => change(() => {
        region.begin();
        region.clear();
    }));
    const file = Object.assign(document.createElement("input"), {type: "file", accept: "image/*", hidden: true});
    button("Load image", () => file.click());
    element.append(file);
    const problem = Object.assign(document.createElement("div"), {className: "facesnap-problem"});
    problem.setAttribute("role", "alert");
    element.append(problem);

    file.addEventListener("change", async () => {
        const [chosen] = file.files;
        file.value = "";
        if (!chosen) return;
        const image = await createImageBitmap(chosen).catch(() => null);
        problem.textContent = image ? "" : "This file cannot be read as an image; use a PNG, JPEG or WebP file.";
        if (image) {
            change(() => {
                region.begin();
                region.load(image);
            });
        }
    });
    // keep key presses from triggering the host's shortcuts
    element.addEventListener("keydown", event => event.stopPropagation());

    function choose(text) {
        tool = text;
        for (const [name, node] of choices) node.setAttribute("aria-pressed", String(name === tool));
        redraw();
    }

    function change(action) {
        action();
        undo.disabled = !region.steps();
        onChange(region.url());
        redraw();
    }

    const pixels = () => size.value / 100 * Math.min(frame.width, frame.height);
    const brush = {
        down(at) {
            region.begin();
            drawing = true;
            region.stroke(at, at, pixels(), tool === "Erase", frame);
            last = hovered = at;
        },
        move(at) {
            hovered = at;
            if (!drawing) return;
            region.stroke(last, at, pixels(), tool === "Erase", frame);
            last = at;
        },
        up() {
            drawing = false;
            change(() => {});
        },
        cancel() {
            drawing = false;
            change(() => region.undo());
        },
        leave() {
            hovered = null;
        },
    };
    choose(tool);
    undo.disabled = true;
    return {
        element,
        undo: () => undo.click(),
        brush: () => tool === "Move the face" ? null : brush,
        setFrame(shown) {
            frame = shown;
        },
        // Draw the outline of the brush at the pointer.
        outline(on) {
            if (!hovered || tool === "Move the face") return;
            on.strokeStyle = "white";
            on.lineWidth = Math.min(frame.width, frame.height) / 300;
            on.beginPath();
            on.arc(...hovered, pixels() / 2, 0, 2 * Math.PI);
            on.stroke();
        },
    };
}
