"""What the two stores hold, from a params file and the widths of the frozen models."""

from __future__ import annotations

from cache import ArraySpec, Codec, StoreSpec
from settings.params import Params


def features_spec(params: Params, d: int) -> StoreSpec:
    """Pooled visual vectors [N, d]."""
    array = ArraySpec(dims={"visual": d}, codec=params.features.codec)
    return StoreSpec(arrays={"pooled": array}, shard_rows=params.features.shard_rows)


def targets_spec(params: Params, L: int, D: int, D_pooled: int | None) -> StoreSpec:
    """Text embeddings [N, L, D], for some generators pooled ones [N, D_pooled], and the same of
    the empty prompt, once. With `targets.source: online` only the latter is ever filled, so there
    is nothing to fit a codec to."""
    codec = params.targets.codec if params.targets.source == "cache" else Codec()
    dims = {"position": L, "channel": D}
    arrays = {"embedding": ArraySpec(dims=dims, codec=codec)}
    constants = {"empty_embedding": dims}
    if D_pooled is not None:
        pooled = {"pooled_channel": D_pooled}
        # One small vector: whole where the codec keeps targets whole, else in half.
        kept = Codec(dtype="float32" if codec.dtype == "float32" else "float16")
        arrays["pooled"] = ArraySpec(dims=pooled, codec=kept)
        constants["empty_pooled"] = pooled
    return StoreSpec(arrays=arrays, constants=constants, shard_rows=params.targets.shard_rows)
