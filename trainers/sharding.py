"""Sharding: masters, gradients and AdamW's moments in equal parts over the ranks, by torch's fully_shard (FSDP2).

The packed storage, which a forward computes from, stays whole on every rank. Of each float32 parameter a rank keeps its
share of the rows, as a DTensor. fully_shard gathers a layer's parameters before its forward and backward and adds its
gradients up over the ranks right after; the functions here gather one parameter at a time, on all ranks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.model import NamedTensors, PackedLinear, Transformer, WeightSlot
from trainers.ranks import Ranks


class ShardedRanks(Ranks):
    """FSDP2: each rank holds its share of masters, gradients and moments.

    Every forward and backward is one of all ranks together; they add gradients up as they go.
    """

    parallelism = "fsdp"

    def prepare(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        shard(model, parts, self.num_ranks)

    def end_forward(self, model: nn.Module) -> None:
        if not torch.is_grad_enabled():
            model.reshard()  # a backward would: what lies outside the layers stays gathered until then

    def reduce_gradients(self, model: nn.Module) -> None:
        model.reshard()  # where a forward with gradients had no backward

    def repack(self, model: nn.Module) -> None:
        repack(model)

    def named_weights(self, model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
        model.reshard()
        return named_weights(model)

    def load_weights(self, model: Transformer, named_tensors: NamedTensors) -> bytes:
        model.reshard()
        return load_weights(model, named_tensors)

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        return full(tensor)

    def part(self, whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        return part_like(whole, parameter)


def shard(model: nn.Module, parts: Sequence[nn.Module], num_ranks: int) -> None:
    """Distributes the parameters of a model with masters, in place: those of each part together, and the rest.

    fully_shard is called here and not left to accelerate, which on the CPU silently replicates the model instead.
    """
    mesh = init_device_mesh(next(model.parameters()).device.type, (num_ranks,))
    for module in (*parts, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # losses are shares of the whole batch's, so gradients add up
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    assert_sharded(model)


def assert_sharded(model: nn.Module) -> None:
    """AssertionError for a parameter that is no DTensor: each rank would hold all of it, and train it alone."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"parameter {name} is not sharded but a {type(parameter).__name__}"


@torch.no_grad()
def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a distributed tensor, on every rank; others as they are. To be called on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(whole: torch.Tensor, parameter: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has whole, cut as the parameter is."""
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def repack(model: nn.Module) -> None:
    """Brings the packed storage of sharded masters up to date: gathers them one at a time."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.ops.write_rows(module.packed, full(module.master), 0)


def named_weights(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """`Transformer.named_weights` of sharded parameters: whole tensors, of which one parameter's exist at a time.

    All ranks must read on to the end together.
    """
    for parameter, places in _places(model).items():
        whole = full(parameter)
        for name, slot in places:
            yield name, whole[slot.rows]
        del whole  # before the next is gathered


def load_weights(model: Transformer, named_tensors: NamedTensors) -> bytes:
    """`Transformer.load_weights` into sharded parameters; every rank is given all tensors and keeps its part."""
    staged, checksum = model.stage_weights(named_tensors)
    for parameter, places in _places(model).items():
        whole = torch.empty(parameter.shape, device=parameter.device)
        for name, slot in places:
            whole[slot.rows] = staged[name]
        module = places[0][1].module
        if parameter is getattr(module, "master", None):
            module.ops.write_rows(module.packed, whole, 0)
        parameter.to_local().data.copy_(part_like(whole, parameter).to_local())
    return checksum


def _places(model: Transformer) -> dict[nn.Parameter, list[tuple[str, WeightSlot]]]:
    """The weights by the parameter that holds them, q, k and v as one."""
    places: dict[nn.Parameter, list[tuple[str, WeightSlot]]] = {}
    for name, slot in model.slots.items():
        places.setdefault(slot.parameter, []).append((name, slot))
    return places
