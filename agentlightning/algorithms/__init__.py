"""The mathematics of reinforcement learning, pure: tensors [B, T] and a mask go in, tensors or (loss, metrics) leave.

Imports torch only, so every function can be read beside its paper and checked on three hand-made numbers. B is samples, T
response tokens (padded); a mask is bool or 0/1 float, true where the policy chose the token.
"""
