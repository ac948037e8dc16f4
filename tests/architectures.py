"""Tiny random models of every architecture in the table of anatomies, and a tokenizer for them."""

from __future__ import annotations

from functools import cache

import torch
import transformers as tf
from prunescope.probes.anatomy import anatomy_of
from prunescope.probes.model import Model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
_PLAIN = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WINDOW = {"sliding_window": 8}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_COMMON),
    "mistral": lambda: tf.MistralConfig(**_COMMON, **_WINDOW),
    "qwen2": lambda: tf.Qwen2Config(**_COMMON),
    "qwen3": lambda: tf.Qwen3Config(**_COMMON),
    "gemma": lambda: tf.GemmaConfig(**_COMMON),
    "gemma2": lambda: tf.Gemma2Config(**_COMMON, **_WINDOW, query_pre_attn_scalar=8),
    "gemma3_text": lambda: tf.Gemma3TextConfig(
        **_COMMON, **_WINDOW, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: tf.Phi3Config(**_COMMON),
    "olmo2": lambda: tf.Olmo2Config(**_COMMON),
    "smollm3": lambda: tf.SmolLM3Config(**_COMMON),
    "gpt2": lambda: tf.GPT2Config(**_PLAIN, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **_PLAIN, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "opt": lambda: tf.OPTConfig(
        **_PLAIN, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32,
    ),
}  # fmt: skip

SAMPLE = "The cat sat on the mat. The dog ran to the red house, and 1 2 3 4 5 birds sang! Paris is."


@cache
def tokenizer():
    """A byte-level BPE of 384 tokens, so that every text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(
        [SAMPLE, "What is the capital of France? Answer: Paris.\n"] * 20, trainer
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def build(name: str, seed: int = 0, scale: float = 0.25) -> Model:
    """A random model with weights large enough that every part matters."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    module = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module = module.eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, scale)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Model(module, tokenizer(), anatomy_of(module.config), f"tiny-{name}", f"random-{seed}")
