"""Images of a request to pixels: runs in a preparation process, which bounds its time and memory.

What arrives is hostile until shown otherwise: the declared media type is ignored, sizes are looked at
before anything is decoded, and nothing here opens a file or a connection.
"""

import binascii
import contextlib
import logging
import math
import os
import struct
import warnings
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import resvg_py
from PIL import Image

MAX_PIXELS = 64 * 1024 * 1024
"""Of an encoded image; the largest sensors of telephones have 50 million, by default."""

MAX_SIDE = 4096
"""Of the picture that a model gets, whatever a state asks for."""

MAX_SVG_BYTES = 8 * 1024 * 1024
MAX_SVG_DEPTH = 256
"""resvg overflows its stack at some thousands of nested elements, and Python's writer at one thousand."""

# A broken image is its sender's matter, not the operator's.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

Image.init()
FORMATS = tuple(
    format_
    for format_ in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "ICO", "PPM", "JPEG2000", "AVIF")
    if format_ in Image.OPEN  # a Pillow may be built without some
)
"""Pillow's decoders that may be tried; none of them starts a program or reads another file."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""

_SVG_BEGINNINGS = (b"<svg", b"<?xml")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OWN_REFERENCES = ("#", "data:")
_MAX_QUOTE = 200


class PictureRefused(Exception):
    """The image cannot be shown to a model; the text says why."""


def decode_picture(url: str, *, resize_to_fit: int) -> dict[str, Any]:
    """Return `width`, `height` and `rgb` of the image in a data URI, as pipe.Picture has them.

    Its larger side has at most `resize_to_fit` pixels. Raises PictureRefused.
    """
    side = max(1, min(resize_to_fit, MAX_SIDE))
    data = _data_of(url)
    try:
        if _is_svg(data):
            data = _rasterised(data, side=side)
        with warnings.catch_warnings(), _silent_libtiff():
            warnings.simplefilter("ignore")  # Pillow warns of what is odd, and decodes it
            picture = _decoded(data, side=side)
    except MemoryError:
        raise PictureRefused("the image needs more memory than it may have") from None
    return {
        "width": picture.width,
        "height": picture.height,
        "rgb": b64encode(picture.tobytes()).decode("ascii"),
    }


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    """Drop what is written to the standard error: libtiff complains there of what it cannot read."""
    with contextlib.ExitStack() as stack:
        kept = os.dup(2)
        stack.callback(os.close, kept)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        stack.callback(os.dup2, kept, 2)
        yield


def _data_of(url: str) -> bytes:
    head, comma, encoded = url.partition(",")
    if head[:5].lower() != "data:":  # scheme and media type have no case
        raise PictureRefused("remote images are not supported: the URL of an image must be a data URI")
    if not comma:
        raise PictureRefused("the data URI of an image has no comma")
    if head[-7:].lower() != ";base64":
        raise PictureRefused("the data URI of an image is not base64")
    try:
        data = binascii.a2b_base64(encoded.strip(), strict_mode=True)
    except ValueError as error:
        raise PictureRefused(f"the base64 of an image is broken: {error}") from None
    if not data:
        raise PictureRefused("the data URI of an image is empty")
    return data


def _is_svg(data: bytes) -> bool:
    return data[:1024].removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(_SVG_BEGINNINGS)


def _rasterised(data: bytes, *, side: int) -> bytes:
    """Return a PNG of an SVG whose larger side is `side`; files that it refers to are left out."""
    if len(data) > MAX_SVG_BYTES:
        raise PictureRefused(f"the SVG has {len(data)} bytes, more than {MAX_SVG_BYTES}")
    # expat bounds what entities grow to, and opens no external ones
    parser = ElementTree.XMLParser(target=_OwnDocument())  # noqa: S314
    try:
        parser.feed(data.removeprefix(_BYTE_ORDER_MARK).lstrip())
        text = ElementTree.tostring(parser.close(), encoding="unicode")
        return bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # an encoding is looked up by name
        raise PictureRefused(f"the SVG cannot be read: {str(error)[:_MAX_QUOTE]}") from None


class _OwnDocument(ElementTree.TreeBuilder):
    """Builds a document without references to others: resvg would read any file that it may."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> ElementTree.Element:
        self._depth += 1
        if self._depth > MAX_SVG_DEPTH:
            raise PictureRefused(f"the SVG is nested more than {MAX_SVG_DEPTH} deep")
        return super().start(tag, {name: text for name, text in attrs.items() if _is_own(name, text)})

    def end(self, tag: str, /) -> ElementTree.Element:
        self._depth -= 1
        return super().end(tag)


def _is_own(name: str, text: str) -> bool:
    local_name = name.rpartition("}")[2]
    return local_name != "href" or text.lstrip().startswith(_OWN_REFERENCES)


def _decoded(data: bytes, *, side: int) -> Image.Image:
    """Return an RGB image that fits `side`, upright, on white where it is transparent."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureRefused(f"the image has {width} x {height} pixels, more than {MAX_PIXELS}")
            if max(width, height) > side:
                image.draft(None, (side, side))  # a JPEG is decoded at a half, a quarter or an eighth
            image.load()
            picture = _fitted(_on_white(image), side=side)
            upright = _UPRIGHT.get(_orientation(image))  # some formats know it only now
            return picture if upright is None else picture.transpose(upright)
    except (PictureRefused, MemoryError):
        raise
    except Exception as error:  # border: broken data makes decoders stumble in every way there is
        reason = str(error).splitlines()[0][:_MAX_QUOTE] if str(error) else type(error).__name__
        if "cannot identify" in reason:
            reason = "its format is none of those that are supported"
        raise PictureRefused(f"the image cannot be decoded: {reason}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ValueError, TypeError, LookupError, SyntaxError, OSError, struct.error):
        return 1  # a picture is worth more than what is written beside it


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, without copying it when it is."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    colours = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(colours, mask=colours.getchannel("A"))
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey values of 16 or 32 bits as 8; those without a known range are stretched to theirs."""
    values = image.convert("F")
    low, high = cast("tuple[float, float]", values.getextrema())
    if not math.isfinite(low) or not math.isfinite(high):
        raise PictureRefused("the image has values that are no numbers")
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    scale = 255 / (high - low) if high > low else 0.0
    return values.point(lambda value: value * scale - low * scale).convert("L").convert("RGB")


def _fitted(image: Image.Image, *, side: int) -> Image.Image:
    larger = max(image.size)
    if larger <= side:
        return image
    width, height = (max(1, round(length * side / larger)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
