"""DeepSpeed, all of it: its flat partitions, its checkpoints, its way to name us."""
