"""`--shard=True`: weights, gradients and optimizer states shared out over the processes, by PyTorch's FSDP2.

Each process keeps its rows of every tensor (a DTensor). FSDP2 gathers a weight when a pass needs it and adds up its gradient
over the processes. See docs/several_machines.md.
"""

import torch
from torch import Tensor, nn

from oec import _is_sharded


def shard(model: nn.Module, config, machine) -> nn.Module:
    """`model` (on the CPU, the same on all processes), shared out over the devices, in place.

    The attention and the MLP of a block are gathered in the dtype of the matrix products; gradients are added up in float32.
    All else (embedding, norms, unembedding) stays in float32, since μ must be subtracted before W is cast. It is gathered once in
    a forward and backward pass. `shard_size` processes hold one copy of the model (0: all of them).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = config.shard_size or machine.world_size
    if size == machine.world_size:
        mesh = init_device_mesh(machine.device.type, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(machine.device.type, (machine.world_size // size, size), mesh_dim_names=("replicate", "shard"))
    low = None if machine.dtype == torch.float32 else machine.dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block.attention, mesh=mesh, mp_policy=policy)
        fully_shard(block.mlp, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process. Every process must call it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def gathered(tree, keep: bool):
    """`tree` (dicts, lists) with its sharded tensors whole, on the CPU of processes that `keep` them, None elsewhere. All must call it.
    One tensor at a time, so that no device holds more than one of them. Other values are passed on."""
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep) for value in tree)
    if not _is_sharded(tree):
        return tree
    full = tree.full_tensor()
    return full.cpu() if keep else None


def shared_out_like(value, parameter: Tensor):
    """If `parameter` is sharded and `value` is a whole tensor of its shape: this process's part of `value`. Otherwise `value`."""
    if not _is_sharded(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # all have read the file
