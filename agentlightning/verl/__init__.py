"""Door 1: the built-in loop behind `python -m agentlightning.verl`, in verl's words."""
