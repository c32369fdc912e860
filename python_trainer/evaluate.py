"""How good a policy is on held-out examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .config import TaskError, TrainConfig
from .distributed import Ranks, gathered
from .engine import Engine
from .model import Policy
from .rollout import Sequences, Transcript, expert, in_chunks, pack, play, sample
from .tasks import Example, Task
from .tokenizer import Tokenizer

SHOWN = 2000  # characters of one part of an episode


class Evaluator:
    """Accuracy on the same held-out examples at every call.

    Where the reference answer is the only right one (`task.exact`), it is the exact expectation of
    the reward: the mean probability of the whole answer, eos included, with no sampling noise. Else
    it is the mean reward of one sampled episode of each example, with the same random numbers at
    every call. `key` chooses the examples.

    Raises:
        TaskError: there are fewer examples than `eval_prompts`; or one whose only right answer the
            policy cannot give: there is no room for it, or its tokens do not spell it.
    """

    def __init__(
        self, task: Task, policy: Policy, config: TrainConfig, ranks: Ranks, key: str = "held-out"
    ) -> None:
        self.task, self.policy, self.config, self.ranks = task, policy, config, ranks
        self.examples = sample(task, config.eval_prompts, key, held_out=True)
        self.answers: list[Sequences] = []
        if task.exact:
            self._check_answers()
            mine = self.examples[ranks.rank :: ranks.world]
            known = expert(policy.tokenizer, task, mine or self.examples[:1], config)
            self.mine, most = len(mine), -(-len(self.examples) // ranks.world)
            size = config.micro_batch_size or most
            # As many forwards on every rank, which shards want: the last one's may not count.
            parts = [known[i : i + size] or known[:1] for i in range(0, most, size)]
            self.answers = [pack(part, policy.tokenizer.pad, config.device) for part in parts]

    def _check_answers(self) -> None:
        tokenizer, config = self.policy.tokenizer, self.config
        for example in self.examples:
            used = len(tokenizer.prompt(example.prompt))
            for text in example.answer or ():
                turn = tokenizer.turn(text)
                rooms = {
                    "max_completion_length": config.max_completion_length,
                    "max_context_length": config.max_context_length - used,
                }
                for name, room in rooms.items():
                    if len(turn) > room:
                        raise TaskError(
                            f"{name}: expected room for the answer {text!r}, of {len(turn)} "
                            f"tokens, got {room}"
                        )
                if (read := tokenizer.decode(turn)) != text:
                    raise TaskError(
                        f"task {self.task.name}: expected answers that the tokenizer can spell, "
                        f"got {text!r}, which is {read!r} in its tokens"
                    )
                used += len(turn)

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module, engine: Engine) -> float:
        """Of the policy as it is now; `model` is what `spread` made of it."""
        if self.task.exact:
            total = torch.zeros((), dtype=torch.float64)
            left = self.mine
            for s in self.answers:
                out = model(s.tokens_BT, s.attention_BT, s.mask_BC, self.config).out
                right_B = out.logp.double().sum(dim=1).exp()  # 0 where masked
                total += right_B[:left].sum().cpu()
                left = max(0, left - len(right_B))
        else:
            # A part's random numbers are its own, whoever plays it.
            def part(examples: Sequence[Example], n: int) -> list[Transcript]:
                if n % self.ranks.world != self.ranks.rank:
                    return []
                key = f"held-out {n}"
                return play(engine, self.policy.tokenizer, self.task, examples, self.config, key)

            with gathered(self.policy):
                engine.refresh()
                played = in_chunks(self.examples, self.config.generation_batch_size, part)
            total = torch.tensor(sum(t.reward for t in played), dtype=torch.float64)
        return float(self.ranks.total(total.to(self.config.device))) / self.config.eval_prompts


def shown(transcript: Transcript, tokenizer: Tokenizer) -> list[str]:
    """An episode to be read: the prompt, then what policy and environment wrote in turn."""
    parts, written = [transcript.prompt], zip(transcript.mine, transcript.ids, strict=True)
    for _, part in itertools.groupby(written, key=lambda pair: pair[0]):
        parts.append([i for _, i in part])
    return [tokenizer.show(part) for part in parts]


def readable(text: str) -> str:
    r"""Cut to SHOWN characters; those that steer a display, or are none, are spelled (`\x1b`)."""
    left = len(text) - SHOWN
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:SHOWN])
    return shown + (f" … ({left} more characters)" if left > 0 else "")
