"""Tiny models with random weights, saved by transformers with a tokenizer of their own.

They answer nonsense, but load and run exactly as real ones do, in milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", END_OF_TURN]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A prompt is read in chunks, so that no running answer waits for it.",
    "def add(a, b):\n    return a + b\n",
    "Die Würde des Menschen ist unantastbar. 你好 世界 🙂",
    "alpha beta gamma delta river mountain code table green house window paper stone light",
]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def save_tiny_model(
    folder: Path,
    architecture: str = "qwen2",
    vocab_size: int = 512,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a model, its tokenizer and a chat template to `folder`, float32, and return it.

    Args:
        folder: made if it is missing.
        architecture: a `model_type` of transformers: "qwen2", "llama", "mistral", "qwen3", ...
        vocab_size: ids the model accepts; the tokenizer knows at most as many.
        seed: of the weights.
        config: fields of the architecture's config, over those of `SHAPE`.
    """
    tokenizer = train_tokenizer(vocab_size)
    end_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    fields = {**SHAPE, "vocab_size": vocab_size, "eos_token_id": end_token_id, **config}
    model_config = AutoConfig.for_model(
        architecture, bos_token_id=None, pad_token_id=None, **fields
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=end_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def disturb_vectors(folder: Path) -> None:
    """Make the norms and biases of a saved model random; transformers makes them ones and zeros."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.dim() == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    save_file(weights, file, {"format": "pt"})


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` ids: any text survives encode, decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, chat_template=CHAT_TEMPLATE
    )
