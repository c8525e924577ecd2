// The pose preview: 72 points on a canvas, redrawn as settings change, and edited by dragging.
//
//     const preview = facesnapAttach(element, {
//         rig,              // from POST /facesnap/landmarks
//         values,           // fields of settings.Unit: pose, template, yaw, pitch, …, x, y, size
//         width, height,    // of the output image
//         points,           // from the same route, for the poses "photo" and "own": [72][2] as fractions of both sides
//         neutral, camera, expression,  // optional: see facesnapChangeExpression
//         image,            // optional: an image or canvas, shown dimmed in the background
//         window,           // optional: the part of `image` that the output shows, see facesnapInitWindow
//         overlay(context) {},  // optional: draws over the points, in pixels of the output image
//         brush,            // optional: {down(at), move(at), up(), cancel(), leave()} that replaces dragging
//         change(changed, done) {},  // called with the changed fields of `values`; `done` at the end of a drag
//     });
//     preview.set({values: {...values, yaw: 20}});  // update any of the above
//     preview.canvas, preview.values(), preview.destroy()
//
// Drag the face to move it and a corner to resize it. Drag the circle on the nose, or the face with Shift, to turn it;
// drag the circle above it to tilt it. While the canvas has the focus, the wheel, + and - resize the face, the arrow
// keys move it, and the arrow keys with Shift turn it.
//
// Drags and keys become yaw, pitch and so on in facesnap_pose.js.

"use strict";

// Draw points as points72.draw does. They are pixels of an image of width x height; the canvas may have any size.
function facesnapDraw(canvas, parts, points, width, height) {
    const context = canvas.getContext("2d");
    const scale = canvas.width / width;
    context.lineWidth = Math.max(1, Math.sqrt(width * height) / 256) * scale;
    context.lineCap = context.lineJoin = "round";
    for (const {colour, lines} of parts) {
        context.strokeStyle = `rgb(${colour.join(",")})`;
        context.beginPath();
        for (const line of lines) {
            line.forEach((i, k) => context[k ? "lineTo" : "moveTo"](points[i][0] * scale, points[i][1] * scale));
        }
        context.stroke();
    }
}

// The rectangle [left, top, width, height] that an image covers on an output of [width, height] which shows the part
// `window` of it.
function facesnapImageRect([left, top, width, height], output) {
    const size = [output[0] / width, output[1] / height];
    return [-left * size[0], -top * size[1], ...size];
}

function facesnapDrawBackground(canvas, image, window = facesnapFullWindow) {
    const context = canvas.getContext("2d");
    context.globalAlpha = 1;
    context.fillStyle = "black";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (image) {
        context.globalAlpha = 0.5;
        context.drawImage(image, ...facesnapImageRect(window, [canvas.width, canvas.height]));
        context.globalAlpha = 1;
    }
}

// Fill a canvas with a pose, for example as a template's thumbnail.
function facesnapDrawPose(canvas, rig, values, width, height) {
    facesnapDrawBackground(canvas);
    const {points} = facesnapPreviewOf({rig, values, width, height});
    facesnapDraw(canvas, rig.parts, points, width, height);
    return points;
}

// The handles with their positions, in pixels of the output image. A photo's points do not have handles for turning.
function facesnapHandles(points, pose, reach) {
    const [left, top, right, bottom] = facesnapBox(points);
    const handles = [[left, top], [right, top], [right, bottom], [left, bottom]].map(at => ({action: "resize", at}));
    if (pose.yaw !== undefined) {
        handles.push({action: "turn", at: points[facesnapNoseTip]});
        handles.push({action: "tilt", at: [(left + right) / 2, top - 2.5 * reach]});
    }
    return handles;
}

function facesnapDrawHandles(canvas, handles, scale, radius) {
    const context = canvas.getContext("2d");
    const corners = handles.filter(handle => handle.action === "resize").map(handle => handle.at);
    context.strokeStyle = context.fillStyle = "rgba(255,255,255,0.75)";
    context.lineWidth = Math.max(1, radius / 5);
    context.setLineDash([radius, radius]);
    context.strokeRect(corners[0][0] * scale, corners[0][1] * scale,
        (corners[2][0] - corners[0][0]) * scale, (corners[2][1] - corners[0][1]) * scale);
    context.setLineDash([]);
    for (const {action, at: [x, y]} of handles) {
        context.beginPath();
        if (action === "resize") {
            context.rect(x * scale - radius / 2, y * scale - radius / 2, radius, radius);
            context.fill();
        } else {
            context.arc(x * scale, y * scale, radius, 0, 2 * Math.PI);
            context.stroke();
        }
    }
}

// Translate text into the host's language. The host itself translates only text elements, not attributes.
function facesnapTranslate(text) {
    return typeof getTranslation === "function" && getTranslation(text) || text;
}

const facesnapLabel = "Pose preview. Arrow keys move the face; with Shift, they turn it. Plus and minus resize it.";
const facesnapSpokenNames = {
    yaw: "Yaw", pitch: "Pitch", roll: "Roll", x: "Horizontal position", y: "Vertical position", size: "Face height",
};

// Attach a preview to an element; see the top of this file. Returns {canvas, set(changes), values(), destroy()}.
function facesnapAttach(root, options) {
    const defaults = {
        rig: null, points: null, neutral: null, camera: null, expression: null, image: null, window: facesnapFullWindow,
        overlay: null, brush: null,
    };
    const state = {...defaults, change: () => {}, ...options};
    const canvas = document.createElement("canvas");
    canvas.className = "facesnap-pose";
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", facesnapTranslate(facesnapLabel));
    Object.assign(canvas.style, {width: "100%", display: "block", margin: "0 auto", touchAction: "pan-y"});
    const announcement = document.createElement("span");
    announcement.className = "facesnap-read";
    announcement.setAttribute("aria-live", "polite");
    root.append(canvas, announcement);

    let frame = 0, drag = null, shown = null, stroke = false;
    // pixels of the output image per CSS pixel
    const pixelsPerCss = () => state.width / (canvas.clientWidth || state.width);
    // maximum distance of the pointer from a handle; smaller on a small face, to leave room for moving it
    const reach = () => Math.min(10 * pixelsPerCss(), shown.pose.size * state.height / 4);
    const handles = () => facesnapHandles(shown.points, shown.pose, reach());

    function draw() {
        frame = 0;
        canvas.style.aspectRatio = `${state.width} / ${state.height}`;
        canvas.style.maxWidth = `calc(30rem * ${state.width / state.height})`;  // limits the height to 30rem
        const scale = Math.min(window.devicePixelRatio || 1, 2) / pixelsPerCss();
        const [width, height] = [state.width, state.height].map(side => Math.max(1, Math.round(side * scale)));
        if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
        facesnapDrawBackground(canvas, state.image, state.window);
        shown = state.rig ? facesnapPreviewOf(state) : null;
        const pixels = canvas.width / state.width;
        if (shown) facesnapDraw(canvas, state.rig.parts, shown.points, state.width, state.height);
        if (shown && !state.brush) facesnapDrawHandles(canvas, handles(), pixels, 0.5 * reach() * pixels);
        if (!state.overlay) return;
        const context = canvas.getContext("2d");
        context.save();
        context.scale(pixels, canvas.height / state.height);
        state.overlay(context);
        context.restore();
    }

    function redraw() {
        frame = frame || requestAnimationFrame(draw);
    }

    function apply(changed, done) {
        const settings = facesnapSettingsOf(state.values, shown.pose, changed);
        state.values = {...state.values, ...settings};
        draw();
        state.change(settings, done);
        if (done) {
            announcement.textContent = Object.entries(facesnapSpokenNames)
                .filter(([name]) => typeof settings[name] === "number")
                .map(([name, text]) => `${facesnapTranslate(text)} ${Number(settings[name].toFixed(2))}`).join(", ");
        }
        return settings;
    }

    function pointAt(event) {
        const box = canvas.getBoundingClientRect();
        const [x, y] = [event.clientX - box.left, event.clientY - box.top];
        return [x / box.width * state.width, y / box.height * state.height];
    }

    function actionAt(point, shift) {
        const distance = ({at: [x, y]}) => Math.hypot(x - point[0], y - point[1]);
        const nearest = handles().reduce((a, b) => distance(b) < distance(a) ? b : a);
        if (distance(nearest) <= reach()) return nearest.action;
        return shift && shown.pose.yaw !== undefined ? "turn" : "move";
    }

    function cancel() {
        if (stroke) state.brush?.cancel();
        stroke = false;
        if (!drag) return redraw();
        state.values = {...state.values, ...drag.before};
        state.change(drag.before, true);
        drag = null;
        redraw();
    }

    // Whether a point is on the face or on a handle. Elsewhere, a finger scrolls the page.
    function isOnFace(point) {
        const [left, top, right, bottom] = facesnapBox(shown.points);
        const inside = left <= point[0] && point[0] <= right && top <= point[1] && point[1] <= bottom;
        return inside || actionAt(point, false) !== "move";
    }

    const listeners = {
        touchstart(event) {
            if (event.touches.length > 1) return;
            if (state.brush || shown && isOnFace(pointAt(event.touches[0]))) event.preventDefault();  // do not scroll
        },
        pointerdown(event) {
            if (event.button || !shown && !state.brush) return;
            if (event.pointerType === "touch" && !state.brush && !isOnFace(pointAt(event))) return;
            event.preventDefault();
            canvas.focus({preventScroll: true});
            canvas.setPointerCapture(event.pointerId);
            const from = pointAt(event);
            if (state.brush) {
                stroke = true;
                state.brush.down(from);
                redraw();
                return;
            }
            const [left, top, right, bottom] = facesnapBox(shown.points);
            const names = ["pose", ...facesnapSliderNames(state.rig), ...facesnapPlaceFields];
            const before = Object.fromEntries(names.map(name => [name, state.values[name]]));
            drag = {
                action: actionAt(from, event.shiftKey), pose: shown.pose, from, before, changed: null,
                middle: [(left + right) / 2, (top + bottom) / 2],
            };
        },
        pointermove(event) {
            if (state.brush && !drag) {
                canvas.style.cursor = "crosshair";
                for (const each of event.getCoalescedEvents?.() || []) state.brush.move(pointAt(each));
                state.brush.move(pointAt(event));
                redraw();
                return;
            }
            if (!shown) return;
            if (!drag) {
                const cursors = {move: "move", resize: "nwse-resize", turn: "grab", tilt: "grab"};
                canvas.style.cursor = cursors[actionAt(pointAt(event), event.shiftKey)];
                return;
            }
            const {action, pose, middle, from} = drag;
            const changed = facesnapDrag(action, pose, middle, from, pointAt(event), state.width, state.height);
            drag.changed = {...drag.changed, ...apply(changed, false)};
        },
        pointerup() {
            if (stroke) state.brush?.up();
            stroke = false;
            if (drag && drag.changed) apply(drag.changed, true);
            drag = null;
        },
        pointerleave() {
            state.brush?.leave();
            redraw();
        },
        pointercancel: cancel,  // the browser took over the pointer, for instance to scroll
        wheel(event) {
            if (!shown || document.activeElement !== canvas) return;  // let the page scroll
            event.preventDefault();
            apply({size: facesnapClamp("size", shown.pose.size * Math.exp(-Math.sign(event.deltaY) * 0.05))}, true);
        },
        keydown(event) {
            if (event.key === "Escape" && stroke) cancel();
            if (!shown || event.ctrlKey || event.metaKey || event.altKey) return;
            if (event.key === "Escape" && drag) {
                cancel();
                return;
            }
            const changed = facesnapKey(event.key, event.shiftKey, shown.pose);
            if (!changed) return;
            event.preventDefault();
            apply(changed, true);
        },
    };
    for (const [name, listener] of Object.entries(listeners)) canvas.addEventListener(name, listener, {passive: false});
    const resized = new ResizeObserver(redraw);
    resized.observe(canvas);
    redraw();

    return {
        canvas,
        set(changes) {
            Object.assign(state, changes);
            redraw();
        },
        values: () => ({...state.values}),
        destroy() {
            cancelAnimationFrame(frame);
            resized.disconnect();
            canvas.remove();
            announcement.remove();
        },
    };
}
