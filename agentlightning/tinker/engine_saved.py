"""What lies in the directory of a saved model beside its tensors: light enough for a server to look at, without torch.

```
NAME/manifest.json
     trainer_state.json                       this module's
     actor/adapter_config.json                PEFT's
           adapter_model.safetensors          PEFT's names
           optimizer-00000-of-00001.safetensors   exp_avg.<name>, exp_avg_sq.<name>, step.<name>; absent from a sampler
           gradient.safetensors               by name; only if a gradient sum was pending
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentlightning.errors import CheckpointError
from agentlightning.tinker.types import LoraConfig

STATE_FILE = "trainer_state.json"
CONFIG_FILE = "actor/adapter_config.json"
WEIGHTS_FILE = "actor/adapter_model.safetensors"
OPTIMIZER_FILE = "actor/optimizer-00000-of-00001.safetensors"
GRADIENT_FILE = "actor/gradient.safetensors"
_KIND = "lora_model"


@dataclass(frozen=True, slots=True)
class SavedModel:
    """`trainer_state.json`."""

    base_model: str  # what the user called it
    base_digest: str  # of its configuration and some of its weights: two names of the same base are the same
    lora: LoraConfig
    optimizer_steps: int
    pending: int  # forward_backwards in the gradient sum

    def json(self) -> dict[str, Any]:
        """As it is written."""
        return {"kind": _KIND, **asdict(self)}

    @classmethod
    def parse(cls, document: Any, where: Path) -> SavedModel:
        """From what was read; CheckpointError if a model of this service did not write it."""
        if not isinstance(document, Mapping) or document.get("kind") != _KIND:
            raise CheckpointError(
                f"{where} is not the state of a model of a TrainingClient; expected a directory that save_state or "
                "save_weights_for_sampler has written (a run's own checkpoint starts a model as lora_adapter_path only)"
            )
        try:
            fields = {key: value for key, value in document.items() if key != "kind"}
            return cls(**{**fields, "lora": LoraConfig(**fields["lora"])})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{where}/{STATE_FILE} has other fields than expected: {error}") from error


def read_saved_model(directory: Path) -> SavedModel:
    """What lies in a saved directory: its base, shape and step, to create a model that it can be loaded into.

    Nothing is verified yet: `load_state` does. CheckpointError if nothing was saved there.
    """
    try:
        document = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no saved model at {directory}: its {STATE_FILE} cannot be read ({error})") from error
    return SavedModel.parse(document, directory)
