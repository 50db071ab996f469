"""The released checkpoint (kohjingyu/gill), read and written: three files of one directory.

| file | content |
|---|---|
| `model_args.json` | the arguments of the model |
| `pretrained_ckpt.pth.tar` | `{"state_dict": ...}`: the trained tensors under the released names |
| `decision_model.pth.tar` | `{"state_dict": ...}`: the retrieve-or-generate classifier (optional) |

The released table of input embeddings ends with the r [IMG] rows, and only those are in the file.
Their token ids differ from ours: the released code puts one row `<|image|>` after the tokenizer's
last and the [IMG] rows behind it, over rows of the language model that no token uses (UPSTREAM 19).
The rows themselves are the same.

Files are read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from gill_errors import GillError
from gill_records import Record
from pipeline.bridge.checkpoint import misfits
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.settings import MapperSizes

ARGUMENTS_FILE = "model_args.json"
HEADS_FILE = "pretrained_ckpt.pth.tar"
DECISION_FILE = "decision_model.pth.tar"

DECISION_CLASSES = ("generate", "retrieve")
"""The released classifier's outputs 0 and 1; its input is the hidden state of [IMG1]."""


_SIZES = {
    "k": "n_visual_tokens",
    "p": "ret_emb_dim",
    "D": "gen_emb_dim",
    "r": "num_tokens",
    "L": "num_clip_tokens",
}
"""Our letters, and what the released arguments call them."""


class UpstreamError(GillError):
    """A released file that is missing, unreadable or of another layout; the message says which."""


class ReleasedArguments(Record):
    """`model_args.json`. The values fixed here are those of the released model."""

    opt_version: str
    freeze_lm: Literal[True] = True
    visual_encoder: str
    freeze_vm: Literal[True] = True
    n_visual_tokens: int
    ret_emb_dim: int
    gen_emb_dim: int
    text_emb_layers: tuple[Literal[-1]] = (-1,)
    text_fc_mode: Literal["gill_mapper"] = "gill_mapper"
    ret_text_fc_mode: Literal["linear"] = "linear"
    num_tokens: int
    num_clip_tokens: int
    share_ret_gen: Literal[True] = True
    norm_image_embed: Literal["none"] = "none"
    retrieval_token_idx: tuple[int, ...]
    gen_token_idx: tuple[int, ...]


def released_arguments(
    sizes: HeadSizes, *, language_model: str, visual_encoder: str, num_tokens: int
) -> ReleasedArguments:
    """The arguments under which the released code would load heads of these sizes.

    `language_model` and `visual_encoder` are the hub ids that the released code loads;
    `num_tokens` is the length of the language model's own tokenizer (50265 for OPT).
    """
    # + 1: the row of `<|image|>` lies between (UPSTREAM 19).
    image_ids = tuple(range(num_tokens + 1, num_tokens + 1 + sizes.r))
    return ReleasedArguments(
        opt_version=language_model,
        visual_encoder=visual_encoder,
        **{theirs: getattr(sizes, ours) for ours, theirs in _SIZES.items()},
        retrieval_token_idx=image_ids,
        gen_token_idx=image_ids,
    )


def read_arguments(directory: str | Path) -> ReleasedArguments:
    """Read `model_args.json`. Raises UpstreamError naming all missing, extra or wrong keys."""
    path = Path(directory) / ARGUMENTS_FILE
    try:
        return ReleasedArguments.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UpstreamError(f"{path} is missing") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise UpstreamError(f"{path}: {problems}") from None


def import_heads(directory: str | Path) -> tuple[Heads, ReleasedArguments]:
    """Read the released arguments and trained tensors as `Heads`, in float32.

    Widths that the arguments leave out (d, e, m, depth) are read from the tensors. A stored
    bfloat16 or float16 tensor keeps its exact value.

    Raises:
        UpstreamError: a file is missing or not a tensor archive, or tensors are missing, extra or
            of another shape; all of them are named, with both shapes.
    """
    arguments = read_arguments(directory)
    path = Path(directory) / HEADS_FILE
    state = _read_state(path)
    sizes = _sizes(path, arguments, state)
    heads = Heads(sizes)
    _check_layout(path, state, _released_state(heads))
    ours = {our_name(name): tensor for name, tensor in state.items()}
    # [1, L, m] there, [L, m] here.
    ours["mapper.queries"] = ours["mapper.queries"][0]
    heads.load_state_dict(ours)
    return heads, arguments


def export_heads(
    heads: Heads,
    arguments: ReleasedArguments,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `model_args.json` and `pretrained_ckpt.pth.tar` as the released code reads them.

    float32 loses nothing; bfloat16 is what the released training kept, and repeats a released
    bfloat16 file bit by bit.

    Raises UpstreamError when the heads cannot be expressed there (another mapping network, Eq. 3's
    mapper input, a pooled projection) or contradict `arguments`.
    """
    _check_expressible(heads.sizes, arguments)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in _released_state(heads).items()
    }
    torch.save({"state_dict": state}, directory / HEADS_FILE)
    text = arguments.model_dump_json(indent=4)
    (directory / ARGUMENTS_FILE).write_text(text + "\n", encoding="utf-8")


def import_decision(
    directory: str | Path,
) -> tuple[Float[Tensor, "2 e"], Float[Tensor, 2]]:
    """Weight and bias of the released retrieve-or-generate classifier, on the state of [IMG1].

    The classes are `DECISION_CLASSES`. In training a Dropout(0.5) came before it, which does
    nothing here. Raises UpstreamError like `import_heads`.
    """
    path = Path(directory) / DECISION_FILE
    state = _read_state(path)
    weight = state.get("1.weight")
    e = weight.shape[1] if weight is not None and weight.ndim == 2 else 0
    classes = len(DECISION_CLASSES)
    expected = {"1.weight": torch.empty(classes, e), "1.bias": torch.empty(classes)}
    _check_layout(path, state, expected)
    return state["1.weight"], state["1.bias"]


def export_decision(
    weight: Float[Tensor, "2 e"], bias: Float[Tensor, 2], directory: str | Path
) -> None:
    """Write a classifier with the classes `DECISION_CLASSES` as the released code reads it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Layer 0 is the Dropout, which has no tensors.
    state = {"1.weight": weight.detach().cpu(), "1.bias": bias.detach().cpu()}
    torch.save({"state_dict": state}, directory / DECISION_FILE)


# Released name (prefix) -> ours. The rest of the name, and the transformer's own names, agree.
_NAMES = {
    "model.logit_scale": "logit_scale",
    "model.input_embeddings.weight": "image_embeddings",
    "model.visual_embeddings.": "caption_projection.",
    "model.visual_fc.": "image_to_text.",
    "model.ret_text_hidden_fcs.0.model.": "text_to_image.",
    "model.gen_text_hidden_fcs.0.query_embs": "mapper.queries",
    "model.gen_text_hidden_fcs.0.fc.": "mapper.input.",
    "model.gen_text_hidden_fcs.0.tfm.": "mapper.transformer.",
    "model.gen_text_hidden_fcs.0.model.": "mapper.output.",
}


def our_name(released: str) -> str:
    """`model.visual_fc.bias` is our `image_to_text.bias`. Raises KeyError for an unknown name."""
    return _renamed(released, _NAMES)


def released_name(ours: str) -> str:
    """`image_to_text.bias` is the released `model.visual_fc.bias`. Raises KeyError if unknown."""
    return _renamed(ours, {our: released for released, our in _NAMES.items()})


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        # Keys that end in a dot are modules; the others are whole names.
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    raise KeyError(name)


def _released_state(heads: Heads) -> dict[str, Tensor]:
    state = {released_name(name): tensor for name, tensor in heads.state_dict().items()}
    # Theirs keep a batch axis: [1, L, m].
    queries = released_name("mapper.queries")
    state[queries] = state[queries][None]
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UpstreamError(f"{path} is missing") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UpstreamError(f"{path} is not an archive of tensors alone: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UpstreamError(f'{path} must hold {{"state_dict": {{name: tensor}}}}')
    return state


def _check_layout(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    problems = misfits(state, expected)
    problems += [
        f"{name} is {t.dtype}, not floating point"
        for name, t in state.items()
        if not t.is_floating_point()
    ]
    if problems:
        raise UpstreamError(f"{path}: " + "; ".join(sorted(problems)))


def _sizes(path: Path, arguments: ReleasedArguments, state: dict[str, Tensor]) -> HeadSizes:
    """Sizes from the arguments, and from the tensors what the arguments leave out."""

    # The second axis of a matrix.
    def width(name: str) -> int:
        if name not in state:
            raise UpstreamError(f"{path}: missing {name}, from which sizes are read")
        if state[name].ndim != 2 or 0 in state[name].shape:
            raise UpstreamError(f"{path}: {name} has shape {list(state[name].shape)}, expected 2-D")
        return state[name].shape[1]

    # [p, d], [r, e], [D, m], and the second map of a feed-forward [m, width].
    tfm = "model.gen_text_hidden_fcs.0.tfm."
    d = width("model.visual_fc.weight")
    e = width("model.input_embeddings.weight")
    m = width("model.gen_text_hidden_fcs.0.model.weight")
    feedforward = width(f"{tfm}encoder.layers.0.linear2.weight")
    depth = {
        # Counted from 0. Where none is found, `_check_layout` will name a layer as missing.
        side: 1
        + max(
            (
                int(found[1])
                for name in state
                if (found := re.match(re.escape(tfm) + side + r"\.layers\.(\d+)\.", name))
            ),
            default=0,
        )
        for side in ("encoder", "decoder")
    }
    return HeadSizes(
        d=d,
        e=e,
        m=m,
        **{ours: getattr(arguments, theirs) for ours, theirs in _SIZES.items()},
        mapper=MapperSizes(
            kind="gill_mapper",
            encoder_layers=depth["encoder"],
            decoder_layers=depth["decoder"],
            feedforward=max(1, feedforward // m),
            num_heads=4,  # not in the file: fixed in the released code
            adds_embedding=True,
        ),
    )


def _check_expressible(sizes: HeadSizes, arguments: ReleasedArguments) -> None:
    problems = []
    if sizes.mapper.kind != "gill_mapper":
        problems.append(f"its mapping network is gill_mapper, not {sizes.mapper.kind}")
    if not sizes.mapper.adds_embedding:
        problems.append("its mapper reads hidden state + embedding, these heads the hidden state")
    if sizes.mapper.num_heads != 4:
        problems.append(f"its mapper has 4 attention heads, these heads {sizes.mapper.num_heads}")
    if sizes.D_pooled is not None:
        problems.append("it has no pooled projection")
    if sizes.standardizes_states:
        problems.append("its mapper and W_t2i read the hidden states as they are")
    problems += [
        f"{theirs} is {getattr(arguments, theirs)} in the arguments and {getattr(sizes, ours)} in "
        "the heads"
        for ours, theirs in _SIZES.items()
        if getattr(arguments, theirs) != getattr(sizes, ours)
    ]
    if problems:
        raise UpstreamError("the released layout cannot hold these heads: " + "; ".join(problems))
