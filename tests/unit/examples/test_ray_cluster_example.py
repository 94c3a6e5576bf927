"""The cluster example: its files parse, and the commands in them compose."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from agentlightning.verl.config import load_config

FOLDER = Path(__file__).parents[3] / "examples" / "ray_cluster"
COMMAND = "python -m agentlightning.verl "
JOB = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


def commands(name: str) -> list[list[str]]:
    """The overrides of every command in the file, without what follows them in the shell."""
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    lines = [line[line.index(COMMAND) + len(COMMAND) :] for line in text.splitlines() if COMMAND in line]
    return [[word for word in shlex.split(line) if "=" in word] for line in lines]


@pytest.mark.parametrize("command", commands("README.md"))
def test_the_readmes_commands_compose_and_work_in_a_job(command):
    config = load_config(command)
    assert config.trainer.nnodes == 2
    assert Path(config.trainer.default_local_dir).is_absolute()


def test_the_readme_has_a_command_of_each_kind():
    assert len(commands("README.md")) == 2
    text = (FOLDER / "README.md").read_text()
    for word in ("ray job submit", "sbatch", "kubectl apply", "ray start --head"):
        assert word in text


def test_the_slurm_script_parses_and_its_command_composes():
    script = FOLDER / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text().replace("\\\n", " ")
    preset = next(line for line in text.splitlines() if line.strip().startswith("set -- "))
    words = shlex.split(preset.strip().removeprefix("set -- "))
    [given] = commands("slurm.sbatch")
    values = {"$SLURM_NNODES": "2", "$RUN_DIR": "/shared/runs/gsm8k"}
    for word, value in values.items():
        given = [override.replace(word, value) for override in given]
    config = load_config([*given, *words])
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 8)
    assert config.trainer.default_local_dir == "/shared/runs/gsm8k"
    assert "scontrol requeue" in text


def test_the_kuberay_manifest_fits_its_own_command():
    spec = JOB["spec"]
    assert JOB["apiVersion"] == "ray.io/v1"
    assert spec["entrypoint"].startswith(COMMAND)
    config = load_config(shlex.split(spec["entrypoint"].removeprefix(COMMAND)))
    [workers] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    assert workers["replicas"] == config.trainer.nnodes
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == config.trainer.n_gpus_per_node
    [head] = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    for mounts in (container["volumeMounts"], head["volumeMounts"]):
        shared = Path(next(mount["mountPath"] for mount in mounts if mount["name"] == "shared"))
        assert shared in Path(config.trainer.default_local_dir).parents


@pytest.mark.parametrize("given", [(FOLDER / "runtime_env.yaml").read_text(), JOB["spec"]["runtimeEnvYAML"]])
def test_a_job_has_a_minute_to_save(given):
    assert yaml.safe_load(given) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
