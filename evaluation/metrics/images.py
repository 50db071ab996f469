"""Metrics of generated pictures: FID and LPIPS, with the convention each number follows.

Both need published weights that are no part of this project. With them they are computed by the
field's own libraries; without them they are absent (`MetricUnavailable`), never replaced. CLIP
similarity is in `evaluation.metrics.basic`.

Legend: N and M pictures, D width of a feature.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from evaluation.metrics.basic import MetricUnavailable
from gill_errors import InputError

LPIPS_SIZE = 256
_HOW = "pip install 'gill[image-metrics]'"


# What is named where a file is missing; `evaluation` in the params says where they are.
_INCEPTION_FILE = (
    "Inception of FID: weights-inception-2015-12-05-6726825d.pth (torch-fidelity) "
    "or pt_inception-2015-12-05-6726825d.pth (pytorch-fid)"
)
_ALEXNET_FILE = "AlexNet of LPIPS: alexnet-owt-7be5be79.pth (torchvision)"


def frechet_distance(
    generated: Float[Tensor, "N D"] | Float[np.ndarray, "N D"],
    real: Float[Tensor, "M D"] | Float[np.ndarray, "M D"],
) -> float:
    """Squared Frechet distance between the Gaussians of two sets of features.

    |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) with unbiased covariances (Heusel et al. 2017,
    equation 6; Dowson and Landau 1982). The trace of the root is the sum of the singular values of
    A A'^T, where S = A^T A is read off a QR decomposition of the centred features: no covariance is
    formed and no matrix root taken, so it also holds for fewer pictures than dimensions. float64.

    Biased upwards for few pictures: compare only distances over the same N and M.

    Raises:
        ValueError: fewer than two pictures on a side, NaN or infinity.
    """
    means, factors = [], []
    for name, features in (("generated", generated), ("real", real)):
        array = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if len(array) < 2:
            raise InputError(f"a covariance needs two {name} pictures, and there is {len(array)}")
        if not array.isfinite().all():
            row = int((~array.isfinite()).any(dim=1).nonzero()[0, 0])
            raise InputError(f"{name} picture {row} has features that are not finite")
        mean = array.mean(dim=0)
        means.append(mean)
        # [min(N, D), D]: all of the features that their covariance knows.
        triangle = torch.linalg.qr(array - mean, mode="r").R
        factors.append(triangle / math.sqrt(len(array) - 1))
    ours, theirs = factors
    root_trace = torch.linalg.svdvals(ours @ theirs.T).sum()
    distance = (means[0] - means[1]).square().sum()
    distance += ours.square().sum() + theirs.square().sum() - 2 * root_trace
    return max(0.0, float(distance))


class InceptionFeatures:
    """The network of FID (Tables 3, 4 and 8): pictures to features of 2048 for `frechet_distance`.

    Convention: torch-fidelity's port of the 2015-12-05 TensorFlow Inception, pool_3 features, 8-bit
    RGB resized to 299x299 as TensorFlow 1 does, unbiased covariances. The paper takes 30 000
    pictures for COCO and does not name its implementation; conventions differ by tenths.

    Args:
        weights: Inception of FID, from torch-fidelity or pytorch-fid.

    Raises:
        MetricUnavailable: no file, or torch-fidelity is not installed; says how to get it.
    """

    def __init__(self, weights: Path | None, device: str | torch.device = "cpu") -> None:
        path = _present("FID", _INCEPTION_FILE, weights)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError:
            raise MetricUnavailable(f"FID needs the torch-fidelity package: {_HOW}") from None
        # The library unpickles whatever its file holds, so it gets a copy with tensors alone.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            torch.save(_load_tensors(path), copy)
            try:
                self._network: nn.Module = FeatureExtractorInceptionV3(
                    "fid", ["2048"], feature_extractor_weights_path=str(copy)
                )
            except RuntimeError as error:
                raise InputError(f"{path} does not hold the Inception of FID: {error}") from error
        self.device = torch.device(device)
        self._network.to(self.device)

    @torch.no_grad()
    def encode(
        self, pictures: Sequence[Image.Image], batch_size: int = 32
    ) -> Float[Tensor, "N 2048"]:
        """Features on the CPU, float32. Pictures may differ in size.

        Raises:
            ValueError: no picture.
        """
        if not pictures:
            raise InputError("no picture to encode")
        return torch.cat(
            [
                self._network(batch.to(self.device))[0].cpu()
                for batch in _batches_of_one_size(pictures, batch_size)
            ]
        )


class LearnedPerceptualDistance:
    """LPIPS (Zhang et al. 2018): distance of two pictures in AlexNet's layers, lower is closer.

    Convention, that of the released evaluation: lpips package, version 0.1 with AlexNet, RGB in
    [-1, 1] resized to 256x256 (bilinear, antialiased). The lpips wheel brings the calibration of
    the layers, and not AlexNet itself.

    Args:
        alexnet: torchvision's AlexNet.

    Raises:
        MetricUnavailable: no file, or lpips is not installed; says how to get it.
    """

    def __init__(self, alexnet: Path | None, device: str | torch.device = "cpu") -> None:
        path = _present("LPIPS", _ALEXNET_FILE, alexnet)
        try:
            import lpips
        except ModuleNotFoundError:
            raise MetricUnavailable(f"LPIPS needs the lpips package: {_HOW}") from None
        self._network: nn.Module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        published = _load_tensors(path)
        layers = self._network.net.state_dict()  # "slice2.3.weight" is "features.3.weight"
        names = {name: f"features.{name.partition('.')[2]}" for name in layers}
        try:
            self._network.net.load_state_dict({name: published[names[name]] for name in layers})
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{path} does not hold torchvision's AlexNet: {error}") from error
        self.device = torch.device(device)
        self._network.to(self.device).eval()

    @torch.no_grad()
    def distances(
        self,
        generated: Sequence[Image.Image],
        real: Sequence[Image.Image],
        batch_size: int = 32,
    ) -> Float[Tensor, " N"]:
        """Distance of each generated picture from its real one, on the CPU, float32.

        Raises:
            ValueError: no pair, or lists of different length.
        """
        if len(generated) != len(real):
            raise InputError(f"{len(generated)} generated pictures and {len(real)} real ones")
        if not generated:
            raise InputError("no pair of pictures to compare")
        parts = []
        for first in range(0, len(generated), batch_size):
            part = slice(first, first + batch_size)
            ours, theirs = (
                torch.stack([_lpips_input(picture) for picture in pictures[part]]).to(self.device)
                for pictures in (generated, real)
            )
            parts.append(self._network(ours, theirs).flatten().cpu())
        return torch.cat(parts)


def _lpips_input(picture: Image.Image) -> Float[Tensor, "3 256 256"]:
    scaled = _pixels(picture).float() / 127.5 - 1
    size = [LPIPS_SIZE, LPIPS_SIZE]
    return transforms.resize(scaled, size, antialias=True)


def _pixels(picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def _batches_of_one_size(
    pictures: Sequence[Image.Image], batch_size: int
) -> Iterator[UInt8[Tensor, "B 3 H W"]]:
    """Pictures in their order; a batch ends where the size changes."""
    for _size, run in groupby(pictures, key=lambda picture: picture.size):
        same_size = list(run)
        for first in range(0, len(same_size), batch_size):
            yield torch.stack([_pixels(p) for p in same_size[first : first + batch_size]])


def _present(metric: str, what: str, path: Path | None) -> Path:
    if path is None:
        raise MetricUnavailable(f"{metric} needs published weights, and params name none. {what}")
    if not path.is_file():
        raise MetricUnavailable(f"{metric} needs published weights, and {path} is absent. {what}")
    return path


def _load_tensors(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"{path} is not a state dict: it holds more than named tensors")
    return state
