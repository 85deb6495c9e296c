// What a block of an 8-bit optimizer's step reads besides its tensors; moments8bit.cpp makes it.
#pragma once

#include "lowrank.h"

namespace lowrank {

// A map's codes are in the order of their values, and neighbours differ by one. So the code nearest
// to s is the number of midpoints between neighbours below |s|, and the first 16 bits of |s| tell
// it but for the last comparison: bins[first 16 bits] = that number below every such |s| << 16 |
// the last 16 bits of the midpoint among them (0xFFFF, which nothing exceeds, if there is none).
constexpr uint32_t LOWEST = 0x34800000;   // 2^-22: no midpoint is below it; smaller |s| count as it
constexpr uint32_t HIGHEST = 0x3F800000;  // 1
constexpr int BINS = ((HIGHEST - LOWEST) >> 16) + 1;

struct MomentMap {
  const float* values;  // of the 256 codes
  int32_t zero;         // the code of 0
  uint32_t bins[BINS];  // from |s| to how far its code is from `zero`
};

constexpr int MOMENT_BLOCK = 256;  // elements of a row that share a scale; the last may be fewer

struct AdamwStep {
  const MomentMap& m;
  const MomentMap& v;
  const lowrank_adamw8bit_coefficients& by;
};

struct LionStep {
  const MomentMap& m;
  const lowrank_lion8bit_coefficients& by;
};

}  // namespace lowrank
