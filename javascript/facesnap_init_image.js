// The output image of a tab, and the part of img2img's init image that it shows.

"use strict";

const facesnapInitSide = 1024;  // longest side of the init image as sent to the server, which finds the face in it

// {width, height, window, image, key, note, inpaints} of the tab's output. Without an init image, `image` is null.
function facesnapOutput(tab) {
    const side = name => Number(gradioApp().querySelector(`#${tab}_${name} input[type=number]`)?.value) || 512;
    const plain = {width: side("width"), height: side("height"), window: facesnapFullWindow, image: null, key: ""};
    const image = tab === "img2img" ? facesnapInitImage() : null;
    if (!image) return plain;
    const size = [image.naturalWidth, image.naturalHeight];
    // this slider is visible if the tab is set to "Resize by", not "Resize to"
    const scale = gradioApp().querySelector("#img2img_scale input[type=number]");
    const output = scale?.offsetParent ?
        size.map(pixels => Math.floor(pixels * scale.value)) : [plain.width, plain.height];
    const choice = (id, fallback) => {
        const inputs = [...gradioApp().querySelectorAll(`#${id} input[type=radio]`)];
        return Math.max(fallback, inputs.findIndex(input => input.checked));
    };
    const area = gradioApp().querySelector("#img2img_inpaint_full_res");
    const inpaints = Boolean(area?.offsetParent);
    const onlyMasked = inpaints && choice("img2img_inpaint_full_res", 0) === 1;
    const source = image.getAttribute("src");
    return {
        width: output[0], height: output[1], image, inpaints,
        window: facesnapInitWindow(onlyMasked ? 2 : choice("resize_mode", 0), size, output),
        key: `${size} ${source.length} ${source.slice(-80)}`,
        note: onlyMasked ?
            "Inpaint area is \"Only masked\": a template or the sliders place the face within the masked area." : "",
    };
}

// The init image in the open tab of img2img, or null.
function facesnapInitImage() {
    const images = [...gradioApp().querySelectorAll("#mode_img2img img")];
    const isOpen = image => image.closest(".tabitem")?.style.display !== "none";
    return images.find(image => isOpen(image) && image.complete && image.naturalWidth > 32) || null;
}

let facesnapInitCache = {source: null, url: ""};

// An init image as the data URL of a JPEG of limited size; empty for null.
function facesnapInitUrl(image) {
    const source = image && image.getAttribute("src");
    if (source === facesnapInitCache.source) return facesnapInitCache.url;
    let url = "";
    if (image) {
        const scale = Math.min(1, facesnapInitSide / Math.max(image.naturalWidth, image.naturalHeight));
        const [width, height] = [image.naturalWidth, image.naturalHeight]
            .map(side => Math.max(1, Math.round(side * scale)));
        const canvas = Object.assign(document.createElement("canvas"), {width, height});
        const context = canvas.getContext("2d");
        context.fillStyle = "white";  // behind transparent pixels, as the host does
        context.fillRect(0, 0, width, height);
        context.drawImage(image, 0, 0, width, height);
        url = canvas.toDataURL("image/jpeg", 0.9);
    }
    facesnapInitCache = {source, url};
    return url;
}
