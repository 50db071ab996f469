"""What a step and a token ask of a device, counted on tensors without contents.

On the meta device a program runs as on a GPU but for the numbers, and every operation is seen as it
is dispatched: operators are kernels to launch, copies from the CPU are messages, and whatever wants
to know a number or a shape of the data waits for the device.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_models import TOY_OPT, batch_of, opt_gill
from pipeline.bridge.document_objective import read_documents
from pipeline.bridge.documents import DocumentBatch, Drawn, Shown, Words
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.frozen.language_model import LanguageModel
from pipeline.settings import Objective, TrainingSettings
from pipeline.talking import token_pass
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, decode
from pipeline.training.accumulation import backpropagate
from pipeline.training.stepping import Stepper


class Counts(TorchDispatchMode):
    """Attributes: kernels, copies from the CPU, and waits, so far. Numbers asked for are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.copies = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_meta for tensor in given)
        if on_device and name == "_local_scalar_dense":
            self.waits += 1
            return 0
        if on_device and name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            self.waits += not kwargs.get("non_blocking")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        masks = [one for one in tree_leaves(args[1:]) if _is_mask(one)] if "index" in name else []
        if (on_device and name in _SHAPED_BY_DATA) or masks:
            raise AssertionError(f"{func} makes a shape of the data and waits for the device")
        made = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(made)):
            # Numbers of no dimension travel with the kernel that takes them.
            from_cpu = any(not tensor.is_meta and tensor.ndim for tensor in given)
            self.copies += from_cpu
            self.kernels += not from_cpu and not func.is_view and name != "_unsafe_view"
        return made


_SHAPED_BY_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.dtype in (torch.bool, torch.uint8)


@pytest.fixture
def gill(monkeypatch: pytest.MonkeyPatch) -> MultimodalLanguageModel:
    """Two layers of OPT without contents."""
    monkeypatch.setattr(LanguageModel, "mean_row_norm", lambda self: 1.0)
    return opt_gill("toy", "meta")


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_waits_for_nothing_and_copies_once_a_pass(
    monkeypatch: pytest.MonkeyPatch, gill: MultimodalLanguageModel, packed: bool
) -> None:
    # torch has the fused optimiser for devices with contents; counted, it is one kernel a group.
    optimizer: Any = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    batch, draws = batch_of(gill, 6), PackingDraws.same(6, packed)
    stepper = Stepper(gill, Objective.released(), TrainingSettings.released())
    with Counts() as first:  # reads the start ids, makes the optimiser's state
        stepper.take(0, batch, draws)
    with Counts() as counts:
        stepper.take(1, batch, draws)
    assert counts.waits == first.waits == 0
    assert counts.copies == 2, "one a pass: where tokens go, and how they fall into sequences"
    assert counts.kernels <= 857


def test_a_pass_over_documents_copies_its_words_and_its_lists(
    gill: MultimodalLanguageModel,
) -> None:
    document = (Words((5, 6, 7), "words"), Shown(0), Words((8,), "image_token"), Drawn(1))
    batch = DocumentBatch(
        documents=(document,) * 3,
        pooled=torch.zeros(2, 8, device="meta"),
        targets=torch.zeros(2, 3, 6, device="meta"),
        rows=torch.arange(2),
    )
    gill.language_model.read_start()
    with Counts() as counts:
        read_documents(gill, batch)
    assert (counts.waits, counts.copies) == (0, 2)


@pytest.mark.parametrize(("packed", "most"), [(False, 146), (True, 158)])
def test_the_kernels_of_a_layer_in_a_step(
    monkeypatch: pytest.MonkeyPatch, gill: MultimodalLanguageModel, packed: bool, most: int
) -> None:
    def kernels(model: MultimodalLanguageModel) -> int:
        batch, draws = batch_of(model, 6), PackingDraws.same(6, packed)
        losses = partial(backpropagate, model, batch, Objective.released(), draws)
        losses()
        with Counts() as counts:
            losses()
        return counts.kernels

    monkeypatch.setitem(TOY_OPT, "num_hidden_layers", 3)
    assert kernels(opt_gill("toy", "meta")) - kernels(gill) <= most


def test_a_token_waits_once_and_an_answer_never_besides(gill: MultimodalLanguageModel) -> None:
    def counted(tokens: int, rows: int) -> Counts:
        context = Context(gill.language_model, rows)
        prompts = [torch.zeros(3 + row, 32, device="meta") for row in range(rows)]
        settings = DecodingSettings(max_tokens=tokens, max_images=0)
        with Counts() as counts:
            decode(gill, context, prompts, settings, stop_ids=())
        return counts

    for rows in (1, 3):
        short, long = counted(4, rows), counted(5, rows)
        assert (short.waits, long.waits) == (4, 5)
        # Its id and position; where prompts were padded also what is padding.
        assert long.copies - short.copies == (3 if rows == 1 else 4)
        assert long.kernels - short.kernels <= (54 if rows == 1 else 67)


def test_a_token_of_a_graph_is_two_copies_and_what_chooses_it(
    monkeypatch: pytest.MonkeyPatch, gill: MultimodalLanguageModel
) -> None:
    """On a GPU the pass itself is one launch: what it holds was counted when it was captured."""
    played = [torch.zeros(1, 1, 32, device="meta")]
    monkeypatch.setattr(token_pass, "DEVICES", ("meta",))
    monkeypatch.setattr(token_pass, "captured", lambda work, device: lambda: played[0])

    def counted(tokens: int) -> Counts:
        settings = DecodingSettings(max_tokens=tokens, max_images=0)
        prompt = torch.zeros(3, 32, device="meta")
        with Counts() as counts:
            decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
        return counts

    short, long = counted(4), counted(5)
    assert long.waits - short.waits == 1
    assert long.copies - short.copies == 3
    assert long.kernels - short.kernels <= 6


def test_joining_and_splitting_conversations_waits_for_nothing(
    gill: MultimodalLanguageModel,
) -> None:
    contexts = [Context(gill.language_model) for _ in range(3)]
    for row, context in enumerate(contexts):
        context.note(0, torch.zeros(2 + row, 32, device="meta"))
        context.read()
    with Counts() as counts:
        parts = Context.join(contexts).split()
    assert counts.waits == 0
    assert counts.copies == 3, "one a row, whatever the layers"
    assert [part.num_read for part in parts] == [2, 3, 4]


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
        lambda x: x.unique(),
    ],
)
def test_what_makes_a_shape_of_the_data_is_refused(ask: Any) -> None:
    with Counts(), pytest.raises(AssertionError, match="waits for the device"):
        ask(torch.zeros(4, device="meta"))


def test_what_is_asked_for_and_sent_is_counted() -> None:
    there = torch.zeros(4, device="meta")
    with Counts() as counts:
        assert there.sum().item() == 0
        assert there.tolist() == [0, 0, 0, 0]
        assert not bool((there > 1).any())
        there + torch.tensor([1, 2, 3, 4]).to("meta")
    assert (counts.waits, counts.copies) == (3, 1)
