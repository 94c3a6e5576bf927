"""DAPO's two answers to answers that grow too long (arXiv:2503.14476, section 3.4): a penalty, or not training on them.

Lengths and the mask [B, T] go in; penalties [B], or a mask without the samples that were cut, leave. A sample that was cut says
little about how good its thought was: its reward is noise.
"""

from __future__ import annotations

from torch import Tensor


def soft_overlong_punishment(
    response_len_B: Tensor, max_response_length: int, buffer_len: int, penalty_factor: float
) -> Tensor:
    """What is added to the scores [B]: 0 up to `max_response_length - buffer_len` tokens, then down to -penalty_factor.

        0                                                   len <= max - buffer
        penalty_factor * (max - buffer - len) / buffer      in between
        -penalty_factor                                     len >= max

    Lengths are in tokens, observations included. The result is float32, or float64 for float64 lengths. Raises ValueError
    unless 0 < buffer_len <= max_response_length.
    """
    if not 0 < buffer_len <= max_response_length:
        raise ValueError(
            f"reward.overlong_buffer.len: given {buffer_len}, expected between 1 and data.max_response_length="
            f"{max_response_length} tokens; mend it with reward.overlong_buffer.len={max(1, max_response_length // 4)}"
        )
    length_B = response_len_B if response_len_B.is_floating_point() else response_len_B.float()
    return penalty_factor * ((max_response_length - buffer_len - length_B) / buffer_len).clamp(-1.0, 0.0)


def without_samples(mask_BT: Tensor, left_out_B: Tensor) -> Tensor:
    """Overlong filtering: the mask (bool), all false for the samples of `left_out_B`, those that were cut.

    Their scores still count in the statistics of their groups.
    """
    return mask_BT.bool() & ~left_out_B.bool()[:, None]
