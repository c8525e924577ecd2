// Take FaceSnap's photos and settings from txt2img to img2img. The hosts' own "Send to img2img" takes no settings of
// scripts.

"use strict";

onUiLoaded(() => {
    const offer = gradioApp().querySelector(".facesnap-carry-over");
    if (!offer) return;
    setInterval(() => {
        if (!offer.parentElement.offsetParent) return;  // another tab is open
        const [here, there] = [facesnapPeopleInTab.img2img?.[1], facesnapPeopleInTab.txt2img?.[1]];
        const useful = Boolean(there?.enabled() && here && !here.enabled() && facesnapInitImage());
        if (offer.hidden === useful) offer.hidden = !useful;
    }, 5 * facesnapPollInterval);
    offer.addEventListener("click", event => {
        if (event.target.closest("button")) facesnapCarryOver().catch(console.error);
    });
});

async function facesnapCarryOver() {
    for (const [number, to] of Object.entries(facesnapPeopleInTab.img2img)) {
        const from = facesnapPeopleInTab.txt2img[number];
        if (!from?.enabled()) continue;
        const control = ({element}, name, part) => element(name).querySelector(part);
        if (!to.enabled()) {  // in the hosts, opening the accordion enables the first person
            (control(to, "enable", ".label-wrap:not(.open)") || control(to, "enable", "input[type=checkbox]")).click();
        }
        from.settings.read();
        to.settings.set(from.settings.values());
        await facesnapCopyMask(control(from, "mask", "textarea").value, facesnapRegions.img2img[number], to);
        const files = await facesnapFilesOf(from.element("references"));
        if (files.length) await facesnapChangePhotos(to.element("references"), to.element("seen"), () => files);
        const more = await facesnapFilesOf(from.element("driving_more"));
        if (more.length) {
            await facesnapChangePhotos(to.element("driving_more"), document.createElement("div"), () => more);  // no cards
        }
        const driving = control(from, "driving", "img");
        if (!driving) continue;
        to.element("driving").querySelector(facesnapClearButton)?.click();  // an image component only accepts a first one
        const input = await facesnapUntil(() => control(to, "driving", "input[type=file]"), 5);
        if (!input) continue;
        const transfer = new DataTransfer();
        transfer.items.add(await facesnapFileOf(driving.src, "driving.png"));
        input.files = transfer.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    }
}

// Set a person's painted mask, both the one that the job uses and the one on the canvas.
async function facesnapCopyMask(url, region, to) {
    facesnapType(to.element("mask").querySelector("textarea"), url);
    region.begin();
    if (url) region.load(await createImageBitmap(await (await fetch(url)).blob()));
    else region.clear();
}
