import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.frozen import grid_attention
from pipeline.frozen.grid_attention import Grids
from pipeline.frozen.packing import Packing, packed_attention
from tests import ragged_kernel


@pytest.fixture(params=["grid", "two grids", "ragged"], autouse=True)
def laid_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test with a padded grid, with two wherever lengths differ, and without as on a GPU."""
    monkeypatch.setattr(grid_attention, "_GAIN", 0.0 if request.param == "two grids" else math.inf)
    with ragged_kernel.on_cpu() if request.param == "ragged" else nullcontext():
        yield


def layer(index: int = 0) -> nn.Module:
    module = nn.Identity()
    module.layer_idx = index  # type: ignore[assignment]
    return module


def qkv(tokens: int, heads: int = 4, kv_heads: int = 4) -> list[torch.Tensor]:
    return [torch.randn(1, h, tokens, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int = 0) -> torch.Tensor:
    """One sequence [1, H, T, h] by itself; the first `past` keys precede the queries."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[3, 1, 4], [2, 2], [5]])
def test_each_sequence_attends_to_itself_alone(lengths: list[int], kv_heads: int) -> None:
    states = qkv(sum(lengths), kv_heads=kv_heads)
    packing = Packing.of(lengths, torch.device("cpu"))
    out, weights = packed_attention(layer(), *states, None, packing=packing)
    assert weights is None
    parts = zip(*[x.split(lengths, dim=2) for x in states])
    torch.testing.assert_close(out, torch.cat([causal(*part) for part in parts], dim=1))


def test_a_prefix_is_seen_by_its_own_sequence() -> None:
    lengths, before = [2, 3, 2], [4, 1, 2]
    prefix_states, states = qkv(sum(before)), qkv(sum(lengths))
    first = Packing.of(before, torch.device("cpu"), record=True)
    packed_attention(layer(), *prefix_states, None, packing=first)
    assert first.recorded is not None
    packing = Packing.of(lengths, torch.device("cpu"), prefix=first.recorded)
    assert packing.positions.tolist() == [4, 5, 1, 2, 3, 2, 3]
    assert packing.longest == 6
    out, _ = packed_attention(layer(), *states, None, packing=packing)
    expected = []
    for i, past in enumerate(before):
        q, k, v = (x.split(lengths, dim=2)[i] for x in states)
        pk, pv = (x.split(before, dim=2)[i] for x in prefix_states[1:])
        expected.append(causal(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), past))
    torch.testing.assert_close(out, torch.cat(expected, dim=1))


def test_one_prefix_may_serve_all_and_be_recorded_with_what_follows() -> None:
    start, states = qkv(2), qkv(4)
    first = Packing.of([2], torch.device("cpu"), record=True)
    packed_attention(layer(), *start, None, packing=first)
    assert first.recorded is not None
    prefix = first.recorded.repeat(2)
    second = Packing.of([3, 1], torch.device("cpu"), prefix=prefix, record=True)
    out, _ = packed_attention(layer(), *states, None, packing=second)
    for i, part in enumerate(zip(*[x.split([3, 1], dim=2) for x in states])):
        k, v = (torch.cat(pair, dim=2) for pair in zip(start[1:], part[1:]))
        torch.testing.assert_close(out.split([3, 1], dim=1)[i], causal(part[0], k, v, 2))
        assert second.recorded is not None
        assert second.recorded.lengths == [5, 3]
        assert second.recorded.keys[0][i, :, : 5 - 2 * i].equal(k[0])
    with pytest.raises(ValueError, match=r"different lengths: \[5, 3\]"):
        Packing.of([1, 1], torch.device("cpu"), prefix=second.recorded, record=True)


def test_unpack_and_pack_are_inverse() -> None:
    packing = Packing.of([3, 1, 2], torch.device("cpu"))
    states = torch.randn(1, 4, 6, 8)
    grid = packing.unpack(states)
    assert grid.shape == (3, 4, 3, 8)
    assert grid[1, :, 1:].count_nonzero() == 0
    assert packing.pack(grid).transpose(1, 2).equal(states)
    assert packing.positions.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("before", [0, 3])
def test_a_window_hides_what_lies_further_back(before: int) -> None:
    states, past = qkv(8), qkv(2 * before)
    prefix = None
    if before:
        first = Packing.of([before, before], torch.device("cpu"), record=True)
        packed_attention(layer(), *past, None, packing=first)
        prefix = first.recorded
    packing = Packing.of([3, 5], torch.device("cpu"), prefix=prefix)
    out, _ = packed_attention(layer(), *states, None, packing=packing, sliding_window=2)
    for i, (q, k, v) in enumerate(zip(*[x.split([3, 5], dim=2) for x in states])):
        old = [x[:, :, i * before : (i + 1) * before] for x in past[1:]]
        k, v = (torch.cat(pair, dim=2) for pair in zip(old, (k, v)))
        own = out.split([3, 5], dim=1)[i]
        for t in range(q.shape[2]):
            seen = slice(max(0, before + t - 1), before + t + 1)
            alone = causal(q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen], min(before + t, 1))
            torch.testing.assert_close(own[:, t : t + 1], alone)


def test_two_grids_have_the_gradients_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, before = [2, 9, 2, 3, 7], [5, 1, 2, 1, 6]
    past, states = qkv(sum(before), kv_heads=2), qkv(sum(lengths), kv_heads=2)
    first = Packing.of(before, torch.device("cpu"), record=True)
    packed_attention(layer(), *past, None, packing=first)
    told = torch.randn(1, sum(lengths), 4, 8, dtype=torch.float64)

    def gradients(gain: float) -> list[torch.Tensor]:
        monkeypatch.setattr(grid_attention, "_GAIN", gain)
        packing = Packing.of(lengths, torch.device("cpu"), prefix=first.recorded)
        own = [x.clone().requires_grad_() for x in states]
        out, _ = packed_attention(layer(), *own, None, packing=packing)
        (out * told).sum().backward()
        return [out.detach(), *(x.grad for x in own if x.grad is not None)]

    for one, two in zip(gradients(math.inf), gradients(0.0), strict=True):
        torch.testing.assert_close(one, two)


def test_sequences_are_parted_where_that_halves_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    device = torch.device("cpu")
    # 21 of 8 after at most 60, 4 of 45 after 3: 21 * 8 * 68 + 4 * 45 * 48, of 25 * 45 * 105.
    grids = Grids.of([8] * 20 + [45] * 4 + [8], [30] * 20 + [3] * 4 + [60], device)
    assert grids is not None
    short, long = grids.parts
    assert short.sequences.tolist() == [*range(20), 24]
    assert (short.longest, short.before, short.starts[-1]) == (8, 60, 60)
    assert (long.sequences.tolist(), long.longest, long.before) == ([20, 21, 22, 23], 45, 3)
    assert Grids.of([8] * 4, [1, 2, 3, 50], device) is None
    assert Grids.of([8, 28] * 16, [30] * 32, device) is None  # 0.59 of one grid
    assert Grids.of([8] * 16 + [28], [30] * 17, device) is not None


def test_half_precision_on_a_cpu_is_computed_in_float32() -> None:
    states = [x.bfloat16() for x in qkv(9)]
    packing = Packing.of([2, 7], torch.device("cpu"))
    out, _ = packed_attention(layer(), *states, None, packing=packing)
    parts = zip(*[x.float().split([2, 7], dim=2) for x in states])
    expected = torch.cat([causal(*part) for part in parts], dim=1)
    assert out.dtype == torch.bfloat16
    if packing.ragged is None:  # on a GPU the kernel has its own accumulators
        assert out.equal(expected.bfloat16())
