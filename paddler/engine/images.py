"""Images to cells: libmtmd's encoder, prompts with pictures in them, and embeddings that are kept.

A picture becomes one or more *images*, as the projection divides it: rows of cells that are computed, and
reused, only as a whole. In the prompt they stand as ids below zero that follow from the pixels. The only
importer of mtmd_cpp. Prompts may be read in any thread, all else happens on the engine's loop.
"""

import binascii
import ctypes
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as c
import llama_cpp.mtmd_cpp as m
import numpy as np
import numpy.typing as npt

from paddler.engine.context import Context
from paddler.engine.layout import Refused
from paddler.engine.llama import LlamaLog, Model
from paddler.engine.pipe import Finish, Generate, Picture
from paddler.engine.sequences import Ids, Prompt, Span

KEPT_EMBEDDING_BYTES = 128 * 1024 * 1024
"""Of images that were encoded: about forty of 1,000 tokens for a model of 8 billion parameters."""

_MARKER: bytes = m.mtmd_default_marker()
_BELOW_ZERO = np.int32(-(2**31))
_IMAGE = m.MTMD_INPUT_CHUNK_TYPE_IMAGE
_TEXT = m.MTMD_INPUT_CHUNK_TYPE_TEXT
_FLOATS = ctypes.POINTER(ctypes.c_float)

_SHAPES = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))
"""Of the pictures whose images are counted to find the largest: what is odder is refused if it is larger."""


class Image:
    """An image of a prompt, prepared for the encoder; its memory is freed when its cells are computed."""

    def __init__(self, chunk: Any, key: str) -> None:
        self.key = key
        self.tokens: int = m.mtmd_input_chunk_get_n_tokens(chunk)
        self.positions: int = m.mtmd_input_chunk_get_n_pos(chunk)
        self.embedding: npt.NDArray[np.float32] | None = None
        self.chunk = m.mtmd_input_chunk_copy(chunk)
        self.free = weakref.finalize(self, m.mtmd_input_chunk_free, self.chunk)

    @property
    def ids(self) -> Ids:
        """What stands for it in a prompt: below zero, and as good as never the same for other pixels."""
        stream = hashlib.shake_128(self.key.encode()).digest(4 * self.tokens)
        return np.frombuffer(stream, np.dtype("<i4")).astype(np.int32) | _BELOW_ZERO

    def release(self) -> None:
        self.embedding = None
        self.free()


class Projection:
    """A multimodal projection's file, loaded for one model."""

    def __init__(
        self,
        path: str,
        model: Model,
        *,
        threads: int,
        log: LlamaLog,
        on_progress: Callable[[], bool] = lambda: True,
    ) -> None:
        """Load it; `on_progress` returns false to give up. Raises Refused."""
        if not Path(path).is_file():  # opening a pipe would block for ever
            raise Refused("not a regular file")
        m.mtmd_helper_log_set(log.callback, ctypes.c_void_p(None))
        settings = m.mtmd_context_params_default()
        settings.use_gpu = model.offloaded
        settings.print_timings = False
        settings.n_threads = threads
        settings.media_marker = _MARKER
        settings.warmup = False  # the first image pays for its buffers, under a deadline that fits it
        callback = m.mtmd_progress_callback(lambda _share, _: on_progress())
        settings.progress_callback = callback
        log.first_error = ""
        self._handle = m.mtmd_init_from_file(path.encode(errors="surrogateescape"), model.handle, settings)
        if not self._handle:
            raise Refused(log.first_error or "libmtmd cannot load it")
        if not m.mtmd_support_vision(self._handle):
            raise Refused("it has no image encoder")
        self._model = model
        self._width: int = c.llama_model_n_embd_inp(model.handle)
        self._embeddings: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        self._embedding_bytes = 0
        self.whole_images: bool = m.mtmd_decode_use_non_causal(self._handle, None)
        """An image's tokens see each other: it must lie in one ubatch."""

    def largest_image(self, side: int) -> int:
        """Return how many tokens an image has at most when its picture fits into a square of `side`."""
        return max(self._count(max(side // down, 1), max(side // across, 1)) for down, across in _SHAPES)

    def read(self, command: Generate, *, most_tokens: int) -> Prompt:
        """Return a prompt with its images, or why there is none: one may have `most_tokens`."""
        data = command.prompt.encode(errors="replace")
        if data.count(_MARKER) != len(command.pictures):
            return _refused(
                Finish.FAILED, f"the prompt has {data.count(_MARKER)} media markers, not one for each image"
            )
        bitmaps = []
        try:
            for index, picture in enumerate(command.pictures):
                bitmap = _bitmap(picture, index)
                if bitmap is None:
                    return _refused(Finish.IMAGE_INVALID, "an image has other pixels than its size says")
                bitmaps.append(bitmap)
            return self._read(data, bitmaps, most_tokens=most_tokens)
        finally:
            for bitmap in bitmaps:
                m.mtmd_bitmap_free(bitmap)

    def fetch(self, image: Image) -> bool:
        """Give an image its embedding if it is kept; false if it has to be encoded."""
        if image.embedding is None:
            image.embedding = self._embeddings.get(image.key)
        if image.key in self._embeddings:
            self._embeddings.move_to_end(image.key)
        return image.embedding is not None

    def encode(self, image: Image) -> bool:
        """Compute the embedding of an image, which can take minutes; false if that failed."""
        if m.mtmd_encode_chunk(self._handle, image.chunk) != 0:
            return False
        floats = m.mtmd_get_output_embd(self._handle)
        embedding = np.ctypeslib.as_array(floats, (image.tokens * self._width,)).copy()
        image.embedding = embedding
        if embedding.nbytes > KEPT_EMBEDDING_BYTES:
            return True
        self._embeddings[image.key] = embedding
        self._embedding_bytes += embedding.nbytes
        while self._embedding_bytes > KEPT_EMBEDDING_BYTES:
            _, oldest = self._embeddings.popitem(last=False)
            self._embedding_bytes -= oldest.nbytes
        return True

    def decode(self, image: Image, context: Any, *, position: int, slot: int, n_batch: int) -> int:
        """Put an encoded image into cells of llama.cpp's context; returns what llama_decode does."""
        assert image.embedding is not None
        end = ctypes.c_int32(position)
        result: int = m.mtmd_helper_decode_image_chunk(
            self._handle,
            context,
            image.chunk,
            image.embedding.ctypes.data_as(_FLOATS),
            position,
            slot,
            n_batch,
            ctypes.byref(end),
            m.mtmd_helper_post_decode_callback(),
            None,
        )
        return result

    def _read(self, data: bytes, bitmaps: list[Any], *, most_tokens: int) -> Prompt:
        chunks = m.mtmd_input_chunks_init()
        try:
            if self._divide(data, bitmaps, chunks) != 0:
                return _refused(Finish.IMAGE_INVALID, "the projection cannot take an image of the request")
            parts: list[Ids] = []
            spans: list[Span] = []
            seen: dict[str, int] = {}
            start = 0
            for index in range(m.mtmd_input_chunks_size(chunks)):
                chunk = m.mtmd_input_chunks_get(chunks, index)
                if m.mtmd_input_chunk_get_type(chunk) == _TEXT:
                    parts.append(_text_ids(chunk))
                else:
                    assert m.mtmd_input_chunk_get_type(chunk) == _IMAGE
                    image = Image(chunk, _key(chunk, seen))
                    span = Span(start, image.tokens, image.positions, image)
                    if image.tokens > most_tokens:
                        return _refused(Finish.IMAGE_TOO_LARGE, "", span)
                    spans.append(span)
                    parts.append(image.ids)
                start += len(parts[-1])
        finally:
            m.mtmd_input_chunks_free(chunks)
        if not spans or spans[-1].end == start:
            return _refused(Finish.FAILED, "the prompt ends with an image: there is no token to go on from")
        return Prompt(np.concatenate(parts), tuple(spans))

    def _divide(self, data: bytes, bitmaps: list[Any], chunks: Any) -> int:
        bos = self._model.bos_text.encode()
        add_special = not (bos and data.startswith(bos))
        text = m.mtmd_input_text(data, len(data), add_special, True)
        pointers = (m.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        result: int = m.mtmd_tokenize(self._handle, chunks, ctypes.byref(text), pointers, len(bitmaps))
        return result

    def _count(self, width: int, height: int) -> int:
        """Return the tokens of the largest image of a picture without looking at pixels."""
        bitmap = m.mtmd_bitmap_init(width, height, None)
        chunks = m.mtmd_input_chunks_init()
        try:
            self._divide(_MARKER, [bitmap], chunks)
            each = [m.mtmd_input_chunks_get(chunks, at) for at in range(m.mtmd_input_chunks_size(chunks))]
            images = [chunk for chunk in each if m.mtmd_input_chunk_get_type(chunk) == _IMAGE]
            return max((m.mtmd_input_chunk_get_n_tokens(chunk) for chunk in images), default=0)
        finally:
            m.mtmd_input_chunks_free(chunks)
            m.mtmd_bitmap_free(bitmap)


class ImageCells:
    """A projection and the context whose cells it fills, as turns.py sees them."""

    def __init__(self, projection: Projection, context: Context) -> None:
        self._projection = projection
        self._context = context

    def fetch(self, image: Image) -> bool:
        return self._projection.fetch(image)

    def encode(self, image: Image) -> bool:
        return self._projection.encode(image)

    def ingest(self, image: Image, position: int, slot: int) -> bool:
        """Compute the cells of an encoded image; false when none are left, and then nothing has changed."""

        def decode(context: Any, n_batch: int) -> int:
            return self._projection.decode(image, context, position=position, slot=slot, n_batch=n_batch)

        done = self._context.ingest_foreign(decode, position, slot)
        if done:
            image.release()
        return done


def _bitmap(picture: Picture, index: int) -> Any | None:
    """Return libmtmd's copy of a picture, named by place and content; None when its size is another."""
    try:
        rgb = binascii.a2b_base64(picture.rgb, strict_mode=True)
    except ValueError:
        return None
    if picture.width < 1 or picture.height < 1 or len(rgb) != 3 * picture.width * picture.height:
        return None
    pixels = np.frombuffer(rgb, np.uint8)
    pointer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = m.mtmd_bitmap_init(picture.width, picture.height, pointer)
    digest = hashlib.sha256(f"{picture.width}x{picture.height}:".encode() + rgb).hexdigest()
    m.mtmd_bitmap_set_id(bitmap, f"{index}:{digest}".encode())
    return bitmap


def _key(chunk: Any, seen: dict[str, int]) -> str:
    """Return what an image is known by: the content of its picture, and which image of that it is."""
    name = m.mtmd_input_chunk_get_id(chunk).decode()
    part = seen.get(name, 0)
    seen[name] = part + 1
    return f"{name.partition(':')[2]}:{part}"


def _text_ids(chunk: Any) -> Ids:
    count = ctypes.c_size_t()
    tokens = m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
    return np.array(tokens[: count.value], np.int32)


def _refused(finish: Finish, failure: str, *spans: Span) -> Prompt:
    return Prompt(np.empty(0, np.int32), spans, refused=finish, failure=failure)
