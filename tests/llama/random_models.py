"""Tiny models with random weights whose memory is not plain cells: a recurrent one and one with windows."""

from pathlib import Path

import gguf
import numpy as np

WIDTH = 64
LAYERS = 4
VOCABULARY = 258
WINDOW = 64
_HEADS = 2
_HEAD_WIDTH = 32
_FEED_FORWARD = 96
_INNER, _STATE, _CONVOLUTION, _RANK = 2 * WIDTH, 16, 4, 8


class _Writer:
    """A file with one token per byte, so that a text has as many tokens as characters."""

    def __init__(self, path: Path, architecture: str) -> None:
        self.gguf = gguf.GGUFWriter(path, architecture)
        self._generator = np.random.default_rng(11)
        self.gguf.add_context_length(4096)
        self.gguf.add_block_count(LAYERS)
        self.gguf.add_embedding_length(WIDTH)
        self.gguf.add_layer_norm_rms_eps(1e-5)
        self.gguf.add_vocab_size(VOCABULARY)
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {byte: chr(byte) for byte in printable} | {
            byte: chr(256 + index) for index, byte in enumerate(others)
        }
        self.gguf.add_tokenizer_model("gpt2")
        self.gguf.add_tokenizer_pre("gpt-2")
        self.gguf.add_token_list([*(letters[byte] for byte in range(256)), "<|begin|>", "<|end|>"])
        self.gguf.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2)
        self.gguf.add_token_merges(["þ ÿ"])
        self.gguf.add_bos_token_id(256)
        self.gguf.add_eos_token_id(257)
        self.gguf.add_add_bos_token(False)

    def add(self, name: str, rows: int, columns: int) -> None:
        weights = self._generator.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)
        if columns % 32:
            self.fill(f"{name}.weight", weights)
        else:  # rows of F32 are multiplied differently in company
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(weights.astype(np.float32), kind)
            self.gguf.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    def fill(self, name: str, values: np.ndarray) -> None:
        self.gguf.add_tensor(name, values.astype(np.float32))

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_recurrent_model(path: Path) -> None:
    """Write a Mamba: a state per layer, no cells."""
    writer = _Writer(path, "mamba")
    writer.gguf.add_feed_forward_length(0)
    writer.gguf.add_head_count(0)
    writer.gguf.add_ssm_conv_kernel(_CONVOLUTION)
    writer.gguf.add_ssm_inner_size(_INNER)
    writer.gguf.add_ssm_state_size(_STATE)
    writer.gguf.add_ssm_time_step_rank(_RANK)
    writer.add("token_embd", VOCABULARY, WIDTH)
    writer.fill("output_norm.weight", np.ones(WIDTH))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        writer.fill(f"{block}.attn_norm.weight", np.ones(WIDTH))
        writer.add(f"{block}.ssm_in", 2 * _INNER, WIDTH)
        writer.add(f"{block}.ssm_conv1d", _INNER, _CONVOLUTION)
        writer.fill(f"{block}.ssm_conv1d.bias", np.zeros(_INNER))
        writer.add(f"{block}.ssm_x", _RANK + 2 * _STATE, _INNER)
        writer.add(f"{block}.ssm_dt", _INNER, _RANK)
        writer.fill(f"{block}.ssm_dt.bias", np.full(_INNER, -3.0))
        writer.fill(f"{block}.ssm_a", -np.tile(np.arange(1, _STATE + 1), (_INNER, 1)))
        writer.fill(f"{block}.ssm_d", np.ones(_INNER))
        writer.add(f"{block}.ssm_out", WIDTH, _INNER)
    writer.close()


def write_window_model(path: Path) -> None:
    """Write a Gemma 3, whose layers, all but the last, see WINDOW tokens."""
    writer = _Writer(path, "gemma3")
    writer.gguf.add_feed_forward_length(_FEED_FORWARD)
    writer.gguf.add_head_count(_HEADS)
    writer.gguf.add_head_count_kv(_HEADS)
    writer.gguf.add_key_length(_HEAD_WIDTH)
    writer.gguf.add_value_length(_HEAD_WIDTH)
    writer.gguf.add_sliding_window(WINDOW)
    writer.add("token_embd", VOCABULARY, WIDTH)
    writer.fill("output_norm.weight", np.ones(WIDTH))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            writer.fill(f"{block}.{name}.weight", np.ones(WIDTH))
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.fill(f"{block}.{name}.weight", np.ones(_HEAD_WIDTH))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add(f"{block}.{name}", WIDTH, WIDTH)
        writer.add(f"{block}.ffn_gate", _FEED_FORWARD, WIDTH)
        writer.add(f"{block}.ffn_up", _FEED_FORWARD, WIDTH)
        writer.add(f"{block}.ffn_down", WIDTH, _FEED_FORWARD)
    writer.close()
