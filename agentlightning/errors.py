"""The one family of errors that agentlightning raises on purpose.

A `UserError` is something the person who started the run can mend: the command line shows its message without a traceback
and exits with code 2. Everything else below ends the run with code 1 and keeps its traceback in the log.
"""

from __future__ import annotations


class AgentLightningError(Exception):
    """Base of every error raised on purpose."""


class UserError(AgentLightningError):
    """Wrong input: says what was given, what was expected, and the override that mends it."""


class ConfigError(UserError):
    """A key or value of the configuration is wrong."""


class DataError(UserError):
    """A data file is missing, malformed, or does not fit the configuration."""


class CheckpointError(UserError):
    """A run directory cannot be used, or no checkpoint in it is valid."""


class RewardError(AgentLightningError):
    """A reward function raised, or returned something that is not a finite number; names the sample."""


class NumericsError(AgentLightningError):
    """NaN or inf in a loss, a gradient, a log-probability or a reward; raised before any weight changes."""


class WorkerError(AgentLightningError):
    """A worker process died or failed; carries the worker's own words."""


class StaleAdapterError(AgentLightningError):
    """Completions were made by another adapter version than the one that is to be trained."""
