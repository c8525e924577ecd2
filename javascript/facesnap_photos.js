// Reference photos by paste, drop and upload: new photos are added to those that the file component already holds.

"use strict";

function facesnapImageFiles(transfer) {
    return [...transfer?.files || []].filter(file => file.type.startsWith("image/"));
}

// Make a person's file component accept more photos. A pasted image becomes a reference photo of the person in the
// open tab while the mouse or the focus is in the accordion, and so does an image dropped on existing photos.
function facesnapAcceptPhotos(root, element) {
    const accordion = element("person").closest('[id$="_enable"]') || element("person");
    const block = element("references");
    let hovered = false;
    accordion.addEventListener("pointerover", () => { hovered = true; });
    accordion.addEventListener("pointerleave", () => { hovered = false; });

    document.addEventListener("paste", event => {
        const images = facesnapImageFiles(event.clipboardData);
        const inAccordion = hovered || accordion.contains(document.activeElement);
        if (!root.offsetParent || !inAccordion || !images.length) return;
        // leave pasted text to the focused field
        if (event.clipboardData.getData("text/plain") && event.target.closest?.("textarea, input")) return;
        event.preventDefault();
        event.stopPropagation();  // otherwise the host would put it into one of its own image components
        facesnapAddPhotos(block, element("report"), images);
    }, true);

    // otherwise the browser opens the dropped file
    block.addEventListener("dragover", event => event.preventDefault());
    block.addEventListener("drop", event => {
        const images = facesnapImageFiles(event.dataTransfer);
        if (!images.length) return;
        const empty = () => block.querySelector("input[type=file]");
        if (empty()) {  // the component accepts the drop itself, but may lose it
            facesnapUntil(() => block.querySelector("a[href]"), 4).then(arrived => {
                if (!arrived && !empty()) facesnapAddPhotos(block, element("report"), images);
            });
            return;
        }
        event.preventDefault();
        event.stopPropagation();
        facesnapAddPhotos(block, element("report"), images);
    }, true);

    block.addEventListener("change", event => {
        if (event.facesnap || event.target.type !== "file" || !event.target.files.length) return;
        event.stopPropagation();
        facesnapAddPhotos(block, element("report"), [...event.target.files]);
    }, true);
}

// Add files to a file component that may already hold some. The component accepts files only while it is empty, so it
// is cleared and all files are uploaded again. Gradio 3 loses an upload if any event of the page is answered meanwhile,
// including those caused by clearing. This is why the function waits after clearing, and retries with longer waits.
async function facesnapAddPhotos(block, report, files) {
    const links = () => [...block.querySelectorAll("a[href]")];
    const existing = await Promise.all(links().map(async (link, i) => {
        const blob = await (await fetch(link.href)).blob();
        return new File([blob], link.getAttribute("download") || `photo${i}.png`, {type: blob.type});
    }));
    const transfer = new DataTransfer();
    for (const file of [...existing, ...files]) transfer.items.add(file);
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

// Wait until `find` returns a truthy value, for at most this many seconds, and return its last value.
async function facesnapUntil(find, seconds) {
    const end = performance.now() + 1000 * seconds;
    while (!find() && performance.now() < end) await new Promise(done => setTimeout(done, facesnapPollInterval));
    return find();
}
