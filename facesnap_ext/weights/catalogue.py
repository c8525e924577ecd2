"""What FaceSnap works with: each part's source, size, licence and hash, as data. The only place that names hosts."""

from __future__ import annotations

from dataclasses import dataclass

from facesnap_ext.errors import FaceSnapError

ROLES = {  # what each part is for; the names are those of `places.Found`
    "facesnap": "turns a face into tokens and tokens into guidance: FaceSnap's own two networks",
    "instantid": "the same by InstantID's two files, which serve where there is no FaceSnap file",
    "face_pack": "finds faces and tells who they are",
    "clip": "sees what a face looks like: hair, skin, age; InstantID does without",
    "deca": "sees pose, expression and the shape of a face; without it the face keeps the shape in the driving photo",
    "flame": "the head whose 72 points carry pose, expression and shape; together with DECA",
}
TO_BEGIN = (
    "To begin: InstantID's two files, which FaceSnap downloads when you ask it to, and antelopev2. Nobody has "
    "published a FaceSnap file yet."
)
NON_COMMERCIAL = "non-commercial research"


@dataclass(frozen=True)
class Part:
    """One way to fill a role.

    name: what `facesnap models get` calls it. commercial: whether the licence allows commercial use; None: it depends.
    page: where to read about it and, where `url` is empty, to get it by hand. into: where it goes, in the model folder.
    size: bytes, exact where there is a hash, else about. sha256: of the file at `url`; only with one does FaceSnap
    download. hash_from: who says that this is the hash.
    """

    name: str
    role: str
    title: str
    licence: str
    commercial: bool | None
    page: str
    get: str
    into: str
    size: int
    url: str = ""
    sha256: str = ""
    hash_from: str = ""
    note: str = ""

    @property
    def use(self) -> str:
        """Whether commercial use is allowed, in words."""
        return {True: "commercial use allowed", False: "no commercial use", None: "depends"}[self.commercial]


_INSTANTID = "https://huggingface.co/InstantX/InstantID"
_MIRROR = "the pointer files of a third party's mirror, not the authors themselves"
_BOUND = "works with antelopev2 alone, and therefore for non-commercial research, as its authors say"

PARTS = (
    Part(
        "facesnap",
        "facesnap",
        "FaceSnap file",
        "that of its training data",
        None,
        "",
        "nobody has published one yet; the command facesnap init makes the file that training starts from",
        "facesnap.safetensors",
        2_900_000_000,
    ),
    Part(
        "antelopev2",
        "face_pack",
        "antelopev2",
        NON_COMMERCIAL,
        False,
        "https://github.com/deepinsight/insightface/releases/tag/v0.7",
        "download antelopev2.zip and unpack it",
        "antelopev2/",
        400_000_000,
    ),
    Part(
        "buffalo_l",
        "face_pack",
        "buffalo_l",
        NON_COMMERCIAL,
        False,
        "https://github.com/deepinsight/insightface/releases/tag/v0.7",
        "download buffalo_l.zip and unpack it",
        "buffalo_l/",
        300_000_000,
        note="not for InstantID",
    ),
    Part(
        "auraface",
        "face_pack",
        "AuraFace",
        "Apache-2.0",
        True,
        "https://huggingface.co/fal/AuraFace-v1",
        "download scrfd_10g_bnkps.onnx and glintr100.onnx",
        "auraface/",
        280_000_000,
        note="not for InstantID; the recognition model is fal's own, the detector beside it has the name of "
        "insightface's, whose models are for non-commercial research: ask fal before relying on it. A FaceSnap file "
        "serves only with the pack that it was trained with",
    ),
    Part(
        "clip",
        "clip",
        "CLIP-ViT-H-14-laion2B-s32B-b79K",
        "MIT",
        True,
        "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "download model.safetensors; ControlNet's clip_h.pth is the same encoder",
        "clip-vit-h.safetensors",
        2_500_000_000,
    ),
    Part(
        "deca",
        "deca",
        "DECA",
        NON_COMMERCIAL,
        False,
        "https://github.com/yfeng95/DECA",
        "register with the FLAME project, then download deca_model.tar as DECA's page says",
        "deca_model.tar",
        430_000_000,
    ),
    Part(
        "flame2020",
        "flame",
        "FLAME 2020",
        NON_COMMERCIAL,
        False,
        "https://flame.is.tue.mpg.de",
        "register, then download FLAME 2020",
        "generic_model.pkl",
        53_000_000,
    ),
    Part(
        "flame2023_open",
        "flame",
        "FLAME 2023 Open",
        "CC-BY-4.0",
        True,
        "https://flame.is.tue.mpg.de",
        "register, then download FLAME 2023 Open",
        "flame2023_Open.pkl",
        53_000_000,
        note="name its authors where you publish",
    ),
    Part(
        "instantid-identitynet",
        "instantid",
        "InstantID's IdentityNet",
        "Apache-2.0",
        False,
        _INSTANTID,
        "download ControlNetModel/diffusion_pytorch_model.safetensors",
        "InstantID/ControlNetModel/diffusion_pytorch_model.safetensors",
        2_502_139_136,
        f"{_INSTANTID}/resolve/main/ControlNetModel/diffusion_pytorch_model.safetensors",
        "c8127be9f174101ebdafee9964d856b49b634435cf6daa396d3f593cf0bbbb05",
        _MIRROR,
        _BOUND,
    ),
    Part(
        "instantid-adapter",
        "instantid",
        "InstantID's adapter",
        "Apache-2.0",
        False,
        _INSTANTID,
        "download ip-adapter.bin",
        "InstantID/ip-adapter.bin",
        1_691_134_141,
        f"{_INSTANTID}/resolve/main/ip-adapter.bin",
        "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1",
        _MIRROR,
        _BOUND,
    ),
)

COMMERCIAL_GAPS = (
    "a FaceSnap file that was trained on data and with a face pack that allow it: nobody has published one",
    "an encoder of pose, expression and shape: DECA is for non-commercial research",
    "the points of a photo where there is no such encoder: insightface's 1k3d68.onnx is for non-commercial research",
    "a face detector beyond doubt: the one beside AuraFace's recognition model has the name of insightface's",
)
COMMERCIAL_THERE = "CLIP-ViT-H (MIT), FLAME 2023 Open (CC-BY-4.0) and AuraFace's recognition model (Apache-2.0)"


def ways(role: str) -> tuple[Part, ...]:
    """The parts that fill a role."""
    return tuple(part for part in PARTS if part.role == role)


def downloadable(name: str) -> Part:
    """The part of this name, which FaceSnap can download.

    Raises:
        FaceSnapError: there is none, or it is to be had by hand only.
    """
    part = next((part for part in PARTS if part.name == name), None)
    if part is None:
        raise FaceSnapError(f"There is no part {name!r}; there is {', '.join(part.name for part in PARTS)}.")
    if not (part.url and part.sha256):
        where = f", from {part.page}" if part.page else ""
        raise FaceSnapError(f"FaceSnap does not download {part.title}, whose hash it does not know: {part.get}{where}.")
    return part
