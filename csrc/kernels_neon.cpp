// The kernels for AArch64, whose every processor has NEON.
#include "vector_neon.h"

#include "all_kernels.h"

const lowrank::Kernels* lowrank::kernels_neon() { return &ALL_KERNELS; }
