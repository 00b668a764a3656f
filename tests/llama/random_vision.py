"""Very small vision models with random weights: projections whose images lie in cells as no fixture's do.

One is Gemma 3's, whose image tokens see each other and must be decoded at once; the other is Qwen2-VL's,
whose images have more tokens than positions, and as many as their size asks for.
"""

from pathlib import Path

import gguf
import numpy as np

WIDTH = 64
HEADS = 2
FEED_FORWARD = 64
VISION_WIDTH = 32
TEXT_LAYERS = 2

_generator = np.random.default_rng(7)


def write_gemma3_projection(path: Path, *, width: int, side: int = 48) -> int:
    """Write a projection for text models of this width; returns the tokens of its images."""
    patch, merge = 2, 2
    writer = _projection(path, "gemma3", image_size=side, patch=patch, width=width)
    writer.add_uint32("clip.vision.projector.scale_factor", merge)
    patches = (side // patch) ** 2
    _add(writer, "v.position_embd.weight", patches, VISION_WIDTH)
    _add(writer, "v.patch_embd.weight", VISION_WIDTH, 3, patch, patch)
    _add_zeros(writer, "v.patch_embd.bias", VISION_WIDTH)
    _add_encoder(writer)
    _add(writer, "mm.input_projection.weight", VISION_WIDTH, width)
    _add_ones(writer, "mm.soft_emb_norm.weight", VISION_WIDTH)
    _finish(writer)
    return patches // merge**2


def write_qwen2vl_projection(path: Path, *, width: int) -> None:
    """Write a projection that makes a token of 8 x 8 pixels."""
    patch = 4
    writer = _projection(path, "qwen2vl_merger", image_size=64, patch=patch, width=width)
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        _add(writer, name, VISION_WIDTH, 3, patch, patch)
    _add_encoder(writer)
    for layer, rows in ((0, 4 * VISION_WIDTH), (2, width)):
        _add(writer, f"mm.{layer}.weight", rows, 4 * VISION_WIDTH)
        _add_zeros(writer, f"mm.{layer}.bias", rows)
    _finish(writer)


def write_qwen2vl_model(path: Path) -> None:
    """Write a text model with positions of several dimensions; its tokens are bytes."""
    writer = gguf.GGUFWriter(path, "qwen2vl")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(TEXT_LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_sections([4, 6, 6, 0])
    special = ["<|end|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = [*_byte_characters(), *special]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(special))
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)
    _add(writer, "token_embd.weight", len(tokens), WIDTH)
    _add_ones(writer, "output_norm.weight", WIDTH)
    for layer in range(TEXT_LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            _add_ones(writer, f"{block}.{name}.weight", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            _add(writer, f"{block}.{name}.weight", WIDTH, WIDTH)
        for name in ("attn_q", "attn_k", "attn_v"):
            _add_zeros(writer, f"{block}.{name}.bias", WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            _add(writer, f"{block}.{name}.weight", FEED_FORWARD, WIDTH)
        _add(writer, f"{block}.ffn_down.weight", WIDTH, FEED_FORWARD)
    _finish(writer)


def _projection(path: Path, kind: str, *, image_size: int, patch: int, width: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.use_gelu", True)
    for name, number in (
        ("image_size", image_size),
        ("patch_size", patch),
        ("embedding_length", VISION_WIDTH),
        ("feed_forward_length", FEED_FORWARD),
        ("block_count", 1),
        ("attention.head_count", HEADS),
        ("projection_dim", width),
    ):
        writer.add_uint32(f"clip.vision.{name}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", [0.5, 0.5, 0.5])
    return writer


def _add_encoder(writer: gguf.GGUFWriter) -> None:
    block = "v.blk.0"
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        _add(writer, f"{block}.{name}.weight", VISION_WIDTH, VISION_WIDTH)
        _add_zeros(writer, f"{block}.{name}.bias", VISION_WIDTH)
    _add(writer, f"{block}.ffn_up.weight", FEED_FORWARD, VISION_WIDTH)
    _add_zeros(writer, f"{block}.ffn_up.bias", FEED_FORWARD)
    _add(writer, f"{block}.ffn_down.weight", VISION_WIDTH, FEED_FORWARD)
    _add_zeros(writer, f"{block}.ffn_down.bias", VISION_WIDTH)
    for norm in (f"{block}.ln1", f"{block}.ln2", "v.post_ln"):
        _add_ones(writer, f"{norm}.weight", VISION_WIDTH)
        _add_zeros(writer, f"{norm}.bias", VISION_WIDTH)


def _add(writer: gguf.GGUFWriter, name: str, *shape: int) -> None:
    scale = np.sqrt(np.prod(shape[1:]))
    writer.add_tensor(name, (_generator.standard_normal(shape) / scale).astype(np.float32))


def _add_ones(writer: gguf.GGUFWriter, name: str, size: int) -> None:
    writer.add_tensor(name, np.ones(size, np.float32))


def _add_zeros(writer: gguf.GGUFWriter, name: str, size: int) -> None:
    writer.add_tensor(name, np.zeros(size, np.float32))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_characters() -> list[str]:
    """Return the 256 characters that stand for bytes in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
