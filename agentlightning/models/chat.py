"""Chat templates as tokens: prompts, and the observation that follows an assistant's turn.

Enters: messages. Leaves: token ids that only ever grow at the end, so that a tool's result extends the cached context instead
of re-rendering it. Why not `apply_chat_template` on the whole conversation at each turn: templates rewrite earlier turns
(Qwen3 drops old reasoning), and the tokens trained on would not be the ones that were sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from agentlightning.errors import UserError

_MARK = "\u241e"  # the visible record separator: no template writes it


def not_found(path: str, error: Exception) -> UserError:
    """The error for a model path that leads nowhere, or to code that is not trusted."""
    return _code_not_trusted(path, error) or UserError(
        f"no model at {path!r}: {_reason(error)}; expected a directory with config.json, tokenizer and safetensors, or the "
        "name of a model on the Hugging Face hub: actor_rollout_ref.model.path=/path/to/model, or model=tiny for the embedded "
        "one"
    )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`. Raises `UserError` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _code_not_trusted(path, error) or UserError(
            f"no tokenizer at {path!r}: {_reason(error)}; expected a directory with tokenizer.json, or a name on the Hugging "
            "Face hub: actor_rollout_ref.model.tokenizer_path=/path/to/tokenizer, or where it is the model's own "
            "actor_rollout_ref.model.path=/path/to/model"
        ) from error


def _code_not_trusted(path: str, error: Exception) -> UserError | None:
    if "trust_remote_code" not in str(error):
        return None
    return UserError(
        f"the files at {path!r} bring code of their own, which is not run unasked: read it, then "
        "actor_rollout_ref.model.trust_remote_code=true"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise `UserError` if `tokenizer` makes ids beyond the model's `rows` embeddings."""
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {len(tokenizer)} tokens and the model {rows} embeddings; "
            "expected the model's own tokenizer: actor_rollout_ref.model.tokenizer_path=<the model's directory>"
        )


class ChatRenderer:
    """Renders for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; expected one (chat_template.jinja beside "
                "its tokenizer.json), or another actor_rollout_ref.model.tokenizer_path"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} names no eos_token; expected the end-of-turn token")
        self.tokenizer = tokenizer
        self.observation_ids = lru_cache(maxsize=4096)(self._observation_ids)

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant's turn."""
        return int(self.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType] - a tokenizer has one; models may have several

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `messages` with the generation prompt behind them."""
        conversation = [dict(message) for message in messages]
        ids = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(token) for token in ids]  # pyright: ignore[reportArgumentType] - token ids, as tokenize=True asks

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of one assistant turn, its end-of-turn token dropped."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _observation_ids(self, content: str, closed: bool) -> tuple[int, ...]:
        """Tokens from the end of an assistant's turn to the start of its next one, with the tool's `content` between them.

        `closed`: whether the policy itself emitted the end-of-turn token, which then does not come again.
        """
        messages = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": _MARK},
            {"role": "tool", "content": content},
        ]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        after_turn = str(rendered).split(_MARK, 1)[1]
        if closed:
            after_turn = after_turn.removeprefix(str(self.tokenizer.eos_token))
        return tuple(self.tokenizer.encode(after_turn, add_special_tokens=False))
