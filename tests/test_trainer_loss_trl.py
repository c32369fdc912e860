"""The losses and advantages against TRL's GRPOTrainer, on the same rollouts and log-probs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from python_trainer.config import LOSSES, TrainConfig
from python_trainer.loss import group_advantages, policy_loss

EOS = 1
COMPLETIONS = [
    [2, 3, EOS],
    [2, 3, 4, 5, 2],  # truncated
    [2, EOS],
    [3, 3, 3, EOS],
    [EOS],
    [4, 4, 4, 4, EOS],
    [5, 4, 5, 4, 5],  # truncated
    [5, 2, EOS],
]
# Tokens that the environment wrote, in the midst of what the policy said (TRL's env_mask).
OBSERVED = {(1, 2), (5, 1), (5, 2)}
REWARDS = [1.0, 0.0, 0.25, 0.0, 1.0, 0.5, 0.5, 1.0]
G = 4
VARIANTS = {
    "plain": {},
    "clip_higher": {"epsilon": 0.1, "epsilon_high": 0.28, "scale_rewards": "none"},
    "truncated": {"mask_truncated_completions": True, "scale_rewards": "batch"},
}


def token_mask(env: bool) -> torch.Tensor:
    """[B, C]; `env`: without what the environment wrote."""
    width = max(map(len, COMPLETIONS))
    return torch.tensor([
        [t < len(ids) and not (env and (b, t) in OBSERVED) for t in range(width)]
        for b, ids in enumerate(COMPLETIONS)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A model and a tokenizer on disk: TRL loads its reference model from there."""
    pytest.importorskip("trl", minversion="1.16")
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "a", "b", "c", "d"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


class Oracle:
    """TRL's trainer, with completions, rewards and log-probs that are given to it."""

    def __init__(self, path: str, out: str, options: dict[str, Any]) -> None:
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(
            out, per_device_train_batch_size=len(COMPLETIONS), num_generations=G,
            num_iterations=2, report_to="none", use_cpu=True, bf16=False, **options,
        )  # fmt: skip
        prompts = InMemoryTable.from_pydict({"prompt": ["a"] * 2})
        self.trainer = GRPOTrainer(
            path,
            reward_funcs=lambda **_: REWARDS,
            args=args,
            train_dataset=Dataset(prompts, fingerprint="prompts"),
            rollout_func=lambda prompts, trainer: {
                "prompt_ids": [[2]] * len(COMPLETIONS),
                "completion_ids": COMPLETIONS,
                "logprobs": None,
                "env_mask": [
                    [int((b, t) not in OBSERVED) for t in range(len(ids))]
                    for b, ids in enumerate(COMPLETIONS)
                ],
            },
        )

    def loss(self, logp, old_logp, ref_logp) -> tuple[torch.Tensor, dict[str, Any]]:
        def logprobs(model, *_, **__):
            if model is self.trainer.ref_model:
                return ref_logp, None, None
            return (logp, logp, None) if torch.is_grad_enabled() else (old_logp, None, None)

        self.trainer._get_per_token_logps_and_entropies = logprobs
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        inputs = self.trainer._generate_and_score_completions([{"prompt": "a"}] * len(COMPLETIONS))
        return self.trainer._compute_loss(self.trainer.model, inputs), inputs


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    ("loss_type", "beta", "variant"),
    list(itertools.product(LOSSES, [0.0, 0.1], VARIANTS)),
)
def test_loss_and_gradient_are_those_of_trl(loss_type, beta, variant, model_path, tmp_path):
    options = dict(
        loss_type=loss_type, beta=beta, max_completion_length=7, temperature=1.0
    ) | VARIANTS[variant]  # fmt: skip
    if loss_type == "cispo":
        options["epsilon_high"] = 1.3
    config = TrainConfig(num_generations=G, **options)
    if loss_type == "gspo":
        options |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    oracle = Oracle(model_path, str(tmp_path), options)

    generator = torch.Generator().manual_seed(0)
    mask = token_mask(env=True)
    noise = [torch.randn(mask.shape, generator=generator) for _ in range(3)]
    old_logp = -noise[0].abs()
    ref_logp = old_logp + 0.3 * noise[1]
    logp = (old_logp + 0.4 * noise[2]).requires_grad_()
    expected, inputs = oracle.loss(logp, old_logp, ref_logp)
    (expected_grad,) = torch.autograd.grad(expected, logp)

    ended = torch.tensor([ids[-1] == EOS for ids in COMPLETIONS])
    if config.mask_truncated_completions:
        mask = mask & ended[:, None]
    assert mask.equal((inputs["completion_mask"] * inputs["tool_mask"]).bool())
    advantage = group_advantages(torch.tensor(REWARDS), G, config.scale_rewards)
    torch.testing.assert_close(advantage, inputs["advantages"])
    loss = policy_loss(
        logp, old_logp, advantage, mask, config, ref_logp if config.beta > 0 else None
    )
    (grad,) = torch.autograd.grad(loss.loss, logp)
    torch.testing.assert_close(loss.loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert grad.abs().max() > 1e-3 and 0.0 < loss.clip_ratio < 1.0

    metrics = oracle.trainer._metrics["train"]
    if loss.kl_ref is not None:
        assert float(loss.kl_ref) == pytest.approx(metrics["kl"][-1], rel=1e-5)
    if loss_type not in ("cispo", "gspo"):  # TRL counts sequences with gspo, A > 0 with cispo
        assert float(loss.clip_ratio) == pytest.approx(metrics["clip_ratio/region_mean"][-1])
