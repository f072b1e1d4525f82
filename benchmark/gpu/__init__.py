"""Step times, kernels and gaps on a GPU, against the floor of its machine."""
