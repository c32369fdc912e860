"""A whole GRPO update of a transformers model, with one language-model head or another.

    python -m benchmarks.bench_step --save step_cpu                  # SmolLM2-135M, about 4 minutes
    python -m benchmarks.bench_step --model qwen2.5-1.5b --device cuda --save step_gpu

One update: forward of the decoder, head and loss, backward of both, clipping of the global norm,
fused AdamW. All heads see the same weights, tokens, targets and advantages, and run once per round,
in an order drawn for each. The head's phases are cut off the decoder's at the hidden states, which
costs nothing: the same kernels run in the same order. Each head's loss and gradients are first held
against fp64; one that is off gets no time, and when it is ours the benchmark ends.

SmolLM2 answers prompts of its own, sampled here. Without weights (`qwen2.5-1.5b`, and `tiny` for
tests) tokens are random, and the final norm is scaled until the policy's entropy is that of a
trained one: targets are drawn from that policy, position by position.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from python_trainer.config import TrainConfig
from python_trainer.loss import group_advantages, policy_loss
from python_trainer.model import positions

from . import common, peers
from .rows import load_smollm2, rollouts, sampled
from .tables import show

EAGER, TRL = "log_softmax and gather", "TRL chunked head, 32768"
CONFIG = TrainConfig(loss_type="bnpo")  # the mean over all tokens, as every peer has it
ENTROPY = 0.8  # nats: what the random models' final norms are scaled to
# Relative error of the head's gradients against fp64, absolute error of the loss.
ALLOWED = {torch.float32: (1e-2, 1e-3), torch.bfloat16: (1.5e-2, 1e-3)}
ALLOWED_OF_A_PEER = (0.2, 0.1)  # 16-bit logits are off by a few hundredths
# Random weights in a known shape, by transformers' names.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
HEAD_PHASES = ("head forward", "head backward")


class Size(NamedTuple):
    """Of a batch."""

    prompts: int
    generations: int  # completions of each prompt
    prompt_length: int  # tokens, where they are random
    completion_length: int  # tokens


SIZES = {
    "smollm2": Size(1, 4, 0, 96),
    "qwen2.5-1.5b": Size(4, 4, 128, 512),
    "tiny": Size(2, 4, 4, 16),
}


class Batch(NamedTuple):
    """What an update is made from: B sequences of T tokens, the last C of them completions."""

    tokens_BT: Tensor
    attention_BT: Tensor | None  # None: no padding
    target_BC: Tensor
    advantage_B: Tensor
    old_logp_BC: Tensor
    entropy: float  # of the policy, mean over the completions
    kept: float  # entries a row of the random tail

    @property
    def mask_BC(self) -> Tensor:
        return torch.ones_like(self.target_BC, dtype=torch.bool)


# -- heads: (hidden [B, C, D], weight [V, D], batch) -> loss ---------------------------------------

HeadLoss = Callable[[Tensor, Tensor, Batch], Tensor]


def loss_of(logp_BC: Tensor, batch: Batch) -> Tensor:
    return policy_loss(logp_BC, batch.old_logp_BC, batch.advantage_B, batch.mask_BC, CONFIG).loss


def with_logp(hidden_BCD: Tensor, weight: Tensor, batch: Batch, peer: peers.Peer) -> Tensor:
    """The loss of a head that gives log-probs."""
    logp = peer(hidden_BCD.flatten(0, 1), weight, batch.target_BC.flatten())
    return loss_of(logp.view_as(batch.target_BC), batch)


def log_softmax_and_gather(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """A model's own logits, as trainers took their log-probs before there were fused heads."""
    logp = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    return logp.gather(1, target[:, None])[:, 0]


def ours(
    hidden_BCD: Tensor, weight: Tensor, batch: Batch, with_lse: bool = False, **options: Any
) -> Tensor:
    """with_lse: the log-sum-exp of the rollout's policy, from its log-probs."""
    if with_lse:
        with torch.no_grad():
            target_logit = (hidden_BCD.float() * weight[batch.target_BC].float()).sum(-1)
            options["lse_ref"] = (target_logit - batch.old_logp_BC).flatten()
    return with_logp(hidden_BCD, weight, batch, partial(peers.ours, **options))


def liger_grpo(hidden_BCD: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    """Liger's head and loss in one, with all sequences in one chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    head = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type=CONFIG.loss_type, chunk_size=len(hidden_BCD),
        epsilon_low=CONFIG.epsilon, epsilon_high=CONFIG.epsilon,
    )  # fmt: skip
    return head(
        hidden_BCD, weight, batch.target_BC, batch.mask_BC, batch.advantage_B,
        old_per_token_logps=batch.old_logp_BC,
    )[0]  # fmt: skip


def heads(device: str) -> tuple[dict[str, HeadLoss], dict[str, str]]:
    """Heads that run on this device, and the reason for each that does not."""
    found: dict[str, HeadLoss] = {EAGER: partial(with_logp, peer=log_softmax_and_gather)}
    fused, missing = peers.available(device)
    missing = {name: why for name, why in missing.items() if name == TRL}
    if TRL in fused:
        found[TRL] = partial(with_logp, peer=fused[TRL])
    try:
        peers.import_peer("liger_kernel.chunked_loss")
        found["Liger chunked GRPO"] = liger_grpo
    except Exception as error:  # a broken peer must not break the benchmark
        missing["Liger chunked GRPO"] = peers.reason(error)
    found["ours"] = ours
    # On a CPU the selection costs nothing beside the product: no reference is needed.
    if with_lse := device == "cuda":
        found["ours, with lse_ref"] = partial(ours, with_lse=True)
    for screen in ("int8", "fp8") if device == "cuda" else ("int8",):
        found[f"ours, screen {screen}"] = partial(ours, with_lse=with_lse, screen=screen)
    return found, missing


# -- model and batch ------------------------------------------------------------------------------


def make_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal LM, and its tokenizer if it has one."""
    if name not in SHAPES:
        model, tokenizer = load_smollm2()
        return model.to(device, dtype), tokenizer
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[name]), dtype=dtype)
    return model.eval(), None


def hidden_of(model: Any, batch: Batch) -> Tensor:
    """What the head reads to predict the completions, [B, C, D]."""
    places = None
    if batch.attention_BT is not None:  # left padding must not shift a prompt
        places = positions(batch.attention_BT)
    hidden_BTD = model.base_model(
        input_ids=batch.tokens_BT, attention_mask=batch.attention_BT, position_ids=places,
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    return hidden_BTD[:, -batch.target_BC.shape[1] - 1 : -1]


@torch.no_grad()
def make_batch(model: Any, tokenizer: Any, size: Size) -> Batch:
    """Sequences of a group per prompt; targets drawn from the policy, which is the old one too."""
    prompts, generations, length, completion = size
    weight = model.get_output_embeddings().weight
    device, sequences = weight.device, prompts * generations
    attention = None
    if tokenizer is not None:
        tokens, attention = rollouts(model, tokenizer, prompts, generations, completion)
        attention = None if attention.all() else attention
    else:
        rng = torch.Generator().manual_seed(0)
        shape = (sequences, length + completion)
        tokens = torch.randint(len(weight), shape, generator=rng).to(device)
    reward = torch.rand(sequences, generator=torch.Generator().manual_seed(1)).to(device)
    blank = torch.zeros(sequences, completion, dtype=torch.int64, device=device)
    advantage = group_advantages(reward, generations)
    batch = Batch(tokens, attention, blank, advantage, blank.float(), 0.0, 0.0)
    if tokenizer is None:
        sharpen(model, hidden_of(model, batch).flatten(0, 1)[:256])
    hidden = hidden_of(model, batch).flatten(0, 1)
    rows = sampled(hidden, weight, None, torch.Generator(device).manual_seed(2))
    target_logit = (hidden.float() * weight[rows.target].float()).sum(-1)
    return batch._replace(
        target_BC=rows.target.view_as(blank), old_logp_BC=(target_logit - rows.lse).view_as(blank),
        entropy=rows.entropy, kept=rows.kept,
    )  # fmt: skip


def sharpen(model: Any, hidden: Tensor) -> None:
    """Scale the final norm's weight until the mean entropy on some rows is ENTROPY."""
    logits = hidden.float() @ model.get_output_embeddings().weight.float().T
    low, high = 1.0, 2.0**10
    for _ in range(20):
        scale = (low * high) ** 0.5
        logp = torch.log_softmax(scale * logits, 1)
        entropy = float(-(logp.exp() * logp).sum(1).mean())
        low, high = (scale, high) if entropy > ENTROPY else (low, scale)
    model.base_model.norm.weight.mul_(low)


# -- measurement ----------------------------------------------------------------------------------


class Update:
    """One update with one head, on a model and an optimizer that all heads share."""

    def __init__(self, head: HeadLoss, model: Any, optimizer: Any, batch: Batch) -> None:
        self.head, self.model, self.optimizer, self.batch = head, model, optimizer, batch
        self.weight = model.get_output_embeddings().weight
        self.hidden: Any = None  # what the decoder gave
        self.leaf: Any = None  # the same, as the head's input
        self.loss: Any = None

    def phases(self) -> tuple[tuple[str, Callable[[], Any]], ...]:
        return (
            ("decoder forward", self.decoder_forward),
            ("head forward", self.head_forward),
            ("head backward", lambda: self.loss.backward()),
            ("decoder backward", lambda: self.hidden.backward(self.leaf.grad)),
            ("clip", lambda: torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)),
            ("step", self.optimizer.step),
        )

    def decoder_forward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.hidden = hidden_of(self.model, self.batch)
        self.leaf = self.hidden.detach().requires_grad_()

    def head_forward(self) -> None:
        self.loss = self.head(self.leaf, self.weight, self.batch)

    def __call__(self) -> common.Phases:
        seconds = common.timed(self.weight.device, *self.phases())
        self.forget()
        return seconds

    def forget(self) -> None:
        """Let go of the graph: it holds every activation of the decoder."""
        self.hidden = self.leaf = self.loss = None

    def errors(self, exact: tuple[float, Tensor, Tensor]) -> dict[str, float]:
        """Of loss (absolute) and gradients (relative); nothing is stepped."""
        for _, phase in self.phases()[:3]:
            phase()
        loss, d_hidden, d_weight = exact
        found = {
            "loss": abs(self.loss.item() - loss),
            "d_hidden": common.relative_error(self.leaf.grad.flatten(0, 1), d_hidden),
            "d_weight": common.relative_error(self.weight.grad, d_weight),
        }
        self.forget()
        return found


def truth(model: Any, batch: Batch) -> tuple[float, Tensor, Tensor]:
    """Loss, and its gradients for hidden [N, D] and weight [V, D], in fp64."""
    with torch.no_grad():
        hidden = hidden_of(model, batch).flatten(0, 1)
    # The policy is the old one: what the loss does with a log-prob does not depend on the head.
    logp_BC = batch.old_logp_BC.clone().requires_grad_()
    loss_of(logp_BC, batch).backward()
    assert logp_BC.grad is not None
    c, target = logp_BC.grad.flatten(), batch.target_BC.flatten()
    weight = model.get_output_embeddings().weight.detach()
    logp, d_hidden, d_weight = common.exact_gradients(hidden, weight, target, c)
    return float(loss_of(logp.view_as(logp_BC).float(), batch)), d_hidden, d_weight


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every head on one batch.

    Raises:
        common.Refused: our own loss or gradients are off.
    """
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    asked = Size(args.prompts, args.generations, args.prompt_length, args.completion_length)
    size = Size(*(a or b for a, b in zip(asked, SIZES[args.model], strict=True)))
    found, missing = heads(device.type)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("model and rollouts", total=None)
        model, tokenizer = make_model(args.model, device, dtype)
        batch = make_batch(model, tokenizer, size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        weight = model.get_output_embeddings().weight
        record: dict[str, Any] = {
            "benchmark": "step",
            "model": args.model,
            "parameters": sum(p.numel() for p in model.parameters()),
            "shape": {
                "sequences": len(batch.tokens_BT),
                "tokens": batch.tokens_BT.numel(),
                "N": batch.target_BC.numel(), "D": weight.shape[1], "V": weight.shape[0],
            },
            "dtype": str(dtype).removeprefix("torch."),
            "entropy": batch.entropy,
            "kept_per_row": batch.kept,
            "rounds": args.rounds,
            "stamp": common.stamp(device, args.threads),
            "missing": missing,
            "variants": {},
        }  # fmt: skip
        progress.update(bar, description="fp64 truth")
        exact = truth(model, batch)
        updates: dict[str, Update] = {}
        for name, head in found.items():
            progress.update(bar, description=f"check {name}")
            update = Update(head, model, optimizer, batch)
            try:
                checked = update.errors(exact)
            except Exception as error:  # a head that fails is reported, not fatal
                missing[name] = peers.reason(error)
                continue
            gradient, loss = ALLOWED[dtype] if name.startswith("ours") else ALLOWED_OF_A_PEER
            worst = max(checked["d_hidden"], checked["d_weight"])
            if not (worst <= gradient and checked["loss"] <= loss):
                missing[name] = (
                    f"gradients off by {worst:.1e}, loss by {checked['loss']:.1e} against fp64: "
                    "no speed is reported"
                )
                if name.startswith("ours"):
                    raise common.Refused(f"{name}: {missing[name]}")
                continue
            record["variants"][name] = {"errors": checked}
            updates[name] = update
        del exact
        next(iter(updates.values()))()  # makes the optimizer's state
        for name, update in updates.items():
            progress.update(bar, description=f"memory {name}")
            optimizer.zero_grad(set_to_none=True)
            memory = common.peak_extra_bytes(update, device)
            record["variants"][name]["peak_extra_bytes"] = memory
        progress.reset(bar, total=(args.rounds + 1) * len(updates))
        timings = common.interleave(
            dict(updates), args.rounds,
            lambda name: progress.update(bar, advance=1, description=name),
        )  # fmt: skip
    record["baseline"], first = next(iter(timings.items()))
    for name, rounds in timings.items():
        totals = [sum(phases.values()) for phases in rounds]
        shares = [sum(phases[p] for p in HEAD_PHASES) / sum(phases.values()) for phases in rounds]
        faster = [sum(a.values()) / b for a, b in zip(first, totals, strict=True)]
        record["variants"][name] |= {
            "phases_s": {p: common.summary([phases[p] for phases in rounds]) for p in rounds[0]},
            "total_s": common.summary(totals),
            "tokens_per_s": common.summary([batch.tokens_BT.numel() / t for t in totals]),
            "head_share": common.summary(shares),
            "speedup": common.summary(faster),
        }
    return record


def main() -> None:
    """Measure, show, record."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="smollm2", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="float32 on a CPU, bfloat16 on a GPU")  # fmt: skip
    parser.add_argument("--prompts", type=int, help="of a batch")
    parser.add_argument("--generations", type=int, help="completions of each prompt")
    parser.add_argument("--prompt-length", type=int, help="tokens, where they are random")
    parser.add_argument("--completion-length", type=int, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    common.use_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        record = measure(args, console)
    except common.Refused as error:
        sys.exit(str(error))
    show(record, console)
    if args.save:
        console.print(f"written: {common.save(args.save, record)}")


if __name__ == "__main__":
    main()
