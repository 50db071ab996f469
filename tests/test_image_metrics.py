"""The Frechet distance against closed forms, FID's and LPIPS's networks against their libraries."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from evaluation.metrics.basic import MetricUnavailable
from evaluation.metrics.images import (
    InceptionFeatures,
    LearnedPerceptualDistance,
    frechet_distance,
)


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Samples whose own mean and unbiased covariance are exactly those given."""
    samples = np.random.default_rng(seed).normal(size=(count, len(mean)))
    samples -= samples.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    return samples @ whiten @ np.linalg.cholesky(covariance).T + mean


def test_distance_of_gaussians_with_commuting_covariances() -> None:
    mean, other = np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 4.0])
    generated = gaussian(mean, np.diag([1.0, 4.0, 9.0]), 50, seed=0)
    real = gaussian(other, np.diag([4.0, 1.0, 9.0]), 80, seed=1)
    # |mu - mu'|^2 = 0 + 4 + 1; of each axis (sigma - sigma')^2 = 1, 1, 0.
    assert frechet_distance(generated, real) == pytest.approx(7.0, rel=1e-9)
    assert frechet_distance(real, generated) == pytest.approx(7.0, rel=1e-9)


def test_distance_agrees_with_the_matrix_square_root() -> None:
    generator = np.random.default_rng(0)
    generated = generator.normal(size=(300, 24)) @ generator.normal(size=(24, 24))
    real = generator.normal(size=(200, 24)) @ generator.normal(size=(24, 24)) + 0.3
    first, second = (np.cov(features, rowvar=False) for features in (generated, real))
    expected = np.square(generated.mean(axis=0) - real.mean(axis=0)).sum()
    expected += np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real)
    assert frechet_distance(torch.from_numpy(generated), torch.from_numpy(real)) == pytest.approx(
        expected, rel=1e-9
    )


def test_fewer_pictures_than_dimensions_lose_no_digits() -> None:
    # The usual matrix root is ill-conditioned here. In one dimension of many, the answer is known.
    generated, real = np.zeros((3, 500)), np.zeros((4, 500))
    generated[:, 7] = [-1, 0, 1]  # mean 0, deviation 1
    real[:, 7] = [0, 0, 6, 6]  # mean 3, deviation sqrt(12)
    assert frechet_distance(generated, real) == pytest.approx(9 + (np.sqrt(12) - 1) ** 2)
    same = np.random.default_rng(0).normal(size=(20, 500)) * 1e3
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(same + 2, same) == pytest.approx(4 * 500, rel=1e-9)


def test_orthogonal_spreads_have_nothing_in_common() -> None:
    generated, real = np.zeros((3, 2)), np.zeros((3, 2))
    generated[:, 0] = [-1, 0, 1]
    real[:, 1] = [-2, 0, 2]
    assert frechet_distance(generated, real) == pytest.approx(1 + 4)


def test_features_without_a_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="two generated pictures, and there is 1"):
        frechet_distance(np.zeros((1, 3)), np.zeros((2, 3)))
    broken = np.zeros((3, 2))
    broken[1, 0] = np.nan
    with pytest.raises(ValueError, match="real picture 1"):
        frechet_distance(np.zeros((2, 2)), broken)


@pytest.mark.parametrize(
    ("metric", "name", "published"),
    [
        (InceptionFeatures, "FID", "weights-inception-2015-12-05-6726825d.pth"),
        (LearnedPerceptualDistance, "LPIPS", "alexnet-owt-7be5be79.pth"),
    ],
)
def test_without_published_weights_a_metric_is_absent_and_says_why(
    metric, name: str, published: str, tmp_path: Path
) -> None:
    with pytest.raises(MetricUnavailable, match=f"{name} needs .* name none.*{published}"):
        metric(None)
    with pytest.raises(MetricUnavailable, match=f"{name} needs .*gone.pth is absent.*{published}"):
        metric(tmp_path / "gone.pth")


class Reduces:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the weights file was unpickled",))


@pytest.mark.parametrize(
    ("metric", "library"),
    [(InceptionFeatures, "torch_fidelity"), (LearnedPerceptualDistance, "lpips")],
)
def test_a_file_of_other_content_is_refused(metric, library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    path = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.pth does not hold"):
        metric(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="more than named tensors"):
        metric(path)
    torch.save(Reduces(), path)
    with pytest.raises(Exception, match="[Ww]eights"):
        metric(path)


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_lpips_is_the_librarys_on_resized_pictures(tmp_path: Path) -> None:
    lpips = pytest.importorskip("lpips")
    from torchvision.models import alexnet
    from torchvision.transforms.functional import resize

    torch.manual_seed(0)
    network = alexnet(weights=None)
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    metric = LearnedPerceptualDistance(tmp_path / "alexnet.pth")
    generated, real = [noise((64, 48), 0), noise((300, 300), 1)], [noise((32, 32), 2)] * 2

    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in (reference.net.slice1, reference.net.slice2, reference.net.slice3,
                 reference.net.slice4, reference.net.slice5):  # fmt: skip
        for number, layer in part.named_children():
            layer.load_state_dict(network.features[int(number)].state_dict())

    def tensor(picture: Image.Image) -> torch.Tensor:
        return resize(lpips.im2tensor(np.array(picture)), [256, 256], antialias=True)

    with torch.no_grad():
        expected = [reference(tensor(a), tensor(b)).item() for a, b in zip(generated, real)]
    assert metric.distances(generated, real, batch_size=1).tolist() == pytest.approx(expected)
    assert metric.distances(generated, real).tolist() == pytest.approx(expected, rel=1e-5)
    assert metric.distances(real, real).tolist() == [0.0, 0.0]
    assert min(expected) > 0.01
    with pytest.raises(ValueError, match="2 generated pictures and 1 real"):
        metric.distances(generated, real[:1])
    with pytest.raises(ValueError, match="no pair"):
        metric.distances([], [])


def test_inception_features_keep_the_order_of_pictures_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network_type = library.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # The published weights are not here: random ones do.
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network_type, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = network_type("random", ["2048"], verbose=False)
    for weights in network.parameters():
        if weights.ndim == 4:  # The default would fade the picture out, layer by layer.
            torch.nn.init.kaiming_normal_(weights)
    torch.save(network.state_dict(), tmp_path / "inception.pth")

    encoder = InceptionFeatures(tmp_path / "inception.pth")
    pictures = [noise((40, 60), 0), noise((40, 60), 1), noise((64, 64), 2).convert("L")]
    features = encoder.encode(pictures, batch_size=2)
    assert features.shape == (3, 2048)
    for row, picture in zip(features, pictures, strict=True):
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
        torch.testing.assert_close(row, network(pixels)[0][0], rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no picture"):
        encoder.encode([])
