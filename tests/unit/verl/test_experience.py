"""What a step trains on: dynamic sampling fills the batch with prompts that teach; a position is all one must know."""

import contextlib
import re

import numpy as np
import pytest

from agentlightning.errors import RewardError
from agentlightning.types import Completion, Prompt
from agentlightning.verl.config import load_config
from agentlightning.verl.data import PromptDataset
from agentlightning.verl.experience import Collector, generations
from agentlightning.verl.rewards import RewardResult

N = 2


def prompt(row: int) -> Prompt:
    return Prompt(f"train:{row}", ({"role": "user", "content": f"problem {row}"},), (1, 2), "sums", str(row))


def row_of(uid: str) -> int:
    return int(re.fullmatch(r"train:(\d+)(#\d+)?", uid)[1])


class Model:
    """Answers with tokens and scores that a test can foresee: `teaches(row)` says whether a prompt's samples differ."""

    def __init__(self, teaches=lambda row: True, stop_reason="stop", masked=lambda row: False, extra=True):
        self.teaches, self.stop_reason, self.masked, self.extra = teaches, stop_reason, masked, extra
        self.asked: list[list[str]] = []

    def generate(self, prompts, sampling, journal):
        self.asked.append([p.uid for p in prompts])
        n, greedy = sampling.n, sampling.temperature == 0
        return [
            Completion(
                uid=p.uid,
                sample_index=-1 if greedy else i,
                token_ids=np.full(3 + i, 7, np.int32),
                mask=np.ones(3 + i, bool),
                logprobs=np.zeros(3 + i, np.float32),
                turns=({"role": "assistant", "content": f"answer {i}"},),
                stop_reason=self.stop_reason,
                adapter_version=0,
            )
            for p in prompts
            for i in range(n)
        ]

    def score(self, prompts, completions):
        score = [0.5 if c.sample_index < 0 else float(c.sample_index * self.teaches(row_of(c.uid))) for c in completions]
        masked_B = np.array([self.masked(row_of(c.uid)) for c in completions])
        return RewardResult(
            score_B=np.array(score, np.float32),
            extra={"acc": [float(c.sample_index) for c in completions]} if self.extra else {},
            components={},
            failed_B=masked_B,
            masked_B=masked_B,
            warnings=("one warning",) if masked_B.any() else (),
        )


def collector(model: Model, *overrides: str, rows: int = 40, batch: int = 4) -> Collector:
    config = load_config([f"data.train_batch_size={batch}", f"actor_rollout_ref.rollout.n={N}", *overrides])
    data = PromptDataset([prompt(row) for row in range(rows)], batch, shuffle=False, seed=0)
    return Collector(config, data, model.generate, model.score)


def collect(made: Collector, position: int = 0):
    return made.collect(position, None, lambda name: contextlib.nullcontext())


FILTER = "algorithm.filter_groups.enable=true"


def test_without_a_filter_a_step_is_one_batch():
    model = Model(teaches=lambda row: False)
    got = collect(collector(model), position=8)
    assert [row_of(p.uid) for p in got.prompts] == [8, 9, 10, 11]
    assert got.position == 12
    assert len(got.completions) == 8
    assert got.metrics == {"reward/acc/mean": 0.5}


def test_prompts_that_teach_nothing_are_replaced_and_the_position_says_how_far_one_has_come():
    model = Model(teaches=lambda row: row % 3 == 0)
    made = collector(model, FILTER)
    first = collect(made)
    assert [row_of(p.uid) for p in first.prompts] == [0, 3, 6, 9]
    assert [[row_of(uid) for uid in asked] for asked in model.asked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert first.position == 1 + 9
    assert first.metrics["training/num_gen_batches"] == len(model.asked)
    assert first.metrics["training/filtered_prompts"] == 6
    second = collect(made, first.position)
    assert [row_of(p.uid) for p in second.prompts] == [12, 15, 18, 21]
    # A start that knows the position alone draws the same.
    assert collect(collector(Model(teaches=lambda row: row % 3 == 0), FILTER), first.position).prompts == second.prompts


def test_rows_of_the_groups_stay_together():
    got = collect(collector(Model(teaches=lambda row: row % 2 == 1), FILTER))
    assert [c.uid for c in got.completions] == [p.uid for p in got.prompts for _ in range(N)]
    assert got.score_B.tolist() == [0, 1] * 4
    assert got.rewards.extra["acc"] == [0, 1] * 4


def test_a_limit_of_batches_fills_up_with_what_was_drawn_and_says_so():
    model = Model(teaches=lambda row: row == 2)
    got = collect(collector(model, FILTER, "algorithm.filter_groups.max_num_gen_batches=3"))
    assert len(model.asked) == 3
    assert [row_of(p.uid) for p in got.prompts] == [2, 0, 1, 3]
    assert "3 of 4 prompts of this step are some whose samples all score alike, as 11 of 12 drawn" in got.rewards.warnings[-1]
    assert "max_num_gen_batches=3" in got.rewards.warnings[-1]


def test_data_in_which_nothing_teaches_end_without_a_limit_too():
    model = Model(teaches=lambda row: False)
    got = collect(collector(model, FILTER, "algorithm.filter_groups.max_num_gen_batches=0", rows=10))
    assert len(got.prompts) == 4
    assert len(model.asked) < 10


def test_a_row_that_comes_again_in_a_step_has_samples_of_its_own():
    got = collect(collector(Model(teaches=lambda row: row == 1), FILTER, rows=4))
    assert [p.uid for p in got.prompts[:3]] == ["train:1", "train:1#2", "train:1#3"]


def test_the_metric_may_be_another_number_of_the_reward_function():
    got = collect(collector(Model(teaches=lambda row: False), FILTER, "algorithm.filter_groups.metric=acc"))
    assert [row_of(p.uid) for p in got.prompts] == [0, 1, 2, 3]
    with pytest.raises(RewardError, match=r"filter_groups.metric: given 'acc'.*nothing beside the score"):
        collect(collector(Model(extra=False), FILTER, "algorithm.filter_groups.metric=acc"))


def test_overlong_answers_are_punished_or_left_out():
    buffer = "reward.overlong_buffer={enable: true, len: 4, penalty_factor: 0.8}"
    got = collect(collector(Model(), buffer, "data.max_response_length=5", "actor_rollout_ref.rollout.stop=[]"))
    # Three tokens are two of the four behind the expected length of one, four are three.
    assert got.score_B.tolist() == pytest.approx([0 - 0.4, 1 - 0.6] * 4)
    assert got.rewards.score_B.tolist() == [0, 1] * 4
    assert got.metrics["reward/overlong/mean"] == pytest.approx(-0.5)
    assert not got.left_out_B.any()
    cut = collect(collector(Model(stop_reason="length"), "algorithm.overlong_filtering=true"))
    assert cut.left_out_B.all()
    assert cut.metrics["training/samples_left_out"] == 1.0


def test_samples_without_a_reward_are_left_out_and_told():
    got = collect(collector(Model(masked=lambda row: row == 1)))
    assert got.left_out_B.tolist() == [False, False, True, True, False, False, False, False]
    assert got.details.scored_B.tolist() == [True, True, False, False, True, True, True, True]
    assert got.metrics["reward/failed"] == 0.25
    assert got.rewards.warnings == ("one warning",)


class Judge(Model):
    """Scores by (row, sample): `None` where there is no reward; the sample of a greedy answer is -1. Reports `acc` where there
    is one."""

    def __init__(self, scores, on_error="mask", **more):
        super().__init__(**more)
        self.scores, self.on_error = scores, on_error

    def score(self, prompts, completions):
        found = [self.scores.get((row_of(c.uid), c.sample_index), float(c.sample_index)) for c in completions]
        failed_B = np.array([score is None for score in found])
        return RewardResult(
            score_B=np.array([score or 0.0 for score in found], np.float32),
            extra={} if failed_B.all() else {"acc": [score or 0.0 for score in found]},
            components={},
            failed_B=failed_B,
            masked_B=failed_B if self.on_error == "mask" else np.zeros_like(failed_B),
            warnings=(f"{int(failed_B.sum())} failed",) if failed_B.any() else (),
        )


def test_a_sample_without_a_reward_makes_no_prompt_informative():
    # Rows 0 and 1 each have one score and one failure; the failure's 0 is no score to differ from.
    got = collect(collector(Judge({(0, 0): None, (0, 1): 1.0, (1, 0): 1.0, (1, 1): None}), FILTER))
    assert [row_of(p.uid) for p in got.prompts] == [2, 3, 4, 5]
    zero = collect(collector(Judge({(0, 0): None, (0, 1): 1.0}, on_error="zero"), FILTER))
    assert [row_of(p.uid) for p in zero.prompts] == [0, 1, 2, 3]


def test_a_prompt_whose_answers_were_all_cut_is_replaced_where_those_are_not_trained_on():
    limit = "algorithm.filter_groups.max_num_gen_batches=2"
    model = Model(stop_reason="length")
    assert collect(collector(model, FILTER, limit)).metrics["training/filtered_prompts"] == 0
    filtered = collect(collector(model, FILTER, limit, "algorithm.overlong_filtering=true"))
    assert filtered.metrics["training/filtered_prompts"] == 4


def test_a_round_without_any_reward_does_not_end_a_run_that_goes_on_without():
    failing = Judge({(row, i): None for row in range(4) for i in range(N)}, on_error="zero")
    got = collect(collector(failing, FILTER, "algorithm.filter_groups.metric=acc"))
    assert [row_of(p.uid) for p in got.prompts] == [4, 5, 6, 7]


def test_a_metric_that_is_no_number_names_the_sample():
    with pytest.raises(RewardError, match=r"acc=nan for sample 1 of train:2.*metric=score"):
        collect(collector(Judge({(2, 1): float("nan")}), FILTER, "algorithm.filter_groups.metric=acc"))


REMAX = "algorithm.adv_estimator=remax"


def test_remax_leaves_out_the_samples_of_a_prompt_whose_greedy_answer_has_no_reward():
    got = collect(collector(Judge({(1, -1): None, (2, 0): None}), REMAX))
    assert got.left_out_B.tolist() == [False, False, True, True, True, False, False, False]
    assert got.details.scored_B.tolist() == [True, True, False, False, False, True, True, True]
    assert got.rewards.warnings == ("1 failed",)


def test_remax_s_baseline_pays_for_long_answers_as_the_samples_do():
    buffer = "reward.overlong_buffer={enable: true, len: 4, penalty_factor: 0.8}"
    got = collect(collector(Model(), REMAX, buffer, "data.max_response_length=5"))
    # The greedy answer and the first sample have three tokens, two of the four that cost.
    assert got.details.baseline_B.tolist() == pytest.approx([0.5 - 0.4] * 8)


def test_remax_asks_for_one_greedy_answer_a_prompt():
    model = Model()
    got = collect(collector(model, "algorithm.adv_estimator=remax"))
    assert len(model.asked) == 2
    assert got.details.baseline_B.tolist() == [0.5] * 8
    assert got.metrics["reward/greedy/mean"] == 0.5


def test_generations_are_what_people_read():
    got = collect(collector(Model()))
    shown = generations(got.prompts, got.completions, got.rewards)
    assert len(shown) == 8
    assert (shown[3].input, shown[3].output, shown[3].ground_truth, shown[3].score) == ("problem 1", "answer 1", "1", 1.0)
    assert shown[3].extra == {"acc": 1.0}
