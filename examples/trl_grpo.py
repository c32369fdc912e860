"""GRPO with TRL, each batch of rollouts used for as long as it helps.

    pip install '.[trl]' reasoning-gym      # in a checkout of this package
    python examples/trl_grpo.py --output_dir runs/trl

A script for TRL but for DGGTrainer, in place of GRPOTrainer, and its gate. Every option of
GRPOConfig is one of this script (--help); without a GPU: --use_cpu --bf16 False --max_steps 20.
CI runs it on a CPU with a tiny model; written for GPUs, too, but not tested on them.
"""

import re
from dataclasses import dataclass, field

import reasoning_gym
from datasets import Dataset
from trl import GRPOConfig, TrlParser

from dgg_kernels import GateConfig
from dgg_kernels.integrations.trl import DGGTrainer  # in place of trl's GRPOTrainer

# The gate that did best in this project's runs; without `gate=`, the paper's.
GATE = GateConfig(energy="loss", threshold=0.4, window=96, include_shut=True)


@dataclass
class Options:
    model: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "a name on the Hub, or a folder"}
    )


def main():
    parser = TrlParser((Options, GRPOConfig))
    # 16 prompts of 8 samples a batch. A decay planned for all eight uses would never end.
    parser.set_defaults(
        num_iterations=8, per_device_train_batch_size=16, gradient_accumulation_steps=8,
        lr_scheduler_type="constant", num_train_epochs=1, logging_steps=1,
        max_completion_length=256,
    )  # fmt: skip
    options, args = parser.parse_args_and_config()
    problems = reasoning_gym.create_dataset(
        "chain_sum", size=4096, seed=args.seed, max_terms=3, max_digits=2
    )

    def correct(completions, number, **_):
        """1 where the last number of a completion is the sum."""
        found = [re.findall(r"-?\d+", completion[0]["content"]) for completion in completions]
        pairs = zip(found, number, strict=True)
        return [float(numbers[-1:] == [problems[n]["answer"]]) for numbers, n in pairs]

    trainer = DGGTrainer(
        options.model,
        correct,
        args=args,
        train_dataset=Dataset.from_list([
            {"prompt": [{"role": "user", "content": problem["question"]}], "number": n}
            for n, problem in enumerate(problems)
        ]),
        gate=GATE,  # shuts when an update gained less than usual
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    counts = trainer.gate.metrics()
    applied, batches = (int(counts[name]) for name in ("updates_applied", "rollout_batches"))
    print(f"{applied} updates of {batches} batches of rollouts: {applied / batches:.2f} uses each")


if __name__ == "__main__":
    main()
