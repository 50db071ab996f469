"""Quantised language models: close to the whole ones, small, exact in themselves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_language_models import TABLE_ROWS, tiny_model, tiny_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, OPTForCausalLM

from miniature.backbones import SHIPPED
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import Heads, HeadSizes, mean_image_embeddings
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, training_losses
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.language_model import load_language_model
from pipeline.frozen.packing import Packing
from pipeline.frozen.quantization import Int8Linear, NF4Linear, quantize, weight_bytes
from pipeline.settings import Objective

needs_bitsandbytes = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("bitsandbytes"),
    reason="the extra `quantized` is not installed",
)
KINDS = ["int8", pytest.param("nf4", marks=needs_bitsandbytes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_nearest_of_255_steps_of_a_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(48, 20).to(dtype)
    layer = Int8Linear(whole.weight.detach(), whole.bias)
    x = torch.randn(5, 48, dtype=dtype)
    step = whole.weight.detach().double().abs().amax(1, keepdim=True) / 127
    nearest = (whole.weight.detach().double() / step).round() * step
    assert ((nearest - whole.weight.double()).abs() <= step / 2 * (1 + 1e-6)).all()
    expected = F.linear(x.double(), nearest, whole.bias.double())
    loose = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x).double(), expected, rtol=loose, atol=loose)
    assert layer.weight.dtype == torch.int8


def test_int8_in_float16_neither_overflows_nor_vanishes() -> None:
    torch.manual_seed(0)
    whole = 0.02 * torch.randn(64, 4096)
    layer = Int8Linear(whole.half(), None)
    x = (40 * torch.randn(3, 4096)).half().requires_grad_()
    y = layer(x)
    expected = x.detach().double() @ whole.half().double().T
    assert float((y.detach().double() - expected).norm() / expected.norm()) < 0.01
    given = 1e-4 * torch.randn(3, 64)
    y.backward(given.half())
    gradient = given.double() @ whole.half().double()
    assert float((x.grad.double() - gradient).norm() / gradient.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_writes_its_weight_once_for_each_product(dtype: torch.dtype) -> None:
    """A cast and nothing else: each further pass over it is most of a short product's time."""
    layer, written = Int8Linear(torch.randn(96, 64).to(dtype), None), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = operator(*args, **(kwargs or {}))
            written.extend([operator] if out.numel() == layer.weight.numel() else [])
            return out

    x = torch.randn(2, 64, dtype=dtype, requires_grad=True)
    with Count():
        y = layer(x)
    assert len([o for o in written if not o.is_view]) == 1
    with Count():
        y.backward(torch.ones_like(y))
    assert len([o for o in written if not o.is_view]) == 2


@needs_bitsandbytes
def test_nf4_is_what_bitsandbytes_says_it_stands_for() -> None:
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    whole = nn.Linear(128, 20)
    layer = NF4Linear(whole.weight.detach(), whole.bias)
    stands_for = dequantize_4bit(layer.weight, layer.state)
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer(x), F.linear(x, stands_for, whole.bias))
    relative = (stands_for - whole.weight).norm() / whole.weight.norm()
    assert 0.05 < relative < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weights_it_stands_for(kind: str) -> None:
    torch.manual_seed(0)
    layer = {"int8": Int8Linear, "nf4": NF4Linear}[kind](torch.randn(16, 64), torch.randn(16))
    weight = (layer(torch.eye(64)) - layer.bias).T
    with torch.no_grad():
        layer(torch.randn(3, 64))  # a pass without gradient must not take later gradients away
    x = torch.randn(3, 64, requires_grad=True)
    given = torch.randn(3, 16)
    layer(x).backward(given)
    torch.testing.assert_close(x.grad, given @ weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["opt-post-norm-projected", "gpt2", "llama-untied-grouped"])
def test_packed_equals_its_own_forward_tightly(kind: str, name: str, tmp_path: Path) -> None:
    tiny_model(name, torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_language_model(tmp_path, quantization=kind)  # and proves it at load
    texts = [torch.tensor(ids) for ids in ([2, 9, 4, 33, 8], [7], [2, 5, 6])]
    packing = Packing.of([len(text) for text in texts], model.device)
    ours = model.logits(model.hidden_states(model.embed(torch.cat(texts)), packing))
    own = torch.cat([model.model(input_ids=text[None]).logits[0] for text in texts])
    own = own[:, : model.num_rows]
    assert (ours - own).abs().max() <= 1e-5 * own.abs().max()
    kept = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert kept == [model.model.get_output_embeddings()]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT wide enough for blocks of 64, initialised as transformers does."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=TABLE_ROWS, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=96,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_training_sees_nearly_the_same_losses_and_gradients(kind: str, wide: Path) -> None:
    (losses, gradients), (ours, own) = _step("none", wide), _step(kind, wide)
    allowed = {"none": 0.0, "int8": 0.002, "nf4": 0.02}[kind]
    for name in ("captioning", "image_token", "generation"):
        assert float(ours[name]) == pytest.approx(float(losses[name]), rel=allowed)
    similar = {"none": 0.99999, "int8": 0.99, "nf4": 0.9}[kind]
    for name in ("image_embeddings", "caption_projection.weight"):
        assert own[name].abs().max() > 0
        cosine = F.cosine_similarity(own[name].flatten(), gradients[name].flatten(), dim=0)
        assert cosine > similar, name


def _step(kind: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Losses, and gradients of the heads, of one batch."""
    model = load_language_model(folder, quantization=kind)
    torch.manual_seed(0)
    heads = Heads(HeadSizes(d=12, e=model.width, k=2, r=4, L=5, D=6, m=16, p=8))
    heads.set_image_embeddings(mean_image_embeddings(model, 4, torch.Generator().manual_seed(0)))
    # At 1/0.07 the contrastive softmax of random features multiplies any difference by 14.
    torch.nn.init.zeros_(heads.logit_scale)
    numbers = torch.Generator().manual_seed(1)
    batch = CaptionBatch.from_lists(
        [[5, 9, 4, 33, 8], [7, 20], [11, 5, 6, 30], [40]],
        torch.randn(4, 12, generator=numbers),
        torch.randn(4, 5, 6, generator=numbers),
        torch.arange(4),
        32,
    )
    objective, draws = Objective(), PackingDraws.same(4, False)
    losses = training_losses(MultimodalLanguageModel(model, heads), batch, objective, draws)
    losses.total.backward()
    found = {name: p.grad for name, p in heads.named_parameters() if p.grad is not None}
    parts = {name: value.detach() for name, value in vars(losses).items() if value is not None}
    return parts, found


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_fall_to_what_is_stated(kind: str) -> None:
    model = tiny_model("opt", torch.bfloat16)
    model.model.decoder.layers[0].fc1 = nn.Linear(256, 1024, bias=False).bfloat16()
    before = weight_bytes(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    weights, rows = (sum(m.weight.numel() for m in linear), sum(m.out_features for m in linear))
    quantize(model, kind, "cpu")
    saved = before - weight_bytes(model)
    if kind == "int8":
        assert saved == weights - 4 * rows  # 2 bytes to 1, and a float32 per row
    else:
        # 2 bytes to a half, an 8-bit scale per 64, a float32 per 256 of those and per layer
        assert 2 - 0.5 - 1 / 64 - 0.01 < saved / weights < 2 - 0.5 - 1 / 64


def test_only_integers_are_kept_for_the_backward_pass() -> None:
    layer = Int8Linear(torch.randn(64, 32), None)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 32, requires_grad=True))
    assert {tensor.dtype for tensor in kept if tensor.numel() >= 32 * 64} == {torch.int8}


def test_a_missing_extra_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(BackboneError, match=r"pip install '.\[quantized\]'") as caught:
        load_language_model(SHIPPED.language_model, quantization="nf4")
    assert "\n" not in str(caught.value)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = tiny_model("gpt2")
    del model.transformer.h[:]
    with pytest.raises(BackboneError, match="keeps no weights in linear layers"):
        quantize(copy.deepcopy(model), "int8", "cpu")
