"""The frozen language model: any causal decoder of transformers that accepts `inputs_embeds`.

Legend: e width of the embedding rows (OPT's `word_embed_proj_dim`), n rows of the frozen
vocabulary, S packed tokens. Hidden states are those after the final norm and, where there is one,
OPT's `project_out`: they have width e as well, which is what ties `E_img` to both ends.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from gill_errors import InputError
from pipeline.devices import rounding_error
from pipeline.frozen.backbones import BackboneError, ChatSettings, Quantization
from pipeline.frozen.packing import ATTENTION, Packing, Prefix
from pipeline.frozen.plain_text import read_control_tokens_as_text
from pipeline.frozen.quantization import quantize, require_quantization
from pipeline.frozen.turns import ChatTemplate
from pipeline.frozen.weight_files import variant_of


@dataclass(frozen=True)
class Start:
    """What the language model holds after the start ids, which is the same for every text."""

    prefix: Prefix
    hidden: Float[Tensor, "T e"]


class LanguageModel:
    """A causal language model that is never trained, never resized, and always in `eval()`.

    For a model whose output head is not tied to its input embedding, the [IMG] tokens are still one
    parameter for both ends: `E_img` is input row and output row, as in OPT (UPSTREAM 20).

    Attributes:
        model: the transformers model; ordinary calls (with caches, masks) work as usual.
        tokenizer: its tokenizer.
        num_rows: n, the rows of the frozen vocabulary in the softmax; [IMG] ids start here.
        start_ids: ids that begin a text: `[bos]` for OPT, `[]` where the tokenizer adds none; with
            turns, what these begin with.
        turns: how a chat model's turns are written; None where texts are continued as they are.
        max_positions: the longest sequence, in tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        num_rows: int | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        """Freeze `model` and prove on a few tokens that it can be run packed.

        Args:
            num_rows: by default the tokenizer's length plus one, at most the rows of the table: the
                released code has one more row, `<|image|>`, before the [IMG] rows (UPSTREAM 19).
            chat: read and answer in turns, as the tokenizer's chat template writes them.

        Raises:
            BackboneError: the model cannot serve; the message says why.
        """
        # cuDNN's attention makes a plan for every new shape, 22 ms to 1 s each: training meets some
        # thousand of them, decoding one with every token. For the process, as torch has it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        _refuse_unfit(model, name)
        rows = min(len(self.input_rows), len(model.get_output_embeddings().weight))
        self.num_rows = min(len(tokenizer) + 1, rows) if num_rows is None else num_rows
        if not 2 <= self.num_rows <= rows:
            raise BackboneError(
                f"{name}: num_rows = {self.num_rows}, but its table has {rows} rows"
            )
        self.turns = None if chat is None else ChatTemplate(tokenizer, chat, name)
        if self.turns is None:
            self.start_ids = _start_ids(tokenizer)
        else:
            self.start_ids = list(self.turns.start_ids)
        self._start: Start | None = None
        self.max_positions = int(model.config.get_text_config().max_position_embeddings)
        self._prove_packing(name)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.input_rows.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embeddings and hidden states."""
        return self.input_rows.dtype

    @property
    def width(self) -> int:
        """e, the width of the input embedding rows."""
        return self.input_rows.shape[1]

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's end of text; of a chat model also what its
        template writes behind an answer, and what transformers' own `generate` stops at."""
        if self.turns is None:
            return [self.tokenizer.eos_token_id]
        own = getattr(self.model.generation_config, "eos_token_id", None)
        named = own if isinstance(own, list) else [own]
        ends = {*self.turns.end_ids, *named, self.tokenizer.eos_token_id}
        return sorted(ends - {None})

    @property
    def input_rows(self) -> Float[Tensor, "V e"]:
        """The whole input table, rows outside the softmax included."""
        return self.model.get_input_embeddings().weight

    @property
    def output_rows(self) -> Float[Tensor, "n e"]:
        """The rows of the softmax."""
        return self.model.get_output_embeddings().weight[: self.num_rows]

    @property
    def output_bias(self) -> Float[Tensor, " n"] | None:
        """The bias of the softmax, for the few models that have one; [IMG] rows have none."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return None if bias is None else bias[: self.num_rows]

    def mean_row_norm(self) -> float:
        """Mean norm of the n frozen input rows."""
        rows = self.input_rows[: self.num_rows]
        return float(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).mean())

    def embed(self, ids: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape e"]:
        """Input embeddings of ids of the frozen vocabulary."""
        return self.model.get_input_embeddings()(ids.to(self.device))

    def logits(self, hidden: Float[Tensor, "*shape e"]) -> Float[Tensor, "*shape n"]:
        """Logits of the frozen vocabulary, in the dtype of `hidden`."""
        return F.linear(hidden, self.output_rows, self.output_bias)

    def hidden_states(self, inputs: Float[Tensor, "S e"], packing: Packing) -> Float[Tensor, "S e"]:
        """Run packed sequences, without padding.

        Raises:
            ValueError: a sequence is longer than the model's positions.
        """
        if packing.longest > self.max_positions:
            raise InputError(
                f"a sequence of {packing.longest} tokens exceeds the language model's "
                f"{self.max_positions} positions: shorten the captions or contexts"
            )
        out = self.model.base_model(
            inputs_embeds=inputs[None],
            position_ids=packing.positions[None],
            # Anything with four axes keeps transformers from building a mask that nobody reads.
            attention_mask=inputs.new_zeros(1, 1, 1, 1),
            use_cache=False,
            packing=packing,
        )
        return out.last_hidden_state[0]

    def read_start(self) -> Start | None:
        """The start ids, read once and for all; None where there are none."""
        if self._start is None and self.start_ids:
            # Kept beyond this call: what is made in inference mode could not go into a later
            # training pass.
            with torch.inference_mode(False), torch.no_grad():
                packing = Packing.of([len(self.start_ids)], self.device, record=True)
                hidden = self.hidden_states(self.embed(torch.tensor(self.start_ids)), packing)
            assert packing.recorded is not None
            self._start = Start(packing.recorded, hidden)
        return self._start

    @torch.no_grad()
    def _prove_packing(self, name: str) -> None:
        """Switch to packed attention, and compare logits before and after on two short texts."""
        # On the meta device there are no numbers to compare.
        if self.device.type == "meta":
            self.model.set_attn_implementation(ATTENTION)
            return
        # From the middle of the vocabulary: the first ids are marks that no text has in a row,
        # where rounding alone moves a bfloat16 model's logits by a third (SmolLM2).
        ids = (self.num_rows // 2 + torch.arange(5, device=self.device)) % self.num_rows
        long, short = ids, ids[1:4]
        try:
            own = torch.cat([self.model(input_ids=text[None]).logits[0] for text in (long, short)])
            own = own[:, : self.num_rows]
            self.model.set_attn_implementation(ATTENTION)
            # Texts of 5 and 3 tokens, each read in two packed passes as training reads them: the
            # first 2 and 1 tokens recorded, the other 3 and 2 after them. Both passes are ragged.
            begin = Packing.of([2, 1], self.device, record=True)
            head = self.hidden_states(self.embed(torch.cat([long[:2], short[:1]])), begin)
            rest = Packing.of([3, 2], self.device, prefix=begin.recorded)
            tail = self.hidden_states(self.embed(torch.cat([long[2:], short[1:]])), rest)
            # Back in reading order: 2 + 3 tokens of the long text, 1 + 2 of the short one.
            ours = self.logits(torch.cat([head[:2], tail[:3], head[2:], tail[3:]]))
            # Decoding calls the model without a packing: that way has to be unchanged too.
            plain = self.model(input_ids=long[None]).logits[0, :, : self.num_rows]
        except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as problem:
            raise BackboneError(
                f"{name} cannot serve as the language model: it does not run packed ({problem})"
            ) from problem
        scale = own.abs().max()
        error = float(((ours - own).abs().max() / scale).float())
        error = max(error, float(((plain - own[:5]).abs().max() / scale).float()))
        allowed = rounding_error(self.dtype)
        # This way round, NaN is refused as well.
        if not error <= allowed:
            raise BackboneError(
                f"{name} cannot serve as the language model: packed, its logits differ from its "
                f"own by {error:.1e} (allowed {allowed:.0e}). Models whose attention is not plain "
                "causal attention with explicit positions, or whose logits are not hidden states "
                "times the output rows, are not supported"
            )


def load_language_model(
    path_or_id: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    chat: ChatSettings | None = None,
) -> LanguageModel:
    """Load a frozen causal language model and its tokenizer.

    Args:
        path_or_id: a directory in transformers' format, or a hub id.
        dtype: always applied; a checkpoint's own dtype (OPT's float16) is never kept unasked.
        quantization: how linear weights are kept on `device` (`pipeline.frozen.quantization`); main
            memory holds the whole model in `dtype` while it is loaded.
        chat: read and answer in turns; None: texts are continued as they are.

    Raises:
        BackboneError: the model cannot serve, or the quantisation's extra is missing; the message
            says why.
    """
    source = {"local_files_only": Path(path_or_id).is_dir(), "trust_remote_code": False}
    if quantization != "none":
        require_quantization(quantization)
    config, tokenizer = _read_description(path_or_id, source)
    _refuse_unfit_configuration(config, str(path_or_id))
    variant = variant_of("language_model", path_or_id)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path_or_id, dtype=dtype, variant=variant, **source
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BackboneError(f"cannot load the language model {path_or_id}: {error}") from error
    if quantization != "none":
        quantize(model, quantization, device)
    return LanguageModel(model.to(device), tokenizer, chat=chat)


def check_language_model(path_or_id: str | Path, chat: ChatSettings | None = None) -> None:
    """Refuse a language model that cannot serve by its configuration and tokenizer, unread weights.

    `path_or_id` may be a GGUF file.

    A model of the same architecture with few layers, few rows and random weights is made and proved
    as a loaded model is: what is wrong with an architecture is known before any work.

    Raises:
        BackboneError: the model cannot serve; the message says why.
    """
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if Path(path_or_id).suffix == ".gguf":
        path_or_id, file = Path(path_or_id).parent, Path(path_or_id).name
        source["gguf_file"] = file
    config, tokenizer = _read_description(path_or_id, source)
    _refuse_unfit_configuration(config, str(path_or_id))
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    # One layer of each kind, in their order; two where all are alike.
    layers = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if kinds:
        text.layer_types = kinds[: text.num_hidden_layers]
    # No token need be in the smaller table: the proof takes ids of its own. A padding id beyond its
    # end would be refused.
    text.vocab_size = min(text.vocab_size, _PROOF_ROWS)
    text.pad_token_id = None
    # The random weights of a check must not move anybody's seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.name_or_path = str(path_or_id)
    LanguageModel(model, tokenizer, num_rows=text.vocab_size, chat=chat)


_PROOF_ROWS = 512


def _read_description(path_or_id: str | Path, source: dict[str, Any]) -> tuple[Any, Any]:
    """Configuration and tokenizer."""
    try:
        config = AutoConfig.from_pretrained(path_or_id, **source)
        if not config.is_encoder_decoder:  # which is refused for that, whatever its tokenizer
            tokenizer = read_control_tokens_as_text(
                AutoTokenizer.from_pretrained(path_or_id, **source)
            )
    except (OSError, ValueError, ImportError) as error:
        raise BackboneError(f"cannot load the language model {path_or_id}: {error}") from error
    if config.is_encoder_decoder:
        return config, None
    # transformers makes an empty tokenizer where its files are missing, and says nothing.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise BackboneError(f"the language model {path_or_id} has no tokenizer: files are missing")
    return config, tokenizer


def _refuse_unfit_configuration(config: PretrainedConfig, name: str) -> None:
    """What can be said of a model by its configuration."""
    text = config.get_text_config()
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder; a causal decoder is needed"
    elif text.model_type in _ALIBI or getattr(text, "alibi", False):
        reason = (
            "its positions are ALiBi's biases between tokens, which the packed attention does not "
            "have; learnt and rotary positions can serve"
        )
    elif getattr(text, "attn_logit_softcapping", None) is not None:
        # Small weights would not show it: the cap is far above their logits.
        reason = (
            "its attention caps its logits (attn_logit_softcapping), which the packed attention "
            "does not"
        )
    elif getattr(text, "max_position_embeddings", None) is None:
        reason = "its configuration states no max_position_embeddings"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"transformers has no causal language model of the type {config.model_type}"
    if reason:
        raise BackboneError(f"{name} cannot serve as the language model: {reason}")


_ALIBI = ("bloom", "mpt")


def _refuse_unfit(model: Any, name: str) -> None:
    """What can be said of a model as built."""
    _refuse_unfit_configuration(model.config, name)
    reason = None
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        reason = "it has no language-modelling head"
    elif output.weight.shape[1] != model.get_input_embeddings().weight.shape[1]:
        reason = (
            f"its input rows have width {model.get_input_embeddings().weight.shape[1]} and its "
            f"output rows {output.weight.shape[1]}; an [IMG] row is both"
        )
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its architecture does not use transformers' exchangeable attention functions"
    if reason:
        raise BackboneError(f"{name} cannot serve as the language model: {reason}")


def _start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: its ids with special tokens, less those without."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
