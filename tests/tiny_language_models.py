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
    "pythia-untied": lambda: GPTNeoXConfig(**_SIZES, tie_word_embeddings=False),
    "llama-untied-grouped": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "qwen2-tied": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral-window": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=90),
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
    """A model of `CONFIGURATIONS` whose weights, biases included, are large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()
