"""What the names in data.train_files stand for, and files too large to be read at once."""

import json
import tracemalloc
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentlightning.errors import ConfigError, DataError
from agentlightning.verl import data as data_module
from agentlightning.verl import data_files
from agentlightning.verl.config import load_config
from agentlightning.verl.data import PromptDataset, load_prompts, load_rows
from agentlightning.verl.data_formats import JsonLines, content_digest

DEFAULTS = load_config().data


@pytest.fixture(scope="module")
def tokenizer(base_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture
def lazily(monkeypatch):
    """More than ten rows are a large file."""
    monkeypatch.setattr(data_module, "SMALL", 10)


def _row(i, source="sums", question=None):
    return {
        "prompt": [{"role": "user", "content": question or f"{i}+1?"}],
        "data_source": source,
        "reward_model": {"ground_truth": str(i + 1)},
    }


def _rows(count, start=0, source="sums"):
    return [_row(i, source) for i in range(start, start + count)]


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _parquet(path, rows, group=7):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def _data(**changes):
    return DEFAULTS.model_copy(update={"train_batch_size": 4} | changes)


def _dataset(tokenizer, **changes):
    return PromptDataset.from_config(_data(**changes), tokenizer)


def _answers(rows):
    return [int(row.values["reward_model"]["ground_truth"]) - 1 for row in rows]


class TestNames:
    def test_files_of_all_kinds_patterns_and_directories_are_one_list(self, tmp_path):
        (tmp_path / "many").mkdir()
        (tmp_path / "many" / "README.md").write_text("not data")
        names = (
            _jsonl(tmp_path / "a.jsonl", _rows(2)),
            _parquet(tmp_path / "b.parquet", _rows(2, 2)),
            str(tmp_path / "many"),
            str(tmp_path / "part-*.jsonl"),
        )
        _jsonl(tmp_path / "many" / "2.jsonl", _rows(1, 5))
        _parquet(tmp_path / "many" / "1.parquet", _rows(1, 4))
        _jsonl(tmp_path / "part-1.jsonl", _rows(1, 7))
        _jsonl(tmp_path / "part-0.jsonl", _rows(1, 6))
        assert _answers(load_rows(names, "data.train_files")) == list(range(8))

    def test_a_dataset_saved_by_datasets(self, tmp_path):
        from datasets import Dataset, DatasetDict

        rows = _rows(25)
        Dataset.from_list(rows).save_to_disk(tmp_path / "one", num_shards=2)
        assert [row.values for row in load_rows(str(tmp_path / "one"), "data.train_files")] == rows
        DatasetDict(train=Dataset.from_list(rows[5:]), test=Dataset.from_list(rows[:5])).save_to_disk(tmp_path / "two")
        assert _answers(load_rows(str(tmp_path / "two" / "train"), "data.train_files")) == list(range(5, 25))
        with pytest.raises(DataError, match=r"two holds the splits test, train; expected one .* mend it with .*/two/test"):
            load_rows(str(tmp_path / "two"), "data.train_files")

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            ('{"_data_files": [{"filename": "../a.arrow"}]}', "names '../a.arrow', which is no file in"),
            ('{"_data_files": [{"filename": "b.arrow"}]}', "names 'b.arrow', which is no file in"),
            ("[]", "is not the state of a saved dataset (TypeError"),
            ("{", "is not the state of a saved dataset (JSONDecodeError"),
        ],
    )
    def test_a_saved_dataset_that_is_damaged_or_leads_outside(self, state, words, tmp_path):
        (tmp_path / "a.arrow").write_bytes(b"")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "state.json").write_text(state)
        with pytest.raises(DataError) as error:
            load_rows(str(tmp_path / "d"), "data.train_files")
        assert words in str(error.value)
        assert "mend it with data.train_files=" in str(error.value)

    def test_directories_of_nothing_and_of_several_splits(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no \.jsonl or \.parquet file"):
            load_rows(str(tmp_path), "data.train_files")
        for name in ("train-0.jsonl", "test-0.jsonl"):
            _jsonl(tmp_path / name, _rows(1))
        with pytest.raises(DataError, match=r"several splits \(test, train\).*mend it with 'data\.train_files=.*/train\*'"):
            load_rows(str(tmp_path), "data.train_files")
        assert len(load_rows(f"{tmp_path}/train*", "data.train_files")) == 1

    def test_a_damaged_arrow_file(self, tmp_path):
        (tmp_path / "a.arrow").write_bytes(b"no arrow file at all")
        with pytest.raises(DataError, match=r"a\.arrow cannot be read as arrow"):
            load_rows(str(tmp_path / "a.arrow"), "data.train_files")


class TestLargeFiles:
    @pytest.fixture
    def names(self, tmp_path):
        """Sixty rows in three kinds of file."""
        table = pa.Table.from_pylist(_rows(20, 40))
        with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
        return (
            _jsonl(tmp_path / "a.jsonl", _rows(20)),
            _parquet(tmp_path / "b.parquet", _rows(20, 20)),
            str(tmp_path / "c.arrow"),
        )

    def _uids(self, data, steps=15):
        return [[prompt.uid for prompt in data.step_prompts(step)] for step in range(1, steps + 1)]

    def test_are_the_prompts_and_the_order_of_small_ones(self, names, tokenizer, monkeypatch):
        whole = _dataset(tokenizer, train_files=names)
        monkeypatch.setattr(data_module, "SMALL", 59)
        lazy = _dataset(tokenizer, train_files=names)
        for step in range(1, 20):
            assert lazy.step_prompts(step) == whole.step_prompts(step)
        assert (len(lazy), lazy.steps_per_epoch) == (60, 15)
        assert whole.fingerprint() != lazy.fingerprint()

    def test_of_groups_that_cannot_be_held_each_is_read_about_once_an_epoch(self, names, tokenizer, lazily, monkeypatch):
        files = data_files.open_files(names, "data.train_files")
        group = int(files.blocks()[1].max())
        monkeypatch.setattr(data_files, "GROUP_MEMORY", group)
        read = []
        monkeypatch.setattr(
            data_files.ParquetRows,
            "read_group",
            lambda file, group, original=data_files.ParquetRows.read_group: read.append(group) or original(file, group),
        )
        data = _dataset(tokenizer, train_files=names, train_batch_size=1)
        before = len(read)
        uids = [uid for step in self._uids(data, 60) for uid in step]
        assert sorted(uids) == sorted(f"train:{i}" for i in range(60))
        assert sorted(read[before:]) in ([0, 1, 2], [1, 2])  # the first rows' group may still be held

    def test_train_max_samples_ends_within_a_file(self, names, tokenizer, lazily):
        for count in (13, 27, 41):
            data = _dataset(tokenizer, train_files=names, train_max_samples=count, train_batch_size=1)
            assert sorted(uid for step in self._uids(data, count) for uid in step) == sorted(f"train:{i}" for i in range(count))

    def test_a_wrong_row_is_named_when_its_turn_comes(self, tmp_path, tokenizer, lazily):
        lines = [json.dumps(row) for row in _rows(300)]
        lines[290:291] = ["", "   ", '{"prompt": ']
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        data = _dataset(tokenizer, train_files=str(tmp_path / "a.jsonl"), shuffle=False, train_batch_size=10)
        assert data.prompts_at(299, 1)[0].ground_truth == "300"
        data.step_prompts(29)
        with pytest.raises(DataError, match=r"a\.jsonl, line 293: not JSON"):
            data.step_prompts(30)

    def test_a_wrong_first_row_of_any_file_is_named_at_the_start(self, tmp_path, tokenizer, lazily):
        names = (_jsonl(tmp_path / "a.jsonl", _rows(20)), _jsonl(tmp_path / "b.jsonl", [{"prompt": "?"}]))
        with pytest.raises(DataError, match=r"b\.jsonl, line 1: column 'prompt' is '\?'"):
            _dataset(tokenizer, train_files=names)

    def test_an_overlong_prompt_is_an_error_a_cut_or_another_row_s_place(self, tmp_path, tokenizer, lazily, monkeypatch):
        monkeypatch.setattr("agentlightning.verl.data_store._CHECKED_FIRST", 1)
        rows = [_row(i, question="x" * 40 if i % 3 == 1 else f"{i:02}") for i in range(30)]
        common = {"train_files": _jsonl(tmp_path / "a.jsonl", rows), "train_batch_size": 10}
        limit = len(load_prompts("train", _data(**common, train_max_samples=1), tokenizer)[0].token_ids)
        common |= {"max_prompt_length": limit}
        with pytest.raises(DataError, match=r"a\.jsonl, line \d+: the prompt has \d+ tokens, .*filter_overlong_prompts=true"):
            _dataset(tokenizer, **common).step_prompts(1)
        cut = _dataset(tokenizer, **common, truncation="left")
        assert {len(prompt.token_ids) for prompt in cut.step_prompts(1)} == {limit}
        filtered = _dataset(tokenizer, **common, filter_overlong_prompts=True)
        steps = self._uids(filtered, 3)
        assert all(int(uid.partition("#")[0][6:]) % 3 != 1 for step in steps for uid in step)
        assert steps == self._uids(_dataset(tokenizer, **common, filter_overlong_prompts=True), 3)
        whole = self._uids(_dataset(tokenizer, **common | {"max_prompt_length": 99}), 3)
        kept = [(a, b) for a, b in zip(chain(*whole), chain(*steps), strict=True) if int(a[6:]) % 3 != 1]
        assert all(b.partition("#")[0] == a for a, b in kept)

    def test_nothing_but_overlong_prompts(self, tmp_path, tokenizer, lazily):
        files = _jsonl(tmp_path / "a.jsonl", _rows(20))
        data = _dataset(tokenizer, train_files=files, max_prompt_length=1, filter_overlong_prompts=True)
        with pytest.raises(DataError, match=r"100 rows drawn for position \d+ are all longer.*mend it with"):
            data.step_prompts(1)

    def test_a_file_that_changes_under_the_run_is_refused_and_one_that_is_touched_is_not(self, tmp_path, tokenizer, lazily):
        path = tmp_path / "a.jsonl"
        data = _dataset(tokenizer, train_files=_jsonl(path, _rows(20)))
        first = data.step_prompts(1)
        path.write_bytes(path.read_bytes())
        assert data.step_prompts(1) == first
        _jsonl(path, _rows(20, 1))
        with pytest.raises(DataError, match=r"a\.jsonl has changed while the run was reading it"):
            data.step_prompts(1)

    def test_the_fingerprint_sees_content_and_not_names(self, tmp_path, tokenizer, lazily):
        def fingerprint(name, rows, **more):
            return _dataset(tokenizer, train_files=_jsonl(tmp_path / name, rows), **more).fingerprint()

        same = fingerprint("a.jsonl", _rows(20))
        assert same == fingerprint("b.jsonl", _rows(20), shuffle=False, train_batch_size=2, max_prompt_length=99)
        others = [
            fingerprint("a.jsonl", [*_rows(19), _row(20)]),
            fingerprint("a.jsonl", _rows(20)[::-1]),
            fingerprint("a.jsonl", _rows(20), train_max_samples=15),
            fingerprint("a.jsonl", _rows(20), truncation="left"),
        ]
        assert len({same, *others}) == 5

    def test_two_hundred_thousand_rows_take_little_memory(self, tmp_path, tokenizer):
        line = json.dumps(_row(0)) + "\n"
        count = 200_000
        (tmp_path / "a.jsonl").write_text(line * count)
        tracemalloc.start()
        try:
            data = _dataset(tokenizer, train_files=str(tmp_path / "a.jsonl"), train_batch_size=64)
            data.step_prompts(1)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(data) == count
        assert kept < 2e6  # bytes; the file has 24 million


def test_the_index_of_lines_knows_blank_lines_and_a_last_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("agentlightning.verl.data_formats._CHUNK", 100)
    rng = np.random.default_rng(1)
    lines = [rng.choice(["", "  ", "\t", " {} ", '{"a": "' + "x" * int(rng.integers(300)) + '"}', "{}\r"]) for _ in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join([*lines, "{}"]).encode())
    expected = [(f"{path}, line {i}", json.loads(line)) for i, line in enumerate([*lines, "{}"], start=1) if line.strip()]
    file = JsonLines(path, "data.train_files")
    assert len(file) == len(expected)
    assert [(row.where, row.values) for row in file.rows(0, len(file))] == expected
    assert [file.rows(i, i + 1)[0].where for i in range(len(file))] == [where for where, _ in expected]
    assert [row.where for row in file.rows(37, 61)] == [where for where, _ in expected[37:61]]


def test_the_digest_of_a_very_large_file_samples_it(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    whole = content_digest(path)
    monkeypatch.setattr("agentlightning.verl.data_formats._HASHED_WHOLE", 999)
    monkeypatch.setattr("agentlightning.verl.data_formats._SAMPLE", 10)
    sampled = content_digest(path)
    assert sampled != whole
    path.write_bytes(bytes(999) + b"x")
    assert content_digest(path) != sampled
    path.write_bytes(bytes(1001))
    assert content_digest(path) != sampled


class TestMixture:
    @pytest.fixture
    def names(self, tmp_path):
        """Forty rows of a, twelve of b, four of c, which lie side by side."""
        rows = [_row(i, "c" if i % 14 == 0 else "b" if i % 14 in (3, 7, 11) else "a") for i in range(56)]
        return (_jsonl(tmp_path / "a.jsonl", rows[:30]), _parquet(tmp_path / "b.parquet", rows[30:]))

    @pytest.mark.parametrize("small", [10, 100])
    def test_every_step_holds_the_weights_proportions(self, small, names, tokenizer, monkeypatch):
        monkeypatch.setattr(data_module, "SMALL", small)
        data = _dataset(tokenizer, train_files=names, mixture={"b": 1.0, "a": 3.0, "c": 0.0}, train_batch_size=8)
        assert (len(data), data.steps_per_epoch) == (52, 6)
        for step in range(1, 12):
            sources = [prompt.data_source for prompt in data.step_prompts(step)]
            assert (sources.count("a"), sources.count("b")) == (6, 2)
        seen = [prompt.uid for step in range(1, 7) for prompt in data.step_prompts(step) if prompt.data_source == "b"]
        assert len(set(seen)) == 12
        turned = _dataset(tokenizer, train_files=names, mixture={"a": 6.0, "b": 2.0}, train_batch_size=8)
        assert turned.step_prompts(3) == data.step_prompts(3)

    def test_lazy_and_whole_mixtures_are_the_same(self, names, tokenizer, monkeypatch):
        mixture = {"a": 1.0, "b": 1.0, "c": 0.3}
        whole = _dataset(tokenizer, train_files=names, mixture=mixture)
        monkeypatch.setattr(data_module, "SMALL", 10)
        lazy = _dataset(tokenizer, train_files=names, mixture=mixture)
        assert all(lazy.step_prompts(step) == whole.step_prompts(step) for step in range(1, 30))

    def test_a_source_smaller_than_its_part_of_a_batch_comes_again(self, names, tokenizer):
        prompts = _dataset(tokenizer, train_files=names, mixture={"c": 1.0, "a": 1.0}, train_batch_size=20).step_prompts(1)
        assert len({prompt.uid for prompt in prompts}) == 20
        assert len({prompt.uid.partition("#")[0] for prompt in prompts if prompt.data_source == "c"}) == 4

    @pytest.mark.parametrize(
        ("mixture", "words"),
        [
            ({"d": 1.0}, ["a weight for 'd'", "they hold c, a, b", "'+data.mixture={c: 1}'"]),
            ({"a": 0.0}, ["expected a weight above 0", "hold c, a, b"]),
            ({"a": 1.0, "b": 1e-6}, ["the weight 1e-06 of 'b' is less than 1/4096"]),
        ],
    )
    @pytest.mark.parametrize("small", [10, 100])
    def test_unknown_sources_and_weights_of_nothing(self, small, mixture, words, names, tokenizer, monkeypatch):
        monkeypatch.setattr(data_module, "SMALL", small)
        with pytest.raises(ConfigError) as error:
            _dataset(tokenizer, train_files=names, mixture=mixture)
        for word in ["data.mixture: ", *words]:
            assert word in str(error.value)

    def test_a_source_of_nothing_but_overlong_prompts_is_empty(self, tmp_path, tokenizer):
        rows = [_row(i, "a", "x" * 40) if i == 1 else _row(i, "b") for i in range(6)]
        limit = len(load_prompts("train", _data(train_files=_jsonl(tmp_path / "a.jsonl", rows[2:])), tokenizer)[0].token_ids)
        with pytest.raises(ConfigError, match=r"a weight for 'a', of which the training files hold no usable row; they hold b"):
            _dataset(
                tokenizer,
                train_files=_jsonl(tmp_path / "a.jsonl", rows),
                mixture={"a": 1.0, "b": 1.0},
                filter_overlong_prompts=True,
                max_prompt_length=limit,
            )

    @pytest.mark.parametrize("write", [_jsonl, _parquet])
    def test_sources_that_are_not_text_and_rows_without_one(self, write, tmp_path, tokenizer, lazily):
        files = write(tmp_path / f"a.{'jsonl' if write is _jsonl else 'parquet'}", [_row(i, i % 2) for i in range(20)])
        data = _dataset(tokenizer, train_files=files, mixture={"0": 1.0})
        assert {prompt.data_source for prompt in data.step_prompts(1)} == {"0"}
        with pytest.raises(DataError, match="no column 'task'"):
            data_files.open_files(files, "data.train_files").sources("task")

    def test_a_row_without_a_source_far_behind_is_named(self, tmp_path):
        rows = _rows(40)
        del rows[33]["data_source"]
        with pytest.raises(DataError, match=r"a\.jsonl, line 34: no column 'data_source'"):
            data_files.open_files(_jsonl(tmp_path / "a.jsonl", rows), "data.train_files").sources("data_source")


class TestSampler:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "own_samplers.py").write_text(
            "import itertools, random, numpy\n"
            "def easy_first(seed, position, rows):\n    return min(position // 2, rows - 1)\n"
            "def drawn(seed, position, rows):\n"
            "    return numpy.int64(random.Random(f'{seed}:{position}').randrange(rows))\n"
            "def too_far(seed, position, rows):\n    return rows\n"
            "def no_number(seed, position, rows):\n    return 0.0\n"
            "def wrong_later(seed, position, rows):\n    return -1 if position > 9 else 0\n"
            "def fails(seed, position, rows):\n    return {}[position]\n"
            "counter = itertools.count()\n"
            "def impure(seed, position, rows):\n    return next(counter) % rows\n"
            "constant = 3\n"
        )
        (tmp_path / "broken_samplers.py").write_text("undefined_name\n")
        monkeypatch.syspath_prepend(tmp_path)
        self.files = _jsonl(tmp_path / "a.jsonl", _rows(12))

    def _data(self, tokenizer, name, **more):
        return _dataset(tokenizer, train_files=self.files, sampler=name, **more)

    @pytest.mark.parametrize("small", [10, 100])
    def test_names_the_rows(self, small, tokenizer, monkeypatch):
        monkeypatch.setattr(data_module, "SMALL", small)
        data = self._data(tokenizer, "own_samplers:easy_first")
        assert [prompt.uid for prompt in data.step_prompts(2)] == ["train:2", "train:2#2", "train:3", "train:3#2"]
        assert (len(data), data.steps_per_epoch) == (12, 3)
        drawn = [self._data(tokenizer, "own_samplers:drawn", seed=seed).step_prompts(3) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_counts_rows_that_are_too_long_and_gets_another_for_them(self, tmp_path, tokenizer):
        rows = [_row(i, question="x" * 40 if i == 1 else f"{i}") for i in range(6)]
        files = _jsonl(tmp_path / "b.jsonl", rows)
        limit = len(load_prompts("train", _data(train_files=files, train_max_samples=1), tokenizer)[0].token_ids)
        more = {"train_files": files, "filter_overlong_prompts": True, "max_prompt_length": limit}
        data = _dataset(tokenizer, sampler="own_samplers:easy_first", **more)
        uids = [prompt.uid for prompt in data.prompts_at(1, 4)]
        assert (uids[0], uids[3].partition("#")[0]) == ("train:0", "train:2")
        assert not {"train:1", "train:1#2"} & set(uids)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("nowhere_at_all:fn", ["cannot import nowhere_at_all: ModuleNotFoundError"]),
            ("broken_samplers:fn", ["cannot import broken_samplers: NameError"]),
            ("own_samplers:fn", ["no function 'fn'", "it has easy_first, drawn,"]),
            ("own_samplers:constant", ["no function 'constant'"]),
            ("own_samplers:too_far", ["position=0, rows=12) returned 12, expected a whole number from 0 to 11"]),
            ("own_samplers:no_number", ["returned 0.0, expected a whole number"]),
            ("own_samplers:fails", ["raised KeyError: 0"]),
            ("own_samplers:impure", ["row 0 for position 0 and row", "pure function of (seed, position, rows)"]),
        ],
    )
    def test_that_cannot_be_used(self, name, words, tokenizer):
        with pytest.raises(ConfigError) as error:
            self._data(tokenizer, name)
        for word in ["data.sampler: ", "data.sampler=", *words]:
            assert word in str(error.value)

    def test_that_goes_wrong_later(self, tokenizer):
        data = self._data(tokenizer, "own_samplers:wrong_later")
        data.step_prompts(2)
        with pytest.raises(ConfigError, match=r"position=10, rows=12\) returned -1"):
            data.step_prompts(3)

    def test_together_with_a_mixture(self, tokenizer):
        with pytest.raises(ConfigError, match=r"together with data\.mixture.*mend it with data\.sampler=null"):
            self._data(tokenizer, "own_samplers:drawn", mixture={"sums": 1.0})


def test_another_mixture_or_sampler_is_another_run():
    from agentlightning.verl.fingerprint import run_fingerprint

    overrides = ([], ["+data.mixture={eggs: 3, sums: 1}"], ["+data.mixture={sums: 1, eggs: 3.0}"], ["data.sampler=mod:fn"])
    plain, mixed, turned, sampled = (run_fingerprint(load_config(words), None)["breaking"] for words in overrides)
    assert "data.mixture" not in plain
    assert mixed["data.mixture"] == turned["data.mixture"] == {"eggs": 3.0, "sums": 1.0}
    assert sampled["data.sampler"] == "mod:fn"
