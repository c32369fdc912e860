"""Sample efficiency inside TRL: its own GRPOTrainer, and DGGTrainer with either gate.

    python -m benchmarks.bench_trl --save trl      # five seeds, about 40 minutes on one core

The demo's task (eight digits to sort), model and warm start, trained by TRL in place of
python_trainer: all arms of a seed begin from the same weights and meet the same prompts in the same
order, for as many rollout batches; what they sample parts with the first update. GRPOTrainer trains
those without a gate, re-use being its `num_iterations`, with its own exact head; DGGTrainer those
with one, with its default random tail. Learning rates are those that docs/evidence.md tuned for the
same arms. Accuracy is the exact probability of the right answer on held-out prompts.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track

from python_trainer.compare import summarise
from python_trainer.config import TrainConfig
from python_trainer.distributed import Ranks
from python_trainer.engine import TransformersEngine
from python_trainer.evaluate import Evaluator
from python_trainer.loop import Progress, WarmStart, prepare
from python_trainer.stopping import gate_config
from python_trainer.tasks import make_task, play

from . import common
from .tables import show

ARMS: dict[str, dict[str, Any]] = {
    "single_use": {"gate": "off", "num_iterations": 1, "learning_rate": 4e-4},
    "fixed_k3": {"gate": "off", "num_iterations": 3},
    "fixed_k8": {"gate": "off", "learning_rate": 1e-4},
    "dgg": {"gate": "dgg"},
    "dgg@1": {"gate": "dgg", "gate_threshold": 1.0},
    "gain": {"gate": "gain"},
}


class Run:
    """One arm of one seed: TRL's trainer around a copy of the warm start."""

    def __init__(self, config: TrainConfig, start: WarmStart, out: str) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        from dgg_kernels.integrations.trl import DGGTrainer

        self.config, self.task, self.policy = config, start.task, copy.deepcopy(start.policy)
        self.evaluator = Evaluator(self.task, self.policy, config, Ranks("cpu"))
        self.progress, self.rows = Progress(), list[dict[str, Any]]()
        examples = [
            example
            for n in range(config.rollout_batches)
            for example in self.task.sample(config.prompts_per_batch, f"{config.seed} train {n}")
        ]
        tokenizer = self.policy.tokenizer
        prompts = [" ".join(map(word, tokenizer.prompt(example.prompt))) for example in examples]
        self.examples = dict(zip(prompts, examples, strict=True))
        args = GRPOConfig(
            out, num_generations=config.num_generations, num_iterations=config.num_iterations,
            per_device_train_batch_size=config.prompts_per_batch * config.num_generations,
            num_train_epochs=1, shuffle_dataset=False, learning_rate=config.learning_rate,
            lr_scheduler_type="constant", weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm, loss_type=config.loss_type, beta=config.beta,
            epsilon=config.epsilon, scale_rewards=config.scale_rewards, seed=config.seed,
            max_completion_length=config.max_completion_length, temperature=config.temperature,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        kind, own = GRPOTrainer, {}
        if config.gate != "off":
            kind, own = DGGTrainer, {"gate": gate_config(config, self.policy)}
        self.trainer: Any = kind(
            self.policy.model, self.reward, args=args,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=ids_as_words(tokenizer, config.vocab_size), **own,
        )  # fmt: skip
        self.trainer.remove_callback(PrinterCallback)

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The task's, of a rollout batch that was drawn just now."""
        if self.progress.rollouts % self.config.eval_every == 0:
            self.evaluate()
        self.progress.rollouts += 1
        self.progress.sequences += len(prompts)
        rewards = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            turn = self.policy.tokenizer.decode(ids)
            rewards.append(play(self.task, self.examples[prompt], [turn])[0])
        mean = sum(rewards) / len(rewards)
        self.rows.append({"type": "update", "rollouts": self.progress.rollouts, "reward": mean})
        return rewards

    def evaluate(self) -> None:
        began, progress = time.perf_counter(), self.progress
        accuracy = self.evaluator.accuracy(self.policy, TransformersEngine(self.policy))
        progress.accuracy.append((progress.rollouts, accuracy))
        row = {"type": "eval", "rollouts": progress.rollouts, "accuracy": accuracy}
        self.rows.append(row)
        progress.seconds["evaluate"] += time.perf_counter() - began

    def train(self) -> Progress:
        """All of it; the seconds of `update` are those of the rollouts, too."""
        began, progress = time.perf_counter(), self.progress
        self.trainer.train()
        progress.seconds["update"] = time.perf_counter() - began - progress.seconds["evaluate"]
        self.evaluate()
        rows = [row for row in self.trainer.state.log_history if "loss" in row]
        progress.updates_attempted = len(rows)
        progress.updates_applied = sum(row.get("gate/shut", 0.0) == 0 for row in rows)
        progress.finished = True
        return progress


def word(token: int) -> str:
    """A token as text; no word is a part of another one."""
    return f"<{token}>"


def ids_as_words(tokenizer: Any, vocabulary: int) -> Any:
    """A transformers tokenizer of texts that are this one's ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word(i): i for i in range(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left",
        pad_token=word(tokenizer.pad), eos_token=word(tokenizer.eos),
    )  # fmt: skip


def main() -> None:
    """Train every arm of every seed; the record is written anew after each."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batches", type=int, default=160, help="rollout batches an arm")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers' own names
    transformers.logging.set_verbosity_error()
    console = Console()
    base = TrainConfig(rollout_batches=args.batches, task_options={"dataset": "number_sorting"})
    configs = {arm: replace(base, **changes) for arm, changes in ARMS.items()}
    stamp = common.stamp(torch.device("cpu"), base.threads)
    runs: dict[tuple[str, int], Progress] = {}
    warmups: dict[str, Any] = {}
    logs: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    record: dict[str, Any] = {}
    for seed in args.seeds:
        start = prepare(replace(base, seed=seed), make_task(base.task, base.task_options))
        warmups[str(seed)] = asdict(start.warmup)
        for arm, config in track(configs.items(), f"seed {seed}", console=console):
            with tempfile.TemporaryDirectory() as out:
                run = Run(replace(config, seed=seed), start, out)
                runs[arm, seed] = run.train()
            logs[arm][str(seed)] = run.rows
            summary = summarise(configs, runs, warmups, {})
            record = {"benchmark": "trl", "stamp": stamp, "summary": summary, "logs": logs}
            if args.save:
                common.save(args.save, record)
    show(record, console)


if __name__ == "__main__":
    main()
