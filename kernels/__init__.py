"""The Triton kernels, installed and imported as lowrank.kernels: by that name alone, here too."""
