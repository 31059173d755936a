"""Gibbs kernels between clouds: soft minimum and pull, each way to hold the costs."""
