// CUDA's 16-bit types, by the conversions of the CPU kernels.
#pragma once

#include "cuda_runtime.h"

namespace emulation {
#include "scalar.h"
}

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) { return emulation::to_float(emulation::Half{v.bits}); }
inline __half __float2half_rn(float v) {
  emulation::Half to;
  emulation::from_float(v, &to);
  return {to.bits};
}
