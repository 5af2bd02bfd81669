"""How each framework stores a parameter: logical shape, region, local tensor."""
