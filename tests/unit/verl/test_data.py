"""Data files as prompts: what is wrong in a file is named with its place; the order is a pure function of seed and step."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentlightning.errors import ConfigError, DataError
from agentlightning.types import Prompt
from agentlightning.verl.config import load_config
from agentlightning.verl.data import PromptDataset, batches, load_prompts, load_rows, number_repeats

DEFAULTS = load_config().data


@pytest.fixture(scope="module")
def tokenizer(base_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path)


def _row(question="2+2?", truth="4", **more):
    return {
        "prompt": [{"role": "user", "content": question}],
        "data_source": "sums",
        "reward_model": {"ground_truth": truth},
        **more,
    }


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _data(**changes):
    return DEFAULTS.model_copy(update=changes)


def _prompts(count):
    return [Prompt(f"train:{i}", (), (i,), "sums", str(i)) for i in range(count)]


def test_jsonl_and_parquet_of_the_same_rows_give_the_same_prompts(tmp_path, tokenizer):
    rows = [_row(f"{i}+1?", str(i + 1), extra_info={"index": i}) for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_parquet = load_prompts("train", _data(train_files=str(tmp_path / "a.parquet")), tokenizer)
    from_jsonl = load_prompts("train", _data(train_files=_jsonl(tmp_path / "a.jsonl", rows)), tokenizer)
    assert from_parquet == from_jsonl
    third = from_jsonl[3]
    assert (third.uid, third.data_source, third.ground_truth, third.extra_info) == ("train:3", "sums", "4", {"index": 3})
    assert third.messages == ({"role": "user", "content": "3+1?"},)


def test_token_ids_are_the_chat_template_with_the_generation_prompt(tmp_path, tokenizer):
    row = _row("23 boxes of 17 pens. How many pens?")
    (prompt,) = load_prompts("val", _data(val_files=_jsonl(tmp_path / "a.jsonl", [row])), tokenizer)
    expected = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(prompt.token_ids) == expected
    assert prompt.uid == "val:0"


def test_several_files_are_one_list_and_uids_count_over_all(tmp_path, tokenizer):
    files = (_jsonl(tmp_path / "a.jsonl", [_row("a"), _row("b")]), _jsonl(tmp_path / "b.jsonl", [_row("c")]))
    prompts = load_prompts("train", _data(train_files=files), tokenizer)
    assert [(p.uid, p.messages[0]["content"]) for p in prompts] == [("train:0", "a"), ("train:1", "b"), ("train:2", "c")]


def test_no_validation_files_no_prompts(tokenizer):
    assert load_prompts("val", _data(val_files=None), tokenizer) == []


def test_columns_of_other_names_and_extra_info_of_none(tmp_path, tokenizer):
    row = {"chat": [{"role": "user", "content": "?"}], "task": "x", "reward_model": {"ground_truth": 4}, "extra_info": None}
    data = _data(train_files=_jsonl(tmp_path / "a.jsonl", [row]), prompt_key="chat", reward_fn_key="task")
    (prompt,) = load_prompts("train", data, tokenizer)
    assert (prompt.data_source, prompt.ground_truth, prompt.extra_info) == ("x", 4, {})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?"}, ["no column 'prompt'", "it has question", "data.prompt_key="]),
        ({"prompt": [{"role": "user", "content": "?"}]}, ["no column 'data_source'", "data.reward_fn_key="]),
        ({**_row(), "prompt": "2+2?"}, ["column 'prompt' is '2+2?'", "expected chat messages", "data.prompt_key="]),
        ({**_row(), "prompt": []}, ["column 'prompt' is []", "data.prompt_key="]),
        ({**_row(), "prompt": [{"role": "user"}]}, ["column 'prompt'", "expected chat messages"]),
        ({**_row(), "prompt": [{"role": "user", "content": 4}]}, ["column 'prompt'", "expected chat messages"]),
        ({**_row(), "reward_model": None}, ["column 'reward_model' is missing", '{"ground_truth": "42"}', "data.train_files"]),
        ({**_row(), "reward_model": {"truth": 1}}, ["column 'reward_model' is {'truth': 1}", "data.train_files"]),
        ({**_row(), "extra_info": "x"}, ["extra_info is 'x'", "expected an object"]),
    ],
)
def test_a_wrong_row_is_named_with_its_place_its_column_and_what_mends_it(row, words, tmp_path, tokenizer):
    data = _data(train_files=_jsonl(tmp_path / "a.jsonl", [_row(), row]))
    with pytest.raises(DataError) as error:
        load_prompts("train", data, tokenizer)
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2: ")
    for word in words:
        assert word in str(error.value)


def test_a_wrong_row_of_a_parquet_file_is_named_by_its_number(tmp_path, tokenizer):
    pq.write_table(pa.Table.from_pylist([_row(), {**_row(), "prompt": None}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'prompt' is None"):
        load_prompts("train", _data(train_files=str(tmp_path / "a.parquet")), tokenizer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": 1}\n{"prompt": \n', "line 2: not JSON"),
        ("\n[1, 2]\n", "line 2: a list, expected a JSON object"),
        ("\xff\xfe\n", "line 1: not JSON"),
        ("\n\n", "data.train_files: {path} holds no row"),
        ("", "data.train_files: {path} holds no row"),
    ],
)
def test_malformed_and_empty_jsonl(content, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as error:
        load_rows(str(path), "data.train_files")
    assert words.format(path=path) in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read_name_the_override(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "data.csv").write_text("a,b\n")
    for name, words in (
        ("nowhere.jsonl", "is not there"),
        ("bad.parquet", "cannot be read as parquet"),
        ("data.csv", "ends with '.csv'"),
        ("*.json", "is not there"),
    ):
        with pytest.raises(DataError) as error:
            load_rows(str(tmp_path / name), "data.val_files")
        assert words in str(error.value)
        assert str(error.value).startswith("data.val_files: ")
        assert "mend it with data.val_files=<file>" in str(error.value)


def test_an_empty_parquet_file(tmp_path):
    pq.write_table(pa.Table.from_pylist([_row()]).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no row"):
        load_rows(str(tmp_path / "a.parquet"), "data.train_files")


def test_a_template_that_refuses_a_conversation_names_the_row(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match=r"line 1: the model's chat template refuses these messages \(no system turn\)"):
        load_prompts("train", _data(train_files=_jsonl(tmp_path / "a.jsonl", [_row()])), tokenizer)


class TestOverlongPrompts:
    """Four rows of which the second and the last have more tokens than data.max_prompt_length."""

    @pytest.fixture
    def data(self, tmp_path, tokenizer):
        rows = [_row("a"), _row("abcdefgh"), _row("b"), _row("abcdefghij")]
        files = _jsonl(tmp_path / "a.jsonl", rows)
        short = len(load_prompts("train", _data(train_files=files), tokenizer)[0].token_ids)
        return _data(train_files=files, max_prompt_length=short + 3)

    def test_is_an_error_that_names_row_count_and_three_ways_out(self, data, tokenizer):
        limit = data.max_prompt_length
        with pytest.raises(DataError) as error:
            load_prompts("train", data, tokenizer)
        assert f"a.jsonl, line 2: the prompt has {limit + 4} tokens, data.max_prompt_length={limit}" in str(error.value)
        assert "(2 of 4 prompts are longer)" in str(error.value)
        for way in (f"data.max_prompt_length={limit + 6}", "data.filter_overlong_prompts=true", "data.truncation=left"):
            assert way in str(error.value)
        load_prompts("train", data.model_copy(update={"max_prompt_length": limit + 6}), tokenizer)

    def test_left_out_where_asked_and_the_others_keep_their_uids(self, data, tokenizer):
        prompts = load_prompts("train", data.model_copy(update={"filter_overlong_prompts": True}), tokenizer)
        assert [prompt.uid for prompt in prompts] == ["train:0", "train:2"]

    def test_cut_on_the_side_that_was_asked_for(self, data, tokenizer):
        whole = load_prompts("train", data.model_copy(update={"max_prompt_length": 99}), tokenizer)[1].token_ids
        left = load_prompts("train", data.model_copy(update={"truncation": "left"}), tokenizer)[1].token_ids
        right = load_prompts("train", data.model_copy(update={"truncation": "right"}), tokenizer)[1].token_ids
        assert (left, right) == (whole[4:], whole[:-4])

    def test_nothing_left_is_an_error(self, data, tokenizer):
        with pytest.raises(DataError, match=r"each of its 4 prompts is longer than data\.max_prompt_length=1; mend it with"):
            load_prompts("train", data.model_copy(update={"filter_overlong_prompts": True, "max_prompt_length": 1}), tokenizer)


def test_train_max_samples_takes_the_first_rows_of_training_only(tmp_path, tokenizer):
    files = _jsonl(tmp_path / "a.jsonl", [_row(str(i)) for i in range(5)])
    data = _data(train_files=files, val_files=files, train_max_samples=2)
    assert len(load_prompts("train", data, tokenizer)) == 2
    assert len(load_prompts("val", data, tokenizer)) == 5


def test_more_prompts_a_step_than_there_are():
    with pytest.raises(ConfigError) as error:
        PromptDataset(_prompts(3), 4, shuffle=True, seed=1)
    assert "data.train_batch_size: given 4" in str(error.value)
    assert "mend it with data.train_batch_size=3" in str(error.value)


def test_an_epoch_gives_every_prompt_at_most_once_and_drops_the_rest():
    data = PromptDataset(_prompts(11), 3, shuffle=True, seed=1)
    assert data.steps_per_epoch == 3
    epoch = [prompt.uid for step in (1, 2, 3) for prompt in data.step_prompts(step)]
    assert len(epoch) == len(set(epoch)) == 9
    assert [data.epoch_of(step) for step in (1, 3, 4, 7)] == [0, 0, 1, 2]


def test_row_loader_workers_unresumable_the_order_is_a_pure_function_of_seed_and_step():
    def uids(seed, steps):
        data = PromptDataset(_prompts(50), 5, shuffle=True, seed=seed)
        return {step: [prompt.uid for prompt in data.step_prompts(step)] for step in steps}

    forwards, backwards = uids(1, range(1, 31)), uids(1, range(30, 0, -1))
    assert forwards == backwards
    assert forwards[23] == uids(1, [23])[23]
    assert forwards[1] != uids(2, [1])[1]
    assert [forwards[step] for step in range(1, 11)] != [forwards[step] for step in range(11, 21)]


def test_the_order_of_a_seed_never_changes():
    # A resumed run depends on these numbers.
    data = PromptDataset(_prompts(10), 10, shuffle=True, seed=1)
    assert [prompt.uid for prompt in data.step_prompts(1)] == [f"train:{i}" for i in (3, 9, 0, 2, 4, 7, 6, 5, 1, 8)]


def test_every_place_is_about_equally_likely():
    firsts = np.zeros(4)
    data = PromptDataset(_prompts(4), 4, shuffle=True, seed=3)
    for epoch in range(400):
        firsts[data.step_prompts(epoch + 1)[0].token_ids[0]] += 1
    # 100 expected, standard deviation 8.7
    assert np.all(np.abs(firsts - 100) < 40)


def test_positions_are_the_stream_that_steps_are_cut_from():
    data = PromptDataset(_prompts(11), 3, shuffle=True, seed=1)
    steps = [prompt.uid for step in range(1, 9) for prompt in data.step_prompts(step)]
    assert [data.prompts_at(position, 1)[0].uid for position in range(24)] == steps
    assert [prompt.uid for prompt in data.prompts_at(4, 4)] == steps[4:8]
    assert data.prompts_at(5, 0) == []
    with pytest.raises(ValueError, match="position -1"):
        data.prompts_at(-1, 2)


def test_a_row_that_comes_again_is_a_prompt_of_its_own():
    data = PromptDataset(_prompts(2), 2, shuffle=False, seed=1)
    uids = ["train:0", "train:1", "train:0#2", "train:1#2", "train:0#3"]
    assert [prompt.uid for prompt in data.prompts_at(0, 5)] == uids
    apart = [*data.prompts_at(0, 3), *data.prompts_at(3, 2)]
    assert [prompt.uid for prompt in number_repeats(apart)] == uids
    assert number_repeats(number_repeats(apart)) == number_repeats(apart)


def test_without_shuffle_the_order_is_the_files():
    data = PromptDataset(_prompts(5), 2, shuffle=False, seed=1)
    assert [[p.uid for p in data.step_prompts(s)] for s in (1, 2, 3)] == [
        ["train:0", "train:1"],
        ["train:2", "train:3"],
        ["train:0", "train:1"],
    ]


def test_steps_count_from_one():
    with pytest.raises(ValueError, match="step 0"):
        PromptDataset(_prompts(4), 2, shuffle=True, seed=1).step_prompts(0)


def test_the_fingerprint_sees_content_and_not_seed_or_batch_size():
    prompts = _prompts(6)
    fingerprint = PromptDataset(prompts, 2, shuffle=True, seed=1).fingerprint()
    assert fingerprint == PromptDataset(_prompts(6), 3, shuffle=False, seed=9).fingerprint()
    other_answer = [*prompts[:5], Prompt("train:5", (), (5,), "sums", "6")]
    other_order = prompts[::-1]
    for changed in (other_answer, other_order, prompts[:5]):
        assert PromptDataset(changed, 2, shuffle=True, seed=1).fingerprint() != fingerprint


def test_batches_of_validation_prompts():
    prompts = _prompts(5)
    assert [len(part) for part in batches(prompts, 2)] == [2, 2, 1]
    assert [len(part) for part in batches(prompts, None)] == [5]
    assert batches([], None) == []


def test_the_embedded_data_fits_the_default_run(tokenizer):
    data = PromptDataset.from_config(DEFAULTS, tokenizer)
    assert data.steps_per_epoch * 16 <= len(data)
    seen = {prompt.uid for step in range(1, 71) for prompt in data.step_prompts(step)}
    assert len(seen) == 70 * 16
    val = load_prompts("val", DEFAULTS, tokenizer)
    train_questions = {prompt.messages for step in range(1, 129) for prompt in map(_hashable, data.step_prompts(step))}
    assert not train_questions & {_hashable(prompt).messages for prompt in val}


def _hashable(prompt):
    return Prompt(prompt.uid, tuple(m["content"] for m in prompt.messages), (), "", "")
