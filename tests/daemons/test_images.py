"""Questions about pictures through balancer and agent: every format, in company, and what is refused."""

from base64 import b64encode
from io import BytesIO
from typing import Any

import pytest
import trio
from PIL import Image, ImageDraw

from paddler.messages.state import LocalModel
from tests.cluster import (
    FIXTURES,
    Cluster,
    Message,
    cluster,
    conversation,
    deterministic,
    result,
    state,
    text_of,
    tokens,
    usage_of,
)
from tests.daemons.sockets import inference_socket

pytestmark = pytest.mark.slow

IMAGE_TOKENS = 36
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" fill="white"/>'
    b'<circle cx="32" cy="32" r="16" fill="rgb(255,0,0)"/></svg>'
)


def seeing(**parameters: Any) -> Any:
    return state(
        LocalModel(str(FIXTURES / "paddler-tiny-vision.gguf")),
        deterministic(**parameters),
        multimodal_projection=LocalModel(str(FIXTURES / "paddler-tiny-vision-mmproj.gguf")),
    )


def red_circle(format_: str = "PNG", size: int = 64) -> str:
    """Return a red circle on white as a data URI."""
    if format_ == "SVG":
        return data_uri(SVG)
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse(
        (size // 4, size // 4, 3 * size // 4 - 1, 3 * size // 4 - 1), fill=(255, 0, 0)
    )
    return encoded(image, format_)


def plain(colour: str) -> str:
    return encoded(Image.new("RGB", (64, 64), colour), "PNG")


def encoded(image: Image.Image, format_: str) -> str:
    file = BytesIO()
    image.save(file, format_)
    return data_uri(file.getvalue())


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64encode(data).decode()}"


def about(question: str, *urls: str, max_tokens: int = 60, **changes: Any) -> Message:
    """Return a request about pictures, which come before the question."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": question}]
    history = [{"role": "user", "content": content}]
    return conversation("", max_tokens, conversation_history=history, **changes)


async def answer(running: Cluster, request: Message) -> str:
    messages = await running.generate(request)
    assert list(result(messages[-1])) == ["Done"]
    return text_of(messages)


@pytest.mark.scenario("IM-1", "IM-2")
async def test_a_picture_is_seen_in_every_format_and_size() -> None:
    async with cluster(slots=1, desired=seeing(image_resize_to_fit=48)) as running:
        for format_ in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "SVG", "TIFF"):
            seen = await answer(running, about("What colour is the shape?", red_circle(format_)))
            assert seen == "The circle is red.", format_
        messages = await running.generate(about("Describe this image.", red_circle("JPEG", size=1200)))
        assert text_of(messages) == "I see a red circle on a white background."
        usage = usage_of(messages)
        assert usage["input_image_tokens"] == IMAGE_TOKENS
        assert 0 < usage["prompt_tokens"] < IMAGE_TOKENS
        assert usage_of(await running.generate(conversation("Hello")))["input_image_tokens"] == 0


async def test_a_second_question_about_a_picture_finds_it_in_the_cells() -> None:
    first = about("What colour is the shape?", red_circle())
    [asked] = first["conversation_history"]
    later = [
        asked,
        {"role": "assistant", "content": "The circle is red."},
        {"role": "user", "content": "Which shape is it?"},
    ]
    async with cluster(slots=1, desired=seeing()) as running:
        assert await answer(running, first) == "The circle is red."
        messages = await running.generate(conversation("", conversation_history=later))
        assert usage_of(messages)["cached_prompt_tokens"] > 0
        warm = text_of(messages)
    async with cluster(slots=1, desired=seeing()) as running:
        assert await answer(running, conversation("", conversation_history=later)) == warm


@pytest.mark.scenario("IM-5")
async def test_a_picture_is_thought_about() -> None:
    async with cluster(slots=1, desired=seeing()) as running:
        messages = await running.generate(
            about("What colour is the shape?", red_circle(), max_tokens=200, enable_thinking=True)
        )
    assert "I see a circle. It is red." in "".join(tokens(messages, "ReasoningToken"))
    assert "".join(tokens(messages, "ContentToken")).strip() == "The circle is red."
    usage = usage_of(messages)
    assert usage["reasoning_tokens"] > 0
    assert usage["input_image_tokens"] == IMAGE_TOKENS


@pytest.mark.scenario("CB-13", "CB-14")
async def test_pictures_and_text_at_once() -> None:
    questions = {
        "Count to 40.": conversation("Count to 40.", 64),
        "shape": about("Which shape is it?", red_circle(), max_tokens=32),
        "colour": about("What colour is this image?", plain("blue"), max_tokens=32),
    }
    answers: dict[str, list[Message]] = {}
    async with cluster(slots=4, desired=seeing()) as running:

        async def ask(name: str) -> None:
            answers[name] = await running.generate(questions[name])

        async with trio.open_nursery() as requests:
            for name in questions:
                requests.start_soon(ask, name)
    assert all(list(result(messages[-1])) == ["Done"] for messages in answers.values())
    assert tokens(answers["Count to 40."])
    assert text_of(answers["shape"]) == "It is a circle."
    assert text_of(answers["colour"]) == "The image is blue."


@pytest.mark.scenario("IM-3")
async def test_an_image_larger_than_a_batch_is_refused_and_the_agent_lives_on() -> None:
    async with cluster(slots=1, desired=seeing(n_batch=32)) as running:
        for format_ in ("JPEG", "WEBP"):
            [message] = await running.generate(about("Which shape is it?", red_circle(format_)))
            assert result(message) == {"ImageExceedsBatchSize": {"image_tokens": IMAGE_TOKENS, "n_batch": 32}}
        assert await answer(running, conversation("Hello"))


async def test_a_picture_of_several_megabytes_comes_over_the_socket() -> None:
    noise = Image.effect_noise((1300, 1300), 30).convert("RGB")
    async with cluster(slots=1, desired=seeing()) as running, inference_socket(running) as socket:
        await socket.request("a", about("What is in this image?", encoded(noise, "BMP"), max_tokens=5))
        messages = await socket.receive_until_terminal("a")
    assert usage_of(messages)["input_image_tokens"] == IMAGE_TOKENS


async def test_what_is_no_picture_is_refused_and_others_go_on() -> None:
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0"
    deep = b'<svg xmlns="http://www.w3.org/2000/svg">' + b"<g>" * 9000 + b"</g>" * 9000 + b"</svg>"
    async with cluster(slots=1, desired=seeing()) as running:
        for url in (data_uri(b"no picture"), data_uri(bomb), data_uri(deep), "https://example.com/a.png"):
            [message] = await running.generate(about("Which shape is it?", url))
            assert list(result(message)) == ["ImageDecodingFailed"]
        assert await answer(running, about("Which shape is it?", red_circle())) == "It is a circle."


@pytest.mark.scenario("IM-9", "IM-10")
async def test_a_picture_without_a_projection_is_refused() -> None:
    blind = state(LocalModel(str(FIXTURES / "paddler-tiny-vision.gguf")))
    async with cluster(slots=1, desired=blind) as running:
        [message] = await running.generate(about("Which shape is it?", red_circle()))
        assert list(result(message)) == ["MultimodalNotSupported"]
        [message] = await running.generate(about("Which shape is it?", "data:image/png;base64,####"))
        assert list(result(message)) == ["ImageDecodingFailed"]
