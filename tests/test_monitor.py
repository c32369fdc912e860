"""WeightDivergence by hand; the chi-square and its bound are held in test_trainer_runs.py."""

from __future__ import annotations

import pytest
import torch

from dgg_kernels.monitor import WeightDivergence


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
