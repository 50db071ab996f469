import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import pipeline.bridge.losses as losses
from pipeline.bridge.losses import (
    constant_cross_entropy_sum,
    cross_entropy_sum,
    info_nce,
    mean_distance,
    mean_squared_error,
)

P, N, R, E = 9, 13, 3, 5


def tensors(with_bias: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, rows = torch.randn(P, E, dtype=torch.float64), torch.randn(N, E, dtype=torch.float64)
    images = torch.randn(R, E, dtype=torch.float64)
    bias = torch.randn(N, dtype=torch.float64) if with_bias else None
    return hidden, rows, bias, images, torch.randint(0, N + R, (P,))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("block_elements", [P, 4 * P, 10**6])
def test_cross_entropy_is_torchs(
    with_bias: bool, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", block_elements)
    hidden, rows, bias, images, targets = tensors(with_bias)
    hidden.requires_grad_(), images.requires_grad_()
    words = F.linear(hidden, rows, bias)
    expected = F.cross_entropy(torch.cat([words, hidden @ images.T], 1), targets, reduction="sum")
    ours = cross_entropy_sum(hidden, targets, rows, bias, images)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    for grad, own in zip(
        torch.autograd.grad(3 * ours, [hidden, images]),
        torch.autograd.grad(3 * expected, [hidden, images]),
    ):
        torch.testing.assert_close(grad, own, rtol=1e-11, atol=1e-12)

    constant = constant_cross_entropy_sum(hidden.detach(), targets, rows, bias, images)
    torch.testing.assert_close(constant, expected, rtol=1e-13, atol=0)
    words = F.linear(hidden.detach(), rows, bias)
    logits = torch.cat([words, hidden.detach() @ images.T], 1)
    reference = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(
        torch.autograd.grad(constant, images)[0],
        torch.autograd.grad(reference, images)[0],
        rtol=1e-11,
        atol=1e-12,
    )


def test_cross_entropy_over_words_alone() -> None:
    hidden, rows, _, _, targets = tensors(False)
    targets = targets % N
    hidden.requires_grad_()
    expected = F.cross_entropy(hidden @ rows.T, targets, reduction="sum")
    ours = cross_entropy_sum(hidden, targets, rows)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, hidden), torch.autograd.grad(expected, hidden)
    )


def test_cross_entropy_survives_huge_logits() -> None:
    hidden, rows, _, images, targets = tensors(False)
    hidden = (hidden * 1e3).float().requires_grad_()
    ours = cross_entropy_sum(hidden, targets, rows.float(), None, images.float())
    expected = F.cross_entropy(
        torch.cat([hidden @ rows.float().T, hidden @ images.float().T], 1), targets, reduction="sum"
    )
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.grad(ours, hidden)[0].isfinite().all()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    hidden, rows, _, images, targets = tensors(False)
    low = [x.bfloat16() for x in (hidden, rows, images)]
    ours = cross_entropy_sum(low[0], targets, low[1], None, low[2])
    assert ours.dtype == torch.float32
    logits = torch.cat([low[0] @ low[1].T, low[0] @ low[2].T], 1).float()
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, reduction="sum"))


def test_info_nce_by_hand() -> None:
    queries = torch.eye(3, 4)
    keys = torch.eye(3, 4)[[0, 2, 1]]
    scale = torch.tensor(2.0).log()
    text, image = info_nce(queries, keys, scale)
    # One of three pairs matches (logit 2), the others see their own at 0 and the wrong one at 2.
    normaliser = torch.tensor([2.0, 0.0, 0.0]).logsumexp(0)
    expected = normaliser - 2 / 3
    torch.testing.assert_close(text, expected)
    torch.testing.assert_close(image, expected)


def test_info_nce_tells_its_two_directions_apart() -> None:
    torch.manual_seed(0)
    queries, keys = (F.normalize(torch.randn(4, 6), dim=1) for _ in range(2))
    text, image = info_nce(queries, keys, torch.tensor(1.0))
    similarity = queries @ keys.T * torch.tensor(1.0).exp()
    torch.testing.assert_close(text, -similarity.log_softmax(1).diagonal().mean())
    torch.testing.assert_close(image, -similarity.log_softmax(0).diagonal().mean())


def test_distances() -> None:
    output = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    target = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]], dtype=torch.float16)
    assert mean_distance(output, target).item() == pytest.approx((5 + 2) / 2)
    assert mean_squared_error(output, target).item() == pytest.approx((9 + 16 + 4) / 4)


def _rank_gradients(rank: int, port: int, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    queries, keys = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = {}
    for divided in (False, True):
        own = slice(3 * rank, 3 * rank + 3)
        q, k = queries[own].clone().requires_grad_(), keys[own].clone().requires_grad_()
        text, image = info_nce(q, k, scale, divide_gradient=divided)
        grads = torch.autograd.grad(text + 2 * image, [q, k, scale])
        found[divided] = [text + 2 * image, *grads]
    torch.save({k: [t.detach() for t in v] for k, v in found.items()}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_info_nce_over_two_ranks_is_that_of_one(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank_gradients, (port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    queries, keys = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    queries.requires_grad_(), keys.requires_grad_()
    text, image = info_nce(queries, keys, scale)
    whole = text + 2 * image
    expected = torch.autograd.grad(whole, [queries, keys, scale])
    for divided, factor in ((False, 1.0), (True, 0.5)):
        for rank in ranks:
            torch.testing.assert_close(rank[divided][0], whole.detach())
        # Data-parallel training averages over ranks: each rank's rows count 1 / W.
        for i in range(2):
            both = torch.cat([rank[divided][1 + i] for rank in ranks]) / 2
            torch.testing.assert_close(both, factor * expected[i])
        torch.testing.assert_close((ranks[0][divided][3] + ranks[1][divided][3]) / 2, expected[2])
