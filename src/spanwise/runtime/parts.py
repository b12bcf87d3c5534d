"""What an executor works with, and what surrounds its compute."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from spanwise.ops.stage_module import StageModule
from spanwise.runtime.trained import TrainedPart


@dataclass(frozen=True)
class DeviceParts:
    """What an executor works with: its stages, parameters (shared between stages) and optimizer.

    ``trained``: what of the parameters the optimizer updates, and units inside of them.
    """

    device: str
    stages: Mapping[int, StageModule]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    torch_device: str = "cpu"
    trained: TrainedPart | None = None


class Pace(Protocol):
    """What surrounds compute: nothing on a real device, a throttle on an emulated one."""

    def work(self, kind: str, stage: int) -> AbstractContextManager[None]:
        """A context for a forward or backward of a stage, or the optimizer step."""
        ...

    def idle(self) -> None:
        """The device had to wait."""
        ...
