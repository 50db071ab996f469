"""From the language model's [IMG] hidden states to the image generator's text space (Eq. 3).

Legend: B batch, r [IMG] tokens, e language-model width, m mapper width, L x D generator text space.
Every mapper turns (hidden [B, r, e], embeddings [r, e]) into [B, L, D].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gill_errors import InputError
from pipeline.settings import MapperSizes


class GILLMapper(nn.Module):
    """Encoder over the [IMG] states, decoder over L learnt queries (section 3.2, Fig. 4).

    Pre-norm with final norms, ReLU, no dropout, no positions on the r inputs, decoder not causal.
    Parameters start as torch's own (Xavier-uniform in the transformer), queries as N(0, 1).
    """

    def __init__(self, e: int, r: int, L: int, D: int, m: int, sizes: MapperSizes) -> None:
        super().__init__()
        del r  # any number of [IMG] states can be attended to
        self.adds_embedding = sizes.adds_embedding
        self.queries = nn.Parameter(torch.randn(L, m))
        self.input = nn.Linear(e, m)
        width = sizes.feedforward * m
        encoder = nn.TransformerEncoderLayer(
            m, sizes.num_heads, width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.transformer = nn.Transformer(
            d_model=m,
            nhead=sizes.num_heads,
            num_decoder_layers=sizes.decoder_layers,
            dim_feedforward=width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            # torch's default encoder warns that nested tensors do not go with norm_first
            custom_encoder=nn.TransformerEncoder(
                encoder, sizes.encoder_layers, nn.LayerNorm(m), enable_nested_tensor=False
            ),
        )
        self.output = nn.Linear(m, D)

    def forward(
        self, hidden: Float[Tensor, "B r e"], embeddings: Float[Tensor, "r e"]
    ) -> Float[Tensor, "B L D"]:
        """[IMG] states to the generator's text space; `embeddings` are the rows of E_img."""
        # [B, r, e] + [r, e]: as released (UPSTREAM 13); Eq. 3 has the hidden states alone.
        inputs = hidden + embeddings if self.adds_embedding else hidden
        memory = self.transformer.encoder(self.input(inputs))
        # One sequence of queries for all examples until the first cross-attention parts them.
        states = self.queries[None]
        # torch's pre-norm decoder layer written out: its own forward wants queries and memory of
        # the same batch size. [1, L, m] up to the first cross-attention, [B, L, m] from there on.
        for layer in self.transformer.decoder.layers:
            normed = layer.norm1(states)
            states = states + layer.self_attn(normed, normed, normed, need_weights=False)[0]
            states = states + _attend_to_few(layer.multihead_attn, layer.norm2(states), memory)
            states = states + layer.linear2(F.relu(layer.linear1(layer.norm3(states))))
        return self.output(self.transformer.decoder.norm(states))


def _attend_to_few(
    attention: nn.MultiheadAttention,
    queries: Float[Tensor, "queries_B L m"],
    memory: Float[Tensor, "B r m"],
) -> Float[Tensor, "B L m"]:
    """Cross-attention of L queries to r << L states; the queries may be one sequence for all.

    The query and output projections are applied on the side of the r keys and values, which is the
    same product in another order and 16 times less work at the paper's sizes.
    """
    m, num_heads = attention.embed_dim, attention.num_heads
    width = m // num_heads
    # Rows of `in_proj`: m for the queries, m for the keys, m for the values.
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    keys, values = (
        F.linear(memory, weight[m:], bias[m:]).unflatten(-1, (2, num_heads, width)).unbind(2)
    )
    # (W_q x + b_q) . k = x . (W_q^T k) + b_q . k: W_q goes to the r keys, [B, heads, r, m], and
    # `offsets` is the second term. scores: [B, L, heads, r].
    key_maps = torch.einsum("brhd,hdm->bhrm", keys, weight[:m].view(num_heads, width, m))
    scores = torch.einsum("blm,bhrm->blhr", queries, key_maps)
    offsets = torch.einsum("brhd,hd->bhr", keys, bias[:m].view(num_heads, width))
    shares = ((scores + offsets[:, None]) * width**-0.5).softmax(dim=-1)
    output = attention.out_proj
    # W_o goes to the r values likewise, [B, heads, r, m]: the weighted sum is the layer's output.
    value_maps = torch.einsum("brhd,mhd->bhrm", values, output.weight.view(m, num_heads, width))
    return torch.einsum("blhr,bhrm->blm", shares.to(value_maps.dtype), value_maps) + output.bias


class _SharedOut(nn.Module):
    """What the three baselines have in common: each [IMG] state yields 1/r of the L x D output.

    The paper leaves open how r vectors become L; this keeps them comparable in size and exact in r.
    """

    def __init__(self, r: int, L: int, D: int) -> None:
        super().__init__()
        if (L * D) % r:
            raise InputError(f"this mapper needs L * D = {L} * {D} to be divisible by r = {r}")
        self.share = L * D // r
        self.L, self.D = L, D

    def network(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B r share"]:
        raise NotImplementedError

    def forward(
        self, hidden: Float[Tensor, "B r e"], embeddings: Float[Tensor, "r e"]
    ) -> Float[Tensor, "B L D"]:
        # [B, r, L * D / r] -> [B, L, D]: the runs of the r states may end within a position.
        return self.network(hidden).reshape(len(hidden), self.L, self.D)


class LinearMapper(_SharedOut):
    """Baseline (1) of Table 3: a linear layer."""

    def __init__(self, e: int, r: int, L: int, D: int, m: int, sizes: MapperSizes) -> None:
        super().__init__(r, L, D)
        self.output = nn.Linear(e, self.share)

    def network(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B r share"]:
        """The linear map."""
        return self.output(hidden)


class MLPMapper(_SharedOut):
    """Baseline (2) of Table 3: a 3-layer perceptron with LeakyReLU."""

    def __init__(self, e: int, r: int, L: int, D: int, m: int, sizes: MapperSizes) -> None:
        super().__init__(r, L, D)
        self.layers = nn.Sequential(
            nn.Linear(e, m),
            nn.LeakyReLU(),
            nn.Linear(m, m),
            nn.LeakyReLU(),
            nn.Linear(m, self.share),
        )

    def network(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B r share"]:
        """The MLP."""
        return self.layers(hidden)


class EncoderMapper(_SharedOut):
    """Baseline (3) of Table 3: a bidirectional transformer encoder over the r [IMG] states."""

    def __init__(self, e: int, r: int, L: int, D: int, m: int, sizes: MapperSizes) -> None:
        super().__init__(r, L, D)
        self.input = nn.Linear(e, m)
        layer = nn.TransformerEncoderLayer(
            m, sizes.num_heads, sizes.feedforward * m, 0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, sizes.encoder_layers, nn.LayerNorm(m), enable_nested_tensor=False
        )
        self.output = nn.Linear(m, self.share)

    def network(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B r share"]:
        """The encoder over the r states, then the linear map."""
        return self.output(self.encoder(self.input(hidden)))


MAPPERS: dict[str, Callable[[int, int, int, int, int, MapperSizes], nn.Module]] = {
    "gill_mapper": GILLMapper,
    "linear": LinearMapper,
    "mlp": MLPMapper,
    "encoder": EncoderMapper,
}
"""Constructors by `MapperSizes.kind`, called with (e, r, L, D, m, sizes)."""
