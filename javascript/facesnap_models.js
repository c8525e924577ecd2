// The buttons of the panel of model files. Their action, such as "get antelopev2", is written into a hidden text box
// with a number, so that the server also sees a repeated action. The progress of a download is copied into its row.

"use strict";

let facesnapActions = 0;

onUiLoaded(() => {
    document.addEventListener("click", event => {
        const button = event.target.closest?.("[data-facesnap-action]");
        const tab = button?.closest("[id*=_facesnap_]").id.match(/^.*?_facesnap_/)?.[0];
        const box = tab && gradioApp().querySelector(`#${tab}models_action textarea`);
        if (box) facesnapType(box, `${button.dataset.facesnapAction} ${++facesnapActions}`);
    });
    setInterval(facesnapCopyProgress, 5 * facesnapPollInterval);
});

function facesnapCopyProgress() {
    for (const row of gradioApp().querySelectorAll("[data-facesnap-progress]")) {
        const job = gradioApp().querySelector(`[data-facesnap-job="${CSS.escape(row.dataset.facesnapProgress)}"]`);
        if (row.innerHTML !== (job?.innerHTML ?? "")) row.replaceChildren(...job ? job.cloneNode(true).childNodes : []);
    }
}
