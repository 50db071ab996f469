"""Random tiny causal language models of many architectures, with a tokenizer, built in memory."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

NUM_WORDS = 50
TABLE_ROWS = 57

_SIZES: dict[str, Any] = {
    "vocab_size": TABLE_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": TABLE_ROWS,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "dropout": 0.1,
}

CONFIGURATIONS: dict[str, Any] = {
    "opt": lambda: OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt-untied": lambda: OPTConfig(**_OPT, word_embed_proj_dim=32, tie_word_embeddings=False),
    "opt-post-norm-projected": lambda: OPTConfig(
        **_OPT, word_embed_proj_dim=24, do_layer_norm_before=False
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=TABLE_ROWS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        bos_token_id=2,
        eos_token_id=2,
    ),
    "gpt2-untied": lambda: GPT2Config(
        vocab_size=TABLE_ROWS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        bos_token_id=2,
        eos_token_id=2,
        tie_word_embeddings=False,
    ),
    "pythia-tied-serial": lambda: GPTNeoXConfig(
        **_SIZES, tie_word_embeddings=True, use_parallel_residual=False
    ),
    "pythia-untied": lambda: GPTNeoXConfig(**_SIZES, tie_word_embeddings=False),
    "llama-untied-grouped": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "llama-3-rope": lambda: LlamaConfig(
        **_SIZES,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2-tied": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3-untied": lambda: Qwen3Config(
        **_SIZES, num_key_value_heads=2, head_dim=12, tie_word_embeddings=False
    ),
    "mistral-window": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=90),
}


# Their windows are shorter than texts of the tests; decoding keeps a context inside the window.
WINDOWED: dict[str, Any] = {
    "mistral": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=4),
    "qwen2, one layer of two": lambda: Qwen2Config(
        **_SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
}


def tiny_tokenizer(start: bool = True) -> PreTrainedTokenizerFast:
    """`NUM_WORDS` single-word ids, the first three <unk>, <pad>, </s>; `start` puts </s> first."""
    words = ["<unk>", "<pad>", "</s>", "a", *(f"w{i}" for i in range(NUM_WORDS - 4))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if start:
        tokenizer.post_processor = TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """One of `CONFIGURATIONS` or `WINDOWED`; its weights and biases are large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((CONFIGURATIONS | WINDOWED)[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()
