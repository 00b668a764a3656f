"""LoRA adapters for the bundled chat model, written by the tests that use them."""

from pathlib import Path

import gguf
import numpy as np

WIDTH, LAYERS, RANK = 192, 6, 4


def write_adapter(
    path: Path,
    *,
    strength: float = 0.5,
    seed: int = 1,
    architecture: str = "qwen3",
    width: int = WIDTH,
    dtype: type[np.generic] = np.float32,
    invocation_tokens: tuple[int, ...] = (),
) -> Path:
    """Write random changes to the queries of every layer; the default strength makes other answers."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    if invocation_tokens:
        writer.add_key_value(
            "adapter.alora.invocation_tokens",
            list(invocation_tokens),
            gguf.GGUFValueType.ARRAY,
            sub_type=gguf.GGUFValueType.UINT32,
        )
    for layer in range(LAYERS):
        for name, shape in (("lora_a", (RANK, width)), ("lora_b", (width, RANK))):
            values = strength * random.standard_normal(shape)
            writer.add_tensor(f"blk.{layer}.attn_q.weight.{name}", values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
