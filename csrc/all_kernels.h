// Every kernel, of the primitives of the vector_*.h that a kernels_*.cpp includes before this.
#pragma once

#include "attend_impl.h"
#include "codebook_impl.h"
#include "elementwise_impl.h"
#include "linear_backward_impl.h"
#include "linear_impl.h"
#include "linear_int16_impl.h"
#include "moments8bit_impl.h"
#include "rows_impl.h"
#include "softmax_impl.h"

namespace {

// In the order of lowrank::Kernels.
constexpr lowrank::Kernels ALL_KERNELS{
    quantize,
    dequantize,
    linear,
    linear_backward,
    products,
    linear_int16,
    attend_newest,
    softmax_cross_entropy,
    gather_rows,
    scatter_rows,
    rms_norm,
    rms_norm_backward,
    rotate,
    gated,
    gated_backward,
    adamw8bit,
    lion8bit,
};

}  // namespace
