"""The command line of door 1: hydra composes, the schema checks, the trainer runs in this very process.

Overrides go in, an exit code comes out: 0 done, 2 something the user can mend, 1 a run that failed (a message on stderr; with
the traceback where nobody foresaw it). The run itself happens outside hydra, so that signals, breakpoints and tracebacks are
the program's own.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from agentlightning.errors import AgentLightningError, ConfigError, UserError
from agentlightning.verl.config import CONFIG_NAME, Config, check_overrides, config_dir, load_config, validate
from agentlightning.verl.rules import check_paths


def main() -> int:
    """Run `python -m agentlightning.verl` with the words of `sys.argv`; returns the exit code."""
    try:
        config = _config_of_command_line(sys.argv[1:])
        return run(config) if config is not None else 0
    except AgentLightningError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped before training began; the same command starts it\n")
        return 130


def run(config: Config) -> int:
    """Train as `config` says; returns the exit code. torch and ray are imported here, not before the configuration is right."""
    check_paths(config)
    from agentlightning.verl.launch import launch

    return launch(config)


def _config_of_command_line(words: list[str]) -> Config | None:
    """The configuration. Flags (--help, --cfg job, --config-dir) are hydra's; None where it only printed something."""
    flags = [word for word in words if word.startswith("-")]
    if not flags:
        return load_config(words)
    if "-m" in flags or "--multirun" in flags:
        raise ConfigError("--multirun: one command is one run; start several, each with its own trainer.experiment_name=<name>")
    # hydra answers for `model=` here: --config-dir may hold models that this package does not know.
    check_overrides([word for word in words if "=" in word and not word.startswith(("-", "model="))])
    composed: list[DictConfig] = []

    def collect(config: DictConfig) -> None:
        composed.append(config)

    hydra.main(config_path=str(config_dir()), config_name=CONFIG_NAME, version_base="1.3")(collect)()
    return validate(composed[0]) if composed else None
