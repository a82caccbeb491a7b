"""Sum a tensor over ranks in 4.19 bits a value, without any model.

torchrun --nproc-per-node 2 examples/all_reduce.py
"""

import torch
import torch.distributed as dist

import narrowcast
from narrowcast.codecs import PRESETS, Ranges

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

# What calibration finds: each rank's ranges, known to all. Here every rank makes the same sample of all ranks' data.
generator = torch.Generator().manual_seed(0)
sample_RTE = torch.randn(world_size, 1000, 256, generator=generator)
sample_RTE[..., 7] *= 300  # a feature that is always huge
recipe = PRESETS["int4-feature"]
partial = recipe.codec(Ranges.of(sample_RTE))
reduced = recipe.codec(Ranges.of(sample_RTE.sum(dim=0, keepdim=True)))

x_TE = sample_RTE[rank, :8]
y_TE = narrowcast.all_reduce(x_TE, codec=(partial, reduced))

exact_TE = sample_RTE[:, :8].sum(dim=0)
if rank == 0:
    error = ((y_TE - exact_TE).square().mean() / exact_TE.square().mean()).sqrt()
    bits = 8 * partial.row_nbytes(256) / 256
    print(f"{bits} bits a value, relative error {error:.4f}, feature 7: {y_TE[0, 7]:.1f} for {exact_TE[0, 7]:.1f}")
dist.destroy_process_group()
