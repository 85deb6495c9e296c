// The kernels for any processor.
#include "vector_generic.h"

#include "all_kernels.h"

const lowrank::Kernels* lowrank::kernels_generic() { return &ALL_KERNELS; }
