"""agentlightning: reinforcement learning of LLM agents whose runs cannot be lost."""

__version__ = "0.1.0"
