import pytest
import torch

from pipeline.bridge.mapper import MAPPERS
from pipeline.settings import MapperSizes

E, L, D, M = 12, 8, 6, 16


@pytest.mark.parametrize("kind", MAPPERS)
@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_every_mapper_yields_the_generators_shape_and_depends_on_every_token(
    kind: str, r: int
) -> None:
    torch.manual_seed(0)
    sizes = MapperSizes(kind=kind, encoder_layers=2, decoder_layers=2)
    mapper = MAPPERS[kind](E, r, L, D, M, sizes)
    hidden = torch.randn(3, r, E, requires_grad=True)
    out = mapper(hidden, torch.randn(r, E))
    assert out.shape == (3, L, D)
    (grad,) = torch.autograd.grad((out[1] ** 2).sum(), hidden)
    assert (grad[1].norm(dim=-1) > 0).all()
    assert grad[0].count_nonzero() == grad[2].count_nonzero() == 0


@pytest.mark.parametrize("adds_embedding", [True, False])
def test_gill_mapper_is_torchs_transformer_over_its_queries(adds_embedding: bool) -> None:
    torch.manual_seed(0)
    sizes = MapperSizes(encoder_layers=3, decoder_layers=3, adds_embedding=adds_embedding)
    mapper = MAPPERS["gill_mapper"](E, 4, L, D, M, sizes).double()
    hidden = torch.randn(5, 4, E, dtype=torch.float64)
    embeddings = torch.randn(4, E, dtype=torch.float64)
    inputs = mapper.input(hidden + embeddings if adds_embedding else hidden)
    expected = mapper.output(mapper.transformer(inputs, mapper.queries.expand(5, -1, -1)))
    torch.testing.assert_close(mapper(hidden, embeddings), expected, rtol=1e-12, atol=1e-12)


def test_what_no_example_changes_is_computed_once() -> None:
    sizes = MapperSizes(encoder_layers=1, decoder_layers=2)
    mapper = MAPPERS["gill_mapper"](E, 4, L, D, M, sizes)
    batches: list[list[int]] = []
    for layer in mapper.transformer.decoder.layers:
        layer.norm1.register_forward_hook(lambda _, args, __: batches.append(list(args[0].shape)))
    mapper(torch.randn(5, 4, E), torch.randn(4, E))
    assert batches == [[1, L, M], [5, L, M]]


def test_baselines_take_the_layers_of_the_paper() -> None:
    mlp = MAPPERS["mlp"](E, 4, L, D, M, MapperSizes(kind="mlp"))
    assert [type(layer).__name__ for layer in mlp.layers] == [
        "Linear",
        "LeakyReLU",
        "Linear",
        "LeakyReLU",
        "Linear",
    ]
    encoder = MAPPERS["encoder"](E, 4, L, D, M, MapperSizes(kind="encoder"))
    assert len(encoder.encoder.layers) == 4
    # Bidirectional: the first token's share of the output sees the last token.
    hidden = torch.randn(1, 4, E, requires_grad=True)
    first = encoder(hidden, torch.zeros(4, E)).flatten()[: L * D // 4]
    (grad,) = torch.autograd.grad(first.square().sum(), hidden)
    assert grad[0, 3].norm() > 0


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match="divisible by r = 7"):
        MAPPERS["linear"](E, 7, L, D, M, MapperSizes(kind="linear"))
