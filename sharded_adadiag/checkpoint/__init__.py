"""The saved form: full logical tensors by parameter, whatever the layout.

Between ranks a state tensor lies where the plan put it: on an owner, in blocks, in flat
ranges. In a state dict it is a DTensor of the full logical shape, sharded by rows
over the optimizer's ranks, so that ``torch.distributed.checkpoint`` writes every
tensor once, in pieces, and reads it for any other layout and number of ranks.
"""
