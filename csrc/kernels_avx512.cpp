// The kernels for processors with AVX-512 F, BW, VL and DQ.
#include "vector_avx512.h"

#include "all_kernels.h"

const lowrank::Kernels* lowrank::kernels_avx512() { return &ALL_KERNELS; }
