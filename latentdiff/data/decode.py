"""A picture's bytes -> pixels: checked, upright, in RGB, resized and cropped; PNG, JPEG and WebP.

Bytes may come from anywhere. They are told apart by how they begin, and no other decoder of Pillow's is run on them.
"""

import io

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

MAX_PIXELS = 89_478_485
"""More than this is taken for a decompression bomb: Pillow's own bound, a quarter of a GB in RGB."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "RGBX", "CMYK", "YCbCr"))
_SIDEWAYS = frozenset((5, 6, 7, 8))  # values of EXIF's orientation that swap height and width


class BrokenPicture(ValueError):
    """Bytes that give no picture; the message says why."""


def check_picture(content: bytes) -> tuple[int, int]:
    """Decodes a whole picture to see that it is one.

    Args:
        content: a file's bytes.

    Returns:
        (height, width) in pixels, upright.

    Raises:
        BrokenPicture: they are no PNG, JPEG or WebP, are cut off or damaged, hold too many pixels, or more than 8 bits.
    """
    picture = _open(content)
    _load(picture)
    return _upright_size(picture)


def decode_crop(
    content: bytes, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5), flip: bool = False, zoom: float = 1
) -> np.ndarray:
    """The part of a picture that fills a size, once the picture is resized to cover `zoom` times that size.

    What is transparent becomes white. The filter is Lanczos', with its support widened where a picture shrinks.

    Args:
        content: a file's bytes.
        size: (height, width) of the crop.
        place: (y, x), each in [0, 1]: where in the margin the crop lies, to a whole pixel; (0.5, 0.5) is the centre.
        flip: whether left and right are exchanged afterwards.
        zoom: at least 1; 2 shows a quarter of the picture's area, twice as large.

    Returns:
        uint8 (height, width, 3).

    Raises:
        BrokenPicture: as `check_picture`.
    """
    picture = _open(content)
    scale = _cover(size, _upright_size(picture), zoom)
    if scale < 0.5:  # a JPEG can be decoded at a half, a quarter or an eighth; twice the size is left for the filter
        width, height = (int(2 * scale * side) + 1 for side in picture.size)
        picture.draft(None, (width, height))
    _load(picture)
    picture = _to_rgb(ImageOps.exif_transpose(picture))
    width, height = picture.size
    scale = _cover(size, (height, width), zoom)
    margins = int(height * scale - size[0] + 1e-6), int(width * scale - size[1] + 1e-6)
    top, left = (round(at * margin) / scale for at, margin in zip(place, margins, strict=True))
    box = (left, top, min(left + size[1] / scale, width), min(top + size[0] / scale, height))
    crop = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS, box))
    return crop[:, ::-1] if flip else crop


def _cover(size: tuple[int, int], upright: tuple[int, int], zoom: float) -> float:
    return zoom * max(size[0] / upright[0], size[1] / upright[1])


def in_model_range(pictures: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], of any shape."""
    return pictures.astype("float32") / 127.5 - 1


def _open(content: bytes):
    """A picture whose header alone has been read."""
    file = io.BytesIO(content)
    try:
        # Not `Image.open`: it tells of bombs by a warning, which threads cannot turn into an error.
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            picture = PngImagePlugin.PngImageFile(file)
        elif content.startswith(b"\xff\xd8\xff"):
            picture = JpegImagePlugin.jpeg_factory(file)
        elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            picture = WebPImagePlugin.WebPImageFile(file)
        else:
            raise BrokenPicture(f"no PNG, JPEG or WebP: begins with {content[:8]!r}")
    except BrokenPicture:
        raise
    except Exception as error:  # Pillow raises whatever its parsing stumbles over
        raise BrokenPicture(f"header cannot be read: {error}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BrokenPicture(f"{width} x {height} are more than {MAX_PIXELS} pixels")
    if picture.mode not in _MODES:
        raise BrokenPicture(f"mode {picture.mode} has not 8 bits a channel")
    return picture


def _load(picture) -> None:
    try:
        picture.load()
        picture.getexif()
    except Exception as error:
        raise BrokenPicture(f"pixels cannot be read: {error}") from error


def _upright_size(picture) -> tuple[int, int]:
    width, height = picture.size
    return (width, height) if picture.getexif().get(0x0112) in _SIDEWAYS else (height, width)


def _to_rgb(picture):
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
