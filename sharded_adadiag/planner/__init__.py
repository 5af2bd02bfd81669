"""What a run will need, said before it is launched: ``sharded-adadiag plan``.

From the shapes of a model (`models`, `configs`) and how ranks share it (`mesh`) to a
plan (`plan.plan`), its figures (`figures`), and how they are shown (`table`, `plot`).
No process group, no weights, no accelerator.
"""
