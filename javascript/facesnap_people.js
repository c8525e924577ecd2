// Forms about saved people: a pressed button sends the values of its form to the server.

"use strict";

let facesnapTaskNumber = 0;  // makes each request different from the one before

// Answer the buttons in a person's forms. Enter in a text field presses the button of its form.
function facesnapPeople(element) {
    const person = element("person");
    person.addEventListener("click", event => {
        const button = event.target.closest("[data-facesnap-task]");
        if (!button) return;
        const values = {do: button.dataset.facesnapTask, person: button.dataset.facesnapPerson};
        for (const field of button.closest(".facesnap-form").querySelectorAll("[data-facesnap-field]")) {
            values[field.dataset.facesnapField] = field.type === "checkbox" ? field.checked : field.value;
        }
        values.number = ++facesnapTaskNumber;
        facesnapType(element("people_task").querySelector("textarea"), JSON.stringify(values));
    });
    person.addEventListener("keydown", event => {
        if (event.key !== "Enter" || !event.target.matches("input[data-facesnap-field=name]")) return;
        event.preventDefault();
        event.target.closest(".facesnap-form").querySelector("[data-facesnap-task]").click();
    });
}
