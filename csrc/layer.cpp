// What a decoder layer does between its matrix products, forward only: RMS norm, rotary positions, gated SiLU.
//
// One thread does one row, in an order that depends on the row alone: results are bit for bit the same for any number of threads and rows,
// and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

// out = s / sqrt(mean(s^2) + epsilon) * weight with s = x + delta, which is stored in sum; delta and sum may be null.
template <int W>
INLINE void norm(const float* x, const float* delta, const float* weight, int64_t n, float epsilon, float* sum, float* out) {
    constexpr int vectors = kLanes / W;
    Floats<W> squares[vectors] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int v = 0; v < vectors; ++v) {
            Floats<W> s = load<W>(x + i + v * W);
            if (delta != nullptr) {
                s += load<W>(delta + i + v * W);
                store<W>(sum + i + v * W, s);
            }
            squares[v] += s * s;
        }
    }
    float lanes[kLanes], tail = 0;
    for (int v = 0; v < vectors; ++v) store<W>(lanes + v * W, squares[v]);
    for (; i < n; ++i) {
        float s = x[i];
        if (delta != nullptr) sum[i] = s = s + delta[i];
        tail = std::fma(s, s, tail);
    }
    const float scale = 1 / std::sqrt((lane_sum(lanes) + tail) / static_cast<float>(n) + epsilon);
    const float* from = delta == nullptr ? x : sum;
    for (i = 0; i + W <= n; i += W) store<W>(out + i, load<W>(from + i) * scale * load<W>(weight + i));
    for (; i < n; ++i) out[i] = from[i] * scale * weight[i];
}

// W numbers of both halves of a head: x cos + (-second, first) sin. Two lengths of vectors make the same products and sums of them.
template <int W>
INLINE void rotate_part(const float* first, const float* second, const float* cos, const float* sin, int64_t half, float* out) {
    const Floats<W> a = load<W>(first), b = load<W>(second);
    const Floats<W> x1 = a * load<W>(cos), x2 = b * load<W>(cos + half);
    store<W>(out, x1 - b * load<W>(sin));
    store<W>(out + half, x2 + a * load<W>(sin + half));
}

// All numbers of both halves of a head x [d]; the last ones in vectors filled up with zeros.
template <int W>
INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t d, float* out) {
    const int64_t half = d / 2;
    int64_t i = 0;
    for (; i + W <= half; i += W) rotate_part<W>(x + i, x + half + i, cos + i, sin + i, half, out + i);
    if (i == half) return;
    float padded[4][2 * W] = {};
    const float* from[] = {x, cos, sin};
    for (int64_t j = 0; j < half - i; ++j)
        for (int part = 0; part < 3; ++part) {
            padded[part][j] = from[part][i + j];
            padded[part][W + j] = from[part][half + i + j];
        }
    rotate_part<W>(padded[0], padded[0] + W, padded[1], padded[2], W, padded[3]);
    for (int64_t j = 0; j < half - i; ++j) {
        out[i + j] = padded[3][j];
        out[half + i + j] = padded[3][W + j];
    }
}

// gate / (1 + exp(-gate)) * up of gate_up [2 n].
template <int W>
INLINE void gated(const float* gate_up, int64_t n, float* out) {
    float padded[2][W];
    for (int64_t i = 0; i < n; i += W) {
        const int64_t left = n - i < W ? n - i : W;
        const float *g = gate_up + i, *u = gate_up + n + i;
        if (left < W) {
            for (int j = 0; j < W; ++j) {
                padded[0][j] = j < left ? g[j] : 0;
                padded[1][j] = j < left ? u[j] : 0;
            }
            g = padded[0], u = padded[1];
        }
        const Floats<W> gate = load<W>(g);
        const Floats<W> e = exp_negative<W>(gate < 0.0f ? gate : -gate);
        const Floats<W> share = (gate < 0.0f ? e : spread<W>(1.0f)) / (e + 1.0f);
        const Floats<W> y = gate * share * load<W>(u);
        if (left == W) {
            store<W>(out + i, y);
        } else {
            for (int j = 0; j < left; ++j) out[i + j] = y[j];
        }
    }
}

struct Kernels {
    void (*norm)(const float*, const float*, const float*, int64_t, float, float*, float*);
    void (*rotate)(const float*, const float*, const float*, int64_t, float*);
    void (*gated)(const float*, int64_t, float*);
};

#define KERNELS(name, target, width)                                                                                          \
    target void norm_##name(const float* x, const float* delta, const float* weight, int64_t n, float epsilon, float* sum,    \
                            float* out) {                                                                                     \
        norm<width>(x, delta, weight, n, epsilon, sum, out);                                                                  \
    }                                                                                                                         \
    target void rotate_##name(const float* x, const float* cos, const float* sin, int64_t d, float* out) {                    \
        rotate<width>(x, cos, sin, d, out);                                                                                   \
    }                                                                                                                         \
    target void gated_##name(const float* gate_up, int64_t n, float* out) { gated<width>(gate_up, n, out); }                  \
    constexpr Kernels k_##name = {norm_##name, rotate_##name, gated_##name};

#if defined(__x86_64__) || defined(__i386__)
KERNELS(avx512, AVX512, 16)
KERNELS(avx2, AVX2, 8)
#else
KERNELS(generic, , 4)
#endif

const Kernels& kernels_of(const std::string& instructions) {
#if defined(__x86_64__) || defined(__i386__)
    if (instructions == "avx512") return k_avx512;
    if (instructions == "avx2") return k_avx2;
#else
    if (instructions == "generic") return k_generic;
#endif
    throw std::invalid_argument("this processor does not run these instructions");
}

using Matrix = Array<float, -1, -1>;
using Vector = Array<float, -1>;
using Heads = Array<float, -1, -1, -1>;

void check(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

void rms_norm(const Matrix& x, const std::optional<Matrix>& delta, const Vector& weight, float epsilon, const std::optional<Matrix>& sum,
              const Matrix& out, int threads, const char* instructions) {
    const int64_t rows = x.shape(0), n = x.shape(1);
    const auto like = [&](const Matrix& y) { return int64_t(y.shape(0)) == rows && int64_t(y.shape(1)) == n; };
    check(int64_t(weight.shape(0)) == n && like(out) && (!delta || (sum && like(*delta) && like(*sum))), "x, delta, sum, out [R, N]; weight [N]");
    const Kernels& kernels = kernels_of(instructions);
    const float *xs = x.data(), *deltas = delta ? delta->data() : nullptr, *w = weight.data();
    float *sums = delta ? sum->data() : nullptr, *outs = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        kernels.norm(xs + r * n, deltas ? deltas + r * n : nullptr, w, n, epsilon, sums ? sums + r * n : nullptr, outs + r * n);
}

void split_rotated(const Matrix& qkv, const Matrix& cos, const Matrix& sin, const Heads& q, const Heads& k, const Heads& v, int threads,
                   const char* instructions) {
    const int64_t rows = qkv.shape(0), width = qkv.shape(1), d = q.shape(2), heads = q.shape(1), kv_heads = k.shape(1);
    const size_t sizes[][2] = {{cos.shape(0), qkv.shape(0)}, {sin.shape(0), qkv.shape(0)}, {q.shape(0), qkv.shape(0)},
                               {k.shape(0), qkv.shape(0)},   {v.shape(0), qkv.shape(0)},   {v.shape(1), k.shape(1)},
                               {k.shape(2), q.shape(2)},     {v.shape(2), q.shape(2)},     {cos.shape(1), q.shape(2)},
                               {sin.shape(1), q.shape(2)}};
    for (const auto& pair : sizes) check(pair[0] == pair[1], "shapes do not agree");
    check(width == (heads + 2 * kv_heads) * d && d % 2 == 0, "qkv [R, (H + 2 Hkv) d] with an even d is wanted");
    const Kernels& kernels = kernels_of(instructions);
    const float *from = qkv.data(), *cosines = cos.data(), *sines = sin.data();
    float *qs = q.data(), *ks = k.data(), *vs = v.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* x = from + r * width;
        for (int64_t h = 0; h < heads; ++h, x += d)
            kernels.rotate(x, cosines + r * d, sines + r * d, d, qs + (r * heads + h) * d);
        for (int64_t h = 0; h < kv_heads; ++h, x += d)
            kernels.rotate(x, cosines + r * d, sines + r * d, d, ks + (r * kv_heads + h) * d);
        std::memcpy(vs + r * kv_heads * d, x, kv_heads * d * sizeof(float));
    }
}

void gated_silu(const Matrix& gate_up, const Matrix& out, int threads, const char* instructions) {
    const int64_t rows = out.shape(0), n = out.shape(1);
    check(gate_up.shape(0) == out.shape(0) && int64_t(gate_up.shape(1)) == 2 * n, "gate_up [R, 2 N] and out [R, N] are wanted");
    const Kernels& kernels = kernels_of(instructions);
    const float* from = gate_up.data();
    float* to = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) kernels.gated(from + r * 2 * n, n, to + r * n);
}

}  // namespace

void bind_layer(nb::module_& m) {
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("delta").none(), nb::arg("weight"), nb::arg("epsilon"), nb::arg("sum").none(),
          nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
    m.def("split_rotated", &split_rotated, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
          nb::arg("threads"), nb::arg("instructions"));
    m.def("gated_silu", &gated_silu, nb::arg("gate_up"), nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
}
