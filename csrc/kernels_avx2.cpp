// The kernels for processors with AVX2, FMA and F16C.
#include "vector_avx2.h"

#include "all_kernels.h"

const lowrank::Kernels* lowrank::kernels_avx2() { return &ALL_KERNELS; }
