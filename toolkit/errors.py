"""What can go wrong that a user can mend.

The tree, shared by all three packages; the command line prints the message and exits with the error's ``exit_code``, 2
but where said:

    QvlError
      CheckpointError        a model directory that is missing, incomplete or of another architecture
        AlreadyQuantized     the source holds quantized weights already
      FormatError            a group size, bit width or layout that does not fit the model or the engine
      ManifestError          a JSONL file of calibration samples or benchmark questions; names file and line
      MediaError             an image or video that is missing, truncated or not an image
      ResourceError          not enough disk, host memory or GPU memory, with the figures
        ResourceInUse        there would be enough, if others did not hold it
      HubError               a model that can't be fetched
      ServerError            a server that does not boot, does not answer or answers with an error
      BenchError             a measurement that would not be true
        UnmeasuredError      what was to be judged could not be measured; exits with 3
"""

from __future__ import annotations

__all__ = [
    "AlreadyQuantized",
    "BenchError",
    "CheckpointError",
    "FormatError",
    "HubError",
    "ManifestError",
    "MediaError",
    "QvlError",
    "ResourceError",
    "ResourceInUse",
    "ServerError",
    "UnmeasuredError",
]


class QvlError(Exception):
    """Base of all errors with a message written for the user: what was wrong, where, and what to do."""

    #: With which the command line exits.
    exit_code = 2


class CheckpointError(QvlError):
    """A model directory that can't be used as it is."""


class AlreadyQuantized(CheckpointError):
    """The source of a quantization holds quantized weights already."""


class FormatError(QvlError):
    """A quantization format or setting that does not fit the model or the engine."""


class ManifestError(QvlError):
    """A JSONL file of samples or questions that can't be read; the message names file and line."""


class MediaError(QvlError):
    """An image or video that is missing, truncated or not an image."""


class ResourceError(QvlError):
    """Not enough disk, host memory or GPU memory for what was asked."""


class ResourceInUse(ResourceError):
    """There would be enough memory if others did not hold it now; nothing was started."""


class HubError(QvlError):
    """A model that can't be fetched from the hub."""


class ServerError(QvlError):
    """A server that does not boot, does not answer, or answers with an error."""


class BenchError(QvlError):
    """A measurement that failed or would not be true."""


class UnmeasuredError(BenchError):
    """What was to be judged could not be measured: requests failed, or the points measured the client."""

    exit_code = 3
