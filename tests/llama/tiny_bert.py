"""A very small BERT with random weights: what encoders and rerankers do, without a download."""

from pathlib import Path

import gguf
import numpy as np

WORDS = ("cat", "dog", "sofa", "stock", "price", "fell", "is", "on", "the", "a")
WIDTH, FEED_FORWARD, HEADS, LAYERS, CONTEXT = 64, 64, 2, 2, 64


def write_bert(path: Path, *, ranks: bool = False) -> Path:
    """Write the model; with a classification head of one number if it `ranks`, else with mean pooling."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *("\u2581" + word for word in WORDS)]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK if ranks else gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_type_count(2)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_pad_token_id(0)
    for name, shape in _shapes(len(tokens), ranks=ranks).items():
        writer.add_tensor(name, _weights(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(n_vocab: int, *, ranks: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, WIDTH),
        "token_types.weight": (2, WIDTH),
        "position_embd.weight": (CONTEXT, WIDTH),
        "token_embd_norm.weight": (WIDTH,),
        "token_embd_norm.bias": (WIDTH,),
    }
    if ranks:
        shapes |= {"cls.weight": (WIDTH, WIDTH), "cls.bias": (WIDTH,)}
        shapes |= {"cls.output.weight": (1, WIDTH), "cls.output.bias": (1,)}
    for layer in range(LAYERS):
        square, norms = (
            ("attn_q", "attn_k", "attn_v", "attn_output"),
            ("attn_output_norm", "layer_output_norm"),
        )
        inner = dict.fromkeys(square, (WIDTH, WIDTH))
        inner |= {"ffn_up": (FEED_FORWARD, WIDTH), "ffn_down": (WIDTH, FEED_FORWARD)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in inner.items()}
        shapes |= {f"blk.{layer}.{name}.bias": shape[:1] for name, shape in inner.items()}
        shapes |= {f"blk.{layer}.{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}
    return shapes


def _weights(name: str, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    random = np.random.default_rng(sum(name.encode()))
    weights = random.normal(0, 0.5, shape).astype(np.float32)
    return weights + 1 if "norm.weight" in name else weights
