"""Who owns which matrix, and which bytes go where: integers and names only.

[Note: words]

* *full matrix*: the whole logical weight as ``rows x cols``.
* *region*: the part of a full matrix that a rank holds: a `Box` or a `FlatRange`.
  Equal regions on several ranks are *replicas*; the distinct ones tile the matrix.
* *piece*: a tensor with the entries of a region.
* *owner*: the one rank that computes a matrix's bases.
* *stage*: a distribution of a matrix over ranks in which one or both rotations
  are applied. A *route* is the stages a gradient passes, from the layout in which
  the framework stores it to the one in which the moments live, and back.
* *hop*: the move between two stages. *Exchange*: one fused all-to-all that makes
  one hop of all matrices of a *bucket*.

Everything here is computed from the same inputs on every rank, without
communication, and comes out the same.
"""
