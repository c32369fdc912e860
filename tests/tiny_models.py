"""Random transformers models of every kind of head that this project knows."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

V = 128
SHAPE = dict(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
# What is peculiar about each head: tied or not, bias, softcap, scale.
MODELS = {
    "Llama": {"tie_word_embeddings": False},
    "Llama, tied": {"tie_word_embeddings": True},  # SmolLM, SmolLM2
    "SmolLM3": {"tie_word_embeddings": True},
    "Mistral": {},
    "Qwen2": {"tie_word_embeddings": False},  # and Qwen2.5
    "Qwen2, tied": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"query_pre_attn_scalar": 8},
    "Gemma3Text, softcap": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Phi": {},
    "Phi3": {},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.3},
}


def build(name, **changes):
    """A random model, its head far from uniform."""
    torch.manual_seed(0)
    family = name.split(",")[0]
    kind = {"Gemma3Text": "Gemma3"}.get(family, family)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **MODELS[name], **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def save_speller(folder, tied):
    """A random Qwen2 and its tokenizer, of a token per letter or digit, which knows chats, too."""
    words = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    ids = {word: i for i, word in enumerate(words)}
    letters = Tokenizer(models.WordLevel(ids, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05 if tied else 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
