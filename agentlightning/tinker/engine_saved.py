"""What lies in the directory of a saved model beside its tensors: light enough for a server to look at, without torch.

```
NAME/manifest.json
     trainer_state.json                       this module's
     actor/adapter_config.json                PEFT's
           adapter_model.safetensors          PEFT's names
           optimizer-00000-of-00001.safetensors   exp_avg.<name>, exp_avg_sq.<name>, step.<name>; absent from a sampler
           gradient.safetensors               by name; only if a gradient sum was pending
```

A checkpoint of the built-in trainer has the same `actor/` (its optimizer in as many files as there were workers) and a
`trainer_state.json` of its own. It is read as a saved model too, so a loop of one's own can go on from a run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlightning.checkpoint import manifest
from agentlightning.checkpoint.fingerprint import MODEL_PATH
from agentlightning.errors import CheckpointError
from agentlightning.tinker.types import LoraConfig

if TYPE_CHECKING:
    from agentlightning.checkpoint.store import LoadedCheckpoint

STATE_FILE = "trainer_state.json"
CONFIG_FILE = "actor/adapter_config.json"
WEIGHTS_FILE = "actor/adapter_model.safetensors"
OPTIMIZER_FILES = "actor/optimizer-"  # how their names begin
OPTIMIZER_FILE = f"{OPTIMIZER_FILES}00000-of-00001.safetensors"
GRADIENT_FILE = "actor/gradient.safetensors"
_KIND = "lora_model"
_RUN_VERSION = "workers_version"  # only a run's state has it
LORA_ALPHA = 32.0  # the service's, whatever the rank: the best learning rate then hardly depends on the rank


@dataclass(frozen=True, slots=True)
class SavedModel:
    """`trainer_state.json`."""

    base_model: str  # what the user called it
    base_digest: str  # of its configuration and some of its weights: two names of the same base are the same
    lora: LoraConfig
    optimizer_steps: int
    pending: int  # forward_backwards in the gradient sum
    lora_alpha: float = LORA_ALPHA
    of_run: bool = False  # the trainer's; `base_digest` is `checkpoint.fingerprint.model_identity` then

    def json(self) -> dict[str, Any]:
        """As it is written."""
        return {"kind": _KIND, **{name: value for name, value in asdict(self).items() if name != "of_run"}}

    @classmethod
    def parse(cls, document: Any, where: Path) -> SavedModel:
        """From what was read; CheckpointError if a model of this service did not write it."""
        if not isinstance(document, Mapping) or document.get("kind") != _KIND:
            raise CheckpointError(
                f"{where} is not the state of a model; expected a directory that save_state or save_weights_for_sampler has "
                "written, or a checkpoint of the trainer (RUN/global_step_N)"
            )
        try:
            fields = {key: value for key, value in document.items() if key != "kind"}
            return cls(**{**fields, "lora": LoraConfig(**fields["lora"])})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{where}/{STATE_FILE} has other fields than expected: {error}") from error

    @classmethod
    def parse_run(cls, state: Any, adapter: Any, weights: Collection[str], fingerprint: Any, where: Path) -> SavedModel:
        """From the trainer's state and `adapter_config.json`, the names of the weights and the manifest's fingerprint.

        CheckpointError for an adapter that a training client's cannot be.
        """
        try:
            odd = [name for name in ("use_rslora", "use_dora", "modules_to_save") if adapter.get(name)]
            if odd:
                raise CheckpointError(
                    f"{where}/{CONFIG_FILE} has {odd[0]}={adapter[odd[0]]}, and a training client's adapter is plain LoRA; "
                    "this run can only go on in the trainer"
                )
            head = [name for name in weights if "lm_head" in name or "embed_out" in name]
            attention = [name for name in weights if "attn" in name or "attention" in name]
            lora = LoraConfig(
                rank=adapter["r"],
                train_unembed=bool(head),
                train_attn=bool(attention),
                train_mlp=len(head) + len(attention) < len(weights),
            )
            base, digest = adapter["base_model_name_or_path"], fingerprint["breaking"][MODEL_PATH]
            return cls(base, digest, lora, state[_RUN_VERSION], 0, float(adapter["lora_alpha"]), of_run=True)
        except (AttributeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{where} is a run's checkpoint with other fields than expected: {error!r}") from error


def is_of_run(state: Any) -> bool:
    """Whether a `trainer_state.json` is the built-in trainer's."""
    return isinstance(state, Mapping) and _RUN_VERSION in state


def read_saved_model(directory: Path) -> SavedModel:
    """What lies in a saved directory: its base, shape and step, to create a model that it can be loaded into.

    Nothing is verified yet: `load_state` does. CheckpointError if nothing was saved there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        if not is_of_run(state):
            return SavedModel.parse(state, directory)
        adapter = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(directory / WEIGHTS_FILE, framework="numpy") as file:
            names = list(file.keys())
        return SavedModel.parse_run(state, adapter, names, manifest.read(directory)["fingerprint"], directory)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no saved model at {directory}: its files cannot be read ({error})") from error


def saved_model_of(loaded: LoadedCheckpoint) -> SavedModel:
    """The same of a checkpoint that was read and verified."""
    state, weights = loaded.json.get(STATE_FILE), loaded.tensors.get(WEIGHTS_FILE, {})
    if not is_of_run(state):
        return SavedModel.parse(state, loaded.path)
    return SavedModel.parse_run(state, loaded.json.get(CONFIG_FILE), list(weights), loaded.fingerprint, loaded.path)


def optimizer_in(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The optimizer's tensors by name, from however many files they lie in; None if there is no such file.

    Empty: no step was taken before the save.
    """
    files = [file for file in sorted(tensors) if file.startswith(OPTIMIZER_FILES)]
    return {name: tensor for file in files for name, tensor in tensors[file].items()} if files else None
