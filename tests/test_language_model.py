import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTForCausalLM,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from miniature.backbones import SHIPPED
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.language_model import LanguageModel, check_language_model, load_language_model
from pipeline.frozen.packing import Packing
from pipeline.frozen.text_conditioner import load_text_conditioner
from tests.tiny_language_models import (
    CONFIGURATIONS,
    NUM_WORDS,
    TABLE_ROWS,
    WINDOWED,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *WINDOWED])
def test_packed_hidden_states_give_the_models_own_logits(name: str) -> None:
    original = tiny_model(name)
    model = LanguageModel(copy.deepcopy(original), tiny_tokenizer())
    assert model.num_rows == NUM_WORDS + 1 < TABLE_ROWS
    assert model.width == original.get_input_embeddings().weight.shape[1]
    texts = [torch.tensor(ids) for ids in ([2, 9, 4, 33, 8], [7], [2, 5, 6])]
    lengths = [len(text) for text in texts]
    hidden = model.hidden_states(model.embed(torch.cat(texts)), Packing.of(lengths, model.device))
    own = torch.cat([original(input_ids=text[None]).logits[0] for text in texts])
    torch.testing.assert_close(model.logits(hidden), own[:, : model.num_rows], rtol=0, atol=2e-5)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert not model.model.training


def test_a_language_model_turns_off_the_attention_that_plans_for_every_shape() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    LanguageModel(tiny_model("opt"), tiny_tokenizer())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_ordinary_calls_with_padding_and_cache_work_as_before() -> None:
    original = tiny_model("llama-untied-grouped")
    model = LanguageModel(copy.deepcopy(original), tiny_tokenizer()).model
    ids = torch.tensor([[1, 1, 7, 8], [4, 5, 6, 7]])
    mask = (ids != 1).long()
    expected = original(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
    last = model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(last[1], expected[1, 3:])


def test_start_ids_are_what_the_tokenizer_puts_first() -> None:
    model = tiny_model("opt")
    assert LanguageModel(copy.deepcopy(model), tiny_tokenizer()).start_ids == [2]
    assert LanguageModel(copy.deepcopy(model), tiny_tokenizer(start=False)).start_ids == []


def test_rows_of_the_softmax_can_be_stated() -> None:
    model = tiny_model("opt")
    assert LanguageModel(copy.deepcopy(model), tiny_tokenizer(), 40).output_rows.shape == (40, 32)
    with pytest.raises(ValueError, match="num_rows = 58, but its table has 57 rows"):
        LanguageModel(copy.deepcopy(model), tiny_tokenizer(), 58)


def test_loading_applies_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    tiny_model("opt", torch.float16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_language_model(tmp_path, torch.float32)
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert isinstance(model.model, OPTForCausalLM)
    assert model.start_ids == [2]
    assert model.max_positions == 96
    assert model.mean_row_norm() == pytest.approx(
        float(model.input_rows[: NUM_WORDS + 1].norm(dim=-1).mean())
    )


def test_packing_is_proved_on_ordinary_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks in a row, which no text has, move a bfloat16 model's logits by a third."""
    read = list[int]()
    embed = LanguageModel.embed

    def recorded(self: LanguageModel, ids: Tensor) -> Tensor:
        read.extend(ids.tolist())
        return embed(self, ids)

    monkeypatch.setattr(LanguageModel, "embed", recorded)
    model = LanguageModel(tiny_model("opt"), tiny_tokenizer())
    assert read
    assert min(read) > max(model.tokenizer.all_special_ids)


def test_a_text_past_the_positions_is_refused() -> None:
    model = LanguageModel(tiny_model("opt"), tiny_tokenizer())
    packing = Packing.of([97], model.device)
    with pytest.raises(ValueError, match="97 tokens exceeds the language model's 96 positions"):
        model.hidden_states(torch.zeros(97, 32, dtype=model.dtype), packing)


_SMALL = {
    "vocab_size": TABLE_ROWS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
UNFIT = {
    "states no max_position_embeddings": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=TABLE_ROWS, hidden_size=16, num_hidden_layers=1)
    ),
    "its positions are ALiBi": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=TABLE_ROWS, hidden_size=16, n_layer=1, n_head=2)
    ),
    "its logits differ from its own": lambda: GraniteForCausalLM(
        GraniteConfig(**_SMALL, logits_scaling=3.0)
    ),
    "its attention caps its logits": lambda: Gemma2ForCausalLM(Gemma2Config(**_SMALL, head_dim=8)),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_model_that_cannot_serve_is_refused_with_the_reason(reason: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"cannot serve as the language model.*{reason}"):
        LanguageModel(UNFIT[reason]().eval(), tiny_tokenizer())


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *WINDOWED])
def test_what_can_serve_is_known_before_its_weights_are_read(name: str, tmp_path: Path) -> None:
    _save(tiny_model(name, torch.float32), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    check_language_model(tmp_path)


CANNOT = {
    "its positions are ALiBi": UNFIT["its positions are ALiBi"],
    "its logits differ from its own": UNFIT["its logits differ from its own"],
    "it is an encoder-decoder; a causal decoder is needed": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=TABLE_ROWS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("reason", CANNOT)
def test_what_cannot_serve_is_refused_before_its_weights_are_read(
    reason: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    _save(CANNOT[reason](), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=f"{tmp_path} cannot serve.*{reason}"):
        check_language_model(tmp_path)
    with pytest.raises(
        BackboneError, match="encoder-decoder|no file named model.safetensors|ALiBi"
    ):
        load_language_model(tmp_path)


def test_the_proof_shows_one_layer_of_each_kind(tmp_path: Path) -> None:
    """A wide, deep model is proved with few layers and rows: in no time, in little memory."""
    config = Qwen2Config(
        vocab_size=200_000, hidden_size=64, intermediate_size=64, num_hidden_layers=40,
        num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True, sliding_window=8,
        max_window_layers=3, pad_token_id=199_999,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made: list[Any] = []
    before = LanguageModel.__init__

    def watch(self: LanguageModel, model: Any, *args: Any, **kwargs: Any) -> None:
        made.append(model)
        before(self, model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "__init__", watch)
        check_language_model(tmp_path)
    assert made[0].config.layer_types == ["full_attention"] * 3 + ["sliding_attention"]
    assert len(made[0].model.layers) == 4
    assert made[0].get_input_embeddings().weight.shape == (512, 64)


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("text", ["a </s> b", "<pad>", "</s></s>", "say <|endoftext|> twice"])
def test_text_that_spells_a_control_token_is_text(text: str) -> None:
    tokenizer = load_language_model(SHIPPED.language_model).tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    pipeline = load_text_conditioner(str(SHIPPED.image_generator))._pipeline
    ids = pipeline.tokenizer(f"{text} <|startoftext|>")["input_ids"]
    assert [ids[0], ids[-1]] == [pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id]
    assert not set(ids[1:-1]) & set(pipeline.tokenizer.all_special_ids)
