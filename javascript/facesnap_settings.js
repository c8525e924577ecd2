// A person's settings whose inputs are plain HTML, and the hidden text box with their JSON.
//
//     const settings = facesnapSettings(element, changed);  // `changed` is called after an input has changed
//     settings.values()         // by name, as in facesnap_ext/settings/page_settings.py
//     settings.set({yaw: 20})   // also into the inputs and the text box
//     settings.reset("place")   // or "pose": the initial values
//     settings.offer({identity: ["Ada"]})  // the choices of lists
//     settings.read()           // what the server has written into the text box, for example pasted infotext
//
// Two inputs of one setting, a number and a range, are kept in step.

"use strict";

const facesnapPlaceSettings = ["placed", "x", "y", "size"];
const facesnapWithoutInput = {template: "front", face_index: 0, driving_face_index: 0};  // the faces have buttons

function facesnapSettings(element, changed) {
    const box = () => element("settings").querySelector("textarea");
    const person = element("person");
    const inputs = new Map();  // by name of the setting
    for (const input of person.querySelectorAll("[data-facesnap-setting]")) {
        const name = input.dataset.facesnapSetting;
        inputs.set(name, [...inputs.get(name) || [], input]);
    }
    const initial = {...facesnapWithoutInput};
    for (const [name, [input]] of inputs) if (name !== "template") initial[name] = valueOf(name, input);
    let values = {...initial}, written = box().value;

    function valueOf(name, input) {
        if (input.type === "checkbox") return input.checked;
        if (input.type === "number" || input.type === "range") return Number(input.value);
        return input.type === "radio" ? inputs.get(name).find(one => one.checked)?.value : input.value;
    }

    function show(name, value) {
        for (const input of inputs.get(name) || []) {
            if (input.matches("select") && ![...input.options].some(option => option.value === value)) {
                input.add(new Option(value, value));  // the list is not up to date, or the file is missing
            }
            if (input.type === "checkbox") input.checked = value;
            else if (input.type === "radio") input.checked = input.value === value;
            else if (input !== document.activeElement || Number(input.value) !== value) input.value = value;
        }
    }

    // The templates and the other poses are one group of radio buttons.
    function showPose() {
        if (values.pose === "template") show("template", values.template);
        else show("pose", values.pose);
    }

    function write() {
        written = JSON.stringify(values);
        facesnapType(box(), written);
    }

    function set(changes) {
        for (const [name, value] of Object.entries(changes)) {
            if (!(name in initial)) continue;
            values[name] = value;
            if (name !== "pose" && name !== "template") show(name, value);
        }
        showPose();
        write();
    }

    function take({target: input}) {
        const name = input.dataset?.facesnapSetting;
        if (!inputs.get(name)?.includes(input)) return;
        const number = input.type === "number" || input.type === "range";
        if (number && !Number.isFinite(input.valueAsNumber)) return;  // being typed
        if (number && !(input.valueAsNumber >= input.min && input.valueAsNumber <= input.max)) return;
        values[name] = valueOf(name, input);
        if (number) values[name] = input.valueAsNumber;
        if (name === "template") values.pose = "template";
        for (const other of inputs.get(name)) if (number && other !== input) other.value = values[name];
        write();
        changed();
    }

    person.addEventListener("input", take);
    person.addEventListener("change", ({target: input}) => {  // show the value in use if the typed one is unusable
        const name = input.dataset?.facesnapSetting;
        if (!inputs.get(name)?.includes(input) || input.type !== "number") return;
        const number = Number.isFinite(input.valueAsNumber) ? input.valueAsNumber : values[name];
        const limited = Math.min(Math.max(number, input.min), input.max);
        input.value = limited;
        if (limited !== values[name]) set({[name]: limited});
    });
    person.addEventListener("keydown", event => {  // the host has shortcuts
        if (event.target.dataset?.facesnapSetting) event.stopPropagation();
    });

    // Set the choices of lists, after an empty one. What is chosen stays in its list.
    function offer(lists) {
        for (const [name, choices] of Object.entries(lists)) {
            for (const select of inputs.get(name) || []) {
                select.replaceChildren(...["", ...choices].map(choice => new Option(choice, choice)));
            }
            show(name, values[name]);
        }
    }

    return {
        values: () => values,
        set,
        offer,
        reset(part) {
            const names = Object.keys(initial).filter(name => part === "place" ? facesnapPlaceSettings.includes(name) :
                facesnapPoseSettings(element).includes(name));
            set(Object.fromEntries(names.map(name => [name, initial[name]])));
        },
        isInitial: names => names.every(name => values[name] === initial[name]),
        read() {
            const text = box().value;
            if (text === written) return;
            written = text;
            let given = {};
            try {
                given = JSON.parse(text || "{}");
            } catch {
                return;  // the server reports it
            }
            values = {...initial, ...given};
            for (const [name, value] of Object.entries(values)) {
                if (name !== "pose" && name !== "template") show(name, value);
            }
            showPose();
        },
    };
}

// The settings that "Reset pose" resets: the pose, the turns, and the expression.
function facesnapPoseSettings(element) {
    const sliders = ["sliders", "movements"].flatMap(part =>
        [...element(part).querySelectorAll("[data-facesnap-setting]")].map(input => input.dataset.facesnapSetting));
    return ["pose", "template", "expression_source", "expression", "expression_strength", ...new Set(sliders)];
}

// Choose weight, start and end with a preset, and show which preset they are: "custom" if none.
function facesnapPresets(group, settings) {
    const presets = JSON.parse(group.dataset.facesnapPresets);
    const radio = name => group.querySelector(`input[value="${name}"]`);
    group.addEventListener("input", event => {
        const [weight, start, end] = presets[event.target.value] || [];
        if (weight !== undefined) settings.set({weight, start, end});
    });
    return () => {
        const {weight, start, end} = settings.values(), current = [weight, start, end];
        const name = Object.keys(presets).find(one => presets[one].every((value, i) => value === current[i])) || "custom";
        radio("custom").closest("label").hidden = name !== "custom";
        if (!radio(name).checked) radio(name).checked = true;
    };
}
