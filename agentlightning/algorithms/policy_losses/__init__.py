"""What the policy minimises: one small file a loss, each a pure function (inputs, settings) -> (loss, metrics).

`names.POLICY_LOSSES` is the table from verl's names to them. Loss and metrics are divided by the counts of the whole
mini-batch, so both add up over micro-batches and workers.
"""
