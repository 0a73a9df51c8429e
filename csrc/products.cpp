// Products of rows with a large matrix, whose elements are read once. `few_rows` sums along its rows as they
// lie, at the speed of memory. `panels` lays some of its rows at a time out as columns of vectors in cache,
// which pays where many rows share them; it takes a matrix that lies column by column too, and can add the
// product to a sum. `pairs` does the same for bfloat16, with float32 sums: two numbers of a row that stand
// side by side are taken for one of 32 bits, and multiplied together.
//
// Each sums every output in one order, that of its row and column alone: results are bit for bit the same for
// any number of threads and rows, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <optional>

#include "arrays.h"
#include "dispatch.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

// Sums the lanes of each of R x C vectors to out [R][C], in the order of `lane_sum` whatever the width.
template <int W, int R, int C>
INLINE void totals(const Floats<W> (&sums)[R][C][kLanes / W], float* out) {
    for (int i = 0; i < R * C; ++i) {
        float lanes[kLanes];
        for (int v = 0; v < kLanes / W; ++v) store<W>(lanes + v * W, sums[i / C][i % C][v]);
        out[i] = lane_sum(lanes);
    }
}

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE8 SHUFFLE
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Vectors<16>::Ints{__VA_ARGS__})
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, Vectors<8>::Ints{__VA_ARGS__})
#endif

// Does the same for sixteen vectors together: each step adds the halves of two vectors and packs them into
// one.
INLINE void totals_of_sixteen(const Floats<16> (&sums)[8][2][1], float* out) {
    Floats<16> x[16];
    for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 2; ++c) x[r / 2 + 8 * (r % 2) + 4 * c] = sums[r][c][0];
    for (int i = 0; i < 8; ++i) {
        const Floats<16>&a = x[2 * i], &b = x[2 * i + 1];
        x[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; ++i) {
        const Floats<16>&a = x[2 * i], &b = x[2 * i + 1];
        x[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; ++i) {
        const Floats<16>&a = x[2 * i], &b = x[2 * i + 1];
        x[i] = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    const Floats<16>&a = x[0], &b = x[1];
    store<16>(out, SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
                       SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31));
}

// Turns rows into columns.
INLINE void transpose(Floats<16> (&x)[16]) {
    Floats<16> y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = SHUFFLE(x[i], x[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        y[i + 1] = SHUFFLE(x[i], x[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < 16; i += i % 2 ? 3 : 1) {
        x[i] = SHUFFLE(y[i], y[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 2] = SHUFFLE(y[i], y[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int i = 0; i < 16; i += i % 4 == 3 ? 5 : 1) {
        y[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        y[i + 4] = SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    for (int i = 0; i < 8; ++i) {
        x[i] = SHUFFLE(y[i], y[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[i + 8] = SHUFFLE(y[i], y[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

INLINE void transpose(Floats<8> (&x)[8]) {
    Floats<8> y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = SHUFFLE8(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = SHUFFLE8(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += i % 2 ? 3 : 1) {
        x[i] = SHUFFLE8(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[i + 2] = SHUFFLE8(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        y[i] = SHUFFLE8(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = SHUFFLE8(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; ++i) x[i] = y[i];
}

// w is asked for so many floats ahead, because two rows side by side are too short for the processor to see
// where the reads go.
constexpr int64_t kAhead = 2048;

// Multiplies R packed rows with C rows of w: out[R][C].
template <int W, int R, int C>
INLINE void dots(const float* x, const float* w, int64_t width, float* out) {
    constexpr int vectors = kLanes / W;
    Floats<W> sums[R][C][vectors] = {};
    const auto add = [&](const float* from, int64_t ldw) __attribute__((always_inline)) {
        for (int v = 0; v < vectors; ++v) {
            Floats<W> b[C];
            for (int c = 0; c < C; ++c) b[c] = load<W>(from + c * ldw + v * W);
            for (int r = 0; r < R; ++r) {
                const Floats<W> a = load<W>(x + r * kLanes + v * W);
                for (int c = 0; c < C; ++c) sums[r][c][v] += a * b[c];
            }
        }
        x += R * kLanes;
    };
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        for (int c = 0; c < C; ++c) __builtin_prefetch(w + c * width + i + kAhead);
        add(w + i, width);
    }
    if (i < width) {
        float padded[C][kLanes] = {};
        for (int c = 0; c < C; ++c) std::memcpy(padded[c], w + c * width + i, (width - i) * sizeof(float));
        add(padded[0], kLanes);
    }
    if constexpr (W == 16 && R == 8 && C == 2) {
        totals_of_sixteen(sums, out);
    } else {
        totals<W, R, C>(sums, out);
    }
}

// Multiplies all rows with C rows of w, which stay in cache from the first group of R rows to the last; out +
// r * ldo takes C numbers.
template <int W, int R, int C>
INLINE void columns(const float* packed, int64_t rows, const float* w, int64_t width, const float* bias,
                    float* out, int64_t ldo) {
    const int64_t group = R * kLanes * ((width + kLanes - 1) / kLanes);
    for (int64_t first = 0; first < rows; first += R, packed += group) {
        float products[R * C];
        dots<W, R, C>(packed, w, width, products);
        for (int64_t r = 0; r < R && first + r < rows; ++r)
            for (int c = 0; c < C; ++c)
                out[(first + r) * ldo + c] = products[r * C + c] + (bias != nullptr ? bias[c] : 0.0f);
    }
}

struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Returns whole cache lines, because a vector that lies across two of them takes twice as long to load.
Buffer buffer(int64_t size) {
    return Buffer(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t(64))));
}

// Packs [rows, width] into groups of R rows [width / lanes][R][lanes], filled up with zeros.
Buffer packed_rows(const float* x, int64_t rows, int64_t width, int R) {
    const int64_t blocks = (width + kLanes - 1) / kLanes, groups = (rows + R - 1) / R,
                  size = groups * blocks * R * kLanes;
    Buffer packed = buffer(size);
    std::fill_n(packed.get(), size, 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
        float* to = packed.get() + (row / R * blocks * R + row % R) * kLanes;
        for (int64_t i = 0; i < width; i += kLanes, to += R * kLanes)
            std::memcpy(to, x + row * width + i, std::min<int64_t>(kLanes, width - i) * sizeof(float));
    }
    return packed;
}

#ifdef AVX512

// A panel holds so many numbers of each of the matrix's rows that it stays in the second cache.
constexpr int64_t kDeep = 1024;
// The next panel's memory is asked for once in so many steps along the width.
constexpr int kAsk = 8;
// So many products are added up apart before they are added to the rest, because long sums round more.
constexpr int64_t kShort = 128;

// out [rows, count] becomes x [rows, width] times a matrix, plus bias; with `add` the product is added to it.
// The matrix is [count, width], or [width, count] where `turned`.
struct Product {
    const float* x;
    int64_t rows, width, count;
    const float* matrix;
    bool turned;
    const float* bias;
    float* out;
    bool add;
};

// The cache lines of the matrix that the next panel is made of, which are asked for one by one.
struct Ahead {
    const float* row;
    int64_t step, lines, rows;  // floats from one row to the next, cache lines of each, rows left
    int64_t line = 0;

    void ask(int64_t count) {
        for (; count > 0 && rows > 0; --count) {
            __builtin_prefetch(row + line * 16, 0, 2);
            if (++line == lines) line = 0, row += step, --rows;
        }
    }
};

// Turns `deep` numbers of `count` rows of w, `width` apart, into panel[deep][wide], filled up with zeros.
template <int W, int Vectors>
INLINE void turn(const float* w, int64_t width, int64_t count, int64_t deep, float* panel) {
    constexpr int64_t wide = W * Vectors;
    const int64_t whole = count / W * W;
    int64_t i = 0;
    for (; i + W <= deep; i += W) {
        for (int64_t first = 0; first < whole; first += W) {
            Floats<W> x[W];
            for (int j = 0; j < W; ++j) x[j] = load<W>(w + (first + j) * width + i);
            transpose(x);
            for (int j = 0; j < W; ++j) store<W>(panel + (i + j) * wide + first, x[j]);
        }
    }
    for (int64_t c = 0; c < count; ++c)
        for (int64_t k = c < whole ? i : 0; k < deep; ++k) panel[k * wide + c] = w[c * width + k];
    for (int64_t k = 0; count < wide && k < deep; ++k)
        std::fill(panel + k * wide + count, panel + (k + 1) * wide, 0.0f);
}

// Makes the same panel of a matrix that is turned already, from `deep` rows of w, `step` apart.
template <int W, int Vectors>
INLINE void gather(const float* w, int64_t step, int64_t count, int64_t deep, float* panel) {
    constexpr int64_t wide = W * Vectors;
    for (int64_t k = 0; k < deep; ++k, w += step, panel += wide) {
        if (count == wide) {
            UNROLL for (int c = 0; c < Vectors; ++c) store<W>(panel + c * W, load<W>(w + c * W));
        } else {
            std::memcpy(panel, w, count * sizeof(float));
            std::fill(panel + count, panel + wide, 0.0f);
        }
    }
}

// Adds a times b to a sum.
template <int W>
INLINE void add_product(Floats<W>& sum, const float* a, const Floats<W>& b) {
    sum += *a * b;
}

// Adds the products of the two bfloat16 in a with those in each lane of b, the second ones first.
INLINE void add_products(Floats<16>& sum, const float* a, const Floats<16>& b) {
#ifdef PAIRS
    int32_t bits;
    std::memcpy(&bits, a, sizeof bits);
    const Vectors<16>::Ints all = bits - Vectors<16>::Ints{};
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(all), "v"(b));
#endif
}

// Adds x [rows, deep] times the panel to total [rows <= Tall, wide]. Of `Pairs` a number is two.
template <int W, int Tall, int Vectors, bool Pairs>
INLINE void tile(const float* x, int64_t width, int64_t rows, const float* panel, int64_t deep,
                 float (*total)[W * Vectors], Ahead& ahead, int64_t lines) {
    constexpr int64_t wide = W * Vectors;
    const float* each[Tall];
    UNROLL for (int r = 0; r < Tall; ++r) each[r] = x + std::min<int64_t>(r, rows - 1) * width;
    constexpr int64_t kPart = Pairs ? kShort / 2 : kShort;
    for (int64_t from = 0; from < deep; from += kPart) {
        Floats<W> sums[Tall][Vectors] = {};
        const auto step = [&](int64_t i) __attribute__((always_inline)) {
            Floats<W> b[Vectors];
            UNROLL for (int c = 0; c < Vectors; ++c) b[c] = load<W>(panel + i * wide + c * W);
            UNROLL for (int r = 0; r < Tall; ++r) UNROLL for (int c = 0; c < Vectors; ++c) {
                if constexpr (Pairs)
                    add_products(sums[r][c], each[r] + i, b[c]);
                else
                    add_product<W>(sums[r][c], each[r] + i, b[c]);
            }
        };
        const int64_t stop = std::min(from + kPart, deep);
        int64_t i = from;
        for (; i + kAsk <= stop; i += kAsk) {
            ahead.ask(lines);
            UNROLL for (int j = 0; j < kAsk; ++j) step(i + j);
        }
        for (; i < stop; ++i) step(i);
        UNROLL for (int r = 0; r < Tall; ++r) UNROLL for (int c = 0; c < Vectors; ++c)
            store<W>(total[r] + c * W, load<W>(total[r] + c * W) + sums[r][c]);
    }
}

// Makes a share of the product, panel by panel. Shares are counted in panels of a group of Tall rows, [begin,
// end): threads then have about the same number of them, and two may have parts of the same panel.
template <int W, int Tall, int Vectors, bool Pairs = false>
INLINE void by_panels(const Product& p, int64_t begin, int64_t end) {
    constexpr int64_t wide = W * Vectors;
    const int64_t groups = (p.rows + Tall - 1) / Tall;
    const Buffer panel = buffer(std::min(kDeep, p.width) * wide);
    for (int64_t n = begin / groups; n * groups < end; ++n) {
        const int64_t c = n * wide, count = std::min(wide, p.count - c);
        const int64_t first = std::max(begin - n * groups, int64_t(0)) * Tall,
                      last = std::min((end - n * groups) * Tall, p.rows);
        for (int64_t k = 0; k < p.width; k += kDeep) {
            const int64_t deep = std::min(kDeep, p.width - k);
            if (p.turned)
                gather<W, Vectors>(p.matrix + k * p.count + c, p.count, count, deep, panel.get());
            else
                turn<W, Vectors>(p.matrix + c * p.width + k, p.width, count, deep, panel.get());
            const bool whole = k + deep == p.width;
            // Next comes the rest of this panel, or the next panel.
            const int64_t next = whole ? std::min(c + wide, p.count) : c, from = whole ? 0 : k + deep;
            const int64_t columns = std::min(wide, p.count - next), numbers = std::min(kDeep, p.width - from);
            Ahead ahead =
                p.turned ? Ahead{p.matrix + from * p.count + next, p.count, (columns + 15) / 16,
                                 columns > 0 ? numbers : 0}
                         : Ahead{p.matrix + next * p.width + from, p.width, (numbers + 15) / 16, columns};
            const int64_t asks = (last - first + Tall - 1) / Tall * ((deep + kAsk - 1) / kAsk);
            const int64_t lines = (ahead.lines * ahead.rows + asks - 1) / asks;
            for (int64_t r = first; r < last; r += Tall) {
                const int64_t rows = std::min<int64_t>(Tall, last - r);
                float* out = p.out + r * p.count + c;
                float total[Tall][wide] = {};
                if (k > 0 && !p.add)
                    for (int64_t i = 0; i < rows; ++i)
                        std::memcpy(total[i], out + i * p.count, count * sizeof(float));
                tile<W, Tall, Vectors, Pairs>(p.x + r * p.width + k, p.width, rows, panel.get(), deep, total,
                                              ahead, lines);
                const float* bias = whole && p.bias != nullptr ? p.bias + c : nullptr;
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t j = 0; j < count; ++j) {
                        const float sum = bias != nullptr ? total[i][j] + bias[j] : total[i][j];
                        out[i * p.count + j] = p.add ? out[i * p.count + j] + sum : sum;
                    }
            }
        }
    }
}

#endif

using Columns = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*, int64_t);
using Panels = void (*)(const Product&, int64_t, int64_t);

struct Kernels {
    int rows, columns;  // of `several`, which go together
    Columns several;
    Columns one;
    int tall, wide;  // rows and columns of a tile of panels, whose sums fill the registers
    Panels panels;
};

#define FEW_ROWS(name, target, width, rows, count)                                                      \
    target void several_##name(const float* x, int64_t n, const float* w, int64_t k, const float* bias, \
                               float* out, int64_t ldo) {                                               \
        columns<width, rows, count>(x, n, w, k, bias, out, ldo);                                        \
    }                                                                                                   \
    target void one_##name(const float* x, int64_t n, const float* w, int64_t k, const float* bias,     \
                           float* out, int64_t ldo) {                                                   \
        columns<width, rows, 1>(x, n, w, k, bias, out, ldo);                                            \
    }
#define PANELS(name, target, width, tall, vectors)                            \
    target void panels_##name(const Product& p, int64_t begin, int64_t end) { \
        by_panels<width, tall, vectors>(p, begin, end);                       \
    }

#ifdef AVX512
FEW_ROWS(avx512, AVX512, 16, 8, 2)
PANELS(avx512, AVX512, 16, 8, 3)
FEW_ROWS(avx2, AVX2, 8, 4, 1)
PANELS(avx2, AVX2, 8, 6, 2)
#ifdef PAIRS
AVX512 void panels_of_pairs(const Product& p, int64_t begin, int64_t end) {
    by_panels<16, 8, 3, true>(p, begin, end);
}
constexpr Kernels kPairs = {0, 0, nullptr, nullptr, 8, 48, panels_of_pairs};
#else
constexpr Kernels kPairs = {};
#endif
constexpr Versions<Kernels> kVersions = {{
    {8, 2, several_avx512, one_avx512, 8, 48, panels_avx512},
    {4, 1, several_avx2, one_avx2, 6, 16, panels_avx2},
}};
#else
FEW_ROWS(generic, , 4, 2, 1)
constexpr Kernels kPairs = {};
constexpr Versions<Kernels> kVersions = {{{2, 1, several_generic, one_generic, 1, 1, nullptr}}};
#endif

using Matrix = Array<float, -1, -1>;
using Vector = Array<float, -1>;

// The sizes of x [rows, width] times a matrix [count, width], or [width, count] where `turned`.
struct Shape {
    int64_t rows, width, count;

    Shape(const Matrix& x, const Matrix& matrix, const std::optional<Vector>& bias, const Matrix& out,
          bool turned = false)
        : rows(x.shape(0)), width(x.shape(1)), count(matrix.shape(turned ? 1 : 0)) {
        const bool alike = int64_t(matrix.shape(turned ? 0 : 1)) == width && int64_t(out.shape(0)) == rows;
        check(alike && int64_t(out.shape(1)) == count && (!bias || int64_t(bias->shape(0)) == count),
              "x [R, K], weight [N, K], bias [N] and out [R, N] are wanted");
    }
};

void few_rows(const Matrix& x, const Matrix& weight, const std::optional<Vector>& bias, const Matrix& out,
              int threads, const char* instructions) {
    const Shape shape(x, weight, bias, out);
    const int64_t rows = shape.rows, width = shape.width, count = shape.count;
    const Kernels& kernels = kVersions.of(instructions);
    const float *ws = weight.data(), *add = bias ? bias->data() : nullptr;
    float* outs = out.data();
    const int64_t together = kernels.columns, groups = (count + together - 1) / together;
    nb::gil_scoped_release release;
    const Buffer packed = packed_rows(x.data(), rows, width, kernels.rows);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * together, end = std::min(first + together, count);
        if (end - first == together) {
            kernels.several(packed.get(), rows, ws + first * width, width, add ? add + first : nullptr,
                            outs + first, count);
        } else {
            for (int64_t c = first; c < end; ++c)
                kernels.one(packed.get(), rows, ws + c * width, width, add ? add + c : nullptr, outs + c,
                            count);
        }
    }
}

// Makes all shares of a product.
void in_shares(const Product& product, const Kernels& kernels, int threads) {
    const int64_t parts = (product.rows + kernels.tall - 1) / kernels.tall *
                          ((product.count + kernels.wide - 1) / kernels.wide);
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; ++t)
        kernels.panels(product, parts * t / threads, parts * (t + 1) / threads);
}

void panels(const Matrix& x, const Matrix& matrix, bool turned, const std::optional<Vector>& bias,
            const Matrix& out, bool add, int threads, const char* instructions) {
    const Shape shape(x, matrix, bias, out, turned);
    const Kernels& kernels = kVersions.of(instructions);
    check(kernels.panels != nullptr, "panels are compiled for AVX2 and AVX-512 only");
    const Product product = {x.data(),
                             shape.rows,
                             shape.width,
                             shape.count,
                             matrix.data(),
                             turned,
                             bias ? bias->data() : nullptr,
                             out.data(),
                             add};
    in_shares(product, kernels, threads);
}

using Pairs = Array<Bfloat16, -1, -1>;

// Sets out [R, N] to x [R, K] times weight [N, K] transposed.
void pairs(const Pairs& x, const Pairs& weight, const Matrix& out, int threads) {
    const size_t sizes[][2] = {
        {x.shape(1), weight.shape(1)}, {x.shape(0), out.shape(0)}, {weight.shape(0), out.shape(1)}};
    check_equal(sizes);
    check(x.shape(1) % 2 == 0, "rows of an even number of bfloat16 are wanted");
    check(runs_pairs(), "this processor has no AVX512-BF16");
    const auto numbers = [](const Pairs& of) { return reinterpret_cast<const float*>(of.data()); };
    const Product product = {numbers(x),
                             int64_t(x.shape(0)),
                             int64_t(x.shape(1) / 2),
                             int64_t(weight.shape(0)),
                             numbers(weight),
                             false,
                             nullptr,
                             out.data(),
                             false};
    in_shares(product, kPairs, threads);
}

}  // namespace

void bind_products(nb::module_& m) {
    m.def("few_rows", &few_rows, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"),
          nb::arg("threads"), nb::arg("instructions"));
    m.def("panels", &panels, nb::arg("x"), nb::arg("matrix"), nb::arg("turned"), nb::arg("bias").none(),
          nb::arg("out"), nb::arg("add"), nb::arg("threads"), nb::arg("instructions"));
    m.def("pairs", &pairs, nb::arg("x"), nb::arg("weight"), nb::arg("out"), nb::arg("threads"));
}
