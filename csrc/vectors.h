// Vectors of W floats for GCC and Clang, and functions of them that the kernels share. Each kernel's file
// includes it, and no name leaves that file. Arithmetic is done in float32; numbers in memory are float32 or
// bfloat16.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bfloat16.h"

namespace {

// Partial sums are kept in this many lanes and added in one order, whatever the vector width W is.
constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <int W>
struct Vectors {
    typedef float Floats __attribute__((vector_size(4 * W)));
    typedef int32_t Ints __attribute__((vector_size(4 * W)));
    typedef uint32_t Words __attribute__((vector_size(4 * W)));
    typedef uint16_t Halves __attribute__((vector_size(2 * W)));
};
template <int W>
using Floats = typename Vectors<W>::Floats;

#define INLINE static inline __attribute__((always_inline))

template <int W>
INLINE Floats<W> load(const float* from) {
    Floats<W> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <int W>
INLINE void store(float* to, const Floats<W>& x) {
    std::memcpy(to, &x, sizeof x);
}

template <int W>
INLINE Floats<W> load(const Bfloat16* from) {
    typename Vectors<W>::Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Floats<W>)(__builtin_convertvector(x, typename Vectors<W>::Words) << 16);
}

// Returns the bits of x rounded to the nearest bfloat16, to the even one of two, in the upper half of each
// word. A NaN stays one.
template <int W>
INLINE typename Vectors<W>::Words rounded_bits(const Floats<W>& x) {
    using Words = typename Vectors<W>::Words;
    const Words bits = (Words)x, nearest = bits + (0x7fff + ((bits >> 16) & 1));
    return (x == x ? nearest : bits | 0x400000) & 0xffff0000;
}

template <int W>
INLINE void store(Bfloat16* to, const Floats<W>& x) {
    const auto halves = __builtin_convertvector(rounded_bits<W>(x) >> 16, typename Vectors<W>::Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// Returns x as it will be read again where it is stored as T.
template <typename T, int W>
INLINE Floats<W> as_stored(const Floats<W>& x) {
    if constexpr (sizeof(T) == sizeof(float)) return x;
    return (Floats<W>)rounded_bits<W>(x);
}

// The same for single numbers.
INLINE float number(float x) { return x; }
INLINE float number(Bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <typename T>
INLINE T stored(float x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return x;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        bits = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
        return {static_cast<uint16_t>(bits >> 16)};
    }
}

template <int W>
INLINE Floats<W> spread(float x) {
    return x - Floats<W>{};
}

// Splits exp(x) into (1 + rest) * power for -87.3 <= x <= 0: x = k ln 2 + r with |r| <= ln(2) / 2, power =
// 2^k, and 1 + rest = exp(r) = 1 + r + r^2 q(r), q the least-error polynomial of degree 4 (relative error
// 3e-9).
template <int W>
INLINE void split_exp(const Floats<W>& x, Floats<W>& rest, Floats<W>& power) {
    using Ints = typename Vectors<W>::Ints;
    constexpr float round = 12582912.0f;
    const Floats<W> shifted = x * 1.44269504f + round;
    const Floats<W> k = shifted - round;
    // ln 2 stands in two parts, and k times the first is exact.
    const Floats<W> r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    Floats<W> q = r * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    rest = q * (r * r) + r;
    const Ints exponent = ((Ints)shifted - (Ints)spread<W>(round) + 127) << 23;
    power = (Floats<W>)exponent;
}

constexpr float kSmallestExp = -87.3f;

// Returns exp(x) for x <= 0 to 2 units in the last place; exactly 0 below exp(-87.3), NaN for NaN.
template <int W>
INLINE Floats<W> exp_negative(const Floats<W>& x) {
    Floats<W> rest, power;
    split_exp<W>(x < kSmallestExp ? spread<W>(kSmallestExp) : x, rest, power);
    return x < kSmallestExp ? Floats<W>{} : (rest + 1.0f) * power;
}

// Returns tanh(x) to a few units in the last place, NaN for NaN: with m = exp(-2 |x|) - 1, |tanh x| = -m / (m
// + 2).
template <int W>
INLINE Floats<W> tanh_of(const Floats<W>& x) {
    const Floats<W> twice = x < 0.0f ? x * 2.0f : x * -2.0f;
    Floats<W> rest, power;
    split_exp<W>(twice < kSmallestExp ? spread<W>(kSmallestExp) : twice, rest, power);
    const Floats<W> m = rest * power + (power - 1.0f);
    const Floats<W> size = m / (m + 2.0f);
    return x < 0.0f ? size : -size;
}

// Returns whether any lane of a comparison holds.
template <int W, typename Mask>
INLINE bool any(const Mask& mask) {
    int64_t words[W / 2], joined = 0;
    std::memcpy(words, &mask, sizeof words);
    for (int j = 0; j < W / 2; ++j) joined |= words[j];
    return joined != 0;
}

template <int W>
INLINE float row_max(const float* row, int64_t columns) {
    constexpr int chains = 4;
    Floats<W> m[chains];
    for (int j = 0; j < chains; ++j) m[j] = spread<W>(-kInfinity);
    int64_t i = 0;
    for (; i + chains * W <= columns; i += chains * W) {
        for (int j = 0; j < chains; ++j) {
            const Floats<W> x = load<W>(row + i + j * W);
            m[j] = m[j] > x ? m[j] : x;
        }
    }
    float result = -kInfinity;
    for (int j = 0; j < chains; ++j)
        for (int lane = 0; lane < W; ++lane) result = m[j][lane] > result ? m[j][lane] : result;
    for (; i < columns; ++i) result = row[i] > result ? row[i] : result;
    return result;
}

// Returns the sum of kLanes floats, added in one order for every W.
INLINE float lane_sum(const float* lanes) {
    const Floats<4> four = (load<4>(lanes) + load<4>(lanes + 8)) + (load<4>(lanes + 4) + load<4>(lanes + 12));
    return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace
