"""How the tools' plain data is shown. Dataclasses enter; a table, lines of text or JSON leave on standard output.

On a terminal a table takes its width; anywhere else every row is one line, so that `grep` and `awk` can be used on it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from agentlightning.tools.diff import Change, Diff, FileDiff
    from agentlightning.tools.export import Exported
    from agentlightning.tools.listing import Listing, Row
    from agentlightning.tools.plot import Plotted
    from agentlightning.tools.prune import Pruned
    from agentlightning.tools.verify import Report

_WIDE = 400  # columns where no terminal limits them
_TOP_TENSORS = 8  # of a file's changed tensors, how many are shown; --json has all
_STYLES = {"bad": "red", "foreign": "dim", "good": "green", "gone": "dim"}


def show_json(value: Any) -> None:
    """One JSON document. NaN and inf, which JSON does not know, are null."""
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return value if value is None or isinstance(value, str | int) else str(value)  # a date in a config.yaml, say


def _print(*parts: Table | str, style: str = "") -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    for part in parts:
        # As `Text`, because a name in brackets is no markup.
        console.print(Text(part, style=style) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str, style: str = "") -> None:
    table.add_row(*(Text(cell) for cell in cells), style=style)


def size_text(count: int | None) -> str:
    """Example: `1.2 MB`; a dash for None."""
    if count is None:
        return "-"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _when(iso: str | None) -> str:
    """The local time of an ISO time."""
    if iso is None:
        return "-"
    try:
        return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:  # it was read from a file
        return iso


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def show_listing(listing: Listing) -> None:
    """`agl ckpt ls`."""
    if not listing.rows:
        _print(f"no checkpoints in {listing.run}")
        return
    metric = listing.metric or "metric"
    table = _table("name", "step", "when", "size", metric, "verified", "kept because", right=("step", "size", metric))
    for row in listing.rows:
        step = "-" if row.step is None else str(row.step)
        verified, why = "-" if row.verified_at is None else _when(row.verified_at), _kept_because(row)
        style = _STYLES[row.state] if row.state in _STYLES else ""  # noqa: SIM401
        cells = (row.name, step, _when(row.saved_at), size_text(row.bytes), _number(row.metric), verified, why)
        _add(table, *cells, style=style)
    _print(table)


def _kept_because(row: Row) -> str:
    if row.state == "bad":
        return f"BAD: {row.problem}"
    if row.state == "foreign":
        return "another loop's record, never pruned"
    return ", ".join(row.kept) or "nothing: goes at the next prune"


def show_reports(reports: Sequence[Report]) -> None:
    """`agl ckpt verify`: a line each, the problems below it."""
    for report in reports:
        speed = f", {report.bytes / report.seconds / 1e9:.2f} GB/s" if report.bytes > 1_000_000 and report.seconds > 0 else ""
        read = f"  {size_text(report.bytes)} in {report.seconds:.2f} s{speed}" if report.bytes else ""
        _print(f"{report.state:<8}{report.name}{read}", style=_STYLES[report.state])
        for line in (*report.problems, *((report.note,) if report.note else ())):
            _print(f"        {line}")
    bad = sum(report.state == "bad" for report in reports)
    _print(f"{len(reports)} looked at, {bad} bad" if reports else "no checkpoints")


def show_pruned(pruned: Pruned) -> None:
    """`agl ckpt prune`: what went."""
    for name in pruned.gone:
        _print(f"{'would go' if pruned.dry_run else 'gone'}  {name}")
    if pruned.gone:
        _print(f"{len(pruned.gone)} of {pruned.run}, {size_text(pruned.bytes)}")
    elif pruned.policy.keep is None:
        _print(f"nothing goes: trainer.max_actor_ckpt_to_keep of {pruned.run} is null, so all are kept; give --keep N")
    else:
        _print(f"nothing goes: the policy keeps all that is in {pruned.run}")


def show_exported(exported: Exported) -> None:
    """`agl ckpt export`."""
    of = f" of {exported.base}" if exported.kind == "adapter" and exported.base else ""
    into = f" into {exported.base}" if exported.kind == "merged" else ""
    _print(f"{exported.kind} {'model' if exported.kind == 'merged' else 'in PEFT layout'}{of}{into}: {exported.path}")
    _print(size_text(exported.bytes))


def show_plotted(plotted: Plotted) -> None:
    """`agl plot`."""
    for curve in plotted.runs:
        resumed = f", resumed at {', '.join(map(str, curve.resumed_at))}" if curve.resumed_at else ""
        missing = [metric for metric in plotted.metrics if metric not in curve.metrics]
        lacks = f"; has no {', '.join(missing)}" if missing else ""
        _print(f"{curve.run}: {curve.steps} steps{resumed}{lacks}")
    _print(plotted.picture)


def show_serving(url: str, key: str | None) -> None:
    """`agl serve`, before the first request. A key that was made is shown this once."""
    _print(f"serving at {url}", f"  export TINKER_BASE_URL={url}")
    if key is not None:
        _print(f"  export TINKER_API_KEY={key}", "the key is shown this once, and holds at every later start without --api-key")
    sys.stdout.flush()


def show_state(state: Mapping[str, Any]) -> None:
    """`agl serve --status`."""
    queue, speed, kept = state["queue"], state["tokens_per_second"], state["checkpoints"]
    _print(f"{state['base_model']}, agentlightning {state['version']}, up for {state['up_seconds']} s")
    _print(f"waiting: {queue['training']} training requests, {queue['samples']} samples")
    _print(f"tokens/s over the last minute: {speed['train']} training, {speed['sample']} sampling")
    memory = state["memory"]
    _print(f"memory: {size_text(memory['resident_bytes'])}, on GPUs {size_text(memory['device_bytes'])}")
    _print(f"checkpoints: {kept['count']}, {size_text(kept['bytes'])}")
    if state["models"]:
        table = _table("model", "rank", "requests", "saved", "in engine", "last request", right=("rank", "requests", "saved"))
        for model in state["models"]:
            held = "yes" if model["in_engine"] else "no"
            cells = (str(model["rank"]), str(model["requests"]), str(model["saved"]), held, _when(model["last_request_at"]))
            _add(table, model["id"], *cells)
        _print(table)


def show_diff(diff: Diff) -> None:
    """`agl ckpt diff`: a section for each kind of difference, and a line for each kind without one."""
    _print(f"A  {diff.a}", f"B  {diff.b}")
    _show_changes("configuration", diff.config)
    _show_changes("configuration, harmless", diff.harmless)
    if diff.run_config:
        _show_changes("config.yaml of their runs", diff.run_config)
    if diff.same_tensors:
        _heading("tensors: the same, bit for bit")
    else:
        _heading("tensors")
        for side, files in (("A", diff.only_in_a), ("B", diff.only_in_b)):
            _print(*(f"  {file}: only in {side}" for file in files))
        for file in diff.files:
            _show_file(file)
    _show_changes("trainer state", diff.state)
    _show_changes("metrics", diff.metrics)


def _heading(text: str) -> None:
    _print("", style="")
    _print(text, style="bold")


def _show_changes(title: str, changes: Sequence[Change]) -> None:
    _heading(title if changes else f"{title}: the same")
    if not changes:
        return
    table = _table("  key", "A", "B")
    for change in changes:
        _add(table, f"  {change.key}", _value(change.a), _value(change.b))
    _print(table)


def _value(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _show_file(file: FileDiff) -> None:
    if not (file.changed or file.only_in_a or file.only_in_b or file.reshaped):
        _print(f"  {file.file}: the same, {file.equal} tensors")
        return
    _print(
        f"  {file.file}: {len(file.changed)} of {file.equal + len(file.changed)} changed, "
        f"max |B-A| {file.max_abs:.3g}, ||B-A||/||A|| {file.relative_norm:.3g}"
    )
    for side, names in (("A", file.only_in_a), ("B", file.only_in_b)):
        _print(*(f"    {name}: only in {side}" for name in names))
    _print(*(f"    {change.key}: A {change.a}, B {change.b}" for change in file.reshaped))
    table = _table("    most changed", "max |B-A|", "||B-A||/||A||")
    for change in file.changed[:_TOP_TENSORS]:
        _add(table, f"    {change.name}", f"{change.max_abs:.3g}", f"{change.relative_norm:.3g}")
    if file.changed:
        _print(table)
    if len(file.changed) > _TOP_TENSORS:
        _print(f"    and {len(file.changed) - _TOP_TENSORS} more; --json has all")
