"""The one tree of errors. Every message names the thing, the rule, the numbers and the way out.

Exit codes (documented in docs/exit-codes.md):

    SpanwiseError            1
    ├── InputError           2   a file, option or object that breaks a rule
    ├── InfeasibleError      3   no plan satisfies memory or data constraints
    ├── ExportError          4   the model cannot be traced or cut
    ├── TrainingError        5   the loss became NaN or infinite
    ├── PeerError            6   a device died, hung, or broke the protocol mid-run
    ├── CheckpointError      7   a checkpoint is corrupt or belongs to another model
    ├── JoinError            8   a worker may not join: token, version or device id
    └── ResourceError        9   a port, folder or file of this machine cannot be used
"""

from __future__ import annotations


class SpanwiseError(Exception):
    """Base of everything that spanwise raises on purpose; ``exit_code`` is what the CLI returns."""

    exit_code: int = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InputError(SpanwiseError):
    """A cluster, job, plan or option breaks a rule."""

    exit_code = 2


class PlanError(InputError):
    """A Plan or Program is not well formed: coverage, pairing or termination fails."""


class InfeasibleError(SpanwiseError):
    """No plan satisfies the constraints; says by how much and where."""

    exit_code = 3


class ExportError(SpanwiseError):
    """The model cannot be exported or cut; names the op and what to do."""

    exit_code = 4


class TrainingError(SpanwiseError):
    """Training cannot go on: the loss is not finite."""

    exit_code = 5


class PeerError(SpanwiseError):
    """A device died, went silent past a deadline, or sent what it must not."""

    exit_code = 6

    def __init__(self, message: str, *, device: str | None = None) -> None:
        super().__init__(message)
        self.device = device


class CheckpointError(SpanwiseError):
    """A checkpoint is corrupt, incomplete, or of another model."""

    exit_code = 7


class JoinError(SpanwiseError):
    """A worker may not join the run."""

    exit_code = 8


class ResourceError(SpanwiseError):
    """Something of this machine cannot be used: a port, a folder, a file."""

    exit_code = 9
