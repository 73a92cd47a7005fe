"""The offline face of the engine, on a tiny real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_fixtures import GREEDY, PROMPTS, Failing, tiny_settings
from transformers import AutoModelForCausalLM

from stallfree import LLM, SamplingParams
from stallfree.bench.table_file import read_table
from stallfree.engine.iteration_file import COLUMNS
from stallfree.engine.llm import Prompt
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError, ContextLengthError, ExecutorError, InvalidRequestError
from stallfree.sim.measured import read_times


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(settings: EngineSettings) -> Iterator[LLM]:
    llm = LLM.from_settings(settings)
    yield llm
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.has_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


def test_generate_matches_transformers(llm: LLM, settings: EngineSettings) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for output in llm.generate(PROMPTS, GREEDY, use_progress_bar=False):
        ids = torch.tensor([output.prompt_token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        [completion] = output.outputs
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"


def test_iterations_are_noted_for_the_simulator(settings: EngineSettings, tmp_path: Path) -> None:
    path = tmp_path / "iterations.csv"
    noting = dataclasses.replace(settings, iteration_file=path, token_budget=16)
    outputs = LLM.from_settings(noting).generate(PROMPTS, GREEDY, use_progress_bar=False)
    columns, table = read_table(path)
    assert tuple(columns) == COLUMNS
    rows = [{name: float(value or "nan") for name, value in row.values.items()} for row in table]
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert sum(row["prefill_tokens"] for row in rows) == num_prompt
    assert sum(row["decodes"] for row in rows) == num_output - len(outputs)
    assert sum(row["sampled"] for row in rows) == num_output
    attended = sum(n * (n + 1) // 2 for n in (len(each.prompt_token_ids) for each in outputs))
    assert sum(row["prefill_context"] for row in rows) == attended
    assert min(row["seconds"] for row in rows) > 0
    assert sum(read_times(path).costs) > 0


def test_a_file_that_cannot_be_written_is_refused(settings: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"iterations\.csv cannot be written: No such"):
        LLM.from_settings(
            dataclasses.replace(settings, iteration_file=tmp_path / "no" / "iterations.csv")
        )


def test_prompts_come_in_any_form(llm: LLM) -> None:
    [one] = llm.generate("The quick", GREEDY, use_progress_bar=False)
    [same] = llm.generate(list(one.prompt_token_ids), GREEDY, use_progress_bar=False)
    mixed: list[Prompt] = [one.prompt_token_ids, "The quick"]
    two = llm.generate(mixed, [GREEDY] * 2, use_progress_bar=False)
    assert one.outputs == same.outputs == two[0].outputs == two[1].outputs
    assert same.prompt is None
    assert llm.generate([], GREEDY, use_progress_bar=False) == []
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 1 prompts"):
        llm.generate("x", [GREEDY] * 2)


def test_a_bad_prompt_runs_none(llm: LLM) -> None:
    prompts: list[Prompt] = ["x", []]
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(prompts, GREEDY, use_progress_bar=False)
    assert not llm.engine.has_requests


def test_stream_gives_the_same_text_in_pieces(llm: LLM) -> None:
    [whole] = llm.generate("Die Würde", GREEDY, use_progress_bar=False)
    deltas = list(llm.stream("Die Würde", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [delta.finish_reason for delta in deltas] == [None] * 11 + ["length"]
    first = next(stream := llm.stream("x", GREEDY))
    assert first.token_ids
    stream.close()
    assert not llm.engine.has_requests


def test_streams_may_be_read_in_turn(llm: LLM) -> None:
    expected = [each.outputs[0].text for each in llm.generate(PROMPTS, GREEDY)]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    texts = ["" for _ in PROMPTS]
    for deltas in zip(*streams, strict=True):
        texts = [text + delta.text for text, delta in zip(texts, deltas, strict=True)]
    assert texts == expected


def test_outputs_come_as_they_are_complete(llm: LLM) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (9, 3, 6)]
    outputs = list(llm.as_completed(["x"] * 3, params))
    assert [index for index, _ in outputs] == [1, 2, 0]
    assert [len(output.outputs[0].token_ids) for _, output in outputs] == [3, 6, 9]


def test_seeds_repeat_whatever_runs_beside(llm: LLM) -> None:
    random = dataclasses.replace(GREEDY, temperature=1.0, seed=5)
    [alone] = llm.generate("The quick", random, use_progress_bar=False)
    others = [dataclasses.replace(random, seed=None)] * 5
    together = llm.generate(["The quick"] * 6, [*others, random], use_progress_bar=False)
    assert together[-1].outputs == alone.outputs
    assert len({output.outputs[0].token_ids for output in together}) > 3


def test_completions_of_one_prompt_differ_and_share_it(llm: LLM) -> None:
    prompt = list(range(40, 140))
    params = dataclasses.replace(GREEDY, temperature=1.0, seed=3, n=3, prompt_logprobs=0)
    [output] = llm.generate([prompt], params, use_progress_bar=False)
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert len({each.token_ids for each in output.outputs}) == 3
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 100
    [again] = llm.generate([prompt], params, use_progress_bar=False)
    assert again == output


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    [free] = llm.generate("alpha beta", GREEDY, use_progress_bar=False)
    text = free.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    params = dataclasses.replace(GREEDY, stop=(stop, "never this"))
    [stopped] = llm.generate("alpha beta", params, use_progress_bar=False)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == stop
    patient = dataclasses.replace(params, min_tokens=12)
    assert llm.generate("alpha beta", patient, use_progress_bar=False)[0].outputs[0].text == text


def test_stop_tokens_add_no_text(llm: LLM) -> None:
    [free] = llm.generate("alpha beta", GREEDY, use_progress_bar=False)
    token = free.outputs[0].token_ids[5]
    first = free.outputs[0].token_ids.index(token)
    params = dataclasses.replace(GREEDY, stop_token_ids=(token,))
    [stopped] = llm.generate("alpha beta", params, use_progress_bar=False)
    assert stopped.outputs[0].token_ids == free.outputs[0].token_ids[: first + 1]
    assert stopped.outputs[0].stop_reason == token
    assert stopped.outputs[0].text == llm.tokenizer.decode(free.outputs[0].token_ids[:first])


def test_end_tokens_end_unless_ignored(llm: LLM) -> None:
    end = max(llm.engine.end_token_ids)
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100.0})
    [output] = llm.generate("x", params, use_progress_bar=False)
    assert output.outputs[0].token_ids == (end,)
    assert output.outputs[0].text == ""
    assert output.outputs[0].finish_reason == "stop"
    ignoring = dataclasses.replace(params, ignore_eos=True)
    [output] = llm.generate("x", ignoring, use_progress_bar=False)
    assert output.outputs[0].token_ids == (end,) * 5


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_logprobs_match_transformers(settings: EngineSettings, budget: int) -> None:
    llm = LLM.from_settings(dataclasses.replace(settings, token_budget=budget))
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=2)
    [output] = llm.generate("alpha beta gamma delta", params, use_progress_bar=False)
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    assert output.prompt_logprobs[0] is None
    positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for row, position, token in zip(expected, positions, tokens[1:], strict=False):
        assert position is not None
        assert position.token_id == token
        assert position.logprob == pytest.approx(float(row[token]), abs=1e-3)
        best = row.topk(len(position.top))
        assert [token for token, _ in position.top] == best.indices.tolist()
    assert len(positions[-1].top if positions[-1] else ()) == 3


def test_max_tokens_none_runs_to_the_end_of_the_context(settings: EngineSettings) -> None:
    llm = LLM.from_settings(dataclasses.replace(settings, max_model_len=40))
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    [output] = llm.generate([list(range(30))], params, use_progress_bar=False)
    assert len(output.outputs[0].token_ids) == 10
    with pytest.raises(ContextLengthError, match="context is 40"):
        llm.generate([list(range(40))], params)


@pytest.mark.parametrize("scheduler", ["sarathi", "faster_transformer"])
def test_an_interrupt_leaves_a_usable_engine(settings: EngineSettings, scheduler: str) -> None:
    llm = LLM.from_settings(dataclasses.replace(settings, scheduler=scheduler))
    expected = llm.generate(PROMPTS, GREEDY)
    failing = Failing(llm.engine, KeyboardInterrupt())
    llm.engine.executor = failing
    failing.fails = True
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    failing.fails = False
    assert not llm.engine.has_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks
    assert llm.generate(PROMPTS, GREEDY) == expected


def test_offline_failures_raise(llm: LLM) -> None:
    failing = Failing(llm.engine)
    failing.fails = True
    llm.engine.executor = failing
    with pytest.raises(ExecutorError, match="no memory"):
        llm.generate(PROMPTS, GREEDY, use_progress_bar=False)
