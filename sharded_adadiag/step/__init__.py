"""One step: what it knows, and the way of a round of matrices through its stages."""
