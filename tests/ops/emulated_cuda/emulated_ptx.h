// csrc/cuda/ptx.h for the emulator: shared memory is memory, tensor cores are a loop.
#pragma once

#include "cuda/common.h"

namespace lowrank_cuda {

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) {
  return reinterpret_cast<SharedAddress>(pointer);
}
template <class T>
void load_shared(SharedAddress at, T* to) {
  *to = *reinterpret_cast<const T*>(at);
}

// Half `half` of register `place` of what a lane shows, as a number.
template <class T>
float element(const unsigned char* shown, int lane, int place, int half) {
  T value;
  memcpy(&value, shown + lane * emulation::kMostBytes + 4 * place + 2 * half, 2);
  return lowrank_cuda::to_float(value);
}

// By the layout that PTX's manual gives; the sum in float64, rounded once.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4], T) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const int lane = int(threadIdx.x % 32);
  const unsigned char* shown = emulation::exchange(mine, sizeof mine);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const float left =
          element<T>(shown, row % 8 * 4 + holder, row / 8 + k / 8 * 2, k % 2);
      const float right = element<T>(shown, column * 4 + holder, 4 + k / 8, k % 2);
      sum += double(left) * double(right);
    }
    d[i] = float(sum);
  }
}

}  // namespace lowrank_cuda
