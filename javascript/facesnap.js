// The live preview of a pose: the 72 points on a canvas, drawn in the browser as settings change, and set by dragging.
//
//     const preview = facesnapAttach(element, {
//         rig,              // of POST /facesnap/landmarks
//         values,           // settings.Unit's fields: pose, template, yaw, pitch, roll, mouth, brows, eyes, x, y, size
//         width, height,    // of the output picture
//         points,           // of the same route, for the poses "photo" and "own": [72][2], parts of width and height
//         picture,          // optional, an image or canvas shown dimly behind
//         window,           // the part of it that the output shows, see facesnapInitWindow; else all of it
//         overlay(context) {},  // optional, draws over the points in pixels of the output picture
//         brush,            // optional {down(at), move(at), up(), cancel(), leave()}: takes the pointer in place of dragging
//         change(changed, done) {},  // what was dragged or typed, as fields of `values`; done: the drag is over
//     });
//     preview.set({values: {...values, yaw: 20}});  // any of the above, whenever it changes
//     preview.canvas, preview.values(), preview.destroy()
//
// Dragging moves the face, a corner or the wheel (once the canvas has the focus) resizes it, the circle on the nose or
// dragging with Shift turns it, the circle above leans it. Arrow keys move, with Shift they turn, + and - resize.
//
// The first part is arithmetic alone, that of facesnap_ext/landmarks/poses.py, and runs without a page; a test compares
// the two. What settings.py allows is in facesnapRanges.

"use strict";

const facesnapRanges = {
    yaw: [-75, 75], pitch: [-45, 45], roll: [-45, 45], x: [-0.5, 1.5], y: [-0.5, 1.5], size: [0.02, 3],
};
const facesnapTurned = ["yaw", "pitch", "roll", "mouth", "brows", "eyes"];
const facesnapPlaced = ["x", "y", "size"];
const facesnapNose = 30;  // the tip
const facesnapWhole = [0, 0, 1, 1];

// ---- arithmetic

function facesnapClamp(name, value) {
    const [low, high] = facesnapRanges[name];
    return Math.min(high, Math.max(low, value));
}

function facesnapIsRigged(values) {
    return values.pose === "template" || values.pose === "sliders";
}

// pose_of: every number of a pose; what the values leave open is the template's.
function facesnapResolve(rig, values, width, height) {
    const template = rig.templates[values.pose === "template" ? values.template : "front"];
    const pose = {...template, size: template.size * Math.min(1, width / height)};
    const given = values.pose === "sliders" ? [...facesnapTurned, ...facesnapPlaced] : facesnapPlaced;
    for (const name of given) {
        if (values[name] !== undefined && values[name] !== null) pose[name] = Number(values[name]);
    }
    return pose;
}

// R = Rz(-roll) Ry(yaw) Rx(pitch); its first two rows, the third is depth.
function facesnapRotation(pose) {
    const [sy, sp, sr] = [pose.yaw, pose.pitch, pose.roll].map(degrees => Math.sin(degrees * Math.PI / 180));
    const [cy, cp, cr] = [pose.yaw, pose.pitch, pose.roll].map(degrees => Math.cos(degrees * Math.PI / 180));
    return [
        [cr * cy, cr * sy * sp + sr * cp, cr * sy * cp - sr * sp],
        [-sr * cy, cr * cp - sr * sy * sp, -cr * sp - sr * sy * cp],
    ];
}

// pose_points: [72][2] pixels of a picture of width x height, for a whole pose (facesnapResolve).
function facesnapPoints(rig, pose, width, height) {
    const {mouth, brows, closed, wide} = rig.directions;
    const close = Math.max(-pose.eyes, 0), widen = Math.max(pose.eyes, 0);
    const [right, up] = facesnapRotation(pose);
    const scale = pose.size * height;
    return rig.rest.map((rest, i) => {
        const p = rest.map((value, k) =>
            value + pose.mouth * mouth[i][k] + pose.brows * brows[i][k] + close * closed[i][k] + widen * wide[i][k]);
        return [
            pose.x * width + scale * (right[0] * p[0] + right[1] * p[1] + right[2] * p[2]),
            pose.y * height - scale * (up[0] * p[0] + up[1] * p[1] + up[2] * p[2]),
        ];
    });
}

// [left, top, right, bottom]
function facesnapBox(points) {
    const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
    return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

// placement: where a photo's points lie, of points in parts of the picture's width and height.
function facesnapPlacement(points) {
    const [left, top, right, bottom] = facesnapBox(points);
    return {x: (left + right) / 2, y: (top + bottom) / 2, size: bottom - top};
}

// moved: a photo's points, in parts of the picture, as [72][2] pixels at the values' place and size.
function facesnapMoved(points, values, width, height) {
    const now = facesnapPlacement(points);
    const place = {...now};
    for (const name of facesnapPlaced) {
        if (values[name] !== undefined && values[name] !== null) place[name] = Number(values[name]);
    }
    const scale = now.size ? place.size / now.size : 1;
    return points.map(([x, y]) => [((x - now.x) * scale + place.x) * width, ((y - now.y) * scale + place.y) * height]);
}

// What the preview shows: pixels of the output picture, and the pose's numbers; null while there is nothing to show.
function facesnapShown({rig, points, values, width, height}) {
    if (facesnapIsRigged(values)) {
        if (!rig) return null;
        const pose = facesnapResolve(rig, values, width, height);
        return {pose, points: facesnapPoints(rig, pose, width, height)};
    }
    if (!points) return null;
    const moved = facesnapMoved(points, values, width, height);
    return {pose: facesnapPlacement(moved.map(([x, y]) => [x / width, y / height])), points: moved};
}

// What dragging from one point to another changes; `pose` and `middle` (pixels) as they were when the drag began.
function facesnapDragged(action, pose, middle, from, to, width, height) {
    const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
    const face = pose.size * height;
    const away = point => Math.hypot(point[0] - middle[0], point[1] - middle[1]);
    const angle = point => Math.atan2(point[0] - middle[0], middle[1] - point[1]) * 180 / Math.PI;
    const changes = {
        move: () => ({x: pose.x + dx / width, y: pose.y + dy / height}),
        size: () => ({size: pose.size * away(to) / Math.max(away(from), 1e-6)}),
        turn: () => ({yaw: pose.yaw + 90 * dx / face, pitch: pose.pitch + 90 * dy / face}),
        // the shorter way round
        lean: () => ({roll: pose.roll + (angle(to) - angle(from) + 540) % 360 - 180}),
    }[action]();
    return Object.fromEntries(Object.entries(changes).map(([name, value]) => [name, facesnapClamp(name, value)]));
}

// What a key changes, or null.
function facesnapKeyed(key, shift, pose) {
    const arrow = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[key];
    if (arrow && shift) {
        if (pose.yaw === undefined) return null;  // a photo's points do not turn
        const [name, step] = arrow[0] ? ["yaw", arrow[0]] : ["pitch", arrow[1]];
        return {[name]: facesnapClamp(name, pose[name] + 3 * step)};
    }
    if (arrow) {
        const [name, step] = arrow[0] ? ["x", arrow[0]] : ["y", arrow[1]];
        return {[name]: facesnapClamp(name, pose[name] + 0.01 * step)};
    }
    const factor = {"+": 1.05, "=": 1.05, "-": 1 / 1.05, "_": 1 / 1.05}[key];
    return factor ? {size: facesnapClamp("size", pose.size * factor)} : null;
}

// webui.init_window: the part of an init picture that fills the output, as left, top, width and height in parts of the
// init picture's; `mode` is the host's number of the way to resize, `size` and `output` are [width, height].
function facesnapInitWindow(mode, size, output) {
    if (mode !== 1 && mode !== 2) return facesnapWhole;
    const pixels = (mode === 1 ? Math.min : Math.max)(size[0] / output[0], size[1] / output[1]);
    const [width, height] = [0, 1].map(k => output[k] * pixels / size[k]);
    return [(1 - width) / 2, (1 - height) / 2, width, height];
}

// A place (some of x, y, size) in parts of the init picture, as parts of the output that shows `window` of it.
function facesnapPlaceSeen(place, [left, top, width, height]) {
    const seen = {...place};
    if (Number.isFinite(place.x)) seen.x = (place.x - left) / width;
    if (Number.isFinite(place.y)) seen.y = (place.y - top) / height;
    if (Number.isFinite(place.size)) seen.size = place.size / height;
    return seen;
}

// The way back.
function facesnapPlaceMeant(place, [left, top, width, height]) {
    return facesnapPlaceSeen(place, [-left / width, -top / height, 1 / width, 1 / height]);
}

// What changed, as settings: turning a template makes sliders of it, with all of the template's numbers.
function facesnapAsSettings(values, pose, changed) {
    const turns = facesnapTurned.some(name => name in changed);
    return values.pose === "template" && turns ? {...pose, ...changed, pose: "sliders"} : changed;
}

// ---- the canvas

// Draw points in pixels of a picture of width x height, as points72.draw does, on a canvas of any size.
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

// Where a picture lies on an output of width x height that shows `window` of it: left, top, width, height.
function facesnapBehind([left, top, width, height], output) {
    const size = [output[0] / width, output[1] / height];
    return [-left * size[0], -top * size[1], ...size];
}

function facesnapClear(canvas, picture, window = facesnapWhole) {
    const context = canvas.getContext("2d");
    context.globalAlpha = 1;
    context.fillStyle = "black";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (picture) {
        context.globalAlpha = 0.5;
        context.drawImage(picture, ...facesnapBehind(window, [canvas.width, canvas.height]));
        context.globalAlpha = 1;
    }
}

// A picture of a pose, such as a template's thumbnail, as large as the canvas is.
function facesnapPose(canvas, rig, values, width, height) {
    facesnapClear(canvas);
    const {points} = facesnapShown({rig, values, width, height});
    facesnapDraw(canvas, rig.parts, points, width, height);
    return points;
}

// Where the handles are, in the pixels of the points. A photo's points have none to turn by.
function facesnapHandles(points, pose, reach) {
    const [left, top, right, bottom] = facesnapBox(points);
    const handles = [[left, top], [right, top], [right, bottom], [left, bottom]].map(at => ({action: "size", at}));
    if (pose.yaw !== undefined) {
        handles.push({action: "turn", at: points[facesnapNose]});
        handles.push({action: "lean", at: [(left + right) / 2, top - 2.5 * reach]});
    }
    return handles;
}

function facesnapDrawHandles(canvas, handles, scale, radius) {
    const context = canvas.getContext("2d");
    const corners = handles.filter(handle => handle.action === "size").map(handle => handle.at);
    context.strokeStyle = context.fillStyle = "rgba(255,255,255,0.75)";
    context.lineWidth = Math.max(1, radius / 5);
    context.setLineDash([radius, radius]);
    context.strokeRect(corners[0][0] * scale, corners[0][1] * scale,
        (corners[2][0] - corners[0][0]) * scale, (corners[2][1] - corners[0][1]) * scale);
    context.setLineDash([]);
    for (const {action, at: [x, y]} of handles) {
        context.beginPath();
        if (action === "size") {
            context.rect(x * scale - radius / 2, y * scale - radius / 2, radius, radius);
            context.fill();
        } else {
            context.arc(x * scale, y * scale, radius, 0, 2 * Math.PI);
            context.stroke();
        }
    }
}

// In the host's language; its own translation sees text in the page alone.
function facesnapSay(text) {
    return typeof getTranslation === "function" && getTranslation(text) || text;
}

const facesnapLabel = "Pose preview. Arrow keys move the face, with Shift they turn it, plus and minus resize it.";

// See the top of this file. Returns {canvas, set(some), values(), destroy()}.
function facesnapAttach(root, options) {
    const nothing = {rig: null, points: null, picture: null, window: facesnapWhole, overlay: null, brush: null};
    const state = {...nothing, change: () => {}, ...options};
    const canvas = document.createElement("canvas");
    canvas.className = "facesnap-pose";
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", facesnapSay(facesnapLabel));
    Object.assign(canvas.style, {width: "100%", display: "block", margin: "0 auto", touchAction: "none"});
    const spoken = document.createElement("span");
    spoken.setAttribute("aria-live", "polite");
    const unseen = {position: "absolute", width: "1px", height: "1px", overflow: "hidden", clipPath: "inset(50%)"};
    Object.assign(spoken.style, unseen);
    root.append(canvas, spoken);

    let frame = 0, drag = null, shown = null, stroke = false;
    const pixelsPerCss = () => state.width / (canvas.clientWidth || state.width);  // of the output picture
    const reach = () => Math.min(10 * pixelsPerCss(), shown.pose.size * state.height / 4);  // a small face can be moved
    const handles = () => facesnapHandles(shown.points, shown.pose, reach());

    function draw() {
        frame = 0;
        canvas.style.aspectRatio = `${state.width} / ${state.height}`;
        canvas.style.maxWidth = `calc(30rem * ${state.width / state.height})`;  // so that it is at most so tall
        const scale = Math.min(window.devicePixelRatio || 1, 2) / pixelsPerCss();
        const [width, height] = [state.width, state.height].map(side => Math.max(1, Math.round(side * scale)));
        if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
        facesnapClear(canvas, state.picture, state.window);
        shown = state.rig ? facesnapShown(state) : null;
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
        const settings = facesnapAsSettings(state.values, shown.pose, changed);
        state.values = {...state.values, ...settings};
        draw();
        state.change(settings, done);
        if (done) {
            spoken.textContent = Object.entries(settings).filter(([, value]) => typeof value === "number")
                .map(([name, value]) => `${name} ${Number(value.toFixed(2))}`).join(", ");
        }
        return settings;
    }

    function at(event) {
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

    function takeBack() {
        if (stroke) state.brush?.cancel();
        stroke = false;
        if (!drag) return redraw();
        state.values = {...state.values, ...drag.before};
        state.change(drag.before, true);
        drag = null;
        redraw();
    }

    const listeners = {
        pointerdown(event) {
            if (event.button || !shown && !state.brush) return;
            event.preventDefault();
            canvas.focus({preventScroll: true});
            canvas.setPointerCapture(event.pointerId);
            const from = at(event);
            if (state.brush) {
                stroke = true;
                state.brush.down(from);
                redraw();
                return;
            }
            const [left, top, right, bottom] = facesnapBox(shown.points);
            const names = ["pose", ...facesnapTurned, ...facesnapPlaced];
            const before = Object.fromEntries(names.map(name => [name, state.values[name]]));
            drag = {
                action: actionAt(from, event.shiftKey), pose: shown.pose, from, before, changed: null,
                middle: [(left + right) / 2, (top + bottom) / 2],
            };
        },
        pointermove(event) {
            if (state.brush && !drag) {
                canvas.style.cursor = "crosshair";
                for (const each of event.getCoalescedEvents?.() || []) state.brush.move(at(each));
                state.brush.move(at(event));
                redraw();
                return;
            }
            if (!shown) return;
            if (!drag) {
                const cursors = {move: "move", size: "nwse-resize", turn: "grab", lean: "grab"};
                canvas.style.cursor = cursors[actionAt(at(event), event.shiftKey)];
                return;
            }
            const {action, pose, middle, from} = drag;
            const changed = facesnapDragged(action, pose, middle, from, at(event), state.width, state.height);
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
        pointercancel: takeBack,  // the browser took the pointer away, to scroll for instance
        wheel(event) {
            if (!shown || document.activeElement !== canvas) return;  // else the page scrolls
            event.preventDefault();
            apply({size: facesnapClamp("size", shown.pose.size * Math.exp(-Math.sign(event.deltaY) * 0.05))}, true);
        },
        keydown(event) {
            if (event.key === "Escape" && stroke) takeBack();
            if (!shown || event.ctrlKey || event.metaKey || event.altKey) return;
            if (event.key === "Escape" && drag) {
                takeBack();
                return;
            }
            const changed = facesnapKeyed(event.key, event.shiftKey, shown.pose);
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
        set(some) {
            Object.assign(state, some);
            redraw();
        },
        values: () => ({...state.values}),
        destroy() {
            cancelAnimationFrame(frame);
            resized.disconnect();
            canvas.remove();
            spoken.remove();
        },
    };
}
