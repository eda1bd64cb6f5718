// Half-precision numbers one at a time, where no vector is at hand.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return float_of_bits(uint32_t(bits) << 16); }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13) return float_of_bits(sign | 0x7f800000 | rest);  // infinite or NaN
    const float value = float_of_bits(rest) * 0x1p112f;                         // subnormals too
    return sign ? -value : value;
  }
};

// The nearest number with that many digits after the first, even where two are as near; least is
// the exponent of the smallest normal number, most the largest number.
inline float rounded_to(float v, int digits, int least, float most) {
  if (!(std::fabs(v) < INFINITY) || v == 0) return v;
  const int exponent = std::max(std::ilogb(v), least) - digits;
  const float nearest = std::ldexp(std::nearbyint(std::ldexp(v, -exponent)), exponent);
  return std::fabs(nearest) > most ? std::copysign(INFINITY, v) : nearest;
}
inline float rounded_to_bfloat16(float v) { return rounded_to(v, 7, -126, 0x1.fep127f); }
inline float rounded_to_float16(float v) { return rounded_to(v, 10, -14, 65504); }
