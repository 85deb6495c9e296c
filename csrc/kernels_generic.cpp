// The kernels for any processor.
#include "vector_generic.h"

#include "attend_impl.h"
#include "moments8bit_impl.h"
#include "codebook_impl.h"
#include "elementwise_impl.h"
#include "linear_impl.h"
#include "linear_int16_impl.h"
#include "rows_impl.h"
#include "softmax_impl.h"

namespace lowrank {

const Kernels* kernels_generic() {
  static constexpr Kernels kernels{quantize,       dequantize,    linear,
                                   products,       linear_int16,  attend_newest,
                                   softmax_cross_entropy, gather_rows, scatter_rows,
                                   rms_norm,       rms_norm_backward, rotate,
                                   gated,          gated_backward, adamw8bit,
                                   lion8bit};
  return &kernels;
}

}  // namespace lowrank
