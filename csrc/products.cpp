// The product of a few rows with a large matrix: its elements are read once, at the speed of memory.
//
// Every output is summed in one order, that of its row and column alone: results are bit for bit the same for any number of threads and
// rows, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "vectors.h"

namespace nb = nanobind;

namespace {

// Dot products of R rows of x and C rows of w, all [width] with the strides given: out[r * ldo + c] (+ bias[c]).
template <int W, int R, int C>
INLINE void dots(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t width, const float* bias, float* out, int64_t ldo) {
    constexpr int vectors = kLanes / W;
    Floats<W> sums[R][C][vectors] = {};
    const auto add = [&](const float* const (&xs)[R], const float* const (&ws)[C]) __attribute__((always_inline)) {
        for (int v = 0; v < vectors; ++v) {
            Floats<W> own[C];
            for (int c = 0; c < C; ++c) own[c] = load<W>(ws[c] + v * W);
            for (int r = 0; r < R; ++r) {
                const Floats<W> a = load<W>(xs[r] + v * W);
                for (int c = 0; c < C; ++c) sums[r][c][v] += a * own[c];
            }
        }
    };
    const float *xs[R], *ws[C];
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        for (int r = 0; r < R; ++r) xs[r] = x + r * ldx + i;
        for (int c = 0; c < C; ++c) ws[c] = w + c * ldw + i;
        add(xs, ws);
    }
    if (i < width) {
        float padded[R + C][kLanes] = {};
        const size_t left = (width - i) * sizeof(float);
        for (int r = 0; r < R; ++r) std::memcpy(padded[r], x + r * ldx + i, left), xs[r] = padded[r];
        for (int c = 0; c < C; ++c) std::memcpy(padded[R + c], w + c * ldw + i, left), ws[c] = padded[R + c];
        add(xs, ws);
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            float lanes[kLanes];
            for (int v = 0; v < vectors; ++v) store<W>(lanes + v * W, sums[r][c][v]);
            out[r * ldo + c] = lane_sum(lanes) + (bias != nullptr ? bias[c] : 0.0f);
        }
    }
}

// All rows with C rows of w, which stay in cache from the first group of rows to the last.
template <int W, int R, int C>
INLINE void columns(const float* x, int64_t rows, const float* w, int64_t width, const float* bias, float* out, int64_t ldo) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) dots<W, R, C>(x + r * width, width, w, width, width, bias, out + r * ldo, ldo);
    for (; r < rows; ++r) dots<W, 1, C>(x + r * width, width, w, width, width, bias, out + r * ldo, ldo);
}

using Columns = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*, int64_t);

struct Kernels {
    int together;  // columns that `several` makes
    Columns several;
    Columns one;
};

#define KERNELS(name, target, width, rows, count)                                                                                \
    target void several_##name(const float* x, int64_t n, const float* w, int64_t k, const float* bias, float* out, int64_t ldo) { \
        columns<width, rows, count>(x, n, w, k, bias, out, ldo);                                                                 \
    }                                                                                                                            \
    target void one_##name(const float* x, int64_t n, const float* w, int64_t k, const float* bias, float* out, int64_t ldo) {   \
        columns<width, rows, 1>(x, n, w, k, bias, out, ldo);                                                                     \
    }                                                                                                                            \
    constexpr Kernels k_##name = {count, several_##name, one_##name};

#if defined(__x86_64__) || defined(__i386__)
KERNELS(avx512, AVX512, 16, 8, 2)
KERNELS(avx2, AVX2, 8, 4, 1)
#else
KERNELS(generic, , 4, 2, 1)
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

using Matrix = nb::ndarray<float, nb::shape<-1, -1>, nb::device::cpu, nb::c_contig>;
using Vector = nb::ndarray<float, nb::shape<-1>, nb::device::cpu, nb::c_contig>;

void few_rows(const Matrix& x, const Matrix& weight, const std::optional<Vector>& bias, const Matrix& out, int threads,
              const char* instructions) {
    const int64_t rows = x.shape(0), width = x.shape(1), count = weight.shape(0);
    if (int64_t(weight.shape(1)) != width || int64_t(out.shape(0)) != rows || int64_t(out.shape(1)) != count ||
        (bias && int64_t(bias->shape(0)) != count))
        throw std::invalid_argument("x [R, K], weight [N, K], bias [N] and out [R, N] are wanted");
    const Kernels& kernels = kernels_of(instructions);
    const float *xs = x.data(), *ws = weight.data(), *add = bias ? bias->data() : nullptr;
    float* outs = out.data();
    const int64_t groups = (count + kernels.together - 1) / kernels.together;
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * kernels.together, end = first + kernels.together < count ? first + kernels.together : count;
        if (end - first == kernels.together) {
            kernels.several(xs, rows, ws + first * width, width, add ? add + first : nullptr, outs + first, count);
        } else {
            for (int64_t c = first; c < end; ++c) kernels.one(xs, rows, ws + c * width, width, add ? add + c : nullptr, outs + c, count);
        }
    }
}

}  // namespace

void bind_products(nb::module_& m) {
    m.def("few_rows", &few_rows, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("threads"),
          nb::arg("instructions"));
}
