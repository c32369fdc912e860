"""Rollouts, losses, advantages and stopping rules against their definitions."""

import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trainer_toys import TINY, Digits, Echo

from python_trainer import loop
from python_trainer.config import LOSSES, SCALES, ConfigError, TaskError, TrainConfig
from python_trainer.distributed import Ranks
from python_trainer.engine import TransformersEngine
from python_trainer.evaluate import Evaluator
from python_trainer.files import read_metrics
from python_trainer.loop import Progress, Run, new_policy, prepare
from python_trainer.loss import group_advantages, policy_loss, token_shares
from python_trainer.rollout import asking, pack, play
from python_trainer.stopping import ARMS, continue_probability
from python_trainer.tasks import Example, make_task
from python_trainer.warmup import warm_up


class Exact(Digits):
    exact = True


@pytest.fixture(scope="module")
def start():
    return prepare(TINY, Digits())


@pytest.fixture(scope="module", params=[Digits, Echo])
def played(request, start):
    """Transcripts of a task of one turn, and of one of several."""
    task = request.param()
    engine = TransformersEngine(start.policy)
    return play(engine, start.policy.tokenizer, task, task.sample(12, "0"), TINY, "key")


@pytest.mark.parametrize("size", [None, 1, 2])
@pytest.mark.parametrize("n", [2, 7])
def test_all_ranks_make_as_many_forwards_of_an_evaluation(size, n):
    """Sharded weights are gathered in each: a rank with one more would wait for the others."""
    torch.manual_seed(0)
    config = replace(TINY, micro_batch_size=size, eval_prompts=n)
    policy = new_policy(config, Exact())
    found = []
    for rank in range(3):
        ranks = SimpleNamespace(rank=rank, world=3, total=lambda x: x)
        evaluator = Evaluator(Exact(), policy, config, ranks)
        forwards = []
        counted = lambda *args: forwards.append(1) or policy(*args)  # noqa: B023, E731
        found.append((evaluator.accuracy(counted, None), len(forwards)))
    alone = Evaluator(Exact(), policy, config, Ranks.alone()).accuracy(policy, None)
    assert sum(accuracy for accuracy, _ in found) == pytest.approx(alone, rel=1e-6) and alone > 0
    assert len({count for _, count in found}) == 1


def test_micro_batches_of_the_warm_up_add_up_to_its_batch():
    rows, weights = [], []
    for size in (None, 5):
        policy = new_policy(TINY, Digits())
        policy.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        config = replace(TINY, micro_batch_size=size, warmup_max_steps=3, grad_eps=0.0)
        warm_up(policy, Digits(), config)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert rows == 3 * [16] + 3 * [5, 5, 5, 1]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_what_counts_is_what_the_policy_wrote(start, played):
    tokenizer = start.policy.tokenizer
    sequences = pack(played, tokenizer.pad)
    width = sequences.mask_BC.shape[1]
    after = sequences.tokens_BT[:, -width:]
    for transcript, ids, counted, there in zip(
        played, after.tolist(), sequences.mask_BC.tolist(),
        sequences.attention_BT[:, -width:].tolist(), strict=True,
    ):  # fmt: skip
        length = len(transcript.ids)
        assert ids == transcript.ids + [tokenizer.pad] * (width - length)
        assert there == [1] * length + [0] * (width - length)
        assert counted == transcript.mine + [False] * (width - length)
        ends = [i for i, mine in enumerate(transcript.mine) if mine and ids[i] == tokenizer.eos]
        assert len(ends) <= transcript.turns and transcript.mine[0]
        assert all(i + 1 == length or not transcript.mine[i + 1] for i in ends)
        if transcript.turns == 1:
            assert all(transcript.mine) and transcript.ended == (ids[length - 1] == tokenizer.eos)


def test_logprobs_are_those_of_the_unpadded_sequence(start, played):
    config = replace(TINY, temperature=0.7, grad_eps=0.0)
    sequences = pack(played, start.policy.tokenizer.pad)
    with torch.no_grad():
        together = start.policy(*sequences, config).out.logp
        for b, transcript in enumerate(played):
            ids = torch.tensor([transcript.prompt + transcript.ids])
            logits = start.policy.model(input_ids=ids).logits[0].float() / 0.7
            logp = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            expected = logp[len(transcript.prompt) - 1 :] * torch.tensor(transcript.mine)
            count = len(transcript.ids)
            torch.testing.assert_close(together[b, :count], expected, atol=2e-5, rtol=1e-5)
            assert not together[b, count:].any()


def test_sampling_follows_the_distribution(start):
    policy, n = start.policy, 4000
    prompt = policy.tokenizer.prompt("ab")
    sampled = TransformersEngine(policy).generate([prompt] * n, [1] * n, 0.7, seed=0)
    counts = torch.bincount(torch.tensor(sampled)[:, 0], minlength=TINY.vocab_size) / n
    with torch.no_grad():
        p = (policy.model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / n)


def test_a_long_prompt_cuts_no_episode_but_its_own(start):
    short, long, full = (Example("a" * n, None, ("12",)) for n in (1, 17, 19))
    config, tokenizer = replace(TINY, max_context_length=20), start.policy.tokenizer
    engine = TransformersEngine(start.policy)

    def lengths(examples):
        played = play(engine, tokenizer, Digits(), examples, config, "key")
        return [len(t.ids) for t in played]

    found = lengths([short, long, short] * 8)
    assert max(found[1::3]) == 20 - 18  # one is the mark where a turn begins
    assert max(found[::3]) == max(found[2::3]) == config.max_completion_length
    with pytest.raises(TaskError, match=r"task digits: .* fewer than 20 tokens .* got one of 20$"):
        lengths([short, full])


@pytest.mark.parametrize("short", [0, 1])
def test_another_turn_needs_room_for_the_whole_of_it(short, start):
    """And an environment's answer takes its part of the room."""

    tokenizer = start.policy.tokenizer
    turn, answer = tokenizer.turn("1"), tokenizer.observation("you said 1\n")
    engine = SimpleNamespace(generate=lambda inputs, *_: [[*turn] for _ in inputs])
    size = len(tokenizer.prompt("ab")) + len(turn) + len(answer) + TINY.max_completion_length
    config = replace(TINY, max_context_length=size - short)
    (played,) = play(engine, tokenizer, Echo(), [Example("ab", None, None)], config, "key")
    assert played.turns == (1 if short else 2) and not played.ended


def test_a_time_limit_leaves_the_alarm_as_it_was():
    def own(*_):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, own)
    try:
        with asking(Digits(), replace(TINY, task_timeout=9.0)):
            assert signal.getsignal(signal.SIGALRM) is not own
        assert signal.getsignal(signal.SIGALRM) is own
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_exact_accuracy_is_the_probability_of_the_answer(start):
    examples = [Example("ab", None, ("12",)), Example("c", None, ("345",))]

    class Two(Digits):
        exact = True

        def sample(self, n, seed, held_out=False):
            return examples

    config, tokenizer = replace(TINY, eval_prompts=2), start.policy.tokenizer
    evaluator = Evaluator(Two(), start.policy, config, Ranks.alone())
    total = 0.0
    for example in examples:
        prompt, answer = tokenizer.prompt(example.prompt), tokenizer.turn(example.answer[0])
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logp = start.policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
        chosen = logp[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total += float(chosen.sum().exp())
    accuracy = evaluator.accuracy(start.policy, TransformersEngine(start.policy))
    assert accuracy == pytest.approx(total / 2, rel=1e-4)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("epsilon_high", [None, 0.28])
def test_loss_is_the_explicit_loop(loss_type, epsilon_high):
    low, high = 0.8, 1.2 if epsilon_high is None else 1.28
    if loss_type == "cispo":
        low, high, epsilon_high = 0.0, 1.28, 1.28
    config = TrainConfig(
        loss_type=loss_type, epsilon_high=epsilon_high, beta=0.1, max_completion_length=7
    )
    torch.manual_seed(0)
    old, ref = -torch.rand(6, 5), -torch.rand(6, 5)
    logp = (old + 0.6 * torch.randn(6, 5)).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 1.5])
    length = [5, 3, 1, 4, 5, 2]
    mask = torch.arange(5) < torch.tensor(length)[:, None]

    total, kl, kl_ref, clipped = 0.0, 0.0, 0.0, 0
    weight = torch.zeros(6, 5)
    for b in range(6):
        log_ratios = [(logp[b, t] - old[b, t]).item() for t in range(length[b])]
        for t, log_ratio in enumerate(log_ratios):
            share = {
                "grpo": 1 / (6 * length[b]), "gspo": 1 / (6 * length[b]), "dr_grpo": 1 / (6 * 7)
            }.get(loss_type, 1 / sum(length))  # fmt: skip
            new, a = logp[b, t].item(), advantage[b].item()
            r = math.exp(sum(log_ratios) / length[b] if loss_type == "gspo" else log_ratio)
            bounded = min(max(r, low), high)
            if loss_type == "cispo":
                cut, weight[b, t] = r > high, bounded
                total -= share * bounded * a * new
            else:
                cut = (a > 0 and r > high) or (a < 0 and r < low)
                weight[b, t] = 0.0 if cut else r
                total -= share * min(r * a, bounded * a)
            clipped += cut
            d = ref[b, t].item() - new
            total += config.beta * share * r * (math.exp(d) - d - 1)
            kl_ref += r * (math.exp(d) - d - 1) / sum(length)
            kl += (math.exp(log_ratio) - log_ratio - 1) / sum(length)

    loss = policy_loss(logp, old, advantage, mask, config, ref)
    assert loss.kl_ref is not None
    assert loss.loss.item() == pytest.approx(total, rel=1e-5)
    assert loss.kl.item() == pytest.approx(kl, rel=1e-4)
    assert loss.kl_ref.item() == pytest.approx(kl_ref, rel=1e-4)
    assert loss.clip_ratio.item() == pytest.approx(clipped / sum(length)) and clipped
    torch.testing.assert_close(loss.weight_BC, weight)
    # The weights are what multiplies A ∇logp in the surrogate's gradient, masks included.
    surrogate = policy_loss(logp, old, advantage, mask, replace(config, beta=0.0))
    (gradient,) = torch.autograd.grad(surrogate.loss, logp)
    expected = -surrogate.share_BC * surrogate.weight_BC * advantage[:, None]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_is_masked_does_not_matter(loss_type):
    config = TrainConfig(loss_type=loss_type, epsilon_high=1.5, beta=0.1)
    torch.manual_seed(0)
    given = -torch.rand(3, 2, 4)  # logp, old, ref
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    outcomes = []
    for rubbish in (0.0, math.nan, -math.inf, 1e30):
        logp, old, ref = given.masked_fill(~mask, rubbish)
        logp.requires_grad_()
        loss = policy_loss(logp, old, torch.tensor([1.0, -1.0]), mask, config, ref)
        (gradient,) = torch.autograd.grad(loss.loss, logp)
        outcomes.append([*vars(loss).values(), gradient])
    for other in outcomes[1:]:
        for value, expected in zip(other, outcomes[0], strict=True):
            assert torch.equal(value, expected) and value.isfinite().all()


def test_kl_gradient_on_samples_of_the_old_policy_is_that_of_the_divergence():
    """Over every token of a small vocabulary, each as often as the old policy says it."""
    torch.manual_seed(0)
    old, ref = torch.randn(2, 5).log_softmax(-1)
    logits = torch.randn(5, requires_grad=True)
    logp = logits.log_softmax(-1)
    divergence = (logp.exp() * (logp - ref)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    config = TrainConfig(loss_type="bnpo", beta=1.0)
    mean = torch.zeros(())
    for token, probability in enumerate(old.exp()):
        lone = (x[token].view(1, 1) for x in (logp, old, ref))
        new_1, old_1, ref_1 = lone
        ones = torch.ones(1, 1, dtype=torch.bool)
        loss = policy_loss(new_1, old_1, torch.zeros(1), ones, config, ref_1)
        mean = mean + probability * loss.loss
    (gradient,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(mean, divergence)
    torch.testing.assert_close(gradient, expected)


def test_shares_sum_to_one_even_with_an_empty_row():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for loss_type in LOSSES:
        config = TrainConfig(loss_type=loss_type, epsilon_high=1.5, max_completion_length=8)
        share = token_shares(mask, config)
        total = 4 / (2 * 8) if loss_type == "dr_grpo" else 1.0
        assert share.sum().item() == pytest.approx(total)
        assert not share[~mask].any()
        assert not token_shares(torch.zeros_like(mask), config).any()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss_type):
    config = TrainConfig(loss_type=loss_type, epsilon_high=1.5, beta=0.1)
    torch.manual_seed(0)
    logp, old, ref = -torch.rand(3, 6, 4)
    logp.requires_grad_()
    mask, advantage = torch.rand(6, 4) < 0.6, torch.randn(6)
    whole = policy_loss(logp, old, advantage, mask, config, ref)
    share = token_shares(mask, config)
    parts = [
        policy_loss(logp[r], old[r], advantage[r], mask[r], config, ref[r], share[r])
        for r in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert torch.cat([part.weight_BC for part in parts]).equal(whole.weight_BC)


def test_truncated_sequences_count_for_nothing():
    kept = torch.tensor([[False] * 3, [True, True, False], [True] * 3])
    torch.manual_seed(0)
    old = -torch.rand(3, 3)
    logp = (old + 0.01).requires_grad_()  # nothing is clipped
    loss = policy_loss(logp, old, torch.tensor([1.0, -1.0, 1.0]), kept, TrainConfig())
    (gradient,) = torch.autograd.grad(loss.loss, logp)
    assert not gradient[~kept].any() and gradient[kept].all()
    assert loss.share_BC.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_a_group_of_equals_has_no_advantage(scale_rewards):
    """Whose mean fp32 misses by a rounding, of which Adam would make whole steps."""
    for n in range(2, 17):
        for reward in (a / b for b in range(1, 12) for a in range(b + 1)):
            rewards = torch.cat([torch.full((n,), reward), torch.linspace(0, 1, n)])
            advantage = group_advantages(rewards, n, scale_rewards)
            assert not advantage[:n].any() and advantage[n:].any()


class Unspeakable(Exact):
    def sample(self, n, seed, held_out=False):
        return [replace(e, answer=("été",)) for e in super().sample(n, seed, held_out)]


class Few(Digits):
    def sample(self, n, seed, held_out=False):
        return super().sample(n, seed, held_out)[:3]


def test_an_accuracy_that_could_not_be_reached_is_refused():
    config = replace(TINY, warmup_max_steps=0)
    with pytest.raises(TaskError, match="tokenizer can spell, got 'été', which is "):
        prepare(config, Unspeakable())
    with pytest.raises(TaskError, match="digits: expected 256 examples, got 3"):
        prepare(config, Few())
    policy = new_policy(TINY, Digits())
    with pytest.raises(TaskError, match="digits: expected 8 held-out examples, got 3"):
        Evaluator(Few(), policy, config, Ranks.alone())
    short = replace(config, max_completion_length=2)
    with pytest.raises(TaskError, match=r"max_completion_length: .* '12', of 3 tokens, got 2"):
        Evaluator(Exact(), policy, short, Ranks.alone())
    cramped = replace(config, max_context_length=4)
    with pytest.raises(TaskError, match=r"max_context_length: .* '12', of 3 tokens, got "):
        Evaluator(Exact(), policy, cramped, Ranks.alone())


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_advantages_of_equal_rewards_are_zero(scale_rewards):
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    advantage = group_advantages(rewards, 3, scale_rewards)
    assert not advantage[:3].any()
    torch.testing.assert_close(advantage[3:].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    deviation = {"group": (1 / 3) ** 0.5, "batch": (4 / 15) ** 0.5, "none": 1.0}[scale_rewards]
    assert advantage[4].item() == pytest.approx(2 / 3 / deviation, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "epsilon_high: expected a finite number >= 1, got None"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high: .* >= 1, got 0.28"),
        ({"loss_type": "ppo"}, "loss_type: .* grpo, dr_grpo, bnpo, dapo, cispo, gspo, got 'ppo'"),
        ({"scale_rewards": True}, "scale_rewards: .* group, batch, none, got True"),
        ({"mask_truncated_completions": 1}, "mask_truncated_completions: .* a bool, got 1"),
    ],
)
def test_settings_of_the_loss_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("mean", [1.0, 1.9, 4.2, 8.0])
def test_random_arm_has_the_requested_mean_use(mean, start):
    q = continue_probability(mean, 8)
    assert sum(q**k for k in range(8)) == pytest.approx(mean, abs=1e-6)
    config = replace(TINY, gate="random", mean_uses=mean, num_iterations=8)
    arm = make_arm(config, start.policy)
    uses = 0
    for batch in range(4000):
        for use in range(1, 9):
            if not arm.allows(batch, use):
                break
            uses += 1
    assert uses / 4000 == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize(
    ("gate", "name"), [("kl", "kl"), ("chi2", "gate/chi2")]
)  # fmt: skip
def test_an_arm_with_a_limit_shuts_above_it_and_on_nan(gate, name, start):
    arm = make_arm(replace(TINY, gate=gate, kl_stop=0.1, chi2_stop=0.1), start.policy)
    for value, shut in ((0.05, False), (0.2, True), (math.nan, True)):
        arm.gate.new_batch()
        arm.foresee({name: torch.tensor(value)})
        assert arm.gate.is_shut() == shut


def test_the_gain_gate_with_a_kl_stop_has_a_bound_before_its_window_is_full(start):
    arm = make_arm(replace(TINY, gate="gain_kl", kl_stop=0.1, gate_window=2), start.policy)
    for kl, loss, shut in (
        (0.05, 0.0, False), (0.2, 0.0, True), (math.nan, 0.0, True), (0.05, math.nan, True),
    ):  # fmt: skip
        arm.gate.new_batch()
        arm.foresee({"kl": torch.tensor(kl), "loss": torch.tensor(loss)})
        assert arm.gate.is_shut() == shut


def test_log_ratios_by_the_sign_of_the_advantage_over_micro_batches(start, tmp_path):
    config = replace(TINY, gate="off", num_iterations=3, micro_batch_size=5, learning_rate=1e-2)
    run = Run(config, start, tmp_path, Progress(), print, ())
    run.draw()
    batch = run.batch
    run.use_again()
    run.use_again()
    with torch.no_grad():
        logp_BC = run.model(*batch.sequences.rows(slice(None)), config).out.logp
    run.use_again()
    run.log.close()
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    for name, chosen_B in (
        ("negative", batch.advantage_B < 0), ("positive", batch.advantage_B > 0),
    ):  # fmt: skip
        chosen_BC = batch.mask_BC & chosen_B[:, None]
        mean = (logp_BC - batch.old_logp_BC)[chosen_BC].mean().item()
        assert row[f"log_ratio/{name}"] == pytest.approx(mean, rel=1e-3) and abs(mean) > 1e-4


@pytest.mark.parametrize("size", [4, 8, 128])  # of a generation batch; 16 episodes in all
def test_no_two_ranks_sample_with_the_same_seed(size, start, tmp_path, monkeypatch):
    class Two(Ranks):
        def __init__(self, world, rank):
            self.world, self.rank = world, rank

        def gather(self, x):
            return torch.cat([x] * self.world)

    keys = []

    def watched(*args):
        keys[-1].append(args[-1])
        return play(*args)

    monkeypatch.setattr(loop, "play", watched)
    config = replace(TINY, generation_batch_size=size)
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        run = Run(config, start, tmp_path / f"{world}.{rank}", Progress(), print, ())
        run.ranks = Two(world, rank)
        keys.append([])
        run.draw()
        run.log.close()
    alone, *both = keys
    assert alone == [f"{config.seed} train 0 {n}" for n in range(math.ceil(16 / size))]
    assert not set(both[0]) & set(both[1])
    assert size == 128 or [*both[0], *both[1]] == alone


def test_a_pool_bounds_the_training_prompts_alone():
    task = make_task("math", {"pool": 5})
    drawn = {example.prompt for key in "abc" for example in task.sample(50, key)}
    assert len(drawn) == 5
    held_out = {example.prompt for example in task.sample(50, "a", held_out=True)}
    assert len(held_out) > 40 and not held_out & drawn
    with pytest.raises(ConfigError, match=r"task_options.pool: expected an integer >= 1, got 0"):
        make_task("math", {"pool": 0})


def test_shuffled_uses_are_those_of_the_other_run_in_another_order(start):
    counts = tuple(range(1, TINY.rollout_batches + 1))
    arms = [
        make_arm(replace(TINY, gate="shuffled", use_counts=counts, seed=seed), start.policy)
        for seed in (0, 0, 1)
    ]
    used = [[sum(arm.allows(batch, use) for use in range(1, 20)) for batch in counts]
            for arm in arms]  # fmt: skip
    assert sorted(used[0]) == list(counts) and used[0] == used[1] != used[2]
    with pytest.raises(ConfigError, match=r"use_counts: .* each of 6 rollout batches, got 5$"):
        make_arm(replace(TINY, gate="shuffled", use_counts=counts[1:]), start.policy)
    within = replace(TINY, gate="shuffled", use_counts=counts, shuffle_within=4, seed=1)
    arm = make_arm(within, start.policy)
    assert sorted(arm.counts[:4]) == [1, 2, 3, 4] != arm.counts[:4] and arm.counts[4:] in (
        [5, 6], [6, 5],
    )  # fmt: skip


def set_gradients(arm, norm):
    parameters = list(arm.policy.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for p in parameters:
        p.grad *= norm / total


def test_skip_step_skips_outliers_and_goes_on(start):
    arm = make_arm(replace(TINY, gate="skip_step"), start.policy)
    generator = torch.Generator().manual_seed(0)
    applied = []
    for i in range(200):
        if i % TINY.num_iterations == 0:
            arm.gate.new_batch()
        normal = 0.1 + 0.01 * float(torch.randn((), generator=generator))
        set_gradients(arm, 9.0 if i in (10, 100, 150) else normal)
        arm.gate._backwards = 1  # as if the head had had its backward
        arm.decide()
        arm.optimizer.step()
        applied.append(not arm.gate.is_shut())
        assert arm.goes_on(applied[-1])
    assert [i for i, a in enumerate(applied) if not a] == [100, 150]  # at 10 too little is known


def test_zclip_follows_its_formula(start):
    """Against the formula over plain floats, with a spike."""
    arm = make_arm(replace(TINY, gate="zclip", max_grad_norm=1e9), start.policy)
    generator = torch.Generator().manual_seed(0)
    norms = [1.0 + 0.1 * float(torch.randn((), generator=generator)) for _ in range(40)]
    norms[33] = 5.0
    mean, variance, after = 0.0, 0.0, []
    arm.gate.new_batch()
    for i, norm in enumerate(norms):
        set_gradients(arm, norm)
        arm.gate._backwards = 1
        arm.decide()
        expected = norm
        if i == 25:
            mean = sum(norms[:25]) / 25
            variance = sum((x - mean) ** 2 for x in norms[:25]) / 25
        if i >= 25:
            z = (norm - mean) / variance**0.5
            if z > 2.5:
                expected = mean + 2.5**2 / z * variance**0.5
            mean = 0.97 * mean + 0.03 * expected
            variance = 0.97 * variance + 0.03 * (expected - mean) ** 2
        got = torch.nn.utils.get_total_norm([p.grad for p in arm.policy.parameters()])
        assert float(got) == pytest.approx(expected, rel=1e-4)
        after.append(expected)
        arm.optimizer.step()
    assert after[33] < 2 and arm.memory[0] == 25


def make_arm(config, policy):
    return ARMS[config.gate](config, policy, torch.optim.AdamW(policy.parameters(), fused=True))
