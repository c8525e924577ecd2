// Translated labels, access by keyboard, and announcements for screen readers.

"use strict";

const facesnapOwn = "[id*=_facesnap_]";  // the host's ids of FaceSnap's elements
const facesnapSpoken = ".facesnap-name, .facesnap-badge, .facesnap-line, .facesnap-problem, [data-facesnap-say]";

onUiLoaded(() => {
    const [status, alert] = ["status", "alert"].map(role => {
        const region = document.body.appendChild(document.createElement("div"));
        region.className = "facesnap-read";
        region.setAttribute("role", role);
        return region;
    });
    facesnapAnnounce(status, alert);
    setInterval(() => {
        facesnapAddLabels();
        facesnapAddKeys();
        facesnapAnnounce(status, alert);
    }, 5 * facesnapPollInterval);
    document.addEventListener("keydown", event => {
        if (!event.target.matches?.("[data-facesnap-key]") || !["Enter", " "].includes(event.key)) return;
        event.preventDefault();
        (event.target.querySelector("input[type=file]") || event.target).click();
    });
});

// Translate labels, and label the number next to a slider, which gradio 3 does not.
function facesnapAddLabels() {
    for (const name of ["aria-label", "title"]) {
        for (const element of gradioApp().querySelectorAll(`${facesnapOwn} [${name}]:not([translate=no])`)) {
            const text = element.getAttribute(name), translated = facesnapTranslate(text);
            if (translated !== text) element.setAttribute(name, translated);
        }
    }
    const numbers = "input[type=number]:not([aria-label], [aria-labelledby])";
    for (const number of gradioApp().querySelectorAll(`${facesnapOwn} ${numbers}`)) {
        const block = number.closest(facesnapOwn), label = block.querySelector("label span, span")?.textContent.trim();
        if (label && block.querySelector("input[type=range]")) number.setAttribute("aria-label", label);
    }
}

// Let the keyboard reach what gradio 3 draws as plain elements: the titles of accordions, and the areas for files. A
// title that contains a checkbox is the host's.
function facesnapAddKeys() {
    for (const title of gradioApp().querySelectorAll(`${facesnapOwn} .label-wrap:not(button, :has(input))`)) {
        facesnapMakeButton(title);
        title.setAttribute("aria-expanded", String(title.classList.contains("open")));
    }
    for (const input of gradioApp().querySelectorAll(`${facesnapOwn} input[type=file]`)) {
        if (input.parentElement.matches("div:not(.facesnap-tools)")) facesnapMakeButton(input.parentElement);
    }
}

function facesnapMakeButton(element) {
    if (element.dataset.facesnapKey !== undefined) return;
    element.dataset.facesnapKey = "";
    element.tabIndex = 0;
    element.setAttribute("role", "button");
}

// Announce what has changed in the reports: outcomes and errors, but not the progress of a download.
function facesnapAnnounce(status, alert) {
    const changed = [[], []];
    for (const report of gradioApp().querySelectorAll(".facesnap-report:not(.facesnap-busy)")) {
        const text = facesnapSpokenText(report), before = report.dataset.facesnapSaid;
        if (text === before) continue;
        report.dataset.facesnapSaid = text;
        const problem = report.matches(".facesnap-problem") || report.querySelector(".facesnap-problem");
        if (text && before !== undefined) changed[problem ? 1 : 0].push(text);
    }
    [status, alert].forEach((region, i) => {
        if (changed[i].length) region.textContent = changed[i].join(" ");
    });
}

function facesnapSpokenText(report) {
    const parts = [...report.querySelectorAll(facesnapSpoken)];
    const outer = parts.filter(part => !parts.some(other => other !== part && other.contains(part)));
    const texts = outer.length ? outer.map(part => part.textContent) : [report.textContent];
    return texts.map(text => text.trim()).filter(Boolean).join(". ");
}
