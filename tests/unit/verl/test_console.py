"""What the two consoles show, event by event."""

import io
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console as RichConsole

from agentlightning.types import Completion, Prompt
from agentlightning.verl.console import (
    LiveConsole,
    PlainConsole,
    StartInfo,
    Summary,
    clock,
    closing_lines,
    core_validation,
    make_console,
    sparkline,
    visible,
)

PROMPT = Prompt("train:3", ({"role": "user", "content": "2 boxes of [b]3[/b] pens?"},), (1,), "calculator", "6")
TURNS = (
    {"role": "assistant", "content": "<calc>2*3</calc>"},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "6"},
)
COMPLETION = Completion(
    "train:3", 0, np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool), np.zeros(1, dtype=np.float32), TURNS, "stop", 0
)
INFO = StartInfo("agentlightning / tiny", 1, 40, ["model base"], ["gen", "update_actor"])


class Clock:
    """`time.monotonic` under the test's hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(time, "monotonic", ticking)
    return ticking


def panel_text(console: LiveConsole, width: int = 100) -> str:
    rich = RichConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with rich.capture() as capture:
        rich.print(console.panel())
    return capture.get()


def live(width: int = 100) -> tuple[LiveConsole, io.StringIO]:
    stream = io.StringIO()
    return LiveConsole(RichConsole(file=stream, width=width, force_terminal=True, color_system=None)), stream


def test_plain_says_one_line_a_step(ticking: Clock) -> None:
    stream = io.StringIO()
    with PlainConsole(stream) as console:
        console.start(INFO)
        for step in (1, 2):
            console.phase("gen")
            ticking.now += 1.5
            console.tokens("gen", 3000, 0.5)
            console.checkpoint(Path(f"run/global_step_{step}"), 0.02)
            console.step_done(step, {"critic/score/mean": 0.25 * step})
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["agentlightning / tiny", "  model base"]
    assert lines[2:] == [
        "step 1/40  reward 0.250  1.50 s  gen 6,000 tok/s  saved in 0.02 s  0:58 left",
        "step 2/40  reward 0.500  1.50 s  gen 6,000 tok/s  saved in 0.02 s  0:57 left",
    ]


def test_plain_mentions_a_validation_and_no_save_that_did_not_happen(ticking: Clock) -> None:
    stream = io.StringIO()
    console = PlainConsole(stream)
    console.start(INFO)
    console.checkpoint(Path("run/global_step_1"), 0.02)
    console.step_done(1, {"critic/score/mean": 0.1})
    console.step_done(2, {"critic/score/mean": 0.1, "val-core/calculator/reward/mean@1": 0.75})
    first, second = stream.getvalue().splitlines()[-2:]
    assert "saved in 0.02 s" in first
    assert "saved" not in second
    assert second.endswith("val calculator/reward/mean@1 0.750")


def test_plain_shows_a_rollout_in_full_and_leaves_the_models_brackets_alone() -> None:
    stream = io.StringIO()
    PlainConsole(stream).rollout(PROMPT, COMPLETION, 1.0)
    shown = stream.getvalue()
    assert "rollout of train:3: reward 1, 2 turns, ended by stop" in shown
    for message in (*PROMPT.messages, *TURNS):
        assert message["content"] in shown


def test_live_panel_shows_phase_progress_reward_speed_time_left_and_checkpoint(ticking: Clock) -> None:
    console, _ = live()
    with console:
        console.start(INFO)
        for step in range(1, 11):
            ticking.now += 2.0
            console.tokens("gen", 5000, 0.25)
            console.step_done(step, {"critic/score/mean": step / 10, "val-core/calculator/reward/mean@1": 0.5})
        console.checkpoint(Path("run/global_step_10"), 0.03)
        console.phase("update_actor")
        ticking.now += 4.0
        text = panel_text(console)
    assert "agentlightning / tiny · step 10/40" in text
    assert "gen > update_actor 4 s" in text
    assert "1.000  ▁▂▃▃▄▅▆▆▇█" in text
    assert "calculator/reward/mean@1 0.500 (step 10)" in text
    assert "gen 20,000" in text
    assert "0:24 elapsed · 1:00 left" in text
    assert "global_step_10 · 0.03 s · 4 s ago" in text


def test_a_phase_that_had_nothing_to_do_shows_no_speed() -> None:
    console, _ = live()
    with console:
        console.start(INFO)
        console.tokens("old_log_prob", 5000, 1e-6)
        console.tokens("gen", 5000, 0.5)
        text = panel_text(console)
    assert "gen 10,000" in text
    assert "old_log_prob" not in text


def test_live_panel_fits_a_narrow_terminal() -> None:
    console, _ = live()
    with console:
        console.start(INFO)
        console.step_done(1, {"critic/score/mean": 0.5})
        assert all(len(line) <= 50 for line in panel_text(console, width=50).splitlines())


def test_live_goes_on_with_the_curve_of_a_resumed_run() -> None:
    console, _ = live()
    with console:
        console.start(StartInfo("t", 4, 10, past_scores=[0.1, 0.2, 0.3]))
        text = panel_text(console)
    assert "step 3/10" in text
    assert sparkline([0.1, 0.2, 0.3]) in text


def die_under(console: LiveConsole) -> None:
    with console:
        console.start(INFO)
        raise RuntimeError("died")


def test_live_gives_the_cursor_back_when_the_run_dies() -> None:
    console, stream = live()
    with pytest.raises(RuntimeError, match="died"):
        die_under(console)
    shown = stream.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_live_prints_model_text_as_it_is() -> None:
    console, stream = live()
    with console:
        console.start(INFO)
        console.rollout(PROMPT, COMPLETION, 0.0)
        console.warning("see [the log]")
    assert "2 boxes of [b]3[/b] pens?" in stream.getvalue()
    assert "see [the log]" in stream.getvalue()


WILD = replace(COMPLETION, turns=({"role": "assistant", "content": "<calc>85\x17-64</calc>\x1b[2J\x9b\r\ud800 5\u00a0€"},))
SPELLED = "<calc>85\\x17-64</calc>\\x1b[2J\\x9b\\r\\ud800 5\u00a0€"


def test_plain_spells_out_the_control_characters_a_model_samples() -> None:
    stream = io.StringIO()
    PlainConsole(stream).rollout(PROMPT, WILD, 0.0)
    assert SPELLED in stream.getvalue()


def test_live_spells_out_the_control_characters_a_model_samples() -> None:
    console, stream = live()
    console.rollout(PROMPT, WILD, 0.0)
    assert SPELLED in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_plain_keeps_lines_and_tabs_of_a_message() -> None:
    assert visible("a\n\tb") == "a\n\tb"


def test_a_stream_that_cannot_spell_a_letter_does_not_end_the_run() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    PlainConsole(stream).note("5 €")
    stream.seek(0)
    assert stream.read() == "5 \\u20ac\n"


def test_live_does_not_break_a_command_in_two() -> None:
    console, stream = live(width=40)
    with console:
        console.done(summary())
    assert "trainer.seed=2 trainer.experiment_name=tiny-seed2" in stream.getvalue()


def test_a_pipe_gets_plain_lines_and_a_terminal_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_console(io.StringIO()), PlainConsole)

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    assert isinstance(make_console(Terminal()), LiveConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_console(Terminal()), PlainConsole)


def summary(**changes: object) -> Summary:
    values: dict[str, object] = {
        "run_dir": Path("/runs/tiny"),
        "step": 70,
        "total_steps": 70,
        "finished": True,
        "seconds": 61.0,
        "scores": [0.1] * 10 + [0.9] * 10,
        "overrides": ["trainer.seed=1", "data.train_files=[a.jsonl,b.jsonl]"],
        "model_path": "/base",
        "seed": 1,
        "experiment_name": "tiny",
        "picture": Path("/runs/tiny/reward.png"),
        "adapter": Path("/runs/tiny/global_step_70/actor"),
        "val": {"val-core/calculator/reward/mean@1": 0.97, "val-core/calculator/reward/best@4": 1.0},
    }
    return Summary(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_a_finished_run_says_where_everything_lies_and_what_to_run_next() -> None:
    text = "\n".join(closing_lines(summary()))
    assert "finished at step 70 of 70, 1:01 after its start" in text
    assert "0.100 over the first 10 steps, 0.900 over the last 10" in text
    assert "calculator/reward/mean@1 0.970" in text
    assert "/runs/tiny/reward.png" in text
    base = "python -m agentlightning.verl"
    assert f"{base} trainer.seed=1 'data.train_files=[a.jsonl,b.jsonl]' trainer.total_training_steps=140" in text
    assert f"{base} 'data.train_files=[a.jsonl,b.jsonl]' trainer.seed=2 trainer.experiment_name=tiny-seed2" in text
    assert "PeftModel.from_pretrained(base, '/runs/tiny/global_step_70/actor')" in text


def test_a_stopped_run_says_how_to_go_on_and_nothing_else() -> None:
    lines = closing_lines(summary(step=12, finished=False, scores=[], val={}))
    assert lines[0] == "stopped at step 12 of 70, 1:01 after its start"
    assert lines[-1].endswith("python -m agentlightning.verl trainer.seed=1 'data.train_files=[a.jsonl,b.jsonl]'")
    assert not [line for line in lines if "another seed" in line or "reward  " in line]


def test_another_seed_gets_another_directory_even_where_the_command_named_one() -> None:
    again = summary(
        overrides=["trainer.default_local_dir=/runs/x-seed2/", "trainer.seed=2"], seed=2, experiment_name="tiny-seed2"
    )
    [line] = [line for line in closing_lines(again) if "another seed" in line]
    assert "trainer.seed=3 trainer.experiment_name=tiny-seed3 trainer.default_local_dir=/runs/x-seed3" in line


def test_paths_below_the_working_directory_are_shown_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n".join(closing_lines(summary(run_dir=Path(os.getcwd()) / "checkpoints" / "tiny")))
    assert "run directory  checkpoints/tiny" in text


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([0.0, 1.0], 5, "▁█"),
        ([3.0, 3.0], 5, "▁▁"),
        ([0, 0, 1, 1, 2, 2], 3, "▁▅█"),
        ([0, 7], 1, "▁"),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "0:00"), (75, "1:15"), (3675, "1:01:15")])
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


def test_core_validation_is_empty_without_one() -> None:
    assert core_validation({"critic/score/mean": 1.0, "val-aux/x/reward/mean@1": 1.0}) == ""


def test_a_reader_that_has_gone_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = PlainConsole(Gone())
    console.note("nobody reads this")
    console.warning("nor this")
