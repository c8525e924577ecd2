// A person's forms: a pressed button sends the values of its form to the server, which draws the saved person and the
// lists of names again.

"use strict";

let facesnapTaskNumber = 0;  // makes each request different from the ones before
const facesnapEveryone = [];  // the people on the page

// Answer the buttons in a person's forms. Enter in a text field presses the button of its form. Returns the function
// that sends a task, and one that brings the lists up to date. `models` finds the panel of model files. A new page first
// sends "list", because gradio draws it as it was when the WebUI was started.
function facesnapTasks(element, settings, models) {
    const person = element("person"), listed = [];
    let described = settings.values().identity;
    const box = () => element("task").querySelector("textarea");
    let done = Promise.resolve();  // gradio 3 ignores a task while it carries out another one; the server empties the box
    const send = values => {
        const number = ++facesnapTaskNumber;
        done = done.then(() => {
            facesnapType(box(), JSON.stringify({...values, number}));
            return facesnapUntil(() => !box().value, facesnapPatience);
        });
        return number;
    };
    facesnapEveryone.push({send, settings});

    person.addEventListener("click", async event => {
        const button = event.target.closest("[data-facesnap-task]");
        if (!button) return;
        const values = {do: button.dataset.facesnapTask, person: button.dataset.facesnapPerson};
        for (const field of button.closest(".facesnap-form").querySelectorAll("[data-facesnap-field]")) {
            values[field.dataset.facesnapField] = field.type === "checkbox" ? field.checked : field.value;
        }
        const number = send(values);
        const find = () => person.querySelector(`.facesnap-report [data-facesnap-number="${number}"]`);
        const answer = await facesnapUntil(find, 300);
        const {facesnapOld, facesnapNew} = answer?.dataset ?? {};
        if (facesnapNew === undefined) return;  // an error
        for (const other of facesnapEveryone.filter(one => one.send !== send)) {
            const {identity} = other.settings.values();
            if (facesnapOld && identity === facesnapOld) other.settings.set({identity: facesnapNew});
            other.send({do: "list"});
        }
    });
    person.addEventListener("keydown", event => {
        if (event.key !== "Enter" || !event.target.matches("input[data-facesnap-field=name]")) return;
        event.preventDefault();
        event.target.closest(".facesnap-form").querySelector("[data-facesnap-task]").click();
    });
    person.addEventListener("change", event => {
        if (event.target.dataset.facesnapSetting !== "identity") return;
        described = event.target.value;
        send({do: "choose"});
    });

    // Fill the lists with the names that the server has sent, and ask for the saved person that was pasted.
    function update() {
        [element("chosen"), models()].forEach((drawn, i) => {
            const lists = drawn?.querySelector("[data-facesnap-lists]")?.dataset.facesnapLists;
            if (!lists || lists === listed[i]) return;
            listed[i] = lists;
            settings.offer(JSON.parse(lists));
        });
        if (settings.values().identity === described) return;
        described = settings.values().identity;
        send({do: "list"});
    }
    return {send, update};
}
