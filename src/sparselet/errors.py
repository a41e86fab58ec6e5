"""The tree of errors. Everything sparselet raises on purpose is a `SparseletError`.

SparseletError
├── ArgumentError                     a value given by the caller is wrong (also a ValueError)
│   ├── DensityOutOfRange
│   ├── BlockSizeError
│   ├── ShapeMismatch
│   ├── UnknownScore
│   ├── UnknownMethod
│   ├── NoTargets
│   ├── RequestRefused                a field of a request to the server
│   └── ConfigError                   a configuration file or field
├── FormatError                       a file is not what docs/format.md says
│   ├── MissingFile
│   ├── UnsafePath                    a name with path parts, a link out of the directory
│   ├── BadConfig                     adapter_config.json
│   ├── UnsupportedVersion
│   ├── BadContainer                  truncated or malformed safetensors
│   ├── UnknownTensor
│   ├── MissingTensor
│   ├── BadDtype
│   ├── BadShape
│   ├── AbsurdShape
│   ├── IndexOutOfBounds
│   ├── UnsortedIndices
│   ├── DuplicateIndex
│   ├── NonFiniteValue                also a ValueError
│   ├── BadCounts                     merge_counts.safetensors is not of the adapter beside it
│   └── BadProfile                    profile.safetensors
├── WrongBase                         the adapter belongs to another base model
├── MissingProfile                    an expert without a profile, where one is needed
├── UnknownTarget                     the model has no such target
├── UnsupportedExpert                 an expert that is not a change of weights, or cannot be read as one
├── ExportError                       the adapter cannot be written in that format
├── SelectionError                    the mask is missing, or cannot be chosen now
├── NonFiniteScore
├── TrainingDiverged                  a loss or a trained weight is NaN or infinite
├── TaskError                         bad rows or splits of a task
├── ModelError                        a base model cannot be found, fetched or loaded
├── OutputExists
├── WriteFailed                       disk full, no permission
├── StudyRunning                      another process runs the same study
├── StudyIncomplete                   some of a study's units failed
├── NotEnoughMemory                   the work needs more memory than is available
├── WorkerFailed                      a worker process of a study cannot start, or one of a training run has ended
├── UnknownExpert                     the server has no expert of this name
├── ServerBusy                        the server's queue is full, or it is shutting down
└── MissingExtra                      an optional dependency is not installed
"""

import contextlib
from collections.abc import Iterator


class SparseletError(Exception):
    """Base of every error that sparselet raises on purpose."""


class ArgumentError(SparseletError, ValueError):
    """A value given by the caller is wrong."""


class DensityOutOfRange(ArgumentError):
    """A density is not in (0, 1]."""


class BlockSizeError(ArgumentError):
    """A block size that is not a positive integer, or does not divide a target's sides."""


class ShapeMismatch(ArgumentError):
    """Two tensors or deltas that must have one shape have two."""


class UnknownScore(ArgumentError):
    """No score has this name."""


class UnknownMethod(ArgumentError):
    """No merge method has this name, or it takes no such parameter."""


class NoTargets(ArgumentError):
    """No layer of the model is a target."""


class RequestRefused(ArgumentError):
    """A field of a request to the server is wrong. field: its name, empty for the whole request."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConfigError(ArgumentError):
    """A configuration has an unknown key, or a value of the wrong kind."""


class FormatError(SparseletError):
    """A file is not what docs/format.md says."""


class MissingFile(FormatError):
    """A file that an adapter or a model must have is absent."""


class UnsafePath(FormatError):
    """A name with path parts, or a link that leaves its directory."""


class BadConfig(FormatError):
    """adapter_config.json cannot be read, or a field of it is missing or wrong."""


class UnsupportedVersion(FormatError):
    """The file was written by a later format version."""


class BadContainer(FormatError):
    """The safetensors container is truncated or malformed."""


class UnknownTensor(FormatError):
    """The file holds a tensor that the configuration does not name."""


class MissingTensor(FormatError):
    """The configuration names a tensor that the file does not hold."""


class BadDtype(FormatError):
    """A tensor's dtype is not allowed."""


class BadShape(FormatError):
    """A tensor's shape does not fit its target."""


class AbsurdShape(FormatError):
    """A claimed size is larger than that of any model."""


class IndexOutOfBounds(FormatError):
    """An index lies outside its target."""


class UnsortedIndices(FormatError):
    """Indices do not ascend."""


class DuplicateIndex(FormatError):
    """An index occurs twice."""


class NonFiniteValue(FormatError, ValueError):
    """A value is NaN or infinite."""


class BadCounts(FormatError):
    """The counts of a merge do not give the values of the adapter beside them."""


class BadProfile(FormatError):
    """A field of profile.safetensors is missing or wrong, or a moment has negative or no entries."""


class MissingProfile(SparseletError):
    """An expert has no profile, which a merge method or a router needs."""


class WrongBase(SparseletError):
    """The adapter was trained on another base model."""


class UnknownTarget(SparseletError):
    """The model has no such target."""


class UnsupportedExpert(SparseletError):
    """An expert that is not a change of weights, or cannot be read as one."""


class ExportError(SparseletError):
    """An adapter cannot be written in a format, or not closely enough."""


class SelectionError(SparseletError):
    """The mask has not been selected, or cannot be selected now."""


class NonFiniteScore(SparseletError):
    """A score is NaN or infinite, so that no mask can be chosen by it."""


class TrainingDiverged(SparseletError):
    """A loss or a trained weight is NaN or infinite."""


class TaskError(SparseletError):
    """A task's directory, split or row is wrong."""


class ModelError(SparseletError):
    """A base model cannot be found, fetched or loaded."""


class OutputExists(SparseletError):
    """The output exists already and would be overwritten."""


class WriteFailed(SparseletError):
    """A file could not be written; no partial file is left."""


class StudyRunning(SparseletError):
    """Another process runs the same study."""


class StudyIncomplete(SparseletError):
    """Some of a study's units failed; the others are done."""


class WorkerFailed(SparseletError):
    """A worker process of a study cannot start, or a process of a training run has ended."""


class NotEnoughMemory(SparseletError, MemoryError):
    """The work needs more memory than is available."""


class UnknownExpert(SparseletError):
    """The server has no expert of this name."""


class ServerBusy(SparseletError):
    """The server's queue is full, or it is shutting down. retry_after: seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MissingExtra(SparseletError, ImportError):
    """An optional dependency is not installed."""


@contextlib.contextmanager
def prefix_errors(where: object) -> Iterator[None]:
    """Put "`where`: " before the message of a `SparseletError` raised inside, keeping its class."""
    try:
        yield
    except SparseletError as error:
        raise type(error)(f"{where}: {error}") from error
