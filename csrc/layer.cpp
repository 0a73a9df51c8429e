// What a decoder layer does between its matrix products, forward only: RMS norm, rotary positions, gated
// SiLU. Rows are float32 or bfloat16; arithmetic is float32, and each result is rounded once.
//
// One thread does one row, in an order that depends on the row alone: results are bit for bit the same for
// any number of threads and rows, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "arrays.h"
#include "dispatch.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

// Sets out to s / sqrt(mean(s^2) + epsilon) * weight with s = x + delta, which goes to sum; delta and sum may
// be null. The norm is that of s as it is stored.
template <int W, typename T>
INLINE void norm(const T* x, const T* delta, const T* weight, int64_t n, float epsilon, T* sum, T* out) {
    constexpr int vectors = kLanes / W;
    Floats<W> squares[vectors] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int v = 0; v < vectors; ++v) {
            Floats<W> s = load<W>(x + i + v * W);
            if (delta != nullptr) {
                s = as_stored<T, W>(s + load<W>(delta + i + v * W));
                store<W>(sum + i + v * W, s);
            }
            squares[v] += s * s;
        }
    }
    float lanes[kLanes], tail = 0;
    for (int v = 0; v < vectors; ++v) store<W>(lanes + v * W, squares[v]);
    for (; i < n; ++i) {
        if (delta != nullptr) sum[i] = stored<T>(number(x[i]) + number(delta[i]));
        const float s = number(delta == nullptr ? x[i] : sum[i]);
        tail = std::fma(s, s, tail);
    }
    const float scale = 1 / std::sqrt((lane_sum(lanes) + tail) / static_cast<float>(n) + epsilon);
    const T* from = delta == nullptr ? x : sum;
    for (i = 0; i + W <= n; i += W) store<W>(out + i, load<W>(from + i) * scale * load<W>(weight + i));
    for (; i < n; ++i) out[i] = stored<T>(number(from[i]) * scale * number(weight[i]));
}

// Turns W numbers of both halves of a head: x cos + (-second, first) sin. AVX2 and AVX-512 fuse the same
// products and sums here.
template <int W, typename T>
INLINE void rotate_part(const T* first, const T* second, const T* cos, const T* sin, int64_t half, T* out) {
    const Floats<W> a = load<W>(first), b = load<W>(second);
    const Floats<W> x1 = a * load<W>(cos), x2 = b * load<W>(cos + half);
    store<W>(out, x1 - b * load<W>(sin));
    store<W>(out + half, x2 + a * load<W>(sin + half));
}

// Turns all numbers of both halves of a head x [d]; the last ones stand in vectors filled up with zeros.
template <int W, typename T>
INLINE void rotate(const T* x, const T* cos, const T* sin, int64_t d, T* out) {
    const int64_t half = d / 2;
    int64_t i = 0;
    for (; i + W <= half; i += W) rotate_part<W>(x + i, x + half + i, cos + i, sin + i, half, out + i);
    if (i == half) return;
    T padded[4][2 * W] = {};
    const T* from[] = {x, cos, sin};
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

// Sets out [n] to gate / (1 + exp(-gate)) * up of gate_up [2 n].
template <int W, typename T>
INLINE void gated(const T* gate_up, int64_t n, T* out) {
    T padded[3][W] = {};
    for (int64_t i = 0; i < n; i += W) {
        const int64_t left = n - i < W ? n - i : W;
        const T *g = gate_up + i, *u = gate_up + n + i;
        if (left < W) {
            std::memcpy(padded[0], g, left * sizeof(T));
            std::memcpy(padded[1], u, left * sizeof(T));
            g = padded[0], u = padded[1];
        }
        const Floats<W> gate = load<W>(g);
        const Floats<W> e = exp_negative<W>(gate < 0.0f ? gate : -gate);
        const Floats<W> share = (gate < 0.0f ? e : spread<W>(1.0f)) / (e + 1.0f);
        const Floats<W> y = gate * share * load<W>(u);
        store<W>(left == W ? out + i : padded[2], y);
        if (left < W) std::memcpy(out + i, padded[2], left * sizeof(T));
    }
}

template <typename T>
struct Kernels {
    void (*norm)(const T*, const T*, const T*, int64_t, float, T*, T*);
    void (*rotate)(const T*, const T*, const T*, int64_t, T*);
    void (*gated)(const T*, int64_t, T*);
};

#define KERNELS(name, target, width)                                                                         \
    template <typename T>                                                                                    \
    target void norm_##name(const T* x, const T* delta, const T* weight, int64_t n, float epsilon, T* sum,   \
                            T* out) {                                                                        \
        norm<width>(x, delta, weight, n, epsilon, sum, out);                                                 \
    }                                                                                                        \
    template <typename T>                                                                                    \
    target void rotate_##name(const T* x, const T* cos, const T* sin, int64_t d, T* out) {                   \
        rotate<width>(x, cos, sin, d, out);                                                                  \
    }                                                                                                        \
    template <typename T>                                                                                    \
    target void gated_##name(const T* gate_up, int64_t n, T* out) {                                          \
        gated<width>(gate_up, n, out);                                                                       \
    }                                                                                                        \
    template <typename T>                                                                                    \
    constexpr Kernels<T> k_##name = {norm_##name<T>, rotate_##name<T>, gated_##name<T>};

#ifdef AVX512
KERNELS(avx512, AVX512, 16)
KERNELS(avx2, AVX2, 8)
template <typename T>
constexpr Versions<Kernels<T>> kVersions = {{k_avx512<T>, k_avx2<T>}};
#else
KERNELS(generic, , 4)
template <typename T>
constexpr Versions<Kernels<T>> kVersions = {{k_generic<T>}};
#endif

template <typename T>
using Matrix = Array<T, -1, -1>;
template <typename T>
using Vector = Array<T, -1>;
template <typename T>
using Heads = Array<T, -1, -1, -1>;

template <typename T>
void rms_norm(const Matrix<T>& x, const std::optional<Matrix<T>>& delta, const Vector<T>& weight,
              float epsilon, const std::optional<Matrix<T>>& sum, const Matrix<T>& out, int threads,
              const char* instructions) {
    const int64_t rows = x.shape(0), n = x.shape(1);
    const auto like = [&](const Matrix<T>& y) {
        return int64_t(y.shape(0)) == rows && int64_t(y.shape(1)) == n;
    };
    check(int64_t(weight.shape(0)) == n && like(out) && (!delta || (sum && like(*delta) && like(*sum))),
          "x, delta, sum, out [R, N]; weight [N]");
    const Kernels<T>& kernels = kVersions<T>.of(instructions);
    const T *xs = x.data(), *deltas = delta ? delta->data() : nullptr, *w = weight.data();
    T *sums = delta ? sum->data() : nullptr, *outs = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        kernels.norm(xs + r * n, deltas ? deltas + r * n : nullptr, w, n, epsilon,
                     sums ? sums + r * n : nullptr, outs + r * n);
}

template <typename T>
void split_rotated(const Matrix<T>& qkv, const Matrix<T>& cos, const Matrix<T>& sin, const Heads<T>& q,
                   const Heads<T>& k, const Heads<T>& v, int threads, const char* instructions) {
    const int64_t rows = qkv.shape(0), width = qkv.shape(1), d = q.shape(2), heads = q.shape(1),
                  kv_heads = k.shape(1);
    const size_t sizes[][2] = {{cos.shape(0), qkv.shape(0)}, {sin.shape(0), qkv.shape(0)},
                               {q.shape(0), qkv.shape(0)},   {k.shape(0), qkv.shape(0)},
                               {v.shape(0), qkv.shape(0)},   {v.shape(1), k.shape(1)},
                               {k.shape(2), q.shape(2)},     {v.shape(2), q.shape(2)},
                               {cos.shape(1), q.shape(2)},   {sin.shape(1), q.shape(2)}};
    check_equal(sizes);
    check(width == (heads + 2 * kv_heads) * d && d % 2 == 0,
          "qkv [R, (H + 2 Hkv) d] with an even d is wanted");
    const Kernels<T>& kernels = kVersions<T>.of(instructions);
    const T *from = qkv.data(), *cosines = cos.data(), *sines = sin.data();
    T *qs = q.data(), *ks = k.data(), *vs = v.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T* x = from + r * width;
        for (int64_t h = 0; h < heads; ++h, x += d)
            kernels.rotate(x, cosines + r * d, sines + r * d, d, qs + (r * heads + h) * d);
        for (int64_t h = 0; h < kv_heads; ++h, x += d)
            kernels.rotate(x, cosines + r * d, sines + r * d, d, ks + (r * kv_heads + h) * d);
        std::memcpy(vs + r * kv_heads * d, x, kv_heads * d * sizeof(T));
    }
}

template <typename T>
void gated_silu(const Matrix<T>& gate_up, const Matrix<T>& out, int threads, const char* instructions) {
    const int64_t rows = out.shape(0), n = out.shape(1);
    check(gate_up.shape(0) == out.shape(0) && int64_t(gate_up.shape(1)) == 2 * n,
          "gate_up [R, 2 N] and out [R, N] are wanted");
    const Kernels<T>& kernels = kVersions<T>.of(instructions);
    const T* from = gate_up.data();
    T* to = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) kernels.gated(from + r * 2 * n, n, to + r * n);
}

template <typename T>
void bind_layer_of(nb::module_& m) {
    m.def("rms_norm", &rms_norm<T>, nb::arg("x"), nb::arg("delta").none(), nb::arg("weight"),
          nb::arg("epsilon"), nb::arg("sum").none(), nb::arg("out"), nb::arg("threads"),
          nb::arg("instructions"));
    m.def("split_rotated", &split_rotated<T>, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("q"),
          nb::arg("k"), nb::arg("v"), nb::arg("threads"), nb::arg("instructions"));
    m.def("gated_silu", &gated_silu<T>, nb::arg("gate_up"), nb::arg("out"), nb::arg("threads"),
          nb::arg("instructions"));
}

}  // namespace

void bind_layer(nb::module_& m) {
    bind_layer_of<float>(m);
    bind_layer_of<Bfloat16>(m);
}
