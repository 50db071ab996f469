"""What a stage says when its inputs cannot be used."""


class StageError(Exception):
    """Something about the inputs of a stage; the message says what to do."""
