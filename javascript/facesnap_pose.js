// Pose arithmetic of the preview: the 72 points for a pose, and the pose that results from a drag or a key.
//
// The formulas match facesnap_ext/landmarks/poses.py and facesnap_ext/hosts/windows.py; a test compares the results.
// This file does not use the page or the other files.

"use strict";

const facesnapRanges = {  // as in facesnap_ext/settings/unit.py
    yaw: [-75, 75], pitch: [-45, 45], roll: [-45, 45], x: [-0.5, 1.5], y: [-0.5, 1.5], size: [0.02, 3],
};
const facesnapRigFields = ["yaw", "pitch", "roll", "mouth", "brows", "eyes"];
const facesnapPlaceFields = ["x", "y", "size"];
const facesnapNoseTip = 30;  // index of the point at the tip of the nose
const facesnapFullWindow = [0, 0, 1, 1];  // [left, top, width, height]

function facesnapClamp(name, value) {
    const [low, high] = facesnapRanges[name];
    return Math.min(high, Math.max(low, value));
}

// Whether the pose comes from the rig instead of from a photo.
function facesnapIsRigged(values) {
    return values.pose === "template" || values.pose === "sliders";
}

// poses.pose_from_unit: all parameters of a pose. Parameters missing from `values` come from the template.
function facesnapResolvePose(rig, values, width, height) {
    const template = rig.templates[values.pose === "template" ? values.template : "front"];
    const pose = {...template, size: template.size * Math.min(1, width / height)};
    const used = values.pose === "sliders" ? [...facesnapRigFields, ...facesnapPlaceFields] : facesnapPlaceFields;
    for (const name of used) {
        if (values[name] !== undefined && values[name] !== null) pose[name] = Number(values[name]);
    }
    return pose;
}

// The first two rows of R = Rz(-roll) Ry(yaw) Rx(pitch). The third row is depth.
function facesnapRotation(pose) {
    const [sy, sp, sr] = [pose.yaw, pose.pitch, pose.roll].map(degrees => Math.sin(degrees * Math.PI / 180));
    const [cy, cp, cr] = [pose.yaw, pose.pitch, pose.roll].map(degrees => Math.cos(degrees * Math.PI / 180));
    return [
        [cr * cy, cr * sy * sp + sr * cp, cr * sy * cp - sr * sp],
        [-sr * cy, cr * cp - sr * sy * sp, -cr * sp - sr * sy * cp],
    ];
}

// poses.amounts: the amount of each of the rig's directions in a pose.
function facesnapAmounts(pose) {
    return {mouth: pose.mouth, brows: pose.brows, closed: Math.max(-pose.eyes, 0), wide: Math.max(pose.eyes, 0)};
}

// poses.pose_points: [72][2] pixels of an image of width x height, for a pose from facesnapResolvePose.
function facesnapPosePoints(rig, pose, width, height) {
    const moves = Object.entries(facesnapAmounts(pose)).map(([name, amount]) => [rig.directions[name], amount]);
    const [right, up] = facesnapRotation(pose);
    const scale = pose.size * height;
    return rig.rest.map((rest, i) => {
        const p = rest.map((value, k) =>
            moves.reduce((sum, [direction, amount]) => sum + amount * direction[i][k], value));
        return [
            pose.x * width + scale * (right[0] * p[0] + right[1] * p[1] + right[2] * p[2]),
            pose.y * height - scale * (up[0] * p[0] + up[1] * p[1] + up[2] * p[2]),
        ];
    });
}

// The bounding box of points: [left, top, right, bottom].
function facesnapBox(points) {
    const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
    return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

// poses.placement: the position and size of a photo's points, which are fractions of the image's width and height.
function facesnapPlacement(points) {
    const [left, top, right, bottom] = facesnapBox(points);
    return {x: (left + right) / 2, y: (top + bottom) / 2, size: bottom - top};
}

// poses.reposition: a photo's points, in fractions of the image, as [72][2] pixels at the position and size in
// `values`.
function facesnapReposition(points, values, width, height) {
    const current = facesnapPlacement(points);
    const place = {...current};
    for (const name of facesnapPlaceFields) {
        if (values[name] !== undefined && values[name] !== null) place[name] = Number(values[name]);
    }
    const scale = current.size ? place.size / current.size : 1;
    return points.map(([x, y]) =>
        [((x - current.x) * scale + place.x) * width, ((y - current.y) * scale + place.y) * height]);
}

// What the preview shows: {pose, points}, with points in pixels of the output image; null if there is nothing to show.
function facesnapPreviewOf({rig, points, values, width, height}) {
    if (facesnapIsRigged(values)) {
        if (!rig) return null;
        const pose = facesnapResolvePose(rig, values, width, height);
        return {pose, points: facesnapPosePoints(rig, pose, width, height)};
    }
    if (!points) return null;
    const placed = facesnapReposition(points, values, width, height);
    return {pose: facesnapPlacement(placed.map(([x, y]) => [x / width, y / height])), points: placed};
}

// The parameters changed by a drag: a horizontal drag of the nose becomes yaw, a vertical one pitch, and so on.
// `from` and `to` are pixels; `pose` and the face's centre `middle` (pixels) are those at the start of the drag.
function facesnapDrag(action, pose, middle, from, to, width, height) {
    const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
    const face = pose.size * height;
    const distance = point => Math.hypot(point[0] - middle[0], point[1] - middle[1]);
    const angle = point => Math.atan2(point[0] - middle[0], middle[1] - point[1]) * 180 / Math.PI;
    const changes = {
        move: () => ({x: pose.x + dx / width, y: pose.y + dy / height}),
        resize: () => ({size: pose.size * distance(to) / Math.max(distance(from), 1e-6)}),
        turn: () => ({yaw: pose.yaw + 90 * dx / face, pitch: pose.pitch + 90 * dy / face}),
        // the shorter way around
        tilt: () => ({roll: pose.roll + (angle(to) - angle(from) + 540) % 360 - 180}),
    }[action]();
    return Object.fromEntries(Object.entries(changes).map(([name, value]) => [name, facesnapClamp(name, value)]));
}

// The parameters changed by a key, or null if the key does nothing.
function facesnapKey(key, shift, pose) {
    const arrow = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[key];
    if (arrow && shift) {
        if (pose.yaw === undefined) return null;  // a photo's points cannot be turned
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

// The changed parameters as settings. Turning a template switches to sliders, with all of the template's parameters.
function facesnapSettingsOf(values, pose, changed) {
    const turns = facesnapRigFields.some(name => name in changed);
    return values.pose === "template" && turns ? {...pose, ...changed, pose: "sliders"} : changed;
}

// windows.init_region: the part of an init image that fills the output, as [left, top, width, height] in fractions of
// the init image. `mode` is the index of the host's resize mode; `size` and `output` are [width, height].
function facesnapInitWindow(mode, size, output) {
    if (mode !== 1 && mode !== 2) return facesnapFullWindow;
    const scale = (mode === 1 ? Math.min : Math.max)(size[0] / output[0], size[1] / output[1]);
    const [width, height] = [0, 1].map(k => output[k] * scale / size[k]);
    return [(1 - width) / 2, (1 - height) / 2, width, height];
}

// Convert a place (any of x, y, size) from fractions of the init image to fractions of the output, which shows the
// part `window` of the init image.
function facesnapPlaceInOutput(place, [left, top, width, height]) {
    const converted = {...place};
    if (Number.isFinite(place.x)) converted.x = (place.x - left) / width;
    if (Number.isFinite(place.y)) converted.y = (place.y - top) / height;
    if (Number.isFinite(place.size)) converted.size = place.size / height;
    return converted;
}

// The inverse of facesnapPlaceInOutput.
function facesnapPlaceInInit(place, [left, top, width, height]) {
    return facesnapPlaceInOutput(place, [-left / width, -top / height, 1 / width, 1 / height]);
}
