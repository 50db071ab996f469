"""The ways to a device and back, on a CPU: values and dtypes."""

import numpy as np
import pytest
import torch

from gill_errors import GillError
from pipeline.devices import (
    Arriving,
    groups_sent_together,
    multiply_in_tf32,
    pick_device,
    sent,
)


def test_a_name_is_a_device_and_auto_is_what_there_is():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(GillError, match="'toaster' cannot be used"):
        pick_device("toaster")
    with pytest.raises(GillError, match="the device 'cuda:99' cannot be used"):
        pick_device("cuda:99")


def test_what_is_sent_to_the_cpu_is_what_it_was():
    values = torch.arange(6, dtype=torch.float16).view(2, 3)
    there = sent(values, torch.device("cpu"))
    assert there.dtype == torch.float16
    assert torch.equal(there, values)


def test_groups_that_are_sent_together_arrive_as_they_were():
    groups = [[[3, 1], torch.tensor([4])], [], [[]]]
    there = groups_sent_together(groups, torch.device("cpu"))
    assert [[one.tolist() for one in group] for group in there] == [[[3, 1], [4]], [], [[]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_arrive_as_they_were(dtype):
    values = torch.randn(3, 4).to(dtype)
    arriving = Arriving(values)
    assert arriving.shape == (3, 4)
    assert np.asarray(arriving).dtype == values.numpy().dtype
    np.testing.assert_array_equal(np.asarray(arriving), values.numpy())


@pytest.mark.parametrize("narrowed", [torch.float32, torch.float16])
def test_bfloat16_arrives_in_a_type_that_numpy_has(narrowed):
    values = torch.tensor([1.5, -300.0, 0.0078125], dtype=torch.bfloat16)
    found = np.asarray(Arriving(values, narrowed))
    assert found.dtype == np.dtype(str(narrowed).removeprefix("torch."))
    np.testing.assert_array_equal(found, [1.5, -300.0, 0.0078125])


def test_another_type_can_be_asked_for():
    assert np.asarray(Arriving(torch.ones(2)), np.float64).dtype == np.float64


def test_a_store_takes_what_arrives(tmp_path):
    from cache import ArraySpec, Roles, StoreSpec, fill, read_rows

    def encode(rows):
        return {"x": Arriving(torch.tensor(rows, dtype=torch.bfloat16)[:, None].expand(-1, 3))}

    fill(
        tmp_path / "x.zarr",
        list(range(9)),
        StoreSpec(arrays={"x": ArraySpec(dims={"c": 3})}, shard_rows=4),
        lambda: Roles(read=int, encode=encode),
        provenance={"model": "numbers"},
    )
    found = read_rows(tmp_path / "x.zarr", [7, 2])["x"]
    np.testing.assert_array_equal(found, [[7, 7, 7], [2, 2, 2]])


def test_float32_is_multiplied_in_tf32_on_a_gpu_alone():
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [library.allow_tf32 for library in libraries]
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        multiply_in_tf32(torch.device("cpu"))
        assert not torch.backends.cuda.matmul.allow_tf32
        multiply_in_tf32(torch.device("cuda"))
        assert [library.allow_tf32 for library in libraries] == [True, True]
    finally:
        for library, value in zip(libraries, before):
            library.allow_tf32 = value
