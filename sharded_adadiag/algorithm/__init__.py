"""Pure maths on plain tensors: bases, rotations and the moment rules.

Nothing here knows of ranks or frameworks. The rules are those of "Improving
Adaptive Moment Optimization via Preconditioner Diagonalization" (arXiv
2502.07488), Algorithms 1-3.
"""
