"""What a person can mend, in every room: the command lines show it as one line, no traceback."""


class GillError(Exception):
    """Something about inputs, files or settings; the message says what is wrong and what to do."""


class InputError(GillError, ValueError):
    """A value that cannot be used, alone or beside another."""


class TasksLostError(GillError, RuntimeError):
    """Some tasks could not be done, as their workers died under them; all others are done."""


class UnfitWorkerError(GillError, RuntimeError):
    """A worker sees other files, or has other libraries, than the process that started the run."""


class OutOfMemoryError(GillError, MemoryError):
    """What is at hand does not suffice: no row's fault, so no row is recorded as failed."""


class StageError(GillError):
    """Something about the inputs of a stage; the message says what to do."""


class WriteFailedError(GillError, OSError):
    """A file cannot be written: full disk, no permission, read-only."""

    def __str__(self) -> str:
        return str(self.strerror)
