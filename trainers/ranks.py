"""Ranks: the processes that train one policy together, and what travels between them.

A process learns which rank it is from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which must be in its environment
before accelerate is imported. Whatever is called here is called by all ranks, in the same order. Given the same weights
a rank's log-probabilities do not depend on the others; a gradient is a sum over ranks, so its last bits depend on how
many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import nn

from engine.computation import DeviceName
from engine.model import NamedTensors, Transformer
from trainers.choices import TrainerParallelism, require_choice

COLLECTIVE_SECONDS = 600.0

NamedTensor = tuple[str, torch.Tensor]
Result = TypeVar("Result")


class Ranks:
    """The only rank: it holds everything and nothing travels. Several ranks are its subclasses."""

    parallelism: TrainerParallelism | None = None

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def prepare(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        """Distributes the parameters of a model whose weights are loaded, before its optimiser is made.

        parts: modules whose parameters are needed at one time, inner ones first.
        """

    def end_forward(self, model: nn.Module) -> None:
        """After every forward."""

    def reduce_gradients(self, model: nn.Module) -> None:
        """After the last backward of a step: gradients become those of all ranks' samples."""

    def repack(self, model: Any) -> None:
        """Brings the packed storage up to date with the masters."""
        model.repack()

    def named_weights(self, model: Transformer) -> Iterator[NamedTensor]:
        """(Hugging Face name, whole float32 tensor) of every weight."""
        return model.named_weights()

    def load_weights(self, model: Transformer, named_tensors: NamedTensors) -> bytes:
        """Replaces every weight by tensors that each rank is given whole; see `Transformer.load_weights`."""
        return model.load_weights(named_tensors)

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a parameter, a gradient or a moment."""
        return tensor

    def part(self, whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor that belongs to a parameter."""
        return whole

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of each rank, by rank."""
        return gather_object([value]) if self.num_ranks > 1 else [value]

    def add_up(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, in their order, of metrics of which each rank has a share."""
        shares = self.gather(dict(metrics))
        return {name: sum(share[name] for share in shares) for name in metrics}

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """The tensors [n] of all ranks, one behind the other."""
        return torch.cat(self.gather(part))

    def over_all(self, function: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
        """This rank's part of what the function makes [n] of the tensors [n] of all ranks, as if one had them all."""
        by_rank = self.gather(parts)
        whole = function(*(torch.cat(column) for column in zip(*by_rank, strict=True)))
        start = sum(len(of_rank[0]) for of_rank in by_rank[: self.rank])
        return whole[start : start + len(parts[0])]

    def lead(self, tensors: Iterator[NamedTensor], consume: Callable[[Iterator[NamedTensor]], Result]) -> Result | None:
        """Runs `consume` on rank 0; the others take part in gathering the tensors and return None.

        Where consume fails, the rest is gathered all the same: the other ranks wait for it.
        """
        try:
            return consume(tensors) if self.rank == 0 else None
        finally:
            deque(tensors, maxlen=0)

    def require_equal(self, what: str, value: Any) -> None:
        """Raises ValueError, on every rank, unless all have the same value."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"trainer ranks differ in their {what}: {values}; run all of them alike")


ONLY_RANK = Ranks()


class ReplicatedRanks(Ranks):
    """Data parallel: each rank holds the whole model, and gradients are added up once a step."""

    parallelism = "ddp"

    def reduce_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():  # one by one: the order of a sum must not depend on when each is ready
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def start_accelerator(collective_seconds: float = COLLECTIVE_SECONDS) -> Accelerator:
    """accelerate's view of this process; where the environment names several ranks, they meet here.

    collective_seconds: how long a rank waits for the others in one exchange before it raises. The first accelerator of
    a process fixes it. It is told of the CPU only, on which batches and losses lie wherever the model computes.
    """
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=collective_seconds))
    return Accelerator(cpu=True, kwargs_handlers=[timeout])


def require_ranks_on_cpu(num_ranks: int, device_name: DeviceName) -> None:
    """Raises ValueError for several trainer ranks on another device, which NCCL would have to bring together."""
    if num_ranks > 1 and device_name != "cpu":
        raise ValueError(
            f"num_trainer_ranks={num_ranks} train on the CPU only so far, not on device={device_name!r}: "
            "train with one rank, or set device='cpu' for engines and trainer"
        )


def make_ranks(accelerator: Accelerator, parallelism: TrainerParallelism) -> Ranks:
    """The ranks that this process is one of. A single one needs no parallelism.

    Raises ValueError for a parallelism that does not exist.
    """
    require_choice("parallelism", parallelism, TrainerParallelism)
    if accelerator.num_processes == 1:
        return ONLY_RANK
    if parallelism == "ddp":
        return ReplicatedRanks(accelerator.process_index, accelerator.num_processes)
    from trainers.sharding import ShardedRanks  # a second of torch's modules that nothing else needs

    return ShardedRanks(accelerator.process_index, accelerator.num_processes)
