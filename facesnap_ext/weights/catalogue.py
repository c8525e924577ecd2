"""The catalogue: source, size, licence and hash of each part. The only module that names download hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from facesnap_ext.errors import FaceSnapError

ROLES = {  # the purpose of each role; `FoundModel.role` uses these names
    "facesnap": "FaceSnap's own two networks: they turn a face into identity tokens, and the tokens into conditioning",
    "instantid": "two files that turn a face into identity tokens and conditioning; used if there is no FaceSnap file",
    "face_pack": "finds faces and computes their identity embeddings",
    "clip": "captures the appearance of a face: hair, skin, age; InstantID does not need it",
    "deca": "estimates pose, expression and face shape; without it, the built-in open face model is used",
    "flame": "together with DECA, provides the 72 landmarks of a face; without DECA, only FLAME's mean face is used",
    "mediapipe": "finds 478 points on a face; used if the face model pack has no 1k3d68.onnx",
    "image_classifier": "detects images that should not be shown, so that FaceSnap can blur them",
}
TO_BEGIN = (
    "To get started, you need InstantID's two files and antelopev2, which FaceSnap can download for you. No FaceSnap "
    "file has been published yet."
)
STARTER_ADVICE = (
    "download InstantID and antelopev2 with the button at the top of the FaceSnap accordion, or with the command "
    "facesnap models get starter."
)
WHERE_TO_GET = "open Model files in the accordion, or run facesnap models, to see where to get {0}"
NON_COMMERCIAL = "non-commercial research"


@dataclass(frozen=True)
class Part:
    """One file or folder that can fill a role.

    Args:
        name: its name in `facesnap models get`.
        commercial: whether the licence allows commercial use; None if the user must check.
        page: the web page that describes it and, if `url` is empty, where the user downloads it.
        how_to_get: instructions for downloading it by hand.
        target: its path in the model folder.
        size: in bytes; exact if there is a hash, otherwise approximate.
        sha256: hash of the file at `url`. Without one, FaceSnap does not download the part.
        hash_from: where the hash comes from.
    """

    name: str
    role: str
    title: str
    licence: str
    commercial: bool | None
    page: str
    how_to_get: str
    target: str
    size: int
    url: str = ""
    sha256: str = ""
    hash_from: str = ""
    note: str = ""

    @property
    def use(self) -> str:
        """Whether commercial use is allowed, in words."""
        return {True: "commercial use allowed", False: "no commercial use", None: "check before commercial use"}[
            self.commercial
        ]


_ANTELOPE = "https://huggingface.co/DIAMONIK7777/antelopev2"
_INSTANTID = "https://huggingface.co/InstantX/InstantID"
_MIRROR = "the pointer files of a third-party mirror, not the authors themselves"
_PUBLIC = "several independent public projects, which all pin this hash"
_BOUND = (
    "works only with antelopev2, and is therefore for non-commercial research only, according to InstantID's authors"
)

PARTS = (
    Part(
        "facesnap",
        "facesnap",
        "FaceSnap file",
        "same as its training data",
        None,
        "",
        "none has been published yet; the command facesnap init creates the file that training starts from",
        "facesnap.safetensors",
        2_900_000_000,
    ),
    *(
        Part(
            f"antelopev2-{name}",
            "face_pack",
            f"antelopev2's {title}",
            NON_COMMERCIAL,
            False,
            "https://github.com/deepinsight/insightface/releases/tag/v0.7",
            f"download antelopev2.zip and extract {file} from it",
            f"antelopev2/{file}",
            size,
            f"{_ANTELOPE}/resolve/main/{file}",
            sha256,
            _PUBLIC,
        )
        for name, title, file, size, sha256 in (
            (
                "detector",
                "face detector",
                "scrfd_10g_bnkps.onnx",
                16_923_827,
                "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
            ),
            (
                "recognition",
                "recognition model",
                "glintr100.onnx",
                260_665_334,
                "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
            ),
            (
                "landmarks",
                "landmark detector",
                "1k3d68.onnx",
                143_607_619,
                "df5c06b8a0c12e422b2ed8947b8869faa4105387f199c477af038aa01f9a45cc",
            ),
        )
    ),
    Part(
        "buffalo_l",
        "face_pack",
        "buffalo_l",
        NON_COMMERCIAL,
        False,
        "https://github.com/deepinsight/insightface/releases/tag/v0.7",
        "download and unpack buffalo_l.zip",
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
        note="not for InstantID. fal trained the recognition model, but the detector has the file name of an "
        "insightface model for non-commercial research; ask fal before you rely on it. A FaceSnap file works only with "
        "the face model pack it was trained with",
    ),
    Part(
        "clip",
        "clip",
        "CLIP-ViT-H-14-laion2B-s32B-b79K",
        "MIT",
        True,
        "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "download model.safetensors; the ControlNet extension's clip_h.pth contains the same encoder",
        "clip-vit-h.safetensors",
        3_944_000_000,
    ),
    Part(
        "deca",
        "deca",
        "DECA",
        NON_COMMERCIAL,
        False,
        "https://github.com/yfeng95/DECA",
        "register with the FLAME project, then download deca_model.tar as described on DECA's page",
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
        note="FaceSnap does not use this file, because DECA's parameters are for FLAME 2020",
    ),
    Part(
        "mediapipe",
        "mediapipe",
        "MediaPipe's face landmarker",
        "Apache-2.0",
        True,
        "https://ai.google.dev/edge/mediapipe/solutions/vision/face_landmarker",
        "download face_landmarker.task, then run python -m facesnap_ext convert face_landmarker.task",
        "face_landmarks.onnx",
        3_760_000,
    ),
    Part(
        "image-classifier",
        "image_classifier",
        "nsfw_image_detection",
        "Apache-2.0",
        True,
        "https://huggingface.co/Falconsai/nsfw_image_detection",
        "download model.safetensors, config.json and preprocessor_config.json into one folder",
        "image_classifier/model.safetensors",
        343_000_000,
        note="optional; other ViT classifiers work too if they use labels such as normal and nsfw",
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

BUNDLES = {
    "antelopev2": ("antelopev2-detector", "antelopev2-recognition", "antelopev2-landmarks"),
    "instantid": ("instantid-identitynet", "instantid-adapter"),
    "starter": (
        "antelopev2-detector",
        "antelopev2-recognition",
        "antelopev2-landmarks",
        "instantid-identitynet",
        "instantid-adapter",
    ),
}
"""Parts that are downloaded together. The starter bundle is all that a first image needs."""

COMMERCIAL_GAPS = (
    "a FaceSnap file whose training data and face model pack permit commercial use (not yet published)",
    "a face detector with a clear licence (AuraFace's detector has the same file name as an insightface model)",
)
COMMERCIAL_AVAILABLE = (
    "CLIP-ViT-H (MIT), AuraFace's recognition model (Apache-2.0), and MediaPipe's face landmarker (Apache-2.0), which "
    "replaces insightface's 1k3d68.onnx and DECA"
)


def parts_for(role: str) -> tuple[Part, ...]:
    """Return the parts that can fill a role."""
    return tuple([part for part in PARTS if part.role == role])


def downloadable(name: str) -> tuple[Part, ...]:
    """Return the part of this name, or the parts of the bundle, if FaceSnap can download them.

    Raises:
        FaceSnapError: there is no such part or bundle, or it can only be downloaded by hand.
    """
    return tuple([_downloadable(part) for part in BUNDLES.get(name, (name,))])


def title_of(parts: Sequence[Part]) -> str:
    """Name several parts by what they belong to, such as "InstantID and antelopev2"; the title of a single part."""
    return parts[0].title if len(parts) == 1 else " and ".join(owners(parts))


def owners(parts: Sequence[Part]) -> list[str]:
    """What parts belong to, such as "InstantID" and "antelopev2"."""
    return list(dict.fromkeys(part.title.partition("'s ")[0] for part in reversed(parts)))


def _downloadable(name: str) -> Part:
    part = next((part for part in PARTS if part.name == name), None)
    if part is None:
        names = ", ".join([*BUNDLES, *(part.name for part in PARTS)])
        raise FaceSnapError(f"There is no part named {name!r}; choose one of {names}.")
    if not (part.url and part.sha256):
        source = f", from {part.page}" if part.page else ""
        raise FaceSnapError(
            f"FaceSnap cannot download {part.title}, because it does not know its hash; {part.how_to_get}{source}."
        )
    return part
