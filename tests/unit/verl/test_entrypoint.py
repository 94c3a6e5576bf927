"""The command line: exit codes, messages without tracebacks, nothing left in the working directory."""

import subprocess
import sys

import pytest

from agentlightning.verl import entrypoint


def _main(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verl", *words])
    return entrypoint.main()


def _never(_config):
    raise AssertionError("the run started")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.save_frq=1"], "error: unknown key 'trainer.save_frq'; did you mean 'trainer.save_freq'?"),
        (["--cfg", "job", "trainer.save_frq=1"], "error: unknown key 'trainer.save_frq'; did you mean 'trainer.save_freq'?"),
        (["--config-name", "trainer", "trainer.seed=-1"], "error: trainer.seed: given -1, expected at least 0"),
        (["trainer.seed=1,2", "--multirun"], "error: --multirun: one command is one run"),
        (["quickly"], "error: cannot read the override"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entrypoint, "run", _never)
    assert _main(monkeypatch, *words) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_path_ends_before_anything_heavy_starts(monkeypatch, capsys):
    assert _main(monkeypatch, "actor_rollout_ref.model.path=/no/where") == 2
    assert capsys.readouterr().err.startswith("error: actor_rollout_ref.model.path: given /no/where")


def test_the_exit_code_of_the_run_passes(monkeypatch):
    seen = []
    monkeypatch.setattr(entrypoint, "run", lambda config: seen.append(config.trainer.seed) or 7)
    assert _main(monkeypatch, "trainer.seed=5") == 7
    assert seen == [5]


def test_what_the_user_cannot_mend_keeps_its_traceback(monkeypatch):
    def broken(_config):
        raise RuntimeError("ours")

    monkeypatch.setattr(entrypoint, "run", broken)
    with pytest.raises(RuntimeError, match="ours"):
        _main(monkeypatch)


def test_a_model_of_the_users_own_from_a_folder_of_theirs(monkeypatch, tmp_path, capsys):
    mine = (
        (entrypoint.config_dir() / "model" / "tiny.yaml").read_text().replace("experiment_name: tiny", "experiment_name: mine")
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(mine)
    seen = []
    monkeypatch.setattr(entrypoint, "run", lambda config: seen.append(config.trainer.experiment_name) or 0)
    assert _main(monkeypatch, "--config-dir", str(tmp_path), "model=mine") == 0
    assert seen == ["mine"]


def test_the_program_prints_its_configuration_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "agentlightning.verl", "--cfg", "job", "trainer.seed=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "seed: 3" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
