"""What a person sees of a run while it runs: a live panel on a terminal, one short line a step anywhere else.

The trainer reports events (a phase begins, a step is done, a checkpoint is committed); text leaves on one stream. Nothing is
computed here that anything else needs, so a run is the same whichever console watches it.
"""

from __future__ import annotations

import itertools
import os
import shlex
import statistics
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentlightning.types import Completion, Prompt
from agentlightning.verl.metrics import SCORE, VAL_CORE

COMMAND = "python -m agentlightning.verl"
_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 10  # steps that the time left is told from
_MEASURABLE_SECONDS = 0.01  # a phase that had nothing to do, or only arithmetic, has no speed worth showing
_SPARKLINE_WIDTH = 40
_LABEL_WIDTH = 11
_ROLE_STYLES = {"user": "cyan", "assistant": "green", "tool": "yellow"}


@dataclass(frozen=True, slots=True)
class StartInfo:
    """What is known when training starts. `first_step` is the next step to do, from 1; above 1 the run was resumed."""

    title: str  # "agentlightning / tiny"
    first_step: int
    total_steps: int
    lines: Sequence[str] = ()  # model, workers, derived sizes, run directory: printed once
    phases: Sequence[str] = ()  # the timers of a step, in order
    past_scores: Sequence[float] = ()  # mean rewards of the steps before a resume, for the curve


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. `finished` is False where it was stopped and the same command would go on."""

    run_dir: Path
    step: int
    total_steps: int
    finished: bool
    seconds: float  # of this session
    scores: Sequence[float]  # mean reward of every step so far
    overrides: Sequence[str]  # the words of the command line
    model_path: str
    seed: int
    experiment_name: str
    picture: Path | None = None
    adapter: Path | None = None  # PEFT's directory of the last checkpoint
    val: Mapping[str, float] = field(default_factory=dict)  # val-core/... of the last validation


class Console(Protocol):
    """What the trainer tells. Leaving the context gives the terminal back, whatever happened."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def start(self, info: StartInfo) -> None:
        """Training begins."""
        ...

    def phase(self, name: str) -> None:
        """The timer `name` runs now."""
        ...

    def tokens(self, phase: str, n: int, seconds: float) -> None:
        """A phase has worked on `n` tokens in `seconds`."""
        ...

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (from 1; 0 is the validation before training) is done and its metrics are logged."""
        ...

    def rollout(self, prompt: Prompt, completion: Completion, score: float) -> None:
        """One rollout to be shown in full."""
        ...

    def checkpoint(self, path: Path, seconds: float) -> None:
        """A checkpoint was committed at `path`; saving held the step up for `seconds`."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def warning(self, text: str) -> None:
        """Something that should not be overlooked."""
        ...

    def done(self, summary: Summary) -> None:
        """The run ends: say where everything lies and what to do next."""
        ...


def make_console(stream: TextIO | None = None) -> Console:
    """The live panel where `stream` (standard output) is a terminal that can show it, plain lines elsewhere."""
    out: TextIO = sys.stdout if stream is None else stream
    rich = RichConsole(file=out, highlight=False)
    can_draw = rich.is_terminal and not rich.is_dumb_terminal and not rich.options.ascii_only
    return LiveConsole(rich) if can_draw else PlainConsole(out)


def core_validation(metrics: Mapping[str, float]) -> str:
    """The `val-core/` means among `metrics`, such as `calculator/reward/mean@1 0.912`; empty where there are none."""
    means = [
        (key.removeprefix(VAL_CORE), value) for key, value in metrics.items() if key.startswith(VAL_CORE) and "/mean@" in key
    ]
    return ", ".join(f"{name} {value:.3f}" for name, value in means)


def visible(text: str) -> str:
    r"""`text` with its control characters spelled out (`\x17`), line ends and tabs left as they are: what a model samples must
    not reach the terminal as a command, and a reader should see why a tool refused it."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else c.encode("unicode_escape").decode() for c in text
    )


def sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH) -> str:
    """`values` as at most `width` small bars between their lowest and highest, neighbours averaged where they are more."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    means = [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / (high - low) * (len(_BARS) - 1)) if high > low else 0] for mean in means)


def clock(seconds: float) -> str:
    """`75` as `1:15`, `3675` as `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(slots=True)
class _View:
    """What both consoles remember of a run."""

    info: StartInfo = StartInfo("", 1, 0)
    step: int = 0
    phase: str = ""
    phase_since: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)  # tokens a second, by phase
    scores: list[float] = field(default_factory=list)
    validation: str = ""
    checkpoint: str = ""
    checkpoint_seconds: float = 0.0
    checkpoint_at: float = 0.0
    began: float = 0.0
    last_step_at: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def start(self, info: StartInfo) -> None:
        self.info, self.step, self.scores = info, info.first_step - 1, list(info.past_scores)
        self.began = self.last_step_at = time.monotonic()

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> float:
        """Returns the seconds since the step before."""
        now = time.monotonic()
        seconds, self.last_step_at = now - self.last_step_at, now
        if step > 0:
            self.recent.append(seconds)
        self.step = step
        if SCORE in metrics:
            self.scores.append(metrics[SCORE])
        validation = core_validation(metrics)
        if validation:
            self.validation = f"{validation} (step {step})"
        return seconds

    def add_rate(self, phase: str, n: int, seconds: float) -> None:
        if seconds >= _MEASURABLE_SECONDS:
            self.rates[phase] = n / seconds

    def save(self, path: Path, seconds: float) -> None:
        self.checkpoint, self.checkpoint_seconds, self.checkpoint_at = path.name, seconds, time.monotonic()

    def seconds_left(self) -> float | None:
        """None until a step has shown how long one takes."""
        # The median: one step with a validation, or the first one, should not move the estimate of all the others.
        return statistics.median(self.recent) * (self.info.total_steps - self.step) if self.recent else None


class PlainConsole:
    """A line an event, flushed at once: for pipes, files and a cluster's logs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.view = _View()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.flush()

    def start(self, info: StartInfo) -> None:
        """See `Console`."""
        self.view.start(info)
        self._write(info.title, *(f"  {line}" for line in info.lines))

    def phase(self, name: str) -> None:
        """Phases are too short for lines of their own."""

    def tokens(self, phase: str, n: int, seconds: float) -> None:
        """See `Console`."""
        self.view.add_rate(phase, n, seconds)

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Console`."""
        view = self.view
        seconds = view.finish_step(step, metrics)
        validation, left = core_validation(metrics), view.seconds_left()
        parts = [
            f"step {step}/{view.info.total_steps}",
            f"reward {metrics[SCORE]:.3f}" if SCORE in metrics else "",
            f"{seconds:.2f} s",
            *(f"{phase} {view.rates[phase]:,.0f} tok/s" for phase in ("gen", "update_actor") if phase in view.rates),
            f"saved in {view.checkpoint_seconds:.2f} s" if view.checkpoint else "",
            f"{clock(left)} left" if left else "",
            f"val {validation}" if validation else "",
        ]
        view.checkpoint = ""
        self._write("  ".join(part for part in parts if part))

    def rollout(self, prompt: Prompt, completion: Completion, score: float) -> None:
        """See `Console`."""
        self._write(_rollout_title(prompt, completion, score))
        for role, text in _turns(prompt, completion):
            indented = text.replace("\n", "\n" + " " * (_LABEL_WIDTH + 2))
            self._write(f"  {role:<{_LABEL_WIDTH}}{indented}")

    def checkpoint(self, path: Path, seconds: float) -> None:
        """Goes into the step's line."""
        self.view.save(path, seconds)

    def note(self, text: str) -> None:
        """See `Console`."""
        self._write(text)

    def warning(self, text: str) -> None:
        """See `Console`."""
        self._write(f"warning: {text}")

    def done(self, summary: Summary) -> None:
        """See `Console`."""
        self._write(*closing_lines(summary))

    def _write(self, *lines: str) -> None:
        # A letter that the stream cannot spell is no reason to end a run.
        encoding = self.stream.encoding or "utf-8"
        text = "".join(f"{line}\n" for line in lines)
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except OSError:
            # Whoever read the lines has gone (a closed pipe or terminal): no reason to end a run either. It goes on unseen.
            self.stream = open(os.devnull, "w")  # noqa: SIM115 - open as long as the console


class LiveConsole:
    """A panel at the foot of the terminal that is drawn four times a second; rollouts and notes scroll away above it."""

    def __init__(self, rich: RichConsole) -> None:
        self.rich = rich
        self.view = _View()
        self._live = Live(console=rich, get_renderable=self.panel, refresh_per_second=4, vertical_overflow="visible")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # A run that never began leaves no empty panel above the error message.
        self._live.transient = not self.view.began
        self._live.stop()

    def start(self, info: StartInfo) -> None:
        """See `Console`."""
        self.rich.print(Text(info.title, style="bold"))
        for line in info.lines:
            self._print(Text(f"  {line}", style="dim"))
        self.view.start(info)
        self._live.start()

    def phase(self, name: str) -> None:
        """See `Console`; the first one shows the panel."""
        self.view.phase, self.view.phase_since = name, time.monotonic()
        self._live.start()

    def tokens(self, phase: str, n: int, seconds: float) -> None:
        """See `Console`."""
        self.view.add_rate(phase, n, seconds)

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Console`."""
        self.view.finish_step(step, metrics)

    def rollout(self, prompt: Prompt, completion: Completion, score: float) -> None:
        """See `Console`."""
        grid = Table.grid(padding=(0, 2))
        for role, text in _turns(prompt, completion):
            grid.add_row(Text(f"  {role}", style="dim"), Text(text, style=_ROLE_STYLES.get(role, "magenta")))
        self.rich.print(Group(Rule(Text(_rollout_title(prompt, completion, score)), style="dim", align="left"), grid, ""))

    def checkpoint(self, path: Path, seconds: float) -> None:
        """See `Console`."""
        self.view.save(path, seconds)

    def note(self, text: str) -> None:
        """See `Console`."""
        self._print(Text(text))

    def warning(self, text: str) -> None:
        """See `Console`."""
        self._print(Text.assemble(("warning: ", "bold yellow"), text))

    def done(self, summary: Summary) -> None:
        """See `Console`."""
        self.view.phase = ""
        self._live.stop()
        headline, *rest = closing_lines(summary)
        self._print(Text(headline, style="bold"))
        for line in rest:
            self._print(Text(line))

    def panel(self) -> RenderableType:
        """The panel as it is now."""
        view, now = self.view, time.monotonic()
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(width=_LABEL_WIDTH, style="dim")
        rows.add_column(ratio=1)
        rows.add_row("phase", self._phases(now))
        if view.scores:
            rows.add_row("reward", Text.assemble((f"{view.scores[-1]:.3f}  ", "bold"), (sparkline(view.scores), "blue")))
        if view.validation:
            rows.add_row("validation", view.validation)
        rates = dict(view.rates)  # the trainer's thread may add one while this one draws
        if rates:
            rows.add_row("tokens/s", " · ".join(f"{phase} {rate:,.0f}" for phase, rate in rates.items()))
        if view.checkpoint:
            age = f"{now - view.checkpoint_at:.0f} s ago"
            rows.add_row("checkpoint", f"{view.checkpoint} · {view.checkpoint_seconds:.2f} s · {age}")
        title, parts = Text("agentlightning", style="bold"), [rows]
        if view.began:
            title = Text.assemble((view.info.title, "bold"), f" · step {view.step}/{view.info.total_steps}")
            parts = [self._progress(now), rows]
        return Panel(Group(*parts), title=title, title_align="left", border_style="blue")

    def _progress(self, now: float) -> Table:
        """The bar, the time since the start and the time left."""
        view, left = self.view, self.view.seconds_left()
        timing = f"{clock(now - view.began)} elapsed" + (f" · {clock(left)} left" if left is not None else "")
        progress = Table.grid(expand=True, padding=(0, 1))
        progress.add_column(ratio=1)
        progress.add_column(justify="right")
        progress.add_row(ProgressBar(total=max(1, view.info.total_steps), completed=view.step), timing)
        return progress

    def _phases(self, now: float) -> Text:
        """The phases of a step with the present one picked out, and for how long it runs."""
        view = self.view
        seconds = int(now - view.phase_since)
        present = f"{view.phase} {seconds} s" if seconds else view.phase
        words = [(present, "bold green") if name == view.phase else (name, "dim") for name in view.info.phases]
        if view.phase and view.phase not in view.info.phases:
            words.append((present, "bold green"))
        return Text(" > ", style="dim").join([Text(word, style=style) for word, style in words])

    def _print(self, text: Text) -> None:
        # Unwrapped: a path or a command that is broken in two cannot be copied.
        self.rich.print(text, soft_wrap=True)


def _turns(prompt: Prompt, completion: Completion) -> Iterator[tuple[str, str]]:
    """Role and text of every message of a rollout."""
    for message in [*prompt.messages, *completion.turns]:
        yield visible(message["role"]), visible(message["content"])


def _rollout_title(prompt: Prompt, completion: Completion, score: float) -> str:
    return f"rollout of {prompt.uid}: reward {score:g}, {completion.num_turns} turns, ended by {completion.stop_reason}"


def closing_lines(summary: Summary) -> list[str]:
    """The last words of a run: what it reached, where everything lies, the commands one would run next."""
    verb = "finished" if summary.finished else "stopped"
    headline = f"{verb} at step {summary.step} of {summary.total_steps}, {clock(summary.seconds)} after its start"
    lines = [headline]
    if summary.scores:
        steps = min(_RECENT, len(summary.scores))
        first, last = statistics.fmean(summary.scores[:steps]), statistics.fmean(summary.scores[-steps:])
        lines.append(f"  reward         {first:.3f} over the first {steps} steps, {last:.3f} over the last {steps}")
    validation = core_validation(summary.val)
    if validation:
        lines.append(f"  validation     {validation}")
    lines.append(f"  run directory  {_shown(summary.run_dir)}")
    if summary.picture is not None:
        lines.append(f"  reward curve   {_shown(summary.picture)}")
    if summary.adapter is not None:
        lines.append(f"  adapter        {_shown(summary.adapter)}")
    lines.append("next")
    if not summary.finished:
        return [*lines, f"  go on          {_command(summary.overrides)}"]
    lines += [
        f"  train longer   {_command(summary.overrides, {'trainer.total_training_steps': 2 * summary.total_steps})}",
        f"  another seed   {_command(summary.overrides, _other_seed(summary))}",
    ]
    if summary.adapter is not None:
        lines += [
            "  use it         from peft import PeftModel; from transformers import AutoModelForCausalLM",
            f"                 base = AutoModelForCausalLM.from_pretrained({summary.model_path!r})",
            f"                 model = PeftModel.from_pretrained(base, {str(summary.adapter)!r})",
        ]
    return lines


def _other_seed(summary: Summary) -> dict[str, object]:
    """Another seed needs a directory of its own, which the experiment's name gives it unless the command named one."""
    old, new = f"-seed{summary.seed}", f"-seed{summary.seed + 1}"
    changes: dict[str, object] = {"trainer.seed": summary.seed + 1}
    changes["trainer.experiment_name"] = summary.experiment_name.removesuffix(old) + new
    for word in summary.overrides:
        key, _, value = word.partition("=")
        if key == "trainer.default_local_dir":
            changes[key] = value.rstrip("/").removesuffix(old) + new
    return changes


def _command(overrides: Sequence[str], changes: Mapping[str, object] | None = None) -> str:
    """The command that was given, with some of its keys set anew."""
    changes = changes or {}
    kept = [word for word in overrides if word.partition("=")[0] not in changes]
    return " ".join([COMMAND, *map(shlex.quote, kept), *(shlex.quote(f"{key}={value}") for key, value in changes.items())])


def _shown(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray may have removed the working directory of a job by now
        return str(path)
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(here) else str(path)
