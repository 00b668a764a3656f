"""Images in data URIs become pixels, whatever they claim to be; hostile ones a refusal."""

import base64
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from paddler.agent.pictures import MAX_SIDE, PictureRefused, decode_picture
from paddler.agent.refusals import refuse_early
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ConversationMessage,
    ImagePart,
    ImageUrl,
)

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def circle() -> Image.Image:
    image = Image.new("RGB", (64, 64), WHITE)
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill=RED)
    return image


def decoded(data: bytes, *, resize_to_fit: int = 1024, media_type: str = "image/png") -> Image.Image:
    picture = decode_picture(data_uri(data, media_type), resize_to_fit=resize_to_fit)
    size = picture["width"], picture["height"]
    return Image.frombytes("RGB", size, base64.b64decode(str(picture["rgb"])))


def refusal(url: str) -> str:
    with pytest.raises(PictureRefused) as refused:
        decode_picture(url, resize_to_fit=1024)
    return str(refused.value)


def near(pixel: Any, colour: tuple[int, int, int]) -> bool:
    return all(abs(one - other) <= 4 for one, other in zip(pixel, colour, strict=True))


def svg(content: str, *, size: int = 64) -> bytes:
    return f'<svg {NAMESPACES} width="{size}" height="{size}">{content}</svg>'.encode()


@pytest.mark.parametrize(
    "format_", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "ICO", "PPM", "JPEG2000", "AVIF"]
)
def test_a_format_is_told_by_its_content_and_scaled_down_to_fit(format_: str) -> None:
    data = encoded(circle(), format_)
    for fit, size in ((64, 64), (32, 32)):
        image = decoded(data, resize_to_fit=fit, media_type="text/plain")
        assert image.size == (size, size)
        assert near(image.getpixel((size // 2, size // 2)), RED)
        assert near(image.getpixel((0, 0)), WHITE)


def test_scaling_keeps_the_shape_and_never_enlarges() -> None:
    assert decoded(encoded(Image.new("RGB", (300, 100)), "PNG"), resize_to_fit=150).size == (150, 50)
    assert decoded(encoded(Image.new("RGB", (1, 3000)), "PNG"), resize_to_fit=100).size == (1, 100)
    assert decoded(encoded(Image.new("RGB", (30, 10)), "PNG"), resize_to_fit=2**32 - 1).size == (30, 10)


@pytest.mark.parametrize(
    ("image", "format_", "colour"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 255, 0)), "PNG", WHITE),
        (Image.new("RGBA", (8, 8), (0, 0, 255, 128)), "PNG", (127, 127, 255)),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", WHITE),
        (Image.new("I;16", (8, 8), 0x8080), "PNG", (128, 128, 128)),
        (Image.new("I", (8, 8), 100), "TIFF", (100, 100, 100)),
        (Image.new("1", (8, 8), 1), "PNG", WHITE),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", RED),
        (Image.new("P", (8, 8)), "PNG", (0, 0, 0)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_on_white(
    image: Image.Image, format_: str, colour: tuple[int, int, int]
) -> None:
    assert near(decoded(encoded(image, format_)).getpixel((4, 4)), colour)


def test_an_image_is_shown_upright() -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    lying = Image.new("RGB", (20, 10), WHITE)
    lying.paste(BLUE, (0, 0, 10, 10))
    for format_ in ("JPEG", "PNG", "WEBP", "TIFF"):
        upright = decoded(encoded(lying, format_, exif=orientation))
        assert upright.size == (10, 20)
        assert upright.getpixel((5, 2))[2] > 200 > upright.getpixel((5, 2))[0]  # type: ignore[index]
        assert near(upright.getpixel((5, 17)), WHITE)


def test_of_a_film_the_first_picture_is_shown() -> None:
    film = encoded(circle(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64), BLUE)] * 3)
    assert near(decoded(film).getpixel((32, 32)), RED)


@pytest.mark.parametrize("beginning", ["", "\ufeff", " \n", '<?xml version="1.0" encoding="UTF-8"?>'])
def test_an_svg_is_drawn_to_fit(beginning: str) -> None:
    drawing = beginning.encode() + svg('<circle cx="32" cy="32" r="16" fill="rgb(255,0,0)"/>')
    for fit in (10, 64, 300):
        image = decoded(drawing, resize_to_fit=fit, media_type="image/jpeg")
        assert image.size == (fit, fit)
        assert near(image.getpixel((fit // 2, fit // 2)), RED)
        assert near(image.getpixel((0, 0)), WHITE)


@pytest.mark.slow
def test_an_svg_is_never_drawn_larger_than_memory_allows() -> None:
    assert decoded(svg("", size=10**6), resize_to_fit=2**32 - 1).size == (MAX_SIDE, MAX_SIDE)


def test_an_svg_sees_no_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), RED).save(secret)
    nested = base64.b64encode(svg(f'<image href="{secret}" width="64" height="64"/>')).decode()
    for reference in (
        f'<image href="{secret}" width="64" height="64"/>',
        f'<image xlink:href="{secret}" width="64" height="64"/>',
        f'<image href=" file://{secret}" width="64" height="64"/>',
        f'<image href="data:image/svg+xml;base64,{nested}" width="64" height="64"/>',
        f'<filter id="f"><feImage href="{secret}"/></filter><rect width="64" height="64" filter="url(#f)"/>',
    ):
        image = decoded(svg(reference), resize_to_fit=64)
        assert not near(image.getpixel((32, 32)), RED), reference
    default = f'<!DOCTYPE svg [<!ATTLIST image href CDATA "{secret}">]>'.encode()
    with_default = b'<?xml version="1.0"?>' + default + svg('<image width="64" height="64"/>')
    assert near(decoded(with_default, resize_to_fit=64).getpixel((32, 32)), WHITE)
    entity = f'<!DOCTYPE svg [<!ENTITY s SYSTEM "file://{secret}">]>'.encode()
    assert "SVG" in refusal(data_uri(b'<?xml version="1.0"?>' + entity + svg("<text>&s;</text>")))


def test_an_svg_keeps_images_of_its_own() -> None:
    own = data_uri(encoded(Image.new("RGB", (8, 8), RED), "PNG"))
    with_own = svg(f'<image href="{own}" width="64" height="64"/>')
    assert near(decoded(with_own, resize_to_fit=64).getpixel((32, 32)), RED)
    reused = svg('<defs><rect id="r" width="64" height="64" fill="red"/></defs><use href="#r"/>')
    assert near(decoded(reused, resize_to_fit=64).getpixel((32, 32)), RED)


def bomb_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def laughs() -> bytes:
    entities = "".join(
        f'<!ENTITY {"abcdefghij"[n]} "{("&" + "abcdefghij"[n - 1] + ";") * 10}">' for n in range(1, 10)
    )
    head = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa">{entities}]>'
    return head.encode() + svg("<text>&j;</text>")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"hello", "its format is none"),
        (encoded(circle(), "PNG")[:100], "truncated"),
        (encoded(circle(), "PNG")[:10], "its format is none"),
        (encoded(circle(), "JPEG")[:-300], "truncated"),
        (encoded(circle(), "EPS"), "its format is none"),
        (encoded(circle(), "PDF"), "its format is none"),
        (bomb_png(60_000, 60_000), "pixels"),
        (bomb_png(9_000, 9_000), "9000 x 9000 pixels"),
        (b"<svg", "SVG"),
        (b"<?xml version='1.0'?><html/>", "SVG"),
        (b"<?xml version='1.0' encoding='nonsense'?><svg/>", "SVG"),
        (svg("", size=0), "SVG"),
        (svg("<g>" * 10_000 + "</g>" * 10_000), "256 deep"),
        (svg("<!--" + " " * 9_000_000 + "-->"), "bytes"),
        (laughs(), "SVG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_shown_is_refused(data: bytes, problem: str) -> None:
    assert problem in refusal(data_uri(data))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://example.com/cat.png", "remote images are not supported"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,%%%", "broken"),
        ("data:image/png;base64,aGVsbG8", "broken"),
        ("data:image/png;base64, ", "empty"),
    ],
)
def test_a_url_that_is_no_data_uri_in_base64_is_refused(url: str, problem: str) -> None:
    assert problem in refusal(url)


@pytest.mark.parametrize("head", ["DATA:IMAGE/PNG;BASE64,", "Data:image/PNG;Base64,", "data:;base64,"])
def test_scheme_and_media_type_of_a_data_uri_have_no_case(head: str) -> None:
    url = head + base64.b64encode(encoded(Image.new("RGB", (2, 1), RED), "PNG")).decode()
    assert decode_picture(url, resize_to_fit=64)["width"] == 2
    conversation = ContinueFromConversationHistory(
        add_generation_prompt=True,
        conversation_history=(ConversationMessage("user", (ImagePart(ImageUrl(url)),)),),
        enable_thinking=False,
        max_tokens=1,
    )
    assert refuse_early(conversation) is None


def test_what_pillow_thinks_of_an_image_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    samples_per_pixel = struct.pack("<HHI", 277, 3, 1)
    tiff = encoded(Image.new("RGB", (8, 8), RED), "TIFF")
    assert samples_per_pixel in tiff
    refusal(data_uri(tiff.replace(samples_per_pixel + b"\3", samples_per_pixel + b"\x59")))
    assert not caplog.records


def test_what_libtiff_thinks_of_an_image_is_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    tiff = bytearray(encoded(Image.effect_noise((64, 64), 50), "TIFF", compression="tiff_lzw"))
    for place in range(16, len(tiff) // 2):
        tiff[place] ^= 0xFF
    refusal(data_uri(bytes(tiff)))
    assert capfd.readouterr().err == ""


@given(data=st.binary(max_size=300), format_=st.sampled_from(["PNG", "GIF", "BMP", "TIFF", "WEBP", "ICO"]))
def test_noise_in_a_file_is_a_picture_or_a_refusal(data: bytes, format_: str) -> None:
    valid = bytearray(encoded(Image.new("RGB", (8, 8), RED), format_))
    for at, byte in enumerate(data):
        valid[(byte * 7 + at * 31) % len(valid)] ^= byte
    try:
        picture = decode_picture(data_uri(bytes(valid)), resize_to_fit=64)
    except PictureRefused:
        return
    assert len(base64.b64decode(str(picture["rgb"]))) == 3 * int(picture["width"]) * int(picture["height"])
