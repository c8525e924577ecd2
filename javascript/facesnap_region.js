// The region where a person is wanted, painted on the canvas of the pose, and the tools for it.
//
//     const region = facesnapRegion();
//     region.begin(); region.stroke(from, to, size, erase, frame);  // pixels of the output picture
//     region.text();  // what settings.Unit's `mask` takes: a PNG as data URL, white on black; "" where nothing is painted
//
// A region is kept as a square, stretched over what it lies in: the init picture in img2img, else the output picture
// (facesnap_ext/regions.py looks it up the same way). `frame` says what of it the canvas shows: {width, height, window}.

"use strict";

const facesnapSquare = 512;  // pixels of its side: the finest residual at 4096 pixels has as many
const facesnapSteps = 20;  // that can be taken back
const facesnapTints = ["rgb(255,176,0)", "rgb(72,149,239)", "rgb(80,200,120)", "rgb(226,110,200)"];  // of the people
const facesnapRegions = {};  // by the tab and the person's number

function facesnapBlank() {
    return Object.assign(document.createElement("canvas"), {width: facesnapSquare, height: facesnapSquare});
}

function facesnapRegion() {
    const layer = facesnapBlank();
    const context = layer.getContext("2d", {willReadFrequently: true});
    const pixels = () => context.getImageData(0, 0, facesnapSquare, facesnapSquare);
    let before = [], tinted = null, middle = null;  // the latter two as last shown

    function erased() {
        tinted = null;
        context.resetTransform();
        context.globalCompositeOperation = "source-over";
        context.clearRect(0, 0, facesnapSquare, facesnapSquare);
    }

    return {
        wanted: false,  // "mask" is chosen, and the person is in the picture

        // What follows is one step for `undo`.
        begin() {
            before = [...before, pixels()].slice(-facesnapSteps);
        },
        undo() {
            const last = before.pop();
            if (last) context.putImageData(last, 0, 0);
            tinted = null;
        },
        steps: () => before.length,
        stroke(from, to, size, erase, {width, height, window: [left, top, w, h]}) {
            tinted = null;
            const [across, down] = [facesnapSquare * w / width, facesnapSquare * h / height];
            context.setTransform(across, 0, 0, down, facesnapSquare * left, facesnapSquare * top);
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
        clear: erased,

        // Take a picture in place of what is painted: its white, by luminance as regions.drawn weighs it.
        take(picture) {
            erased();
            context.fillStyle = "black";
            context.fillRect(0, 0, facesnapSquare, facesnapSquare);  // what is transparent is outside
            context.drawImage(picture, 0, 0, facesnapSquare, facesnapSquare);
            const image = pixels();
            for (let i = 0; i < image.data.length; i += 4) {
                const [red, green, blue] = image.data.subarray(i, i + 3);
                image.data.set([255, 255, 255, (299 * red + 587 * green + 114 * blue) / 1000], i);
            }
            context.putImageData(image, 0, 0);
        },
        text() {
            if (!pixels().data.some((value, i) => i % 4 === 3 && value)) return "";
            const flat = facesnapBlank(), on = flat.getContext("2d");
            on.fillRect(0, 0, facesnapSquare, facesnapSquare);  // black
            on.drawImage(layer, 0, 0);
            return flat.toDataURL("image/png");
        },

        // Over a canvas in pixels of the output; the number at the region's middle where one is given.
        show(on, tint, alpha, {width, height, window}, number) {
            if (!tinted) {
                tinted = facesnapBlank();
                const paint = tinted.getContext("2d");
                paint.drawImage(layer, 0, 0);
                paint.globalCompositeOperation = "source-in";
                paint.fillStyle = tint;
                paint.fillRect(0, 0, facesnapSquare, facesnapSquare);
                middle = null;
            }
            const [left, top, w, h] = facesnapBehind(window, [width, height]);
            on.globalAlpha = alpha;
            on.drawImage(tinted, left, top, w, h);
            on.globalAlpha = 1;
            if (!number) return;
            middle ||= facesnapMiddle(pixels().data, facesnapSquare);
            if (!middle) return;
            on.font = `bold ${Math.min(width, height) / 14}px sans-serif`;
            on.textAlign = "center";
            on.textBaseline = "middle";
            on.fillStyle = tint;
            on.fillText(String(number), left + middle[0] * w, top + middle[1] * h);
        },
    };
}

// The centre of gravity of an RGBA picture's alpha, in parts of its side; null where there is none.
function facesnapMiddle(data, side) {
    let sum = 0, x = 0, y = 0;
    for (let i = 3, k = 0; i < data.length; i += 4, k++) {
        sum += data[i];
        x += data[i] * (k % side + 0.5);
        y += data[i] * (Math.floor(k / side) + 0.5);
    }
    return sum ? [x / sum / side, y / sum / side] : null;
}

// The tools below a canvas: {element, undo(), brush(), frame(frame), outline(context)}; `painted(text)` hears of what is to be handed
// over, `redraw()` of what is to be shown.
function facesnapTools(region, painted, redraw) {
    const element = document.createElement("div");
    element.className = "facesnap-tools";
    element.setAttribute("role", "toolbar");
    element.setAttribute("aria-label", facesnapSay("Region"));
    let tool = "Paint", frame = null, last = null, hovered = null, drawing = false;

    const button = (text, click) => {
        const made = Object.assign(document.createElement("button"), {type: "button", textContent: text});
        made.addEventListener("click", click);
        element.append(made);
        return made;
    };
    const choices = ["Paint", "Erase", "Move the face"].map(text => [text, button(text, () => choose(text))]);
    const size = Object.assign(document.createElement("input"), {type: "range", min: 2, max: 60, value: 20});
    const label = document.createElement("label");
    const words = Object.assign(document.createElement("span"), {textContent: "Brush size"});
    label.append(words, size);
    element.append(label);
    const undo = button("Undo", () => change(() => region.undo()));
    button("Clear", () => change(() => {
        region.begin();
        region.clear();
    }));
    const file = Object.assign(document.createElement("input"), {type: "file", accept: "image/*", hidden: true});
    button("From a picture", () => file.click());
    element.append(file);
    const trouble = Object.assign(document.createElement("div"), {className: "facesnap-problem"});
    trouble.setAttribute("role", "alert");
    element.append(trouble);

    file.addEventListener("change", async () => {
        const [chosen] = file.files;
        file.value = "";
        if (!chosen) return;
        const picture = await createImageBitmap(chosen).catch(() => null);
        trouble.textContent = picture ? "" : "The region's picture cannot be read: give it as PNG, JPEG or WebP.";
        if (picture) {
            change(() => {
                region.begin();
                region.take(picture);
            });
        }
    });
    element.addEventListener("keydown", event => event.stopPropagation());  // the host's keys are not meant

    function choose(text) {
        tool = text;
        for (const [name, made] of choices) made.setAttribute("aria-pressed", String(name === tool));
        redraw();
    }

    function change(what) {
        what();
        undo.disabled = !region.steps();
        painted(region.text());
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
        frame(shown) {
            frame = shown;
        },
        // The brush's outline where the pointer is.
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
