"""TRL's own GRPO tests with DGGTrainer in GRPOTrainer's place, offline.

    python tests/trl_own_tests.py CHECKOUT [--stock] [--save NAME] [pytest's arguments]

CHECKOUT is a folder with TRL's `tests/`, which its wheel and sdist do not ship. The tiny models and
the data set that they take from the hub are stood in for by random ones of the same architecture,
so that what a test asks of other models, images, chat templates with tools, or the hub itself
fails: run `--stock` too, with TRL's own trainer, and compare. How every case ended goes into a
record beside the benchmarks'.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SHAPE = dict(
    hidden_size=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=256, eos_token_id=257,
    bos_token_id=None,
)  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Hub name of TRL's tiny model -> config class, model class.
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2Config", "Qwen2ForCausalLM"),
    "tiny-Qwen3ForCausalLM": ("Qwen3Config", "Qwen3ForCausalLM"),
    "tiny-LlamaForCausalLM-3.2": ("LlamaConfig", "LlamaForCausalLM"),
    "tiny-MistralForCausalLM-0.2": ("MistralConfig", "MistralForCausalLM"),
    "tiny-Gemma2ForCausalLM": ("Gemma2Config", "Gemma2ForCausalLM"),
    "tiny-Cohere2ForCausalLM": ("Cohere2Config", "Cohere2ForCausalLM"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2Config", "Qwen2ForSequenceClassification"),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3Config", "Qwen3ForSequenceClassification"),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaConfig", "LlamaForSequenceClassification"),
}


def make_hub(cache: Path) -> None:
    """Random tiny models in the layout of the hub's cache."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    words = {word: i for i, word in enumerate([*alphabet, *special])}
    byte_level = Tokenizer(models.BPE(vocab=words, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level, pad_token=special[0], eos_token=special[1],
        additional_special_tokens=special[2:], chat_template=CHAT,
    )  # fmt: skip
    for name, (config, model) in MODELS.items():
        torch.manual_seed(0)
        labels = {"num_labels": 1} if "Sequence" in model else {}
        made = getattr(transformers, config)(vocab_size=len(words), **SHAPE, **labels)
        folder = cache / f"models--trl-internal-testing--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        getattr(transformers, model)(made).save_pretrained(folder / "snapshots" / ("0" * 40))
        tokenizer.save_pretrained(folder / "snapshots" / ("0" * 40))


def load_dataset(name: str, config: str = "", split: str | None = None, **_: Any) -> Any:
    """Stands in for trl-internal-testing/zen, prompts only: 17 of training, 2 of test."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    if name != "trl-internal-testing/zen" or not config.endswith("prompt_only"):
        raise ConnectionError(f"{name} {config} is on the hub")
    lines = [f"Line {i} of the poem is" for i in range(19)]
    chats = [[{"role": "user", "content": line}] for line in lines]
    rows = chats if config.startswith("conversational") else lines
    parts = {"train": rows[:17], "test": rows[17:]}
    made = {part: Dataset.from_dict({"prompt": rows}) for part, rows in parts.items()}
    if _.get("streaming"):
        streams = IterableDatasetDict({n: d.to_iterable_dataset() for n, d in made.items()})
        return streams[split] if split else streams
    return made[split] if split else DatasetDict(made)


class Outcomes:
    """pytest's plugin: how every case ended, and why where it did not pass."""

    def __init__(self) -> None:
        self.cases: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if report.failed:
            why = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
        elif report.skipped:
            why = report.longrepr[2]
        line = f": {why.splitlines()[0][:200]}" if why else ""
        self.cases[report.nodeid.split("::", 1)[1]] = report.outcome + line


def main() -> int:
    """Run them; pytest's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--stock", action="store_true", help="with TRL's own trainer")
    parser.add_argument("--save", metavar="NAME")
    args, passed_on = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_CACHE": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        import datasets
        import pytest
        import torch
        import trl
        from trl import import_utils

        from benchmarks import common
        from dgg_kernels.integrations.trl import DGGTrainer

        # The newest checkout at hand was of TRL 1.10, whose tests ask for it.
        vars(import_utils).setdefault("is_joblib_available", lambda: False)
        make_hub(Path(folder))
        datasets.load_dataset = load_dataset
        if not args.stock:
            trl.GRPOTrainer = DGGTrainer
        os.chdir(args.checkout)
        outcomes = Outcomes()
        code = pytest.main(
            ["tests/test_grpo_trainer.py", "-q", "-p", "no:cacheprovider", *passed_on],
            plugins=[outcomes],
        )
    if args.save:
        ended = [how.split(":")[0] for how in outcomes.cases.values()]
        record = {
            "stamp": common.stamp(torch.device("cpu")),
            "trainer": trl.GRPOTrainer.__name__,
            "counts": {how: ended.count(how) for how in ("passed", "failed", "skipped")},
            "tests": outcomes.cases,
        }
        print(common.save(args.save, record))
    return code


if __name__ == "__main__":
    sys.exit(main())
