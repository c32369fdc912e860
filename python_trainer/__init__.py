"""A thin GRPO trainer that exercises and judges gated re-use of rollout batches.

Read it in this order: `config`, `tasks`, `rollout`, `loss`, `stopping`, `loop`.
"""

from .config import ConfigError, TaskError, TrainConfig

__all__ = ["ConfigError", "TaskError", "TrainConfig"]
