"""Ways to the potentials, by the two operators of a kernel."""
