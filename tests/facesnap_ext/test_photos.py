"""Photos: all kinds of image files become upright RGB, and other files raise a clear error."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo, PhotoReader, TooManyPhotosError, from_base64, from_bytes, from_path, from_pil

ORIENTATION = 0x0112


def random_pixels(height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_all_sources_give_the_same_photo(tmp_path):
    pixels = random_pixels()
    data = encoded(Image.fromarray(pixels))
    (tmp_path / "me.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    results = [
        from_path(tmp_path / "me.png"),
        from_bytes(data, "me.png"),
        from_pil(Image.fromarray(pixels), "me.png"),
        from_base64(text, "me.png"),
        from_base64(f"data:image/png;base64,{text}", "me.png"),
        from_base64(f" DATA:image/x-png;charset=utf-8;base64,{text[:40]}\r\n{text[40:]}\n", "me.png"),
    ]
    for photo in results:
        np.testing.assert_array_equal(photo.pixels, pixels)
        assert photo.pixels.dtype == np.uint8
        assert photo.name == "me.png"


def test_digest_depends_on_pixels_and_shape():
    pixels = random_pixels(4, 6)
    digest = Photo(pixels, "a").digest
    assert digest == Photo(pixels.copy(), "b").digest
    assert digest != Photo(pixels.reshape(6, 4, 3), "a").digest
    other = pixels.copy()
    other[3, 5, 2] ^= 1
    assert digest != Photo(other, "a").digest
    assert len(digest) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), "uint8"), ((4, 4, 4), "uint8"), ((0, 4, 3), "uint8"), ((4, 4, 3), "float32")]
)
def test_photo_must_be_rgb_bytes(shape, dtype):
    with pytest.raises(ValueError, match="uint8"):
        Photo(np.zeros(shape, dtype), "wrong")


# how a camera stores an upright image, by the value of the EXIF orientation tag
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, format):
    upright = random_pixels()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(from_bytes(data, "rotated").pixels, upright)


@given(alpha=st.integers(0, 255), value=st.integers(0, 255))
def test_transparent_pixels_are_blended_with_white(alpha, value):
    expected = (alpha * value + (255 - alpha) * 255) / 255
    for image in (Image.new("RGBA", (2, 2), (value,) * 3 + (alpha,)), Image.new("LA", (2, 2), (value, alpha))):
        assert np.abs(from_bytes(encoded(image), "transparent").pixels - expected).max() <= 1


def test_transparent_colours_become_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 0, 0, 0])
    palette.putdata([0, 1])
    expected = [[[200, 10, 20], [255, 255, 255]]]
    np.testing.assert_array_equal(from_bytes(encoded(palette, transparency=1), "p").pixels, expected)
    np.testing.assert_array_equal(from_bytes(encoded(palette, "GIF", transparency=1), "p").pixels, expected)
    colours = Image.fromarray(np.array([[[200, 10, 20], [0, 0, 0]]], np.uint8))
    np.testing.assert_array_equal(from_bytes(encoded(colours, transparency=(0, 0, 0)), "rgb").pixels, expected)


def test_greyscale_and_palette_images():
    grey = random_pixels()[:, :, 0]
    np.testing.assert_array_equal(from_bytes(encoded(Image.fromarray(grey)), "grey").pixels, np.stack([grey] * 3, 2))
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(from_bytes(encoded(bits), "bits").pixels[:, :, 1], np.asarray(bits) * 255)
    palette = Image.fromarray(random_pixels()).quantize(4)
    table = np.array(palette.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(from_bytes(encoded(palette), "p").pixels, table[np.asarray(palette)])


def test_cmyk_images():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [0, 0, 0, 55]]], np.uint8)
    image = Image.frombytes("CMYK", (5, 1), inks.tobytes())
    expected = [[[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0], [200, 200, 200]]]
    np.testing.assert_array_equal(from_bytes(encoded(image, "TIFF"), "print").pixels, expected)


RAMP = np.linspace(0, 65535, 64).round().reshape(8, 8)


@pytest.mark.parametrize(
    ("image", "white"),
    [
        (Image.fromarray(RAMP.astype("<u2")), 65535),
        (Image.fromarray((RAMP // 300).astype("<u2")), 65535),
        (Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()), 65535),
        (Image.fromarray(RAMP.astype(np.int32)), 65535),
        (Image.fromarray((RAMP // 257).astype(np.int32)), 255),
        (Image.fromarray((RAMP * 32767).astype(np.int32)), 2**31 - 1),
        (Image.fromarray((RAMP / 65535).astype(np.float32)), 1),
        (Image.fromarray((RAMP / 257).astype(np.float32)), 255),
        (Image.fromarray(RAMP.astype(np.float32)), 65535),
    ],
)
def test_16_and_32_bit_greyscale_is_scaled_to_8_bits(image, white):
    expected = np.asarray(image).astype(float) / white * 255
    pixels = from_pil(image, "grey").pixels
    assert np.abs(pixels - expected[:, :, None]).max() <= 0.51


def test_16_bit_greyscale_files_are_scaled():
    """This must hold for every mode in which Pillow opens a 16-bit file."""
    image = Image.fromarray(RAMP.astype("<u2"))
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(from_bytes(encoded(image, format), "x").pixels[:, :, 2], (RAMP / 257).round())


def test_16_bit_colour_files_are_scaled():
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(np.uint16)
    for ending in (".png", ".tiff"):
        data = cv2.imencode(ending, values[:, :, ::-1])[1].tobytes()
        assert np.abs(from_bytes(data, "rgb48").pixels - values / 257).max() <= 1


def test_invalid_pixel_values_are_rejected():
    for value in (np.nan, np.inf, 1e20):
        with pytest.raises(FaceSnapError, match=r"odd\.tif"):
            from_pil(Image.fromarray(np.full((2, 2), value, np.float32)), "odd.tif")


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_animations_is_used(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (from_bytes(data, "animation").pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_truncated_files_are_rejected(format, tolerant, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = encoded(Image.fromarray(random_pixels(64, 64)), format)
    for fraction in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(FaceSnapError, match=r"half\.jpg"):
            from_bytes(data[: int(len(data) * fraction)], "half.jpg")
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


@given(st.binary(max_size=200))
def test_arbitrary_data_are_rejected(data):
    with pytest.raises(FaceSnapError, match=r"holiday\.doc"):
        from_bytes(data, "holiday.doc")


@settings(deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_files_give_a_photo_or_a_facesnap_error(format, data):
    file = bytearray(encoded(Image.fromarray(random_pixels(16, 16)), format))
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert from_bytes(bytes(file), "damaged").pixels.shape[2] == 3
    except FaceSnapError as error:
        assert "damaged" in str(error)


def test_postscript_is_not_executed():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(FaceSnapError, match=r"drawing\.eps is not a readable image"):
        from_bytes(data, "drawing.eps")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize(("width", "height"), [(10_000, 8_001), (60_000, 60_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_large_images_are_rejected_before_decoding(width, height, pillow_limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(FaceSnapError, match=r"bomb\.png has more than 80 million pixels"):
        from_bytes(png_header(width, height), "bomb.png")


def test_images_of_exactly_the_maximum_size_are_accepted(monkeypatch):
    monkeypatch.setattr(photos, "MAX_PIXELS", 12)
    assert from_pil(Image.new("RGB", (4, 3)), "fits").pixels.shape == (3, 4, 3)
    with pytest.raises(FaceSnapError, match="wide"):
        from_pil(Image.new("RGB", (13, 1)), "wide")


def test_base64_is_never_used_as_a_path_or_address(tmp_path, monkeypatch):
    """This holds even if the text is valid base64 and a file of this name exists."""
    monkeypatch.chdir(tmp_path)
    data = encoded(Image.fromarray(random_pixels()))
    for name in ("face", "face.png", str(tmp_path / "face.png")):
        (tmp_path / name).write_bytes(data)
    paths = ["face", "face.png", str(tmp_path / "face.png"), (tmp_path / "face.png").as_uri(), "https://a.org/b.png"]
    for text in [*paths, "", "data:text/html;base64,aGVsbG8=", "data:image/png,hello", "ä"]:
        with pytest.raises(FaceSnapError, match="reference 1"):
            from_base64(text, "reference 1")
    with pytest.raises(FaceSnapError, match="is not base64"):
        from_base64("https://a.org/b.png", "reference 1")


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(FaceSnapError, match=r"missing\.png"):
        from_path(tmp_path / "missing.png")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FaceSnapError, match="pictures"):
        from_path(tmp_path / "pictures")


def url_safe(text):
    return text.replace("+", "-").replace("/", "_")


@pytest.mark.parametrize(
    "form",
    [
        lambda text: text,
        lambda text: "data:application/octet-stream;base64," + text,
        lambda text: "data:;base64," + text,
        lambda text: "DATA:IMAGE/PNG;BASE64," + text,
        lambda text: "data:text/plain;charset=US-ASCII;base64," + text,
        lambda text: 'data:image/png;name="a photo.png"; charset=utf-8 ;base64,' + text,
        lambda text: " \n data:image/png;base64,\n" + "\r\n".join(text[i : i + 60] for i in range(0, len(text), 60)),
        lambda text: text.rstrip("="),
        url_safe,
        lambda text: "data:image/x-unknown;base64," + url_safe(text).rstrip("="),
        lambda text: "data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ],
)
@pytest.mark.parametrize("size", [(5, 7), (6, 7), (8, 9)])
def test_every_form_of_base64_is_read(form, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(pixels))
    text = base64.b64encode(data).decode()
    assert set("+/") & set(text)
    np.testing.assert_array_equal(from_base64(form(text), "photo").pixels, pixels)


@pytest.mark.parametrize(
    "text",
    [
        *("data:image/svg+xml,%3Csvg/%3E", "data:image/png,AAAA", "data:image/png;base64", "data:" + "x" * 5000),
        *("https://example.org/a.png", "data:image/png;base64,====", "data:image/png;base64,ä", "%", "-", ""),
    ],
)
def test_other_text_is_not_a_photo(text):
    with pytest.raises(FaceSnapError, match=r"^photo is not "):
        from_base64(text, "photo")


SOURCES = {  # one photo of 4 × 3 pixels in every form that a job or a request may use
    "image": Image.new("RGB", (4, 3)),
    "bytes": encoded(Image.new("RGB", (4, 3))),
    "base64": base64.b64encode(encoded(Image.new("RGB", (4, 3)))).decode(),
    "data URL": "data:image/png;base64," + base64.b64encode(encoded(Image.new("RGB", (4, 3)))).decode(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_photos_of_one_job_are_limited_in_number_and_total_size(source, monkeypatch):
    value = SOURCES[source]
    monkeypatch.setattr(photos, "MAX_PHOTOS", 3)
    reader = PhotoReader()
    for number in range(3):
        assert reader.read(value, f"photo {number}").pixels.shape == (3, 4, 3)
    with pytest.raises(TooManyPhotosError, match="more than 3 photos; use fewer"):
        reader.read(value, "photo 3")
    monkeypatch.setattr(photos, "MAX_TOTAL_PIXELS", 35)
    reader = PhotoReader()
    for number in range(2):
        reader.read(value, f"photo {number}")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(TooManyPhotosError, match=r"photos up to photo 2 have more than .* scale them down"):
        reader.read(value, "photo 2")


def test_rejected_photos_do_not_count(monkeypatch):
    monkeypatch.setattr(photos, "MAX_PHOTOS", 1)
    reader = PhotoReader()
    for value in (b"no photo", "no photo"):
        with pytest.raises(FaceSnapError, match="thing is not"):
            reader.read(value, "thing")
    reader.read(SOURCES["bytes"], "photo")


def test_one_photo_is_decoded_at_a_time(monkeypatch):
    inside, most = [], []
    load = ImageFile.ImageFile.load

    def slow(self):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: from_bytes(SOURCES["bytes"], "x"), range(16)))
    assert max(most) == 1


def test_decoding_takes_little_more_memory_than_the_image():
    """Pillow stores RGB in four bytes a pixel; the photo has three. The memory is measured in a separate process."""
    code = """
import io, resource
from PIL import Image
from facesnap_ext.photos import from_bytes
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
files = []
for mode, orientation in (("RGB", 1), ("RGB", 6), ("RGBA", 1), ("L", 3)):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new(mode, (6000, 4000)).save(file, "PNG", exif=exif, compress_level=1)
    files.append(file.getvalue())
    del file
from_bytes(files[0], "warm")
open("/proc/self/clear_refs", "w").write("5")
import re
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
idle = status("VmRSS")
for data in files:
    from_bytes(data, "x")
print(status("VmHWM") - idle)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"Linux only: {run.stderr.strip().splitlines()[-1]}")
    assert float(run.stdout) < 24 * (4 + 3) * 1.3, "MB for 24 million pixels"


DATA_URLS = {
    "a parameter without end": lambda n: "data:image/png" + ";a=" * (n // 3),
    "parameters without a comma": lambda n: "data:image/png" + ";a=b" * (n // 4),
    "a long type": lambda n: "data:image/" + "a" * n + ";base64,",
    "spaces": lambda n: "data:image/png;base64," + " " * n,
    "spaced letters": lambda n: "A " * (n // 2),
    "commas": lambda n: "," * n,
    "letters": lambda n: "A" * n + "*",
}


@pytest.mark.parametrize("shape", DATA_URLS)
def test_parsing_base64_takes_linear_time(shape):
    """The text has 28 MB, the maximum of a request; a regular expression with nested repetition took seconds."""
    text = DATA_URLS[shape](28 * 2**20)
    start = time.process_time()
    with pytest.raises(FaceSnapError, match="long"):
        from_base64(text, "long")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "header",
    [
        "",
        "data:image/png;base64,",
        "data:;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:application/octet-stream;base64,",
        "data:image/svg+xml;charset=utf-8;base64,",
        " data:image/png;name=a.png;base64,",
        "data:binary/octet-stream;base64, ",
    ],
)
def test_every_form_of_data_url_is_understood(header):
    assert from_base64(header + SOURCES["base64"], "photo").pixels.shape == (3, 4, 3)
