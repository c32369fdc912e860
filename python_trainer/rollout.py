"""Episodes: the policy and the environment write in turn; what came out as tensors."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import ConfigError, TaskError, TrainConfig, one_line
from .engine import Engine, pad_left
from .tasks import Episode, Example, Task
from .tasks import play as play_out
from .tokenizer import Tokenizer


@dataclass
class Transcript:
    """One episode in tokens."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)  # all that follows: turns and observations
    mine: list[bool] = field(default_factory=list)  # written by the policy
    turns: int = 0
    ended: bool = False  # by itself: not cut by a limit on tokens
    reward: float = 0.0

    def write(self, ids: Sequence[int], mine: bool) -> None:
        """Append what the policy, or the environment, wrote."""
        self.ids += ids
        self.mine += [mine] * len(ids)


class Sequences(NamedTuple):
    """Prompts (padded on the left) and what follows them (padded on the right)."""

    tokens_BT: Tensor  # int64
    attention_BT: Tensor  # int64; 1 at every token of the episode
    mask_BC: Tensor  # bool; tokens that count: those that the policy wrote, eos included

    def rows(self, some: slice) -> Sequences:
        """Some of the sequences."""
        return Sequences(*(x[some] for x in self))


@dataclass
class Rollout:
    """One rollout batch of B = P * G sequences; the G completions of a prompt are neighbours."""

    tokens_BT: Tensor
    attention_BT: Tensor
    mask_BC: Tensor
    old_logp_BC: Tensor  # log-probs under the policy that sampled them, at `temperature`
    ref_logp_BC: Tensor  # under the warm start; [B, 0] without a KL term
    lse_BC: Tensor  # log-sum-exp of the last pass over it: a reference for the next
    reward_B: Tensor
    advantage_B: Tensor
    ended_B: Tensor  # bool
    turns_B: Tensor
    length_B: Tensor  # tokens of the policy

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.tokens_BT, self.attention_BT, self.mask_BC)


def pack(
    transcripts: Sequence[Transcript],
    pad: int,
    device: str = "cpu",
    widths: Sequence[int] = (0, 0),
) -> Sequences:
    """Transcripts as tensors, of at least `widths` tokens of prompt and of what follows."""
    prompt_BP, attention_BP = pad_left([t.prompt for t in transcripts], pad, widths[0])
    width = max(widths[1], *(len(t.ids) for t in transcripts))
    after_BC = torch.tensor([t.ids + [pad] * (width - len(t.ids)) for t in transcripts])
    there_BC = torch.tensor([[1] * len(t.ids) + [0] * (width - len(t.ids)) for t in transcripts])
    mask_BC = torch.tensor([t.mine + [False] * (width - len(t.ids)) for t in transcripts])
    return Sequences(
        torch.cat([prompt_BP, after_BC], dim=1).to(device),
        torch.cat([attention_BP, there_BC], dim=1).to(device),
        mask_BC.to(device),
    )


def sample(task: Task, n: int, seed: str, held_out: bool = False) -> list[Example]:
    """The task's examples.

    Raises:
        TaskError: they are not as many as were asked for.
    """
    examples = task.sample(n, seed, held_out)
    if len(examples) != n:
        kind = "held-out examples" if held_out else "examples"
        raise TaskError(f"task {task.name}: expected {n} {kind}, got {len(examples)}")
    return examples


def play(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    config: TrainConfig,
    key: str,
) -> list[Transcript]:
    """One episode of each example, a turn of all of them at a time. `key` seeds the sampling.

    Raises:
        TaskError: the environment raised, took longer than `task_timeout` or gave a bad reward;
            or a prompt leaves no room for a turn.
    """
    with asking(task, config):
        episodes = [task.begin(example) for example in examples]
    transcripts = [Transcript(tokenizer.prompt(example.prompt)) for example in examples]
    open_ = list(range(len(examples)))
    turn = 0
    while open_:
        inputs = [transcripts[i].prompt + transcripts[i].ids for i in open_]
        # Of a first turn: another one is begun only where there is room for the whole of it.
        room = [config.max_context_length - len(ids) for ids in inputs]
        if min(room) < 1:
            raise TaskError(
                f"task {task.name}: expected prompts of fewer than {config.max_context_length} "
                f"tokens (max_context_length), got one of {max(map(len, inputs))}"
            )
        limits = [min(n, config.max_completion_length) for n in room]
        new = engine.generate(inputs, limits, config.temperature, sampling_seed(f"{key} {turn}"))
        still = []
        for i, ids in zip(open_, new, strict=True):
            transcript = transcripts[i]
            transcript.write(ids, mine=True)
            transcript.turns += 1
            transcript.ended = ids[-1] == tokenizer.eos
            answer = answered(task, episodes[i], tokenizer.decode(ids), transcript, config)
            if answer is None:
                continue
            answer_ids = tokenizer.observation(answer)
            if not transcript.ended:  # cut in mid-sentence: the environment speaks none the less
                answer_ids = [tokenizer.eos, *answer_ids]
            length = len(transcript.prompt) + len(transcript.ids) + len(answer_ids)
            transcript.ended = length + config.max_completion_length <= config.max_context_length
            if transcript.ended:
                transcript.write(answer_ids, mine=False)
                still.append(i)
        open_, turn = still, turn + 1
    return transcripts


def expert(
    tokenizer: Tokenizer, task: Task, examples: Sequence[Example], config: TrainConfig
) -> list[Transcript]:
    """The episodes of the examples' own answers, for warm-up and exact evaluation."""
    transcripts = []
    for example in examples:
        if example.answer is None:
            raise TaskError(f"task {task.name}: expected an answer to imitate, got None")
        with asking(task, config):
            episode = task.begin(example)
        transcript = Transcript(tokenizer.prompt(example.prompt), ended=True)
        for text in example.answer:
            transcript.write(tokenizer.turn(text), mine=True)
            answer = answered(task, episode, text, transcript, config)
            if answer is None:
                break
            transcript.write(tokenizer.observation(answer), mine=False)
        transcripts.append(transcript)
    return transcripts


def texts(task: Task, n: int, config: TrainConfig) -> Iterator[str]:
    """What an embedded policy must be able to read and say: prompts, turns, answers."""
    for example in sample(task, n, "tokenizer"):
        turns = example.answer or ()
        with asking(task, config):
            _, written = play_out(task, example, turns)
        yield from (example.prompt, *turns, *written)


def answered(
    task: Task, episode: Episode, text: str, transcript: Transcript, config: TrainConfig
) -> str | None:
    """The environment's answer to a turn; the reward so far goes to the transcript."""
    with asking(task, config, text):
        answer = episode.step(text)
        transcript.reward = reward = float(episode.reward)
    if not (isfinite(reward) and 0.0 <= reward <= 1.0):
        raise TaskError(
            f"task {task.name}: reward: expected a number in [0, 1], got {reward!r} "
            f"(turn {one_line(text)!r})"
        )
    return answer


@contextmanager
def asking(task: Task, config: TrainConfig, turn: str | None = None) -> Generator[None]:
    """Whatever happens in a task becomes a TaskError of one line; so does taking too long.

    The time limit needs signals: it holds in the main thread, and not against code that never
    returns to Python.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer within task_timeout = {config.task_timeout:g} s")

    limited = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM")
    before = signal.signal(signal.SIGALRM, late) if limited else None
    if limited:
        signal.setitimer(signal.ITIMER_REAL, config.task_timeout)
    try:
        yield
    except (TaskError, ConfigError):
        raise
    except Exception as error:  # anything may come out of an environment
        said = "" if turn is None else f" (turn {one_line(turn)!r})"
        raise TaskError(
            f"task {task.name}: {type(error).__name__}: {one_line(str(error)) or 'no message'}"
            f"{said}"
        ) from error
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def sampling_seed(key: str) -> int:
    """A seed that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])


def in_chunks(items: Sequence[Any], size: int, call: Callable[[Sequence[Any], int], list[Any]]):
    """`call(part, number)` for every `size` items, one list of the results."""
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    return [result for n, part in enumerate(parts) for result in call(part, n)]
