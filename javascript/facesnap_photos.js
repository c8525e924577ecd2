// Reference photos: added by paste, drop and upload, and removed and moved by the buttons on their cards.

"use strict";

// gradio translates the button's label into the browser's language
const facesnapClearButton = "button[aria-label]:not(.file-preview *)";

let facesnapUploads = 0;  // how many have ended
new PerformanceObserver(list => {
    facesnapUploads += list.getEntries().filter(({name}) => /\/upload(\?|$)/.test(name)).length;
}).observe({type: "resource"});

function facesnapImageFiles(transfer) {
    return [...transfer?.files || []].filter(file => file.type.startsWith("image/"));
}

// Make a person's file component accept more photos, and answer the buttons on the photos' cards. A pasted image becomes
// a reference photo of the person in the open tab while the mouse or the focus is in the accordion, and so does an image
// dropped on existing photos.
function facesnapAcceptPhotos(root, element) {
    const accordion = element("person").closest('[id$="_enable"]') || element("person");
    const block = element("references"), cards = element("seen");
    const add = files => facesnapChangePhotos(block, cards, existing => [...existing, ...files]);
    element("person").dataset.facesnapPhotos = "";  // style.css hides controls that the number of photos makes useless
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
        add(images);
    }, true);

    for (const target of [block, cards]) {
        target.addEventListener("dragover", event => event.preventDefault());  // else the browser opens the dropped file
        target.addEventListener("drop", event => {
            const images = facesnapImageFiles(event.dataTransfer);
            if (!images.length) {
                if (target === cards) event.preventDefault();  // else the browser opens the file
                return;
            }
            const empty = () => block.querySelector("input[type=file]");
            if (empty() && target === block) {  // the component accepts the drop itself, but may lose it
                facesnapUntil(() => block.querySelector("a[href]"), 4).then(arrived => {
                    if (!arrived && !empty()) add(images);
                });
                return;
            }
            event.preventDefault();
            event.stopPropagation();
            add(images);
        }, true);
    }

    block.addEventListener("change", event => {
        if (event.facesnap || event.target.type !== "file" || !event.target.files.length) return;
        event.stopPropagation();
        add([...event.target.files]);
    }, true);

    cards.addEventListener("click", event => {
        const button = event.target.closest("[data-facesnap-do]");
        if (!button) return;
        if (button.dataset.facesnapDo === "add") facesnapPickPhotos(add);
        else facesnapPressCard(block, cards, button.dataset);
    });
}

// Let the user pick image files.
function facesnapPickPhotos(add) {
    const input = Object.assign(document.createElement("input"), {type: "file", multiple: true, accept: "image/*"});
    input.addEventListener("change", () => add([...input.files]));
    input.click();
}

// Keep the photos that a button names, in its order, and then return the focus to the same button of a card.
async function facesnapPressCard(block, cards, {facesnapDo, facesnapKeep, facesnapThen}) {
    const keep = facesnapKeep.split(",").filter(Boolean).map(Number);
    await facesnapChangePhotos(block, cards, existing => keep.map(i => existing[i]).filter(Boolean));
    const shown = () => cards.querySelectorAll(".facesnap-card");
    await facesnapUntil(() => shown().length === keep.length, 10);
    const card = shown()[facesnapThen];
    const same = card?.querySelector(`[data-facesnap-do=${facesnapDo}]:not(:disabled)`);
    (same || card?.querySelector("button"))?.focus();
}

// Change the photos of a file component, one change after the other. `change` gets the existing files and returns the
// new ones. The result says whether all of them have been uploaded.
function facesnapChangePhotos(block, cards, change) {
    const previous = block.facesnapChange || Promise.resolve();
    block.classList.add("facesnap-busy");
    const done = previous.then(() => facesnapReplacePhotos(block, cards, change)).catch(console.error).finally(() => {
        if (block.facesnapChange === done) block.classList.remove("facesnap-busy");
    });
    return block.facesnapChange = done;
}

// The component accepts files only while it is empty, so it is cleared and all files are uploaded again. Meanwhile a
// copy of the cards is shown. Gradio 3 loses an upload if any event of the page is answered meanwhile, including those
// caused by clearing. This is why the function waits after clearing, and retries with longer waits. A component that
// accepts an upload shows it at once.
async function facesnapReplacePhotos(block, cards, change) {
    const arrived = () => block.querySelectorAll("a[href]").length === transfer.files.length;
    const existing = await facesnapFilesOf(block);
    const transfer = new DataTransfer();
    for (const file of change(existing)) transfer.items.add(file);
    const copy = cards.cloneNode(true);
    copy.removeAttribute("id");
    copy.inert = true;
    copy.classList.add("facesnap-busy");
    cards.before(copy);
    facesnapProblem(block, "");
    try {
        for (let seconds = 4; seconds < 100; seconds *= 2) {
            block.querySelector(facesnapClearButton)?.click();
            await facesnapUntil(() => !cards.textContent.trim(), 5);
            if (seconds > 4) await facesnapUntil(() => false, seconds / 8);
            const input = await facesnapUntil(() => block.querySelector("input[type=file]"), 5);
            if (!input) continue;
            if (!transfer.files.length) return true;
            input.files = transfer.files;
            const before = facesnapUploads;
            input.dispatchEvent(Object.assign(new Event("change", {bubbles: true}), {facesnap: true}));
            const ended = await facesnapUntil(() => arrived() || facesnapUploads > before, seconds);
            if (ended && await facesnapUntil(arrived, 0.5)) break;
        }
        if (!arrived()) {
            facesnapProblem(block, "The photos could not be uploaded; add them again.");
            return false;
        }
        if (copy.isConnected) await facesnapUntil(() => cards.textContent.trim(), 30);  // faces are being detected
        return true;
    } finally {
        copy.remove();
    }
}

// Show a sentence below a file component; an empty one removes it.
function facesnapProblem(block, sentence) {
    if (block.nextElementSibling?.matches(".facesnap-problem")) block.nextElementSibling.remove();
    if (!sentence) return;
    const problem = Object.assign(document.createElement("div"), {className: "facesnap-report facesnap-problem"});
    problem.textContent = facesnapTranslate(sentence);
    block.after(problem);
}

// A job that begins while photos are uploaded again would run without them, so it begins when they have arrived.
document.addEventListener("click", event => {
    const button = event.target.closest?.("#txt2img_generate, #img2img_generate");
    const people = button ? Object.values(facesnapPeopleInTab[button.id.split("_")[0]] || {}) : [];
    const busy = people.map(({element}) => element("references")).filter(block => block.matches(".facesnap-busy"));
    if (!busy.length) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (button.facesnapWaits) return;
    button.facesnapWaits = true;
    Promise.all(busy.map(block => block.facesnapChange)).then(uploaded => {
        button.facesnapWaits = false;
        if (uploaded.every(Boolean)) button.click();
    });
}, true);

// The files that a file component holds.
function facesnapFilesOf(block) {
    return Promise.all([...block.querySelectorAll("a[href]")].map(
        (link, i) => facesnapFileOf(link.href, link.getAttribute("download") || `photo${i}.png`)));
}

async function facesnapFileOf(url, name) {
    const blob = await (await fetch(url)).blob();
    return new File([blob], name, {type: blob.type});
}

// Wait until `find` returns a truthy value, for at most this many seconds, and return its last value.
async function facesnapUntil(find, seconds) {
    const end = performance.now() + 1000 * seconds;
    while (!find() && performance.now() < end) await new Promise(done => setTimeout(done, facesnapPollInterval));
    return find();
}
