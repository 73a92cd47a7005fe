"""The embedded models against transformers reading the same file: weights, 20 greedy prompts."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stallfree import LLM, SamplingParams
from stallfree.model.demo import DEMO, GEMMA, EmbeddedModel, assemble
from stallfree.model.gguf import GgufWeights

NUM_TOKENS = 48
PROMPTS = [
    "def fibonacci(n):",
    "import numpy as np\n\ndef softmax(x):",
    "SELECT name, COUNT(*) FROM",
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "#include <stdio.h>\n\nint main(",
    "class Stack:\n    def __init__(self):",
    "Explain what a KV cache is:",
    "Die Hauptstadt von Österreich ist",
    "用一句话解释什么是递归:",
    "for i in range(10):\n    print(",
    "A list comprehension in Python",
    "function debounce(callback, delay) {",
    "1, 1, 2, 3, 5, 8,",
    "fn main() {\n    let mut total =",
    "The quick brown fox",
    "Q: What is 17 * 3?\nA:",
    "README\n\n# Installation\n\n",
    "try:\n    value = int(text)\nexcept",
    "x" * 300,
]
LONG = "and runs over the hills and far away " * 90  # past the window of Gemma's local layers


def skip_if_not_installed(model: EmbeddedModel) -> None:
    try:
        metadata.distribution(model.parts[0][0])
    except metadata.PackageNotFoundError:
        pytest.skip(f"the extra {model.extra} is not installed")


Reference = tuple[EmbeddedModel, Path, Any]


@pytest.fixture(scope="module", params=[DEMO, GEMMA], ids=lambda model: model.name)
def reference(request: pytest.FixtureRequest) -> Reference:
    """An embedded model, its file, and what transformers makes of it."""
    embedded: EmbeddedModel = request.param
    if embedded is GEMMA:
        skip_if_not_installed(embedded)
    file = assemble(embedded)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return embedded, file, model


@pytest.mark.model
@pytest.mark.slow
def test_weights_are_those_that_transformers_loads(reference: Reference) -> None:
    _, file, model = reference
    weights, theirs = GgufWeights(file), model.state_dict()
    assert theirs.keys() - weights.names() <= {"lm_head.weight"}  # if it is the embedding
    assert weights.names() <= theirs.keys()
    names = sorted(weights.names())
    for name in {*names[:2], *names[::20], names[-1]}:
        assert torch.equal(weights.tensor(name), theirs[name]), name


@pytest.mark.model
@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(reference: Reference) -> None:
    embedded, _, model = reference
    llm = LLM(embedded.name, dtype="float32", kv_cache_memory_bytes=1 << 28, token_budget=48)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([*PROMPTS, LONG], params, use_progress_bar=False)
    del llm
    for output in outputs:
        # Greedy by induction: each of our tokens is the likeliest one after those before it.
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        with torch.inference_mode():
            inputs = torch.tensor([tokens[:-1]])
            logits = model(inputs, logits_to_keep=NUM_TOKENS).logits[0]
        assert logits.argmax(dim=-1).tolist() == tokens[-NUM_TOKENS:]
