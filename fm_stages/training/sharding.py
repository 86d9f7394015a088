"""Fully sharded training (FSDP2): each rank holds a part of all weights, of their average and of the optimizer's state.

Only what is sharded and when differs from DDP: weights are loaded whole and then cut, and gathered again to be saved,
so that a checkpoint does not tell which strategy wrote it, nor on how many ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

OVERLAY = "--config configs/strategy_fsdp.yaml, which names fm_stages.training.FSDP2Strategy"


class FSDP2Strategy(ModelParallelStrategy):
    """Shards a module's ``network`` and ``network_ema`` over all ranks: each of its ``blocks``, then the rest.

    Lightning's `ModelParallelStrategy` with what it leaves to others: the number of ranks is that of the run; weights
    start as those of rank 0; a checkpoint is restored before anything is sharded, as under DDP, so that callbacks find
    their state when training starts; and it is one file, whose optimizer state is numbered as torch's optimizers do.

    With bf16-mixed, blocks gather and compute with bfloat16 weights, under the same autocast as elsewhere; what is
    kept, averaged and reduced is float32. A module that overrides ``configure_model`` shards itself.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are restored before they are cut."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is restored by `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Shard over all ranks: Lightning's "auto" is the number of nodes, whose ranks would see the same data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Move, shard, and make the optimizer, in the order of all strategies; there is no model to configure."""
        Strategy.setup(self, trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Shard the networks, unless they are."""
        if not any(isinstance(part, FSDPModule) for part in model.modules()):
            if not isinstance(getattr(model, "network", None), nn.Module):
                raise ValueError(f"{type(model).__name__} has no `network` to shard: name it so")
            bf16 = isinstance(self.precision_plugin, MixedPrecision) and self.precision_plugin.precision == "bf16-mixed"
            for name in ("network", "network_ema"):
                if isinstance(network := getattr(model, name, None), nn.Module):
                    shard(network, self.device_mesh["data_parallel"], bf16)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                raise ValueError(
                    f"{name} is trained but is no part of the network, so that each rank would go its own way with it: "
                    "train it with --config configs/strategy_ddp.yaml"
                )
        return model

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a whole checkpoint."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take whole weights, sharded or not yet."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, as ``optimizer.state_dict()`` would give it without shards; every rank calls."""
        return apply_to_collection(optimizer.state_dict(), DTensor, self._whole)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of a whole state."""
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in whole["param_groups"] for number in group["params"]]
            owners = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _part(value, owners[number]) for name, value in values.items()}
                for number, values in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})

    def _whole(self, sharded: DTensor) -> Tensor | None:
        """On rank 0, and on no other, all of it."""
        whole = sharded.full_tensor()
        return whole.cpu() if self.global_rank == 0 else None


def shard(network: nn.Module, mesh: DeviceMesh, bf16: bool) -> None:
    """Cut a network's weights in place: this rank keeps its part of each, and gathers a block when it is its turn.

    Args:
        network: sharded by its ``blocks``, if it has such, and what is left as one.
        mesh: the ranks.
        bf16: whether the blocks' weights are gathered in bfloat16; gradients are reduced in float32 all the same.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        dist.broadcast(tensor.detach(), 0)  # as DDP does: a rank may have drawn others
    # the rest stays float32: positions that are added to the tokens would round all that follows.
    # inputs are not cast: times and noise must keep their digits, and autocast casts what can be
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in getattr(network, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
    # else the average would be left whole after a validation, beside parts to average
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def check_strategy(strategy: Strategy | str) -> None:
    """Refuse what shards weights otherwise.

    Raises:
        ValueError: with the strategy to choose.
    """
    other = isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy)
    if other or (isinstance(strategy, str) and strategy.startswith("fsdp")):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(f"strategy {name} keeps no average of the weights: use {OVERLAY}")


def _part(value: Any, parameter: Tensor) -> Any:
    """What this rank keeps of a number for each of a parameter's elements; anything else as it is."""
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    # a copy, for a slice would keep the whole in memory
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()
