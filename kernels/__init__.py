"""The Triton kernels. Installed and imported as lowrank.kernels; one kernel file imports another by that name."""
