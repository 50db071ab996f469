"""What the language model has read: keys and values that live across the turns of a talk.

Letters: B rows, T positions of one read, S positions so far, e language-model width.

The rows of a batch advance by different numbers of tokens (ragged prompts; 1 token or r of an
image; none when finished). Each read is therefore right-aligned: shorter rows are padded on the
left, no later position attends to the padding, and positions count real tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gill_errors import InputError
from pipeline.devices import sent, sent_together
from pipeline.frozen.language_model import LanguageModel
from pipeline.talking.key_memory import key_memory
from pipeline.talking.token_pass import TokenPass, borrow, give_back

States = list[tuple[Float[Tensor, "B H S h"], Float[Tensor, "B H S h"]]]
"""Keys and values of every layer."""


class Context:
    """All that the language model has read so far in B rows: keys, values and positions.

    Keep it between the turns of a conversation: a turn then reads its own tokens only.
    """

    def __init__(self, language_model: LanguageModel, num_rows: int = 1) -> None:
        self._language_model = language_model
        # Whatever the configuration says: layers with a sliding window would drop what masks count.
        self._memory = key_memory()
        self._token_pass: TokenPass | None = None
        """Has the keys and values in place of `_memory`, from one token to the next."""
        self._by_token = False
        window = getattr(language_model.model.config, "sliding_window", None)
        self.max_positions = min(
            language_model.max_positions, window or language_model.max_positions
        )
        # On the CPU, where shapes are decided with no wait for a device.
        self._real = torch.zeros(num_rows, 0, dtype=torch.bool)
        self._pending: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._has_padding = False
        self.last_hidden = torch.zeros(
            num_rows, language_model.width, dtype=language_model.dtype, device=language_model.device
        )
        """[B, e]: final hidden state of each row's last position read."""
        self.num_rows = num_rows
        self.lengths = [0] * num_rows
        """Positions used per row, those noted and not yet read included."""

    @classmethod
    def join(cls, contexts: Sequence[Context]) -> Context:
        """One context whose rows are those of `contexts`, in order; these stay as they are.

        Conversations of any age are decoded together and taken apart again with `split`.
        """
        first = contexts[0]
        joined = cls(first._language_model, sum(context.num_rows for context in contexts))
        width = max(context._real.shape[1] for context in contexts)

        def padded(states: Tensor, dim: int) -> Tensor:
            shape = list(states.shape)
            shape[dim] = width - shape[dim]
            return torch.cat([states.new_zeros(shape), states], dim) if shape[dim] else states

        joined._real = torch.cat([padded(context._real, 1) for context in contexts])
        joined._has_padding = not bool(joined._real.all())
        joined._pending = [list(parts) for context in contexts for parts in context._pending]
        joined.lengths = [length for context in contexts for length in context.lengths]
        joined.last_hidden = torch.cat([context.last_hidden for context in contexts])
        of_each = [context._states() for context in contexts]
        like = next((states for states in of_each if states), [])
        for layer, (keys, values) in enumerate(like):
            nothing = (keys[:1, :, :0], values[:1, :, :0])
            parts = [
                states[layer] if states else tuple(x.expand(n, -1, -1, -1) for x in nothing)
                for states, n in zip(of_each, (context.num_rows for context in contexts))
            ]
            joined._memory.update(
                torch.cat([padded(keys, 2) for keys, _ in parts]),
                torch.cat([padded(values, 2) for _, values in parts]),
                layer,
            )
        return joined

    def split(self) -> list[Context]:
        """Each row as a context of its own, without padding."""
        alone = []
        for row in range(self.num_rows):
            context = Context(self._language_model)
            real = self._real[row]
            context._real = real[real][None]
            context._pending = [list(self._pending[row])]
            context.lengths = [self.lengths[row]]
            context.last_hidden = self.last_hidden[row : row + 1].clone()
            [kept] = sent_together([real.nonzero()[:, 0]], self.last_hidden.device)
            for layer, (keys, values) in enumerate(self._states()):
                context._memory.update(
                    keys[row : row + 1].index_select(2, kept),
                    values[row : row + 1].index_select(2, kept),
                    layer,
                )
            alone.append(context)
        return alone

    @property
    def num_read(self) -> int:
        """Positions that a context of one row has read."""
        return self._real.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(states.nbytes for pair in self._states() for states in pair)

    def beginning(self, length: int) -> Context:
        """The first `length` positions that a context of one row has read, as a new context.

        Raises ValueError for several rows or more than was read.
        """
        if self.num_rows != 1 or self._has_padding or not 0 < length <= self.num_read:
            raise InputError(f"{self.num_rows} rows of {self.num_read} positions, not {length}")
        context = Context(self._language_model)
        context._real = self._real[:, :length]
        context.lengths = [length]
        if length == self.lengths[0]:
            context.last_hidden = self.last_hidden.clone()
        for layer, (keys, values) in enumerate(self._states()):
            context._memory.update(keys[:, :, :length], values[:, :, :length], layer)
        return context

    def rewind(self, length: int) -> None:
        """Forget all after the first `length` positions of a context of one row.

        Raises ValueError for several rows or a length that was not reached.
        """
        if self.num_rows != 1 or self._has_padding or not 0 <= length <= self.lengths[0]:
            raise InputError(
                f"cannot rewind {self.num_rows} rows of {self.lengths} positions to {length}"
            )
        was_read = self._real.shape[1]
        pending = torch.cat([self.last_hidden[:0], *self._pending[0]])
        self._pending[0] = [pending[: max(length - was_read, 0)]]
        self.lengths[0] = length
        if length < was_read:
            self._states()  # back in `_memory`
            self._memory.crop(length - was_read)
            self._real = self._real[:, :length]
            # The state before the next token is that of a position whose state was not kept.
            self.last_hidden = torch.zeros_like(self.last_hidden)

    def drop(self, row: int, count: int, last_hidden: Float[Tensor, " e"]) -> None:
        """Forget the last `count` positions of `row`, all of which were read; `last_hidden` is the
        final hidden state of the position before them."""
        self._states()  # what is dropped is still shown elsewhere than in `_memory`
        if self.num_rows == 1 and not self._has_padding:
            self.rewind(self.lengths[0] - count)
        else:
            # They stay where they are and are seen by no later position.
            self._real = self._real.clone()
            self._real[row, self._real[row].nonzero()[-count:, 0]] = False
            self.lengths[row] -= count
            self._has_padding = True
        self.last_hidden[row] = last_hidden

    @contextmanager
    def by_token(self) -> Iterator[None]:
        """Within, an answer is decoded: on a GPU tokens are read by a captured graph."""
        self._by_token = True
        try:
            yield
        finally:
            self._by_token = False
            self._states()

    def _states(self) -> States:
        """All keys and values, back in `_memory`; none where nothing was read yet."""
        if self._token_pass is not None:
            token_pass, self._token_pass = self._token_pass, None
            for layer, (keys, values) in enumerate(token_pass.states(self._real.shape[1])):
                self._memory.update(keys, values, layer)
            give_back(self._language_model, token_pass)
        layers: list[Any] = list(self._memory.layers)
        return [(layer.keys, layer.values) for layer in layers]

    def _pass_with_room(self) -> TokenPass | None:
        """What reads the next token, with what was read so far; None: it is read eagerly."""
        length = self._real.shape[1]
        token_pass = self._token_pass
        if token_pass is not None and length < token_pass.capacity:
            return token_pass
        states = self._states()
        if not self._by_token or not states:
            return None
        token_pass = borrow(self._language_model, states, length)
        if token_pass is not None:
            token_pass.load(states, self._real)
            self._token_pass, self._memory = token_pass, key_memory()
        return token_pass

    def room(self, row: int) -> int:
        """Positions left in `row`."""
        return self.max_positions - self.lengths[row]

    def note(self, row: int, embeddings: Float[Tensor, "T e"]) -> None:
        """Append embeddings to `row`; they are read together with the next ones.

        Raises ValueError when the row would pass the language model's last position.
        """
        if len(embeddings) > self.room(row):
            raise InputError(
                f"row {row}: {len(embeddings)} positions after the {self.lengths[row]} already "
                f"used pass the language model's limit of {self.max_positions}; "
                "shorten the prompt or start a new context"
            )
        self._pending[row].append(embeddings)
        self.lengths[row] += len(embeddings)

    @torch.no_grad()
    def read(self) -> Float[Tensor, "B T e"]:
        """Run the language model over what was noted; T is the longest row's share.

        Returns the final hidden states, right-aligned: a row with n noted positions has them at
        [-n:]; what lies before is padding and means nothing.
        """
        language_model, device = self._language_model, self.last_hidden.device
        counts = [sum(len(part) for part in parts) for parts in self._pending]
        width = max(counts)
        if width == 0:
            return self.last_hidden.new_zeros(self.num_rows, 0, language_model.width)
        embeddings = torch.zeros(
            self.num_rows, width, language_model.width, dtype=language_model.dtype, device=device
        )
        for row, (parts, count) in enumerate(zip(self._pending, counts)):
            if count:
                embeddings[row, width - count :] = torch.cat(parts).to(embeddings)
            parts.clear()
        column = torch.arange(width)
        share = torch.tensor(counts)[:, None]
        padding = width - share
        real = column >= padding
        before = torch.tensor(self.lengths)[:, None] - share
        positions = (before + column - padding).clamp(min=0)
        self._has_padding |= min(counts) < width
        token_pass = self._pass_with_room() if width == 1 else None
        if token_pass is not None:
            at = self._real.shape[1]
            self._real = torch.cat([self._real, real], dim=1)
            hidden = token_pass.read(embeddings, positions, real, at)
        else:
            self._states()  # back in `_memory`
            self._real = torch.cat([self._real, real], dim=1)
            hidden = language_model.model.base_model(
                inputs_embeds=embeddings,
                position_ids=sent(positions, device),
                attention_mask=self._mask(width, embeddings.dtype) if self._has_padding else None,
                past_key_values=self._memory,
                use_cache=True,
            ).last_hidden_state
        last = hidden[:, -1].clone()  # not a view that keeps the whole read
        if min(counts) == 0:
            last = torch.where(sent(share > 0, device), last, self.last_hidden)
        self.last_hidden = last
        return hidden

    def _mask(self, width: int, dtype: torch.dtype) -> Float[Tensor, "B 1 T S"]:
        """Additive mask of the last `width` positions over all S: causal, real, or itself.

        That padding sees itself keeps its softmax from being empty (NaN).
        """
        real = sent(self._real, self.last_hidden.device)
        total = real.shape[1]
        key = torch.arange(total, device=real.device)
        query = key[total - width :, None]
        seen: Bool[Tensor, "B T S"] = (real[:, None] & (key <= query)) | (key == query)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
