"""Journals of steps that are durable go away, and a run that never saves keeps a bounded number of them."""

from pathlib import Path

from agentlightning.verl.journals import StepJournals

RUN = {"actor_rollout_ref.model.path": "a", "data.train_files": "b"}


def made(tmp_path: Path, *steps: int) -> StepJournals:
    journals = StepJournals(tmp_path, "whole", RUN)
    for step in steps:
        spec = journals.of_step(step)
        assert spec is not None
        Path(spec.directory).mkdir()
        (Path(spec.directory) / "a.jsonl").write_text("x")
    return journals


def left(tmp_path: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in (tmp_path / "rollouts").iterdir()}


def test_durable_steps_are_forgotten(tmp_path):
    journals = made(tmp_path, 3, 4, 5)
    journals.forget(durable_step=4, step=5)
    assert left(tmp_path) == {"step_5"}


def test_a_run_that_never_saves_keeps_the_newest(tmp_path):
    journals = made(tmp_path, *range(1, 41))
    (tmp_path / "rollouts" / "step_notes").mkdir()  # somebody's own
    journals.forget(durable_step=0, step=40)
    assert left(tmp_path) == {"step_notes", *(f"step_{n}" for n in range(25, 41))}


def test_off_keeps_nothing(tmp_path):
    journals = StepJournals(tmp_path, "off", RUN)
    assert journals.of_step(1) is None
    journals.forget(0, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "rollouts").write_text("a file")
    journals = StepJournals(tmp_path, "whole", RUN)
    assert journals.of_step(1) is None
    journals.forget(0, 1)


def test_a_run_with_another_base_or_other_prompts_takes_nothing_over(tmp_path):
    def place(**other):
        spec = StepJournals(tmp_path, "whole", RUN | other).of_step(1)
        assert spec is not None
        return spec.directory

    assert place() == place()
    assert len({place(), place(**{"data.train_files": "c"}), place(**{"actor_rollout_ref.model.path": "c"})}) == 3
    Path(place(**{"data.train_files": "c"})).mkdir()
    StepJournals(tmp_path, "whole", RUN).forget(durable_step=1, step=1)
    assert left(tmp_path) == set()
