"""Write a GGUF model with random weights: real work for llama.cpp, no download, no meaning.

A llama decoder with tied embeddings, Q8_0. At the default size 49 million parameters and 32,000
tokens. Its end-of-generation token has a zero embedding, so greedy decoding never ends by itself.
"""

import argparse
import itertools
import string
from pathlib import Path

import gguf
import numpy as np

HEADS = 8
KEY_VALUE_HEADS = 4
CONTEXT_LENGTH = 8192
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
CONTROL_TOKENS = ("<|begin|>", "<|end|>")


def byte_characters() -> list[str]:
    """Return the 256 characters that stand for bytes in a byte-level BPE vocabulary (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(256 + index) for index, byte in enumerate(rest)}
    return [shifted.get(byte, chr(byte)) for byte in range(256)]


def make_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Return `size` tokens, control tokens last, and the merges that make them."""
    letters = string.ascii_lowercase
    space = "Ġ"
    tokens, merges = byte_characters(), []
    pairs = [(space, letter) for letter in letters] + list(itertools.product(letters, letters))
    pairs += [(space + a, b + c) for a, b, c in itertools.product(letters, repeat=3)]
    pairs += [(a + b, c + d) for a, b, c, d in itertools.product(letters, repeat=4)]
    for left, right in pairs[: size - len(tokens) - len(CONTROL_TOKENS)]:
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    if len(tokens) + len(CONTROL_TOKENS) != size:
        raise SystemExit(f"a vocabulary of {size} tokens is more than this generator can name")
    return [*tokens, *CONTROL_TOKENS], merges


def write_model(
    path: Path,
    *,
    vocabulary: int = 32_000,
    width: int = 512,
    layers: int = 11,
    feed_forward: int = 1408,
    seed: int = 1,
) -> int:
    """Write the model and return its number of parameters."""
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("paddler bench, random weights")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    tokens, merges = make_vocabulary(vocabulary)
    begin, end = vocabulary - 2, vocabulary - 1
    normal = vocabulary - len(CONTROL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * normal + [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    parameters = 0

    def add(name: str, rows: int, columns: int, *, zero_rows: tuple[int, ...] = ()) -> None:
        nonlocal parameters
        weights = generator.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(columns)
        weights[list(zero_rows)] = 0
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
        parameters += weights.size

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    add("token_embd.weight", vocabulary, width, zero_rows=(begin, end))
    add_norm("output_norm.weight")
    key_value_width = width // HEADS * KEY_VALUE_HEADS
    for layer in range(layers):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm.weight")
        add(f"{block}.attn_q.weight", width, width)
        add(f"{block}.attn_k.weight", key_value_width, width)
        add(f"{block}.attn_v.weight", key_value_width, width)
        add(f"{block}.attn_output.weight", width, width)
        add_norm(f"{block}.ffn_norm.weight")
        add(f"{block}.ffn_gate.weight", feed_forward, width)
        add(f"{block}.ffn_up.weight", feed_forward, width)
        add(f"{block}.ffn_down.weight", width, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    for name in ("vocabulary", "width", "layers", "feed_forward", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    parameters = write_model(**arguments)
    print(f"{arguments['path']}: {parameters / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
