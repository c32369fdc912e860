"""The training loop of one arm: GRPO with gated re-use of each rollout batch.

What the rows of `metrics.jsonl` hold is told at `update_row` and `Run.evaluate`. Everything that a
run needs to go on is in `Run`: a checkpoint may fall between any two of its acts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dgg_kernels import GatedScheduler
from dgg_kernels.monitor import WeightDivergence

from . import checkpoint
from .config import TrainConfig
from .distributed import Ranks, gathered, spread, whole
from .engine import make_engine
from .evaluate import Evaluator, shown
from .files import MetricsLog, Row
from .loss import group_advantages, policy_loss, token_shares
from .model import Policy, load_policy
from .rollout import Rollout, Sequences, Transcript, in_chunks, pack, play, sample, texts
from .stopping import ARMS, Arm
from .tasks import Task
from .trackers import Tracker
from .warmup import WarmUp, warm_up
from .watch import Watch


@dataclass
class WarmStart:
    """What all arms of a comparison begin from."""

    task: Task
    policy: Policy  # each arm trains a copy
    warmup: WarmUp


@dataclass
class Progress:
    """Where an arm is, in plain numbers: kept up to date, so that an interrupted one has them."""

    rollouts: int = 0  # rollout batches drawn
    sequences: int = 0  # completions sampled: rollouts * prompts_per_batch * num_generations
    uses: int = 0  # updates begun, of the batch in hand
    updates_attempted: int = 0  # of all batches, applied or not
    updates_applied: int = 0
    accuracy: list[tuple[int, float]] = field(default_factory=list)  # (rollouts, accuracy)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("rollout", "update", "evaluate", "save"), 0.0)
    )
    finished: bool = False

    @property
    def mean_uses(self) -> float:
        """Applied updates per rollout batch."""
        return self.updates_applied / max(self.rollouts, 1)


def prepare(config: TrainConfig, task: Task) -> WarmStart:
    """Build and warm up the policy; deterministic in `config`."""
    policy = new_policy(config, task)
    return WarmStart(task, policy, warm_up(policy, task, config))


def new_policy(config: TrainConfig, task: Task) -> Policy:
    """The policy as it is before the warm-up."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return load_policy(config, texts(task, 256, config))


def train(
    config: TrainConfig,
    start: WarmStart,
    folder: Path,
    progress: Progress,
    tick: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[str], None] = print,
    mirrors: Sequence[Tracker] = (),
) -> None:
    """Train a copy of the warm start, from where `folder` says; rows go to its `metrics.jsonl`.

    They go to `mirrors` as well, which are closed at the end, whatever ends it.

    Bit-reproducible for a seed, machine, torch version and number of processes, whether or not it
    was interrupted: prompts and samples depend on (seed, batch) alone, so that all arms meet the
    same prompts; torch's default generator (which seeds `linear_logprob`'s random tail) is reseeded
    here, and checkpointed.

    Raises:
        TaskError: the task's environment failed. What came before is in `folder`.
        CheckpointError: there are checkpoints, and none can be read, or they are of a run with
            other settings.
    """
    try:
        run = Run(config, start, folder, progress, warn, mirrors)
        while not progress.finished:
            if run.batch is not None:
                if not run.use_again():
                    run.batch = None
                    tick(progress)
            elif progress.rollouts < config.rollout_batches:
                if progress.rollouts % config.eval_every == 0:
                    run.evaluate()
                run.draw()
            else:
                run.evaluate()
                progress.finished = True
            run.save_if_due()
        run.log.close()
    finally:
        for mirror in mirrors:
            mirror.close()


class Run:
    """One arm under way: what it holds, and its acts: draw, use again, evaluate, save."""

    def __init__(
        self,
        config: TrainConfig,
        start: WarmStart,
        folder: Path,
        progress: Progress,
        warn: Callable[[str], None],
        mirrors: Sequence[Tracker],
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.task, self.progress, self.warn = config, start.task, progress, warn
        self.ranks, self.checkpoints = Ranks(config.device), folder / "checkpoints"
        torch.manual_seed(config.seed + self.ranks.rank)
        self.policy = copy.deepcopy(start.policy)
        self.reference = start.policy if config.beta > 0 else None
        self.model = spread(self.policy, config, self.ranks)
        self.engine = make_engine(self.policy, config)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.policy.parameters() if p.requires_grad],
            lr=config.learning_rate, weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.divergence = WeightDivergence(
            {"lm_head": self.policy.head.weight, "middle": self.policy.middle}
        )
        state, complaints = checkpoint.load(self.checkpoints)
        for complaint in complaints:
            warn(complaint)
        if state is not None:  # before the gate sees the optimizer: loading steps it
            checkpoint.check_settings(state, config)
            checkpoint.restore_weights(self.policy, state)
            checkpoint.restore_optimizer(self.policy, self.optimizer, state)
            self.divergence.update()
        self.arm: Arm = ARMS[config.gate](config, self.policy, self.optimizer)
        self.schedule = LambdaLR(self.optimizer, config.learning_rate_factor)
        self.batch: Rollout | None = None
        self.evaluator = Evaluator(self.task, self.policy, config, self.ranks)
        if state is not None:
            self._restore(state)
        self.scheduler = GatedScheduler(self.schedule, self.arm.gate.applied_updates)
        self.saved_at = progress.updates_attempted
        size = 0 if state is None else state["log_bytes"]
        self.log = MetricsLog(folder / "metrics.jsonl", size, self.ranks.first, mirrors)

    def draw(self) -> None:
        """Sample a rollout batch, and what the updates need to know of it."""
        began, config, progress = time.perf_counter(), self.config, self.progress
        key = f"{config.seed} train {progress.rollouts}"
        prompts = self.ranks.share(sample(self.task, config.prompts_per_batch, key))
        episodes = [example for example in prompts for _ in range(config.num_generations)]
        # Of the first episode among all ranks': a whole number where one process has such a part.
        first = Fraction(self.ranks.rank * len(episodes), config.generation_batch_size)
        with gathered(self.policy):
            self.engine.refresh()
            sampled = in_chunks(
                episodes, config.generation_batch_size,
                lambda part, n: play(self.engine, self.policy.tokenizer, self.task, part, config,
                                     f"{key} {first + n}"),
            )  # fmt: skip
        device = config.device
        widths = torch.tensor(
            [[max(len(t.prompt) for t in sampled), max(len(t.ids) for t in sampled)]]
        )
        widths = self.ranks.gather(widths.to(device)).amax(0).tolist()
        sequences = pack(sampled, self.policy.tokenizer.pad, device, widths)
        length_B = sequences.mask_BC.sum(dim=1).float()
        ended_B = torch.tensor([t.ended for t in sampled], device=device)
        if config.mask_truncated_completions:  # DAPO's overlong filtering: they count nowhere
            sequences = sequences._replace(mask_BC=sequences.mask_BC & ended_B[:, None])
        reward_B = torch.tensor([t.reward for t in sampled], device=device)
        all_B = self.ranks.gather(reward_B)
        advantage_B = group_advantages(all_B, config.num_generations, config.scale_rewards)
        # Not the log-probs of the sampling, whose cached attention rounds differently: from the
        # same call as the updates', so that the first update's importance ratio is exactly 1.
        logp_BC, lse_BC = self._logprobs(self.model, sequences)
        ref_logp_BC = logp_BC[:, :0]
        if self.reference is not None:
            ref_logp_BC, _ = self._logprobs(self.reference, sequences)
        self.batch = Rollout(
            sequences.tokens_BT, sequences.attention_BT, sequences.mask_BC,
            logp_BC, ref_logp_BC, lse_BC, reward_B, self.ranks.share(advantage_B), ended_B,
            torch.tensor([float(t.turns) for t in sampled], device=device), length_B,
        )  # fmt: skip
        progress.rollouts += 1
        progress.sequences += len(all_B)
        progress.uses = 0
        self.arm.gate.new_batch()
        if progress.rollouts % config.eval_every == 1 or config.eval_every == 1:
            self.log.write(episode_row(progress, sampled[0], self.policy))
        progress.seconds["rollout"] += time.perf_counter() - began

    def use_again(self) -> bool:
        """One more update from the batch in hand, unless it is used up. May another follow?"""
        config, progress, batch = self.config, self.progress, self.batch
        if batch is None or progress.uses == config.num_iterations * config.mini_batches:
            return False
        if not self.arm.allows(progress.rollouts, progress.uses + 1):
            return False
        began = time.perf_counter()
        progress.uses += 1
        progress.updates_attempted += 1
        self.optimizer.zero_grad(set_to_none=True)
        earlier, part = divmod(progress.uses - 1, config.mini_batches)
        rate = self.schedule.get_last_lr()[0] * config.reuse_decay**earlier
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = len(batch.reward_B) // config.mini_batches
        micro_batches = self._micro_batches(part * size, size)
        here = slice(part * size, (part + 1) * size)
        share_BC = torch.zeros_like(batch.old_logp_BC)
        share_BC[here] = token_shares(batch.mask_BC[here], config, self.ranks.total)
        watch = Watch(config, self.ranks, self.ranks.total(batch.mask_BC[here].sum()))
        seen: dict[str, Tensor] = {}
        for rows in micro_batches:
            mask_BC, advantage_B = batch.mask_BC[rows], batch.advantage_B[rows]
            evaluated = self.model(
                *batch.sequences.rows(rows), config, batch.lse_BC[rows], self.arm.gate
            )
            loss = policy_loss(
                evaluated.out.logp, batch.old_logp_BC[rows], advantage_B, mask_BC, config,
                batch.ref_logp_BC[rows] if config.beta > 0 else None, share_BC[rows],
            )  # fmt: skip
            watch.add(evaluated, loss, mask_BC, advantage_B)
            batch.lse_BC[rows] = evaluated.out.lse
            if rows is micro_batches[-1]:
                seen = watch.forward()
                self.arm.foresee(seen)
                if self.arm.gate.is_shut(wait=True):
                    break
            (loss.loss * self.ranks.world).backward()  # DDP and FSDP2 average over the ranks
        else:
            self.arm.decide()
            self.optimizer.step()  # does nothing when the gate is shut
            seen |= watch.chi2_bound(self.arm.head_energy()) | self.divergence.update()
        seen |= self.arm.gate.metrics()
        # The trainer logs every update, so it reads the flag at once; a loop that does not
        # want to wait for the device asks with wait=False (see GradientGate).
        applied = not self.arm.gate.is_shut(wait=True)
        progress.updates_applied += applied
        seen["learning_rate"] = torch.tensor(rate, dtype=torch.float64)
        self.scheduler.step()  # counts applied updates
        self.log.write(update_row(progress, earlier + 1, batch, self.ranks, seen, applied))
        progress.seconds["update"] += time.perf_counter() - began
        return self.arm.goes_on(applied)

    def evaluate(self) -> None:
        """Log the accuracy on the held-out examples (`Evaluator`)."""
        began, progress = time.perf_counter(), self.progress
        accuracy = self.evaluator.accuracy(self.model, self.engine)
        progress.accuracy.append((progress.rollouts, accuracy))
        self.log.write({
            "type": "eval",
            "rollouts": progress.rollouts,
            "sequences": progress.sequences,
            "updates_attempted": progress.updates_attempted,
            "updates_applied": progress.updates_applied,
            "accuracy": accuracy,
        })  # fmt: skip
        progress.seconds["evaluate"] += time.perf_counter() - began

    def save_if_due(self) -> None:
        """A checkpoint every `save_every` updates and at the end. A full disk ends no run."""
        progress = self.progress
        due = progress.updates_attempted - self.saved_at >= self.config.save_every
        if not (due or progress.finished):
            return
        began = time.perf_counter()
        self.saved_at = progress.updates_attempted
        state = checkpoint.training_state(self.policy, self.optimizer)
        generators = checkpoint.random_states(self.ranks, self.config.device)
        batch = {} if self.batch is None else vars(self.batch)
        batch = {f"batch.{name}": self.ranks.gather(value) for name, value in batch.items()}
        if self.ranks.first:
            gate = self.arm.gate.state_dict()
            plain = {
                "config": asdict(self.config), "progress": asdict(progress),
                "gate.config": gate["config"], "schedule": self.schedule.state_dict(),
                "arm.memory": self.arm.memory, "log_bytes": self.log.size,
            }  # fmt: skip
            state |= generators | batch | plain | {"gate.state": gate["state"]}
            # The last one may follow another of the same update: a number of its own, as there is
            # no moment at which a folder takes the place of one that is not empty.
            number = progress.updates_attempted + progress.finished
            try:
                self.log.sync()
                checkpoint.save(self.checkpoints, number, state)
            except OSError as error:
                self.warn(f"no checkpoint was written at update {self.saved_at}: {error}")
        progress.seconds["save"] += time.perf_counter() - began

    def _restore(self, state: dict[str, Any]) -> None:
        """Everything but weights and optimizer, which came first."""
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        # By which way the gate comes to its energy depends on the number of ranks.
        gate = state["gate.config"] | {"accumulate": self.arm.gate.config.accumulate}
        self.arm.gate.load_state_dict({"config": gate, "state": state["gate.state"]})
        self.arm.memory = state["arm.memory"]
        self.schedule.load_state_dict(state["schedule"])
        batch = {name.removeprefix("batch."): self.ranks.share(value).to(self.config.device)
                 for name, value in state.items() if name.startswith("batch.")}  # fmt: skip
        self.batch = Rollout(**batch) if batch else None
        checkpoint.restore_random_states(state, self.ranks, self.config.device)

    @torch.no_grad()
    def _logprobs(self, model: Any, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probs and log-sum-exps [B, C]."""
        parts = [
            model(*sequences.rows(rows), self.config).out
            for rows in self._micro_batches(0, len(sequences.mask_BC))
        ]
        return torch.cat([out.logp for out in parts]), torch.cat([out.lse for out in parts])

    def _micro_batches(self, first: int, n: int) -> list[slice]:
        size, end = self.config.micro_batch_size or n, first + n
        return [slice(i, min(i + size, end)) for i in range(first, end, size)]


def update_row(
    progress: Progress,
    use: int,
    batch: Rollout,
    ranks: Ranks,
    seen: dict[str, Tensor],
    applied: bool,
) -> Row:
    """One attempted update. What is not known of one that had no backward is null.

    `rollouts` counts rollout batches and `sequences` completions, this batch included;
    `updates_applied` includes this update if it was applied. `reward` is the batch's mean, `turns`
    and `completion_length` (tokens of the policy) are per episode, `truncated` the share that a
    limit on tokens cut. `kl` is KL(old || new) and `kl_ref` that to the warm start, nats per token,
    as `entropy`; `clip_ratio` the share of tokens whose gradient the clip cuts off; `log_ratio/*`
    the mean of logp - old_logp over tokens of negative, or positive, advantage. `gate/reuse` counts
    passes from 1; `gate/energy` is the norm that the gate of a norm scored, that of the head's
    gradient in the other arms, and `grad_norm` the global one before clipping. `dwd/*` is
    ‖W_t - W_{t-1}‖ / ‖W_{t-1}‖ (0 when discarded), `dwd_total/*` that against W_0. `learning_rate`
    is this update's.
    """
    names = (
        "loss", "kl", "kl_ref", "entropy", "clip_ratio", "learning_rate",
        "log_ratio/negative", "log_ratio/positive",
        "grad_norm", "gate/energy", "gate/z", "gate/chi2", "gate/chi2_lower_bound",
        "dwd/lm_head", "dwd/middle", "dwd_total/lm_head", "dwd_total/middle",
    )  # fmt: skip
    of_episodes = torch.stack(
        [batch.reward_B, batch.turns_B, batch.length_B, 1.0 - batch.ended_B.float()]
    )
    reward, turns, length, truncated = ranks.gather(of_episodes.T).mean(dim=0).tolist()
    values = {name: float(whole(seen[name])) for name in names if name in seen}
    return {
        "type": "update",
        "step": progress.updates_attempted,
        "rollouts": progress.rollouts,
        "sequences": progress.sequences,
        "updates_attempted": progress.updates_attempted,
        "updates_applied": progress.updates_applied,
        "reward": reward,
        "turns": turns,
        "completion_length": length,
        "truncated": truncated,
        "gate/shut": not applied,
        "gate/reuse": use,
        **{name: values.get(name) for name in names},
    }


def episode_row(progress: Progress, transcript: Transcript, policy: Policy) -> Row:
    """One sampled episode: `text` is the prompt and what policy and environment wrote in turn."""
    return {
        "type": "episode", "rollouts": progress.rollouts,
        "updates_attempted": progress.updates_attempted, "reward": transcript.reward,
        "text": shown(transcript, policy.tokenizer),
    }  # fmt: skip
