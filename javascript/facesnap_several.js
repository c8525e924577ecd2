// Several people in one image: a photo adds its person to the image, and one button places the people side by side.

"use strict";

const facesnapFaceHeight = 0.45;  // of one person, as a fraction of the image's height

// Take part in a tab's list of people. Returns a function that is called while the person's controls are visible.
function facesnapJoin(people, person, tab, {element, settings}) {
    const box = element("enable").querySelector("input[type=checkbox]");
    people[person] = {element, settings, enabled: () => box.checked};
    let before = false;

    // A new photo or saved person adds the person, unless the user has removed them again since then.
    function add() {
        const photos = element("references");
        if (photos.classList.contains("facesnap-busy")) return;  // the same photos are uploaded again
        const given = Boolean(photos.querySelector("a[href]") || settings.values().identity);
        if (given && !before && person > 1 && !box.checked) box.click();
        before = given;
    }

    const everywhere = () => facesnapEnabled(people).filter(one => one.settings.values().region === "image");
    element("person").addEventListener("click", event => {
        if (event.target.closest("[data-facesnap-side-by-side]")) facesnapPlaceSideBySide(people);
    });
    return () => {
        add();
        const mixed = tab === "txt2img" && box.checked && everywhere().length > 1;
        if (element("person").dataset.facesnapMixed !== String(mixed)) element("person").dataset.facesnapMixed = mixed;
    };
}

function facesnapEnabled(people) {
    const [first, ...others] = Object.keys(people).sort((one, other) => one - other).map(number => people[number]);
    return first?.enabled() ? [first, ...others.filter(one => one.enabled())] : [];
}

// Give each person the region around their face, from left to right.
function facesnapPlaceSideBySide(people) {
    const enabled = facesnapEnabled(people), size = Math.min(facesnapFaceHeight, 0.9 / enabled.length);
    enabled.forEach(({settings}, i) => {
        settings.read();  // what has been pasted
        settings.set({region: "face", placed: true, x: Number(((i + 0.5) / enabled.length).toFixed(3)), y: 0.45, size});
    });
}
