"""What the store of latents holds.

Apart from `store_specs`, whose code decides stores that are there already.
"""

from __future__ import annotations

from cache import ArraySpec, StoreSpec
from settings.params import Params, PrecomputeParams


def latents_layout(params: Params) -> PrecomputeParams:
    """In float16, in shards of as many rows as the targets."""
    return PrecomputeParams(shard_rows=params.targets.shard_rows)


def latents_spec(params: Params, shape: tuple[int, int, int, int]) -> StoreSpec:
    """Mean and deviation of the latents [N, 2, C, H, W], of which `shape` has all but N."""
    layout = latents_layout(params)
    dims = dict(zip(("moment", "channel", "height", "width"), shape, strict=True))
    arrays = {"posterior": ArraySpec(dims=dims, codec=layout.codec)}
    return StoreSpec(arrays=arrays, shard_rows=layout.shard_rows)
