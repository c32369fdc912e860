"""WeightDivergence by hand; the chi-square and its bound are held in test_trainer_runs.py."""

from __future__ import annotations

import pytest
import torch

from dgg_kernels.distributed import sharded_norm
from dgg_kernels.monitor import WeightDivergence, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_moved_by_a_share_of_themselves(dtype):
    """Also in memory that the module got since: Module.to() keeps the parameter, not its data."""
    layer = torch.nn.Linear(8, 5)
    watched = WeightDivergence({"head": layer.weight})
    layer.to(dtype)
    for share, since_the_first in ((1.5, 0.5), (1.0, 0.5), (2.0, 2.0)):
        with torch.no_grad():
            layer.weight *= share
        changes = watched.update()
        assert float(changes["dwd/head"]) == pytest.approx(share - 1, rel=1e-2)
        assert float(changes["dwd_total/head"]) == pytest.approx(since_the_first, rel=1e-2)
        assert not any(change.requires_grad for change in changes.values())


@pytest.mark.parametrize("shape", [(30_000, 256), (7, 5, 3), (9,), (), (0, 4)])
def test_a_norm_is_exact_however_large_the_matrix(shape, tmp_path):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(t.double())
    torch.testing.assert_close(norm(t), exact, rtol=1e-6, atol=0)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.testing.assert_close(sharded_norm(t), exact.float(), rtol=1e-6, atol=0)
    finally:
        torch.distributed.destroy_process_group()
