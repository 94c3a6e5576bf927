"""`agl`: the words of a command line enter, an exit code leaves.

0 done; 1 something failed, or `verify` found something bad; 2 something the user can mend, with a message on stderr. What a
command needs is imported when it runs, so that `agl --help` is instant and looking at checkpoints needs no trainer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from agentlightning import __version__
from agentlightning.errors import AgentLightningError, UserError

if TYPE_CHECKING:
    from agentlightning.tinker.engine_api import LoraEngine

_CHECKPOINT = "a path or URL (RUN/global_step_40, RUN/40, a record, or RUN for its newest); with --run also a step or a name"
_API_KEY = "AGL_API_KEY"
_INTERRUPTED = 130  # as a shell counts it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:  # all of its words are hydra's, --help too
        return _train(words[1:])
    arguments = _parser().parse_args(words)
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except AgentLightningError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader, `head` say, has what it wanted; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror or error}: {error.filename}\n")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _train(words: list[str]) -> int:
    from agentlightning.verl.entrypoint import main as train

    sys.argv = [sys.argv[0], *words]  # hydra reads it, and the run's last words quote it
    return train()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agl", description="Reinforcement learning of LLM agents whose runs cannot be lost")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train: agl train key=value..., the same as python -m agentlightning.verl")
    checkpoints = commands.add_parser("ckpt", help="look at checkpoints, verify, compare, export and prune them")
    _add_checkpoint_commands(checkpoints.add_subparsers(required=True, metavar="COMMAND"))
    plot = commands.add_parser("plot", help="curves of several runs with their resume marks, as a PNG")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="run directories or URLs")
    plot.add_argument("-o", "--out", default="curves.png", metavar="FILE.png", help="the picture (default: %(default)s)")
    plot.add_argument(
        "--metric", action="append", metavar="NAME", help="of metrics.jsonl; may be repeated (default: critic/score/mean)"
    )
    _finish(plot, _plot)
    _add_serve(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser("serve", help="an HTTP service that the tinker SDK talks to; --status asks a running one")
    serve.add_argument("--base-model", metavar="PATH_OR_NAME", help='a directory, a hub name, or "tiny", the embedded one')
    serve.add_argument("--root", type=Path, metavar="DIR", help="where all its state lives; the same again goes on with it")
    serve.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: %(default)s, this machine alone)"
    )
    serve.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    serve.add_argument(
        "--api-key",
        action="append",
        metavar="tml-...",
        help=f"who may come in; may be repeated, one owner each (default: ${_API_KEY}, those of the last start, or a new one)",
    )
    serve.add_argument("--backend", choices=("inprocess", "ray"), default="inprocess", help="(default: %(default)s)")
    serve.add_argument("--workers", type=int, default=1, metavar="N", help="with --backend ray: processes, one a GPU")
    serve.add_argument("--max-body-mb", type=int, default=64, metavar="MB", help="larger requests are refused")
    serve.add_argument(
        "--reproducible",
        action="store_true",
        help="sample one request at a time, so that no bit of a log-probability depends on who else samples; slower",
    )
    serve.add_argument("--status", action="store_true", help="show models, queue, speed and checkpoints of a running server")
    serve.add_argument("--url", metavar="URL", help="with --status: of that server (default: http://HOST:PORT)")
    _finish(serve, _serve)


def _add_checkpoint_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ls = commands.add_parser("ls", help="a table of all that a run directory holds, and why it is kept")
    ls.add_argument("run", metavar="RUN", help="a run directory or URL, as trainer.default_local_dir names it")
    ls.add_argument("--metric", metavar="NAME", help="which metric to show (default: trainer.keep_best_by, or the validation)")
    _finish(ls, _ls)
    verify = commands.add_parser("verify", help="read every byte and compare it with the manifest; exit code 1 if one is bad")
    verify.add_argument("run", metavar="RUN", help="a run directory or URL")
    verify.add_argument("names", nargs="*", metavar="NAME", help="steps or names; all by default")
    _finish(verify, _verify)
    diff = commands.add_parser("diff", help="how two checkpoints differ: configuration, tensors, metrics")
    diff.add_argument("a", metavar="A", help=_CHECKPOINT)
    diff.add_argument("b", metavar="B", help="the same")
    diff.add_argument("--run", metavar="RUN", help="the run directory that steps and names are of")
    _finish(diff, _diff)
    export = commands.add_parser("export", help="the adapter as a PEFT directory, or merged into its base")
    export.add_argument("checkpoint", metavar="CKPT", help=_CHECKPOINT)
    export.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    export.add_argument("--run", metavar="RUN", help="the run directory that a step or a name is of")
    export.add_argument("--merged", action="store_true", help="a whole model instead of an adapter")
    export.add_argument(
        "--base", metavar="PATH", help="with --merged: the base model (default: the one that the adapter names)"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="with --merged: of its weights (default: float32; a 16-bit type rounds most of the adapter's change away)",
    )
    _finish(export, _export)
    prune = commands.add_parser("prune", help="remove what the run's policy does not keep")
    prune.add_argument("run", metavar="RUN", help="a run directory or URL that no run is using")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.add_argument("--keep", type=int, metavar="N", help="the newest N, in place of trainer.max_actor_ckpt_to_keep")
    prune.add_argument(
        "--best-by", metavar="METRIC", help="in place of trainer.keep_best_by; --best-by=-METRIC: less is better"
    )
    prune.add_argument("--every", type=int, metavar="K", help="steps that are multiples, in place of trainer.keep_every")
    _finish(prune, _prune)


def _finish(parser: argparse.ArgumentParser, command: object) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    parser.set_defaults(command=command)


def _ls(arguments: argparse.Namespace) -> int:
    from agentlightning.tools.console import show_json, show_listing
    from agentlightning.tools.listing import list_checkpoints
    from agentlightning.tools.places import open_places
    from agentlightning.tools.runs import policy_of

    with open_places() as places:
        root = places.run(arguments.run)
        listing = list_checkpoints(root, policy_of(root), arguments.metric)
        listing = replace(listing, run=places.shown(listing.run))
    (show_json if arguments.json else show_listing)(listing)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from agentlightning.tools.console import show_json, show_reports
    from agentlightning.tools.places import open_places
    from agentlightning.tools.verify import verify_run

    with open_places() as places:
        root = places.run(arguments.run)
        reports = verify_run(root, arguments.names, places.remote(root))
        reports = [replace(report, note=report.note and places.shown(report.note)) for report in reports]
    (show_json if arguments.json else show_reports)(reports)
    return 1 if any(report.state == "bad" for report in reports) else 0


def _diff(arguments: argparse.Namespace) -> int:
    from agentlightning.tools.console import show_diff, show_json
    from agentlightning.tools.diff import diff_checkpoints
    from agentlightning.tools.places import open_places

    with open_places() as places:
        run = None if arguments.run is None else places.run(arguments.run)
        diff = diff_checkpoints(places.checkpoint(arguments.a, run), places.checkpoint(arguments.b, run))
        diff = replace(diff, a=places.shown(diff.a), b=places.shown(diff.b))
    (show_json if arguments.json else show_diff)(diff)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from agentlightning.tools.console import show_exported, show_json
    from agentlightning.tools.export import EXPORTED_FILES, export_adapter, export_merged
    from agentlightning.tools.places import open_places

    if not arguments.merged and (arguments.base or arguments.dtype):
        raise UserError("--base and --dtype are of a merged model; expected --merged with them")
    with open_places() as places:
        run = None if arguments.run is None else places.run(arguments.run)
        checkpoint = places.checkpoint(arguments.checkpoint, run, EXPORTED_FILES)
        if arguments.merged:
            exported = export_merged(checkpoint, arguments.out, arguments.base, arguments.dtype or "float32")
        else:
            exported = export_adapter(checkpoint, arguments.out)
    (show_json if arguments.json else show_exported)(exported)
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from agentlightning.tools.console import show_json, show_pruned
    from agentlightning.tools.places import open_places
    from agentlightning.tools.prune import prune_remote, prune_run
    from agentlightning.tools.runs import policy_of

    with open_places() as places:
        root = places.run(arguments.run)
        policy = policy_of(root, arguments.keep, arguments.best_by, arguments.every)
        remote = places.remote(root)
        if remote is None:
            pruned = prune_run(root, policy, arguments.dry_run)
        else:
            pruned = prune_remote(remote, policy, arguments.dry_run)
    (show_json if arguments.json else show_pruned)(pruned)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from agentlightning.tools.console import show_json, show_plotted
    from agentlightning.tools.places import open_places
    from agentlightning.tools.plot import FILES, plot_runs
    from agentlightning.verl.metrics import SCORE

    with open_places() as places:
        roots = [places.run(run, FILES) for run in arguments.runs]
        plotted = plot_runs(roots, Path(arguments.out), arguments.metric or [SCORE])
        plotted = replace(plotted, runs=tuple(replace(run, path=places.shown(run.path)) for run in plotted.runs))
    (show_json if arguments.json else show_plotted)(plotted)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    keys = arguments.api_key or [os.environ[name] for name in (_API_KEY,) if name in os.environ]
    if arguments.status:
        return _serve_status(arguments, keys)
    if arguments.base_model is None or arguments.root is None:
        raise UserError("--base-model or --root is missing; expected both, like --base-model tiny --root ./serve")
    try:
        from agentlightning.tinker.server.serve import Settings, serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; expected the extra `serve`: pip install 'agentlightning[serve]'"
        ) from error
    from agentlightning.tools.console import show_serving

    def engine() -> LoraEngine:
        from agentlightning.tinker.engine import open_engine

        return open_engine(arguments.base_model, backend=arguments.backend, workers=arguments.workers)

    settings = Settings(
        root=arguments.root.absolute(),
        host=arguments.host,
        port=arguments.port,
        api_keys=keys,
        max_body_mb=arguments.max_body_mb,
        reproducible=arguments.reproducible,
    )
    return serve(settings, engine, show_serving)


def _serve_status(arguments: argparse.Namespace, keys: Sequence[str]) -> int:
    from agentlightning.tinker.server.status import fetch_state
    from agentlightning.tools.console import show_json, show_state

    if not keys:
        raise UserError(f"no key is given; expected one of the server's: --api-key KEY, or {_API_KEY}")
    state = fetch_state(arguments.url or f"http://{arguments.host}:{arguments.port}", keys[0])
    (show_json if arguments.json else show_state)(state)
    return 0
