// The buttons of the panel of model files. Their action, such as "get antelopev2", is written into a hidden text box
// with a number, so that the server also sees a repeated action. The progress of a download is copied into its row.
// gradio draws a new page as it was when the WebUI was started, so the list is refreshed when the accordion is opened.

"use strict";

let facesnapActions = 0;

onUiLoaded(() => {
    document.addEventListener("click", event => {
        const button = event.target.closest?.("[data-facesnap-action]");
        const tab = button?.closest("[id*=_facesnap_]").id.match(/^.*?_facesnap_/)?.[0];
        const box = tab && gradioApp().querySelector(`#${tab}models_action textarea`);
        if (box) facesnapAct(box, button.dataset.facesnapAction);
    });
    setInterval(facesnapCopyProgress, 5 * facesnapPollInterval);
    setInterval(facesnapRefreshOpened, 5 * facesnapPollInterval);
});

function facesnapAct(box, action) {
    facesnapType(box, `${action} ${++facesnapActions}`);
}

function facesnapRefreshOpened() {
    for (const box of gradioApp().querySelectorAll("[id$=_facesnap_models_action] textarea")) {
        const panel = gradioApp().querySelector(`#${box.closest("[id$=_facesnap_models_action]").id.replace(/_action$/, "")}`);
        if (box.facesnapOpened || !panel?.offsetParent) continue;
        box.facesnapOpened = true;
        facesnapAct(box, "refresh");
    }
}

function facesnapCopyProgress() {
    for (const row of gradioApp().querySelectorAll("[data-facesnap-progress]")) {
        const job = gradioApp().querySelector(`[data-facesnap-job="${CSS.escape(row.dataset.facesnapProgress)}"]`);
        if (row.innerHTML !== (job?.innerHTML ?? "")) row.replaceChildren(...job ? job.cloneNode(true).childNodes : []);
    }
}
