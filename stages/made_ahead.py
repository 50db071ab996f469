"""Sources of training batches, of which the next is made while this one is in use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Generic, TypeVar

from cache import in_background

Batch = TypeVar("Batch")


class MadeAhead(ABC, Generic[Batch]):
    """Batches without end, resumable at any step (a `BatchSource` of training).

    A thread is one batch ahead; `_state` is the position after the batch that was handed out last.
    """

    _state: dict[str, Any]

    @abstractmethod
    def _made(self) -> Generator[tuple[Batch, dict[str, Any]]]:
        """Batches, each with the position after it."""

    @abstractmethod
    def _go_to(self, state: Mapping[str, Any]) -> None:
        """Have what is made next begin at a position."""

    def __iter__(self) -> Iterator[Batch]:
        made = in_background(self._made, depth=1)
        try:
            for batch, state in made:
                self._state = state
                yield batch
        finally:
            made.close()
            self._go_to(self._state)  # what was made ahead is made again

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch handed out last (JSON)."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier position."""
        self._go_to(state)
        self._state = dict(state)
