"""The bench gives TRL the same tokens and the same tool as ours."""

import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def tokenizer(bench):
    return AutoTokenizer.from_pretrained(bench.TINY_BASE)


def test_trl_sees_the_tokens_of_the_embedded_template(bench, tokenizer):
    question = {"role": "user", "content": "23 boxes of 17 pens. How many pens?"}
    result = {"role": "tool", "content": "391"}
    ours = [question, {"role": "assistant", "content": "<calc>23*17</calc>"}, result]
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "23*17"}}}
    trl = [question, {"role": "assistant", "content": "", "tool_calls": [call]}, {"name": "calculate", **result}]
    expected = tokenizer.apply_chat_template(ours, add_generation_prompt=True, return_dict=False)
    given = tokenizer.apply_chat_template(
        trl, chat_template=bench.TRL_CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert given == expected


@pytest.mark.parametrize(
    ("text", "expression"),
    [("<calc>23*17</calc><|end|>", "23*17"), ("<calc>23*", "23*"), ("391<|end|>", None)],
)
def test_trl_parses_calls(bench, tokenizer, text, expression):
    pytest.importorskip("transformers", minversion="5.13")  # response templates
    prefix = tokenizer.encode("<|user|>?<|end|><|assistant|>")
    message = tokenizer.parse_response(tokenizer.encode(text), schema=bench.TRL_RESPONSE_TEMPLATE, prefix=prefix)
    calls = [call["function"]["arguments"]["expression"] for call in message.get("tool_calls", [])]
    assert calls == ([expression] if expression is not None else [])
    assert message.get("content", "") == ("391" if expression is None else "")


def test_the_tool_is_the_agents(bench):
    assert bench.calculate("23*17") == "391"
    assert bench.calculate("23*") == "error"


def test_rewards_reach_trl(bench):
    reward = bench.trl_reward(lambda source, answer, truth: float(answer == truth))
    turns = [[{"role": "assistant", "content": "5"}], [{"role": "assistant", "content": "6"}, {"role": "tool", "content": "5"}]]
    assert reward(completions=turns, ground_truth=["5", "5"], data_source=["calculator"] * 2) == [1.0, 0.0]
