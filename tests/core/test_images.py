"""The one image reader: every mode and bit depth, orientation, transparency, frames, damage."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffportrait3d.images import ImageError, NoteLog, read_image

HALF = 32768  # of 16 bits
FILLED = "transparent areas are filled with white"


def save(path, image: Image.Image | np.ndarray, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def png16(path, samples: np.ndarray, colour_type: int, extra: bytes = b""):
    """A PNG of 16 bits a sample, [H, W, C], which Pillow cannot write itself in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return _written(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels)


GREY16 = np.full((4, 6), HALF, np.uint16)
DEEP = {
    "grey PNG": lambda p: save(p / "a.png", GREY16),
    "grey TIFF": lambda p: save(p / "a.tif", GREY16),
    "grey TIFF of Motorola's byte order": lambda p: save(
        p / "a.tif", Image.frombytes("I;16B", (6, 4), GREY16.astype(">u2").tobytes())
    ),
    "grey JPEG 2000": lambda p: save(p / "a.jp2", GREY16, irreversible=False),
    "PGM": lambda p: _written(p / "a.pgm", b"P5 6 4 65535\n" + GREY16.astype(">u2").tobytes()),
    "PGM of 10 bits": lambda p: _written(p / "a.pgm", b"P5 6 4 1023\n" + np.full((4, 6), 512, ">u2").tobytes()),
    "RGB PNG": lambda p: png16(p / "a.png", np.full((4, 6, 3), HALF), 2),
    "grey PNG with alpha": lambda p: png16(p / "a.png", np.full((4, 6, 2), [HALF, 65535]), 4),
    "RGBA PNG": lambda p: png16(p / "a.png", np.full((4, 6, 4), [HALF, HALF, HALF, 65535]), 6),
    "PPM": lambda p: _written(p / "a.ppm", b"P6 6 4 65535\n" + np.full((4, 6, 3), HALF, ">u2").tobytes()),
}


def _written(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_bits_are_scaled(tmp_path, kind):
    image = read_image(DEEP[kind](tmp_path))
    assert image.pixels.shape == (4, 6, 3) and image.notes == ()
    assert image.as_floats().mean() == pytest.approx(0.5, abs=1 / 255)
    assert np.abs(image.as_bytes().astype(int) - 128).max() <= 1


def test_grey_of_sixteen_bits_keeps_them(tmp_path):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    floats = read_image(save(tmp_path / "a.png", ramp)).as_floats()
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats[..., 1], ramp / 65535, atol=1e-7)


def test_white_is_zero_in_a_tiff(tmp_path):
    path = save(tmp_path / "a.tif", np.full((4, 6), 65535, np.uint16), tiffinfo={262: 0})
    with Image.open(path) as file:
        assert file.tag_v2[262] == 0
    assert read_image(path).as_bytes().max() == 0


VALUES = {
    "0 to 1": (np.float32(0.5), 0.5, "its floating-point values are read as 0 to 1"),
    "0 to 255": (np.float32(127.5), 0.5, "its floating-point values are read as 0 to 255"),
    "0 to 65535": (np.float32(32767.5), 0.5, "its floating-point values are read as 0 to 65535"),
    "integers to 255": (np.int32(51), 0.2, "its 32-bit values are read as 0 to 255"),
    "integers to 65535": (np.int32(13107), 0.2, "its 32-bit values are read as 0 to 65535"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_scales_that_a_file_does_not_state(tmp_path, kind):
    value, wanted, note = VALUES[kind]
    image = read_image(save(tmp_path / "a.tif", np.full((4, 6), value)))
    assert image.as_floats().mean() == pytest.approx(wanted) and image.notes == (note,)


@pytest.mark.parametrize("value", [1.3, -0.1, float("nan"), 1e6, 70000])
def test_values_of_no_known_scale_are_refused(tmp_path, value):
    values = np.full((4, 6), value, np.int32 if isinstance(value, int) else np.float32)
    with pytest.raises(ImageError, match="a.tif.*save it with 8 or 16 bits"):
        read_image(save(tmp_path / "a.tif", values))


RED = (254, 0, 0)
MODES = {
    "bilevel": (lambda: Image.new("1", (6, 4), 1), (255, 255, 255)),
    "grey": (lambda: Image.new("L", (6, 4), 77), (77, 77, 77)),
    "palette": (lambda: Image.new("RGB", (6, 4), RED).quantize(4), RED),
    "CMYK": (lambda: Image.new("CMYK", (6, 4), (0, 255, 255, 0)), (255, 0, 0)),
    "grey, opaque": (lambda: Image.new("LA", (6, 4), (77, 255)), (77, 77, 77)),
    "RGBA, opaque": (lambda: Image.new("RGBA", (6, 4), (*RED, 255)), RED),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_becomes_rgb(tmp_path, kind):
    make, colour = MODES[kind]
    image = read_image(save(tmp_path / "a.tif" if kind == "CMYK" else tmp_path / "a.png", make()))
    assert image.pixels.dtype == np.uint8 and image.pixels.shape == (4, 6, 3) and image.notes == ()
    assert np.abs(image.pixels.astype(int) - colour).max() <= 1


def half_clear(mode: str, clear, solid) -> Image.Image:
    """The left half transparent, the right half not."""
    image = Image.new(mode, (6, 4), clear)
    image.paste(solid, (3, 0, 6, 4))
    return image


def _palette() -> Image.Image:
    image = half_clear("P", 0, 1)
    image.putpalette([255, 0, 255, 0, 0, 254])
    return image


GREY_KEY = np.where(np.arange(6) < 3, HALF, 100)[None].repeat(4, 0).astype(np.uint16)
CLEAR = {
    "RGBA": (lambda p: save(p / "a.png", half_clear("RGBA", (255, 0, 255, 0), (0, 0, 254, 255))), (0, 0, 254)),
    "WebP": (
        lambda p: save(p / "a.webp", half_clear("RGBA", (255, 0, 255, 0), (0, 0, 254, 255)), lossless=True, exact=True),
        (0, 0, 254),
    ),
    "LA": (lambda p: save(p / "a.png", half_clear("LA", (0, 0), (51, 255))), (51, 51, 51)),
    "palette": (lambda p: save(p / "a.png", _palette(), transparency=0), (0, 0, 254)),
    "palette with alphas": (lambda p: save(p / "a.png", _palette(), transparency=b"\x00\xff"), (0, 0, 254)),
    "GIF": (lambda p: save(p / "a.gif", _palette(), transparency=0), (0, 0, 254)),
    "colour key": (
        lambda p: save(p / "a.png", half_clear("RGB", (255, 0, 255), (0, 0, 254)), transparency=(255, 0, 255)),
        (0, 0, 254),
    ),
    "grey key of 16 bits": (lambda p: save(p / "a.png", GREY_KEY, transparency=HALF), (0, 0, 0)),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparency_lies_on_white_and_is_reported(tmp_path, kind):
    make, solid = CLEAR[kind]
    image = read_image(make(tmp_path))
    assert image.notes == (FILLED,)
    assert (image.as_bytes()[:, :3] == 255).all()
    assert np.abs(image.as_bytes()[:, 3:].astype(int) - solid).max() <= 1


def test_a_colour_key_of_sixteen_bits(tmp_path):
    samples = np.array([[[65535, 0, 65535], [0, 0, 40000]]])
    key = struct.pack(">HHH", 65535, 0, 65535)
    chunk = struct.pack(">I", 6) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    image = read_image(png16(tmp_path / "a.png", samples, 2, chunk))
    assert image.as_bytes().tolist() == [[[255, 255, 255], [0, 0, 156]]] and image.notes == (FILLED,)


def test_half_transparency_is_mixed(tmp_path):
    image = read_image(save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (255, 0, 0, 51))))
    assert image.as_bytes()[0, 0].tolist() == [255, 204, 204]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_obeyed(tmp_path, suffix, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (250, 0, 0)
    upright[16:, 24:] = (0, 250, 0)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, "lossless": True} if suffix == "webp" else {"exif": exif}
    image = read_image(save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), **options))
    assert image.pixels.shape == upright.shape
    assert np.abs(image.pixels.astype(int) - upright)[4:-4, 4:-4].mean() < 5
    assert image.notes == ((f"it is turned upright by its EXIF orientation {orientation}",) if orientation > 1 else ())


def test_orientation_of_sixteen_bits_and_of_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = read_image(save(tmp_path / "a.png", np.arange(24, dtype=np.uint16).reshape(4, 6) * 1000, exif=exif))
    assert deep.pixels.shape == (6, 4, 3) and deep.notes == ("it is turned upright by its EXIF orientation 6",)
    assert deep.pixels[0, 0, 0] == pytest.approx(18000 / 65535) and deep.pixels[0, 3, 0] == 0
    clear = read_image(save(tmp_path / "b.png", _palette(), transparency=0, exif=exif))
    assert (clear.pixels[:3] == 255).all() and clear.notes[1] == FILLED


def test_a_damaged_exif_block_is_no_reason_to_refuse(tmp_path):
    image = read_image(save(tmp_path / "a.png", Image.new("RGB", (6, 4), (9, 9, 9)), exif=b"nothing of the kind"))
    assert image.pixels.shape == (4, 6, 3) and image.notes == (
        "its EXIF block cannot be read, so the image is taken as upright",
    )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_is_read_and_said(tmp_path, suffix):
    first, *others = [Image.new("RGB", (6, 4), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    image = read_image(save(tmp_path / f"a.{suffix}", first, save_all=True, append_images=others))
    assert image.notes == ("it has 3 frames, the first is read",)
    assert np.abs(image.pixels.astype(int) - (200, 0, 0)).max() <= 4


def _png_bytes() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def _huge_png() -> bytes:
    """A header that claims 200 megapixels."""
    data = bytearray(_png_bytes())
    data[16:24] = struct.pack(">II", 20000, 10000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


DAMAGED = {
    "cut off": lambda: _png_bytes()[:1500],
    "a chunk overwritten": lambda: _png_bytes()[:60] + b"\xff" * 200 + _png_bytes()[260:],
    "a broken header": lambda: _png_bytes()[:12] + b"XXXX" + _png_bytes()[16:],
    "too large": _huge_png,
    "empty": lambda: b"",
    "text": lambda: b"not an image",
    "zeros": lambda: bytes(4096),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_one_error_that_names_the_file(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(DAMAGED[kind]())
    with pytest.raises(ImageError, match="a.png is not an image that can be read: ."):
        read_image(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ImageError, match="a.png is not an image that can be read: it does not exist"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not an image") as caught:
        read_image(tmp_path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as it leaves a worker process


def test_notes_are_logged_once(tmp_path, caplog):
    path, report = save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (0, 0, 0, 0))), NoteLog()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            report(path, read_image(path))
    assert len(caplog.records) == 1 and "a.png" in caplog.text and FILLED in caplog.text
