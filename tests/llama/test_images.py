"""The vision model sees: exact answers, cold, warm and in company; bad input ends its own request only."""

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from paddler.engine.images import Projection
from paddler.engine.layout import Refused
from paddler.engine.llama import LlamaLog, Model, load_model
from paddler.engine.pipe import Finish, Generate, Log, Picture
from paddler.engine.sequences import GRID
from paddler.errors import ModelUnavailable
from paddler.messages.state import MultimodalProjectionCannotBeLoaded
from tests.llama import random_vision
from tests.llama.engines import Generations, chat, running

FIXTURES = Path(__file__).parent.parent / "fixtures"
VISION: dict[str, Any] = {
    "model_path": str(FIXTURES / "paddler-tiny-vision.gguf"),
    "projection_path": str(FIXTURES / "paddler-tiny-vision-mmproj.gguf"),
}
MARKER = "<__media__>"
IMAGE_TOKENS = 36


def picture(image: Image.Image) -> Picture:
    return Picture(image.width, image.height, b64encode(image.tobytes()).decode())


def plain(colour: str, *, width: int = 64, height: int = 64) -> Picture:
    return picture(Image.new("RGB", (width, height), colour))


def red_circle() -> Picture:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill=(255, 0, 0))
    return picture(image)


def about(question: str) -> str:
    return chat(f"{MARKER}\n{question}")


def then(history: str, answer: str, question: str) -> str:
    """Return a prompt that goes on after an answer."""
    return history.replace("<think>\n\n</think>\n\n", "") + f"{answer}<|im_end|>\n" + chat(question)


ANSWERS = {
    "What colour is the shape?": "The circle is red.",
    "Which shape is it?": "It is a circle.",
    "What colour is the background?": "The background is white.",
    "Describe this image.": "I see a red circle on a white background.",
    "What is in this image?": "I see a red circle on a white background.",
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["per-slot", "shared"])
async def test_questions_about_a_picture_are_answered(layout: str) -> None:
    async with running(**VISION, kv_layout=layout) as generations:
        for number, (question, answer) in enumerate(ANSWERS.items()):
            told = await generations.ask(about(question), pictures=(red_circle(),))
            assert (told.text, told.finish) == (answer, Finish.END)
            assert told.image_tokens == IMAGE_TOKENS
            assert told.prompt_tokens < 30
            assert told.cached_prompt_tokens == (3 if number else 0)  # those before the picture
        blue = await generations.ask(about("What colour is this image?"), pictures=(plain("blue"),))
        assert blue.text == "The image is blue."
        assert blue.cached_prompt_tokens == 0
        assert (await generations.ask(chat("What is the capital of France?"))).image_tokens == 0


@pytest.mark.slow
async def test_a_conversation_about_pictures_is_the_same_cold_and_warm() -> None:
    """The pictures lie anywhere between grid lines; two of them in one prompt, and one a second time."""
    prompts: list[tuple[str, tuple[Picture, ...]]] = []
    for filler in (0, 9, 25, 40, 70):
        first = chat("la " * filler + f"{MARKER}\nWhat colour is the shape?")
        second = then(first, "The circle is red.", "Which shape is it?")
        third = then(second, "It is a circle.", f"{MARKER}\nWhat colour is this image?")
        prompts += [
            (first, (red_circle(),)),
            (second, (red_circle(),)),
            (third, (red_circle(), plain("blue"))),
            (third, (red_circle(), red_circle())),
        ]

    async def answers(**settings: Any) -> list[tuple[int, ...]]:
        async with running(**VISION, **settings) as generations:
            told = [
                await generations.ask(prompt, pictures=pictures, max_tokens=24)
                for prompt, pictures in prompts
            ]
        cached = [answer.cached_prompt_tokens for answer in told]
        assert any(cached) is settings["prefix_cache"]
        assert [answer.image_tokens for answer in told] == [IMAGE_TOKENS * len(p) for _, p in prompts]
        return [answer.tokens for answer in told]

    assert await answers(prefix_cache=True) == await answers(prefix_cache=False)


@pytest.mark.slow
async def test_pictures_and_texts_are_answered_at_once() -> None:
    async with running(**VISION) as generations:
        started = [
            (generations.start(chat("Count to 40."), max_tokens=64), None),
            (generations.start(about("Which shape is it?"), pictures=(red_circle(),)), "It is a circle."),
            (
                generations.start(about("What colour is this image?"), pictures=(plain("green"),)),
                "The image is green.",
            ),
            (generations.start(chat("Hello")), "Hello! How can I help you today?"),
        ]
        for generation, text in started:
            answer = await generations.answer(generation)
            assert answer.finish in (Finish.END, Finish.LENGTH)
            assert text in (None, answer.text)


@pytest.mark.slow
async def test_a_picture_of_any_shape_can_be_asked_about() -> None:
    async with running(**VISION) as generations:
        for width, height in ((1, 1), (1, 3000), (2000, 1), (7, 1000)):
            told = await generations.ask(
                about("What colour is this image?"), pictures=(plain("blue", width=width, height=height),)
            )
            assert (told.finish, told.image_tokens) == (Finish.END, IMAGE_TOKENS)


@pytest.mark.slow
@pytest.mark.scenario("IM-3")
async def test_an_image_larger_than_a_batch_is_refused_and_the_engine_goes_on() -> None:
    async with running(**VISION, n_batch=32) as generations:
        assert generations.engine.capacity.n_batch == 32
        for _ in range(2):
            told = await generations.ask(about("Which shape is it?"), pictures=(red_circle(),))
            assert (told.finish, told.image_tokens) == (Finish.IMAGE_TOO_LARGE, IMAGE_TOKENS)
        assert (await generations.ask(chat("Hello"))).text == "Hello! How can I help you today?"
    async with running(**VISION, n_batch=IMAGE_TOKENS) as generations:
        assert (await asked_for_shape(generations)).text == "It is a circle."


async def asked_for_shape(generations: Generations) -> Any:
    return await generations.ask(about("Which shape is it?"), pictures=(red_circle(),))


@pytest.mark.slow
async def test_what_cannot_be_read_ends_its_own_request_only() -> None:
    broken = Picture(64, 64, b64encode(bytes(100)).decode())
    async with running(**VISION) as generations:
        for prompt, pictures, finish in (
            (chat(f"{MARKER}{MARKER}"), (red_circle(),), Finish.FAILED),
            (chat("none"), (red_circle(),), Finish.FAILED),
            (f"{MARKER}", (red_circle(),), Finish.FAILED),
            (about("?"), (broken,), Finish.IMAGE_INVALID),
            (about("?"), (Picture(0, 0, ""),), Finish.IMAGE_INVALID),
            (about("?"), (Picture(1, 1, "%%%%"),), Finish.IMAGE_INVALID),
        ):
            told = await generations.ask(prompt, pictures=pictures)
            assert told.finish is finish
            assert told.failure
        assert (await asked_for_shape(generations)).text == "It is a circle."


@pytest.mark.slow
async def test_a_prompt_with_pictures_longer_than_its_cells_is_refused() -> None:
    async with running(**VISION, slots=1, context_size=256) as generations:
        told = await generations.ask(chat(MARKER * 8), pictures=(red_circle(),) * 8)
        assert told.finish is Finish.FAILED
        assert "room for 256" in told.failure
        assert (await asked_for_shape(generations)).text == "It is a circle."


@pytest.mark.slow
async def test_a_request_can_be_cancelled_while_its_picture_is_read() -> None:
    async with running(**VISION, slots=1) as generations:
        large = plain("red", width=1024, height=1024)
        generation = generations.start(chat(MARKER * 4 + "\nWhich shape is it?"), pictures=(large,) * 4)
        generations.engine.cancel(generation)
        assert (await generations.answer(generation)).finish is Finish.STOPPED
        assert (await asked_for_shape(generations)).text == "It is a circle."


COLOURS = ("red", "green", "blue", "black")


async def told_by(model: dict[str, str], *, together: bool = False, **settings: Any) -> list[Any]:
    """Return what a random model says about pictures of several sizes, each asked about twice."""
    sizes = [(64, 64), (40, 120), (256, 256), (8, 300)]
    pictures = [plain(colour, width=w, height=h) for colour, (w, h) in zip(COLOURS, sizes, strict=True)]
    first = [f"{'la ' * 9 * at}{MARKER} one {MARKER} and more?" for at in range(len(COLOURS))]
    prompts = [
        (prompt + more, (pictures[at], pictures[0]))
        for at, prompt in enumerate(first)
        for more in ("", " and even more?")
    ]
    async with running(**{**VISION, **model}, context_size=4096, **settings) as generations:
        if together:
            started = [generations.start(text, pictures=own, max_tokens=16) for text, own in prompts]
            return [await generations.answer(generation) for generation in started]
        return [await generations.ask(text, pictures=own, max_tokens=16) for text, own in prompts]


async def check_exactness(model: dict[str, str]) -> None:
    cold = await told_by(model, prefix_cache=False)
    assert all(answer.finish in (Finish.END, Finish.LENGTH) for answer in cold)
    assert len({answer.tokens for answer in cold}) > 1
    warm = await told_by(model)
    assert all(answer.cached_prompt_tokens for answer in warm[1::2])
    restored = await told_by(model, slots=1, prefix_cache_bytes=10**8)
    together = await told_by(model, together=True)
    for answers in (warm, restored, together):
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in cold]


@pytest.mark.slow
async def test_images_with_fewer_positions_than_tokens_are_the_same_cold_and_warm(tmp_path: Path) -> None:
    """M-RoPE: what comes behind an image lies at other positions than its cells."""
    model, projection = tmp_path / "model.gguf", tmp_path / "mmproj.gguf"
    random_vision.write_qwen2vl_model(model)
    random_vision.write_qwen2vl_projection(projection, width=random_vision.WIDTH)
    names = {"model_path": str(model), "projection_path": str(projection)}
    [large] = {answer.image_tokens for answer in (await told_by(names))[4:6]}
    assert large == 32 * 32 + 8 * 8  # the first of them in two batches
    await check_exactness(names)
    async with running(**{**VISION, **names}, kv_layout="shared") as generations:
        for _ in range(2):
            told = await generations.ask(f"{MARKER} what?", pictures=(plain("red"),), max_tokens=4)
            assert (told.finish, told.image_tokens) == (Finish.LENGTH, 64)


@pytest.mark.slow
async def test_images_that_must_be_decoded_at_once_get_a_batch_that_holds_them(tmp_path: Path) -> None:
    projection = tmp_path / "mmproj.gguf"
    count = random_vision.write_gemma3_projection(projection, width=192, side=96)
    assert count > 512
    names = {"projection_path": str(projection)}
    async with running(**{**VISION, **names}, context_size=4096) as generations:
        assert generations.engine.capacity.n_batch == count
        told = await generations.ask(f"{MARKER} what?", pictures=(plain("red"),), max_tokens=4)
        assert told.image_tokens == count
        question = f"{MARKER} what? and more?"
        warm = await generations.ask(question, pictures=(plain("red"),), max_tokens=16)
    async with running(**{**VISION, **names}, context_size=4096) as generations:
        cold = await generations.ask(question, pictures=(plain("red"),), max_tokens=16)
    assert warm.tokens == cold.tokens
    async with running(**{**VISION, **names}, n_batch=count - 1, context_size=4096) as generations:
        assert generations.engine.capacity.n_batch == count - 1
        told = await generations.ask(f"{MARKER} what?", pictures=(plain("red"),), max_tokens=4)
        assert (told.finish, told.image_tokens) == (Finish.IMAGE_TOO_LARGE, count)


def damaged(path: Path, kind: str) -> Path:
    whole = Path(VISION["projection_path"]).read_bytes()
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 16)
    elif kind == "cut":
        path.write_bytes(whole[:400_000])
    elif kind == "header only":
        path.write_bytes(whole[:2000])
    elif kind == "a model":
        path.write_bytes(Path(VISION["model_path"]).read_bytes())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", "garbage", "cut", "header only", "a model"])
async def test_a_file_that_is_no_projection_is_told(kind: str, tmp_path: Path) -> None:
    path = str(damaged(tmp_path / "mmproj.gguf", kind))
    with pytest.raises(ModelUnavailable) as unavailable:
        async with running(model_path=VISION["model_path"], projection_path=path):
            raise AssertionError("it was loaded")
    assert unavailable.value.issues == (MultimodalProjectionCannotBeLoaded(path),)


@pytest.mark.slow
async def test_a_projection_for_another_model_is_told() -> None:
    embedder = str(FIXTURES / "paddler-tiny-embed.gguf")
    with pytest.raises(ModelUnavailable) as unavailable:
        async with running(model_path=embedder, projection_path=VISION["projection_path"]):
            raise AssertionError("it was loaded")
    assert unavailable.value.issues == (MultimodalProjectionCannotBeLoaded(VISION["projection_path"]),)


@pytest.fixture(scope="module")
def log() -> LlamaLog:
    lines: list[Log] = []
    return LlamaLog(lines.append)


@pytest.fixture(scope="module")
def model(log: LlamaLog) -> Model:
    return load_model(VISION["model_path"], n_gpu_layers=0, on_progress=lambda _: True, log=log)


@pytest.fixture(scope="module")
def projection(model: Model, log: LlamaLog) -> Projection:
    return Projection(VISION["projection_path"], model, threads=1, log=log)


def read(projection: Projection, prompt: str, *pictures: Picture) -> Any:
    return projection.read(Generate(1, prompt, 10, pictures=pictures), most_tokens=100)


def test_ids_of_an_image_follow_from_its_pixels(projection: Projection) -> None:
    prompt = f"one {MARKER} two {MARKER} three"
    both = read(projection, prompt, red_circle(), plain("blue"))
    first, second = both.spans
    assert (first.length, second.length) == (IMAGE_TOKENS, IMAGE_TOKENS)
    images = [both.tokens[span.start : span.end] for span in both.spans]
    assert all((image < 0).all() for image in images)
    assert len(set(images[0].tolist()) | set(images[1].tolist())) == 2 * IMAGE_TOKENS
    assert len(both.text) == len(both) - 2 * IMAGE_TOKENS
    swapped = read(projection, prompt, plain("blue"), red_circle())
    assert (swapped.tokens[first.start : first.end] == images[1]).all()
    assert (swapped.tokens[second.start : second.end] == images[0]).all()
    wide = read(projection, prompt, plain("blue", width=128, height=32), plain("blue"))
    assert (wide.tokens[first.start : first.end] != images[1]).any()


def test_an_image_is_encoded_once(projection: Projection) -> None:
    first, again = read(projection, f"{MARKER} one {MARKER} two", plain("pink"), plain("pink")).spans
    assert not projection.fetch(first.image)
    assert projection.encode(first.image)
    assert projection.fetch(again.image)
    assert (again.image.embedding == first.image.embedding).all()
    first.image.release()
    assert projection.fetch(again.image)


def test_the_encoder_is_described(projection: Projection) -> None:
    assert projection.largest_image(1024) == IMAGE_TOKENS < GRID
    assert not projection.whole_images


def test_loading_can_be_given_up(model: Model, log: LlamaLog) -> None:
    with pytest.raises(Refused):
        Projection(VISION["projection_path"], model, threads=1, log=log, on_progress=lambda: False)
