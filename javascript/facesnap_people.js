// Forms about saved people: a pressed button sends the values of its form to the server.

"use strict";

let facesnapTaskNumber = 0;  // makes each request different from the ones before
const facesnapPeopleLists = [];  // functions that send a request from one of the people on the page

// Answer the buttons in a person's forms. Enter in a text field presses the button of its form. Returns the
// function that sends a task. A new page first sends "list", because gradio draws it as it was when the WebUI was started.
function facesnapPeople(element) {
    const person = element("person"), report = element("people_report");
    const send = values => {
        const task = JSON.stringify({...values, number: ++facesnapTaskNumber});
        facesnapType(element("people_task").querySelector("textarea"), task);
        return facesnapTaskNumber;
    };
    facesnapPeopleLists.push(send);

    person.addEventListener("click", async event => {
        const button = event.target.closest("[data-facesnap-task]");
        if (!button) return;
        const values = {do: button.dataset.facesnapTask, person: button.dataset.facesnapPerson};
        for (const field of button.closest(".facesnap-form").querySelectorAll("[data-facesnap-field]")) {
            values[field.dataset.facesnapField] = field.type === "checkbox" ? field.checked : field.value;
        }
        const number = send(values);
        const answer = await facesnapUntil(() => report.querySelector(`[data-facesnap-number="${number}"]`), 300);
        if (answer?.dataset.facesnapNew === undefined) return;  // an error
        const change = {do: "list", person: answer.dataset.facesnapOld, name: answer.dataset.facesnapNew};
        for (const other of facesnapPeopleLists) if (other !== send) other(change);
    });
    person.addEventListener("keydown", event => {
        if (event.key !== "Enter" || !event.target.matches("input[data-facesnap-field=name]")) return;
        event.preventDefault();
        event.target.closest(".facesnap-form").querySelector("[data-facesnap-task]").click();
    });
    return send;
}
