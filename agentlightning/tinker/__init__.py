"""Doors two and three: a training client for loops of one's own, and the service that the `tinker` SDK talks to."""
