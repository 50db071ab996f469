"""The plain formulation of a training step: the reference of the tests and of the benchmark.

Written from the equations and the description of the released code alone: three separate padded
passes (captioning, retrieval, generation) through transformers' own forward, full logits, one table
of input embeddings whose last r rows are the [IMG] tokens. It shares only parameters with the fast
step, and neither packing, streams nor losses.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.bridge.documents import DocumentBatch, Shown, Words
from pipeline.bridge.heads import Heads
from pipeline.bridge.objective import PackingDraws
from pipeline.settings import Objective

IGNORED = -100
Piece = tuple[list[int] | Tensor, list[int]]
"""Ids or input vectors [t, e], and the labels of their own places."""


class Plain(nn.Module):
    """The released structure: whole tables are parameters, frozen rows included.

    Args:
        model: a transformers causal model; it is copied.
        heads: copied too; their `image_embeddings` become the last r rows of the tables.
        num_rows: frozen rows in the softmax.
        start_ids: what begins a text.
        pad_to: tokens that a caption with its start ids and [IMG] tokens is padded to (32 in the
            released code); 0 pads each batch to its longest row.
    """

    def __init__(
        self,
        model: Any,
        heads: Heads,
        num_rows: int,
        start_ids: list[int],
        pad_to: int = 0,
    ) -> None:
        super().__init__()
        self.lm = copy.deepcopy(model).requires_grad_(False).eval()
        self.lm.set_attn_implementation("sdpa")
        self.heads = copy.deepcopy(heads)
        self.n, self.r, self.k = num_rows, heads.sizes.r, heads.sizes.k
        self.start, self.pad_to = list(start_ids), pad_to
        images = heads.image_embeddings.detach()
        inputs = self.lm.get_input_embeddings().weight.detach()
        outputs = self.lm.get_output_embeddings().weight.detach()
        tied = inputs.data_ptr() == outputs.data_ptr()
        self.input_table = nn.Parameter(torch.cat([inputs[:num_rows], images.to(inputs.dtype)]))
        self.output_table = (
            self.input_table
            if tied
            else nn.Parameter(torch.cat([outputs[:num_rows], images.to(inputs.dtype)]))
        )

    def losses(
        self,
        captions: list[list[int]],
        pooled: Tensor,
        targets: Tensor,
        objective: Objective,
        draws: PackingDraws,
    ) -> dict[str, Tensor]:
        """The unweighted parts and the weighted total, named as in `Losses`."""
        captioning, _ = self._captioning(captions, pooled, objective, draws.captioning)
        retrieval_ce, hidden = self._images(captions, objective, draws.retrieval)
        text_to_image, image_to_text = self._retrieval(hidden[:, 0], pooled)
        generation_ce, hidden = self._images(captions, objective, draws.generation)
        generation = self._generation(hidden, targets, objective)
        image_token = (retrieval_ce + generation_ce) / 2
        total = (
            objective.captioning_weight * captioning
            + objective.image_token_weight * image_token
            + objective.retrieval_weight * (text_to_image + image_to_text)
            + objective.generation_weight * generation
        )
        return {
            "captioning": captioning,
            "image_token": image_token,
            "text_to_image": text_to_image,
            "image_to_text": image_to_text,
            "generation": generation,
            "total": total,
        }

    def document_losses(self, batch: DocumentBatch, objective: Objective) -> dict[str, Tensor]:
        """Likewise of a batch of documents: one padded pass, places found by walking each one."""
        visual = self.heads.caption_projection(batch.pooled).view(len(batch.pooled), self.k, -1)
        image = list(range(self.n, self.n + self.r))
        rows, drawn = [], []
        labels: dict[str, list[list[int]]] = {"words": [], "image_token": [], "here": []}
        for number, document in enumerate(batch.documents):
            pieces: list[Piece] = [(self.start, [IGNORED] * len(self.start))] if self.start else []
            own = {kind: [IGNORED] * len(self.start) for kind in labels}
            for part in document:
                vectors: list[int] | Tensor
                told: dict[str, list[int]]
                if isinstance(part, Words):
                    vectors, told = list(part.ids), {str(part.supervised): list(part.ids)}
                elif isinstance(part, Shown):
                    vectors, told = visual[part.picture], {}
                else:
                    length = len(own["words"])
                    drawn.append((number, list(range(length, length + self.r)), part.picture))
                    vectors, told = image, {"here": [image[0]] + [IGNORED] * (self.r - 1)}
                pieces.append((vectors, [IGNORED] * len(vectors)))
                for kind in labels:
                    own[kind] += told.get(kind, [IGNORED] * len(vectors))
            rows.append(pieces)
            for kind in labels:
                labels[kind].append(own[kind])
        _, _, hidden = self._run(rows, 0)

        def summed(states: Tensor, kind: str, num_rows: int) -> tuple[Tensor, int]:
            goal = torch.full(states.shape[:2], IGNORED)
            for number, own in enumerate(labels[kind]):
                goal[number, : len(own) - 1] = torch.tensor(own[1:])
            logits = F.linear(states, self.output_table[:num_rows])
            loss = F.cross_entropy(
                logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            return loss, int((goal != IGNORED).sum())

        every = self.n + self.r
        words, num_words = summed(
            hidden, "words", self.n if objective.captioning_softmax == "words" else every
        )
        here, num_here = summed(hidden, "here", every)
        elsewhere, num_elsewhere = summed(hidden.detach(), "image_token", every)
        if objective.token_reduction == "tokens":
            captioning = words / max(num_words, 1)
            image_token = (here + elsewhere) / max(num_here + num_elsewhere, 1)
        else:
            captioning, image_token = words / len(rows), (here + elsewhere) / len(rows)
        text_to_image = image_to_text = generation = torch.zeros(())
        if drawn:
            states = torch.stack([hidden[number, places] for number, places, _ in drawn])
            pictures = [picture for _, _, picture in drawn]
            text_to_image, image_to_text = self._retrieval_of_places(
                states[:, 0], batch.pooled[pictures], batch.rows[pictures].tolist()
            )
            generation = self._generation(states, batch.targets[pictures], objective)
        total = (
            objective.captioning_weight * captioning
            + objective.image_token_weight * image_token
            + objective.retrieval_weight * (text_to_image + image_to_text)
            + objective.generation_weight * generation
        )
        return {
            "captioning": captioning,
            "image_token": image_token,
            "text_to_image": text_to_image,
            "image_to_text": image_to_text,
            "generation": generation,
            "total": total,
        }

    def _retrieval_of_places(
        self, first: Tensor, pooled: Tensor, shown: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Both terms of Eq. 4, in which another place with the same picture is no candidate."""
        text = F.normalize(self.heads.text_to_image(first), dim=-1)
        image = F.normalize(self.heads.image_to_text(pooled), dim=-1)
        scores = text @ image.T * self.heads.logit_scale.exp()
        terms = []
        for logits in (scores, scores.T):
            losses = []
            for i in range(len(shown)):
                kept = [j for j in range(len(shown)) if j == i or shown[j] != shown[i]]
                losses.append(logits[i, kept].logsumexp(0) - logits[i, i])
            terms.append(torch.stack(losses).mean())
        return terms[0], terms[1]

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the names of `Heads`; those of E_img are summed over both its uses."""
        named = {n: p.grad for n, p in self.heads.named_parameters() if p.grad is not None}
        tables = {id(t): t for t in (self.input_table, self.output_table)}.values()
        used = [table.grad[-self.r :] for table in tables if table.grad is not None]
        if used:
            named["image_embeddings"] = torch.stack(used).sum(0)
        return named

    def _run(self, rows: list[list[Piece]], padded: int) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded: logits, the labels they are to predict, and hidden states [rows, T, e]."""
        widths = [sum(len(piece) for piece, _ in row) for row in rows]
        width = max(*widths, padded)
        read = [piece for row in rows for piece, _ in row if isinstance(piece, list)]
        ids = torch.tensor([i for piece in read for i in piece], dtype=torch.int64)
        words = iter(F.embedding(ids, self.input_table).split([len(piece) for piece in read]))
        inputs, labels, mask = [], [], []
        for row, length in zip(rows, widths):
            vectors = torch.cat([next(words) if isinstance(v, list) else v for v, _ in row])
            inputs.append(F.pad(vectors, (0, 0, 0, width - length)))
            own = [i for _, piece in row for i in piece]
            labels.append(torch.tensor(own + [IGNORED] * (width - length)))
            mask.append(torch.tensor([1] * length + [0] * (width - length)))
        attention_mask = torch.stack(mask)
        hidden = self.lm.base_model(
            inputs_embeds=torch.stack(inputs), attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        logits = F.linear(hidden, self.output_table)
        goal = F.pad(torch.stack(labels)[:, 1:], (0, 1), value=IGNORED)
        return logits, goal, hidden

    def _reduce(self, logits: Tensor, goal: Tensor, objective: Objective, n: int) -> Tensor:
        flat = F.cross_entropy(
            logits.flatten(0, 1), goal.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return flat / ((goal != IGNORED).sum() if objective.token_reduction == "tokens" else n)

    def _captioning(
        self,
        captions: list[list[int]],
        pooled: Tensor,
        objective: Objective,
        packed: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        visual = self.heads.caption_projection(pooled).view(len(captions), self.k, -1)
        visual = visual.to(self.input_table.dtype)
        rows = []
        groups = grouped(len(captions), packed)
        for row in groups:
            pieces: list[Piece] = []
            for place, i in enumerate(row):
                pieces.append((visual[i], [IGNORED] * self.k))
                if place == 0 and self.start:
                    labels = (
                        self.start if objective.supervise_start else [IGNORED] * len(self.start)
                    )
                    pieces.append((self.start, labels))
                pieces.append((captions[i], captions[i]))
            rows.append(pieces)
        logits, goal, hidden = self._run(rows, max(map(len, groups)) * (self.pad_to + self.k))
        if objective.captioning_softmax == "words":
            logits = logits[..., : self.n]
        return self._reduce(logits, goal, objective, len(captions)), hidden

    def _images(
        self, captions: list[list[int]], objective: Objective, packed: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        rows, places = [], []
        groups = grouped(len(captions), packed)
        for number, row in enumerate(groups):
            pieces: list[Piece] = []
            if self.start:
                pieces.append((self.start, [IGNORED] * len(self.start)))
            length = len(self.start)
            for place, i in enumerate(row):
                supervised = place == 0 or objective.supervise_second
                words = objective.image_token_targets == "caption_and_image_token" and supervised
                pieces.append((captions[i], captions[i] if words else [IGNORED] * len(captions[i])))
                image = list(range(self.n, self.n + self.r))
                labels = [image[0] if supervised else IGNORED] + [IGNORED] * (self.r - 1)
                pieces.append((image, labels))
                length += len(captions[i])
                places.append((number, list(range(length, length + self.r))))
                length += self.r
            rows.append(pieces)
        logits, goal, hidden = self._run(rows, max(map(len, groups)) * self.pad_to)
        picked = torch.stack([hidden[number, at] for number, at in places])
        return self._reduce(logits, goal, objective, len(captions)), picked

    def _retrieval(self, first: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.heads.logit_scale.dtype
        text = F.normalize(self.heads.text_to_image(first.to(wide)), dim=-1)
        image = F.normalize(self.heads.image_to_text(pooled), dim=-1)
        logits = image @ text.T * self.heads.logit_scale.exp()
        own = torch.arange(len(logits))
        return F.cross_entropy(logits.T, own), F.cross_entropy(logits, own)

    def _generation(self, hidden: Tensor, targets: Tensor, objective: Objective) -> Tensor:
        mapper: Any = self.heads.mapper
        inputs = hidden
        if self.heads.sizes.mapper.adds_embedding:
            inputs = inputs + self.input_table[-self.r :]
        queries = mapper.queries.expand(len(hidden), -1, -1)
        inputs = mapper.input(inputs.to(mapper.queries.dtype))
        difference = mapper.output(mapper.transformer(inputs, queries)) - targets
        if objective.generation_loss == "distance":
            return (difference**2).sum(-1).sqrt().mean()
        return (difference**2).mean()


def grouped(num_examples: int, packed: Sequence[bool]) -> list[list[int]]:
    """Neighbours (2i, 2i + 1) together where `packed[i]`."""
    rows: list[list[int]] = []
    for i in range(num_examples):
        if i % 2 and packed[i // 2]:
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows
