"""Rollouts, loss and stopping rules against their definitions."""

import math
from dataclasses import replace

import pytest
import torch
from trainer_toys import TINY, Digits

from python_trainer.config import TrainConfig
from python_trainer.loop import prepare
from python_trainer.loss import group_advantages, policy_loss, token_shares
from python_trainer.rollout import (
    completion_logprobs,
    expected_accuracy,
    generate,
    pad_prompts,
    rollout,
    with_answers,
)
from python_trainer.stopping import ARMS, RandomStop, continue_probability
from python_trainer.tasks import Example


@pytest.fixture(scope="module")
def start():
    return prepare(TINY, Digits())


def draw(start, config=TINY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = start.task.sample(config.prompts_per_batch, str(seed))
    return rollout(start.model, start.tokenizer, start.task, examples, config, generator)


def test_mask_ends_with_the_first_eos(start):
    drawn = draw(start)
    mask, eos, pad = drawn.sequences.mask_BC, start.tokenizer.eos, start.tokenizer.pad
    completions = drawn.sequences.tokens_BT[:, -mask.shape[1] :]
    assert len(completions) == TINY.sequences_per_batch
    for ids, counted, text in zip(
        completions.tolist(), mask.tolist(), drawn.completions, strict=True
    ):
        length = ids.index(eos) + 1 if eos in ids else len(ids)
        assert counted == [i < length for i in range(len(ids))]
        assert all(i == pad for i in ids[length:])
        assert text == start.tokenizer.decode(ids)
    assert drawn.sequences.attention_BT[:, -mask.shape[1] :].equal(mask.long())


def test_old_logprobs_are_those_of_the_unpadded_sequence(start):
    drawn = draw(start)
    tokens, attention = drawn.sequences.tokens_BT, drawn.sequences.attention_BT
    mask = drawn.sequences.mask_BC
    for b in range(len(tokens)):
        ids = tokens[b][attention[b].bool()]
        count = int(mask[b].sum())
        with torch.no_grad():
            logits = start.model(input_ids=ids[None]).logits[0].float() / TINY.temperature
        expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[-count:, 0]
        torch.testing.assert_close(drawn.old_logp_BC[b, :count], expected, atol=2e-5, rtol=1e-5)
        assert not drawn.old_logp_BC[b, count:].any()


def test_first_use_has_ratio_exactly_one(start):
    drawn = draw(start)
    out, _ = completion_logprobs(start.model, drawn.sequences, TINY, lse_ref_BC=drawn.lse_BC)
    assert out.logp.detach().equal(drawn.old_logp_BC)


def test_sampling_follows_the_distribution(start):
    config = replace(TINY, max_completion_length=1, temperature=0.7)
    tokens, attention = pad_prompts(start.tokenizer, [Example("ab", None, None)])
    generator = torch.Generator().manual_seed(0)
    n = 4000
    sequences = generate(
        start.model, tokens.repeat(n, 1), attention.repeat(n, 1), config, generator
    )
    counts = torch.bincount(sequences.tokens_BT[:, -1], minlength=TINY.vocab_size) / n
    with torch.no_grad():
        p = (start.model(input_ids=tokens).logits[0, -1] / 0.7).softmax(-1)
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / n)


def test_expected_accuracy_is_the_probability_of_the_answer(start):
    examples = [Example("ab", None, "12"), Example("c", None, "345")]
    sequences = with_answers(start.tokenizer, examples)
    total = 0.0
    for example in examples:
        prompt, answer = (start.tokenizer.encode(t) for t in (example.prompt, example.answer))
        ids = torch.tensor([[*prompt, *answer, start.tokenizer.eos]])
        with torch.no_grad():
            logp = start.model(input_ids=ids).logits[0].double().log_softmax(-1)
        chosen = logp[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total += float(chosen.sum().exp())
    assert expected_accuracy(start.model, sequences, TINY) == pytest.approx(total / 2, rel=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("epsilon_high", [None, 0.28])
def test_loss_is_the_explicit_loop(loss_type, epsilon_high):
    config = TrainConfig(loss_type=loss_type, epsilon_high=epsilon_high, beta=0.1)
    torch.manual_seed(0)
    old, ref = -torch.rand(6, 5), -torch.rand(6, 5)
    logp = (old + 0.4 * torch.randn(6, 5)).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 1.5])
    length = [5, 3, 1, 4, 5, 2]
    mask = torch.arange(5) < torch.tensor(length)[:, None]
    low, high = 0.8, 1.2 if epsilon_high is None else 1.28

    total, kl, clipped = 0.0, 0.0, 0
    weight = torch.zeros(6, 5)
    for b in range(6):
        for t in range(length[b]):
            share = 1 / (6 * length[b]) if loss_type == "grpo" else 1 / sum(length)
            new, a = logp[b, t].item(), advantage[b].item()
            r = math.exp(new - old[b, t].item())
            total -= share * min(r * a, min(max(r, low), high) * a)
            d = ref[b, t].item() - new
            total += config.beta * share * (math.exp(d) - d - 1)
            kl += (r - math.log(r) - 1) / sum(length)
            cut = (a > 0 and r > high) or (a < 0 and r < low)
            clipped += cut
            weight[b, t] = 0.0 if cut else r

    loss = policy_loss(logp, old, advantage, mask, config, ref)
    assert loss.loss.item() == pytest.approx(total, rel=1e-5)
    assert loss.kl.item() == pytest.approx(kl, rel=1e-4)
    assert loss.clip_ratio.item() == pytest.approx(clipped / sum(length)) and clipped
    torch.testing.assert_close(loss.weight_BC, weight)
    # The weights are what multiplies A ∇logp in the surrogate's gradient, masks included.
    surrogate = policy_loss(logp, old, advantage, mask, replace(config, beta=0.0))
    (gradient,) = torch.autograd.grad(surrogate.loss, logp)
    expected = -surrogate.share_BC * surrogate.weight_BC * advantage[:, None]
    torch.testing.assert_close(gradient, expected)


def test_shares_sum_to_one_even_with_an_empty_row():
    mask = torch.tensor([[True, True], [True, False]])
    for loss_type in ("grpo", "dapo"):
        assert token_shares(mask, loss_type).sum().item() == pytest.approx(1.0)
        assert not token_shares(torch.zeros_like(mask), loss_type).any()


def test_advantages_of_equal_rewards_are_zero():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    advantage = group_advantages(rewards, 3)
    assert not advantage[:3].any()
    torch.testing.assert_close(advantage[3:].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert advantage[4] > 0 > advantage[3]


@pytest.mark.parametrize("mean", [1.0, 1.9, 4.2, 8.0])
def test_random_arm_has_the_requested_mean_use(mean):
    q = continue_probability(mean, 8)
    assert sum(q**k for k in range(8)) == pytest.approx(mean, abs=1e-6)
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    config = replace(TINY, gate="random", mean_uses=mean, num_iterations=8)
    arm = RandomStop(config, weight, torch.optim.AdamW([weight], fused=True))
    uses = 0
    for _ in range(4000):
        for use in range(1, 9):
            if not arm.allows(use):
                break
            uses += 1
    assert uses / 4000 == pytest.approx(mean, rel=0.05)


def test_kl_arm_vetoes_above_its_limit_and_on_nan():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    arm = ARMS["kl"](
        replace(TINY, gate="kl", kl_stop=0.1), weight, torch.optim.SGD([weight], fused=True)
    )
    assert not arm.vetoes(torch.tensor(0.05))
    assert arm.vetoes(torch.tensor(0.2)) and arm.vetoes(torch.tensor(math.nan))
