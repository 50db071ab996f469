"""What a stage says when its inputs cannot be used."""

from gill_errors import GillError


class StageError(GillError):
    """Something about the inputs of a stage; the message says what to do."""
