// Gradients of the loss head from the entries of softmax - onehot above a bound.
//
// `collect` looks at a tile of masses while it is in cache: what stands above a bound goes to a list of its
// row, and of the rest two sums are kept. `settle` cuts the lists once the sums of rows are known and turns
// masses into entries of J. `gather_rows` and `gather_columns` make dH and dW of the lists.
//
// Sums have an order that depends on shapes and lists alone: results are bit for bit the same for any number
// of threads, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "vectors.h"

#ifdef AVX512
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace {

// The list of a row: `count` values and their columns, which rise. No more than `room` fit.
struct List {
    float* value;
    int32_t* column;
    int64_t count, room;
};

// The sums of the masses that are left out of a row's list, bare and times the largest element of the head's
// row.
struct LeftOut {
    float mass, error;
};

// Appends the columns of mass > bound to the list, from the first one that has room, and adds up the others;
// `first` is the number of the tile's first column. NaN is left out, which makes the sums NaN.
template <int W>
INLINE void collect_part(const float* mass, int64_t columns, int64_t first, const float* widest, float bound,
                         List& list, LeftOut& left) {
    constexpr int vectors = kLanes / W;
    Floats<W> sums[vectors] = {}, errors[vectors] = {};
    const auto step = [&](const float* from, const float* wide, int64_t column)
                          __attribute__((always_inline)) {
        for (int v = 0; v < vectors; ++v) {
            Floats<W> x = load<W>(from + v * W);
            const auto above = x > bound;
            if (any<W>(above))
                for (int lane = 0; lane < W; ++lane)
                    if (above[lane] && list.count < list.room) {
                        list.value[list.count] = x[lane];
                        list.column[list.count++] = static_cast<int32_t>(column + v * W + lane);
                        x[lane] = 0;
                    }
            sums[v] += x;
            errors[v] += x * load<W>(wide + v * W);
        }
    };
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) step(mass + i, widest + i, first + i);
    if (i < columns) {
        float padded[2][kLanes] = {};
        std::memcpy(padded[0], mass + i, (columns - i) * sizeof(float));
        std::memcpy(padded[1], widest + i, (columns - i) * sizeof(float));
        step(padded[0], padded[1], first + i);
    }
    float lanes[kLanes];
    for (int v = 0; v < vectors; ++v) store<W>(lanes + v * W, sums[v]);
    left.mass += lane_sum(lanes);
    for (int v = 0; v < vectors; ++v) store<W>(lanes + v * W, errors[v]);
    left.error += lane_sum(lanes);
}

#ifdef AVX512
// For each mask of 8 lanes the lanes that it has, in order.
struct Packing {
    int32_t lanes[256][8];
    constexpr Packing() : lanes() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, next = 0; lane < 8; ++lane)
                if (mask >> lane & 1) lanes[mask][next++] = lane;
    }
};
constexpr Packing kPacking;

// Does the same, packing the lanes of a mask together at once where there is room for all.
AVX2 void collect_avx2(const float* mass, int64_t columns, int64_t first, const float* widest, float bound,
                       List& list, LeftOut& left) {
    // Each store has 8 entries, whatever the mask.
    if (list.count + columns + 8 > list.room) {
        collect_part<8>(mass, columns, first, widest, bound, list, left);
        return;
    }
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, errors[2] = {sums[0], sums[0]};
    const __m256 limit = _mm256_set1_ps(bound);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int64_t count = list.count;
    float padded[2][kLanes] = {};
    for (int64_t i = 0; i < columns; i += kLanes) {
        const float *from = mass + i, *wide = widest + i;
        if (const int64_t rest = columns - i; rest < kLanes) {
            std::memcpy(padded[0], from, rest * sizeof(float));
            std::memcpy(padded[1], wide, rest * sizeof(float));
            from = padded[0], wide = padded[1];
        }
        for (int v = 0; v < 2; ++v) {
            const __m256 x = _mm256_loadu_ps(from + 8 * v), above = _mm256_cmp_ps(x, limit, _CMP_GT_OQ);
            if (const int mask = _mm256_movemask_ps(above)) {
                const __m256i order =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPacking.lanes[mask]));
                const __m256i at = _mm256_add_epi32(_mm256_permutevar8x32_epi32(lanes, order),
                                                    _mm256_set1_epi32(static_cast<int32_t>(first + i + 8 * v)));
                _mm256_storeu_ps(list.value + count, _mm256_permutevar8x32_ps(x, order));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(list.column + count), at);
                count += __builtin_popcount(mask);
            }
            const __m256 out = _mm256_andnot_ps(above, x);
            sums[v] = _mm256_add_ps(sums[v], out);
            errors[v] = _mm256_fmadd_ps(out, _mm256_loadu_ps(wide + 8 * v), errors[v]);
        }
    }
    list.count = count;
    float all[2][kLanes];
    for (int v = 0; v < 2; ++v) {
        _mm256_storeu_ps(all[0] + 8 * v, sums[v]);
        _mm256_storeu_ps(all[1] + 8 * v, errors[v]);
    }
    left.mass += lane_sum(all[0]);
    left.error += lane_sum(all[1]);
}

// Does the same with the instruction that packs the lanes of a mask together.
AVX512 void collect_avx512(const float* mass, int64_t columns, int64_t first, const float* widest,
                           float bound, List& list, LeftOut& left) {
    __m512 sums = _mm512_setzero_ps(), errors = sums;
    const __m512 limit = _mm512_set1_ps(bound);
    const __m512i lanes =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int64_t count = list.count;
    for (int64_t i = 0; i < columns; i += kLanes) {
        const int64_t rest = std::min<int64_t>(kLanes, columns - i);
        const __mmask16 inside = static_cast<__mmask16>((1u << rest) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(inside, mass + i);
        __mmask16 above = _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ);
        if (above != 0) {
            int found = __builtin_popcount(above);
            // The last bits go where there is no room.
            for (; count + found > list.room; --found)
                above ^= static_cast<__mmask16>(0x8000u >> (__builtin_clz(above) - 16));
            const __m512 values = _mm512_maskz_compress_ps(above, x);
            const __m512i columns_of = _mm512_maskz_compress_epi32(
                above, _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i))));
            if (count + kLanes <= list.room) {
                _mm512_storeu_ps(list.value + count, values);
                _mm512_storeu_si512(list.column + count, columns_of);
            } else {
                const __mmask16 some = static_cast<__mmask16>((1u << found) - 1);
                _mm512_mask_storeu_ps(list.value + count, some, values);
                _mm512_mask_storeu_epi32(list.column + count, some, columns_of);
            }
            count += found;
        }
        const __m512 out = _mm512_maskz_mov_ps(static_cast<__mmask16>(~above), x);
        sums = _mm512_add_ps(sums, out);
        errors = _mm512_fmadd_ps(out, _mm512_maskz_loadu_ps(inside, widest + i), errors);
    }
    list.count = count;
    float all[kLanes];
    _mm512_storeu_ps(all, sums);
    left.mass += lane_sum(all);
    _mm512_storeu_ps(all, errors);
    left.error += lane_sum(all);
}
#endif

// Adds sum of factor_i * source[index_i] over entries [begin, end) to `out`, or overwrites it, in vectors of
// one width: `Vectors` of them from element d on.
template <int W, int Vectors>
INLINE void add_rows(const float* source, int64_t width, const int32_t* index, int64_t origin,
                     const float* factor, int64_t begin, int64_t end, bool add, int64_t d, float* out) {
    Floats<W> sums[Vectors] = {};
    for (int64_t i = begin; i < end; ++i) {
        const float* row = source + (index[i] - origin) * width + d;
        const float a = factor[i];
        for (int v = 0; v < Vectors; ++v) sums[v] += a * load<W>(row + v * W);
    }
    for (int v = 0; v < Vectors; ++v)
        store<W>(out + d + v * W, add ? load<W>(out + d + v * W) + sums[v] : sums[v]);
}

// Does it for the elements [first, last) of `width`.
template <int W>
INLINE void add_part(const float* source, int64_t width, const int32_t* index, int64_t origin,
                     const float* factor, int64_t begin, int64_t end, bool add, int64_t first, int64_t last,
                     float* out) {
    constexpr int many = 12;
    int64_t d = first;
    for (; d + many * W <= last; d += many * W)
        add_rows<W, many>(source, width, index, origin, factor, begin, end, add, d, out);
    for (; d + W <= last; d += W)
        add_rows<W, 1>(source, width, index, origin, factor, begin, end, add, d, out);
    for (; d < last; ++d) {
        float sum = 0;
        for (int64_t i = begin; i < end; ++i)
            sum = std::fma(factor[i], source[(index[i] - origin) * width + d], sum);
        out[d] = add ? out[d] + sum : sum;
    }
}

// The largest absolute element of a row.
template <int W>
INLINE float widest_of(const float* row, int64_t width) {
    Floats<W> most[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
        for (int v = 0; v < 4; ++v) {
            const Floats<W> x = load<W>(row + i + v * W), size = x < 0.0f ? -x : x;
            most[v] = most[v] > size ? most[v] : size;
        }
    float result = 0;
    for (int v = 0; v < 4; ++v)
        for (int lane = 0; lane < W; ++lane) result = std::max(result, most[v][lane]);
    for (; i < width; ++i) result = std::max(result, std::abs(row[i]));
    return result;
}

using Collect = void (*)(const float*, int64_t, int64_t, const float*, float, List&, LeftOut&);
using AddPart = void (*)(const float*, int64_t, const int32_t*, int64_t, const float*, int64_t, int64_t, bool,
                         int64_t, int64_t, float*);
using Widest = float (*)(const float*, int64_t);

struct Kernels {
    Collect collect;
    AddPart add;
    Widest widest;
};

#define GATHER(name, target, W)                                                                          \
    target void add_##name(const float* source, int64_t width, const int32_t* index, int64_t origin,     \
                           const float* factor, int64_t begin, int64_t end, bool add, int64_t first,     \
                           int64_t last, float* out) {                                                   \
        add_part<W>(source, width, index, origin, factor, begin, end, add, first, last, out);            \
    }                                                                                                    \
    target float widest_##name(const float* row, int64_t width) { return widest_of<W>(row, width); }     \
    constexpr Kernels k_##name = {collect_##name, add_##name, widest_##name};

#ifdef AVX512
GATHER(avx512, AVX512, 16)
GATHER(avx2, AVX2, 8)
constexpr Versions<Kernels> kVersions = {{k_avx512, k_avx2}};
#else
void collect_generic(const float* mass, int64_t columns, int64_t first, const float* widest, float bound,
                     List& list, LeftOut& left) {
    collect_part<4>(mass, columns, first, widest, bound, list, left);
}
GATHER(generic, , 4)
constexpr Versions<Kernels> kVersions = {{k_generic}};
#endif

using Matrix = Array<float, -1, -1>;
using Numbers = Array<int32_t, -1>;
template <typename T>
using Vector = Array<T, -1>;
template <typename T>
using Strided = StridedArray<T, -1, -1>;

constexpr int64_t kFetched = 5 * kLanes;

// The lists of rows: values and columns [R, room], whose rows may lie further apart, and counts [R].
struct Lists {
    float* value;
    int32_t *column, *count;
    int64_t rows, room, value_stride, column_stride;

    Lists(const Strided<float>& values, const Strided<int32_t>& columns, const Numbers& counts)
        : value(values.data()),
          column(columns.data()),
          count(counts.data()),
          rows(counts.shape(0)),
          room(values.shape(1)),
          value_stride(values.stride(0)),
          column_stride(columns.stride(0)) {
        const bool alike = int64_t(values.shape(0)) == rows && int64_t(columns.shape(0)) == rows &&
                           int64_t(columns.shape(1)) == room;
        const bool dense = room <= 1 || (values.stride(1) == 1 && columns.stride(1) == 1);
        check(alike && dense, "values and columns [R, N] with dense rows and counts [R] are wanted");
    }

    List of(int64_t r) const {
        return {value + r * value_stride, column + r * column_stride, count[r], room};
    }

    // Asks for the memory of row r from entry `at` on, as far as some tens of entries go. Lists lie far apart,
    // so the processor does not foresee which comes next.
    void fetch(int64_t r, int64_t at) const {
        if (r >= rows) return;
        const float* const x = value + r * value_stride + at;
        const int32_t* const v = column + r * column_stride + at;
        for (int64_t i = 0; i < kFetched; i += kLanes) {
            __builtin_prefetch(x + i, 1);
            __builtin_prefetch(v + i, 1);
        }
    }
};

// Takes in a tile of masses exp((z - largest) inverse), where the target has 0 and `left` [R, 2] is brought to
// the same `largest`. Columns go to the list where their mass is above `threshold` times the row's mass, of
// which exp(early inverse) is a part that is known beforehand.
void collect(const Strided<float>& mass, int64_t first, double inverse, double threshold,
             const Vector<float>& largest, const Vector<double>& others, const Vector<float>& early,
             const Vector<float>& widest, const Strided<float>& values, const Strided<int32_t>& columns,
             const Numbers& counts, const Matrix& left, int threads, const char* instructions) {
    const Lists lists(values, columns, counts);
    const int64_t rows = mass.shape(0), width = mass.shape(1), stride = mass.stride(0);
    const size_t count = rows;
    check_equal({{counts.shape(0), count},
                 {largest.shape(0), count},
                 {others.shape(0), count},
                 {early.shape(0), count},
                 {left.shape(0), count},
                 {left.shape(1), 2},
                 {widest.shape(0), size_t(width)}});
    check(width == 1 || mass.stride(1) == 1, "masses with dense columns are wanted");
    const Collect one = kVersions.of(instructions).collect;
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const double ahead = (early.data()[r] - largest.data()[r]) * inverse;
        const double total = std::max(others.data()[r], std::exp(std::min(ahead, 80.0)));
        if (r + 1 < rows) lists.fetch(r + 1, lists.count[r + 1]);
        // The last place is the target's.
        List list = lists.of(r);
        --list.room;
        LeftOut sums = {left.data()[2 * r], left.data()[2 * r + 1]};
        one(mass.data() + r * stride, width, first, widest.data(), static_cast<float>(threshold * total),
            list, sums);
        lists.count[r] = static_cast<int32_t>(list.count);
        left.data()[2 * r] = sums.mass, left.data()[2 * r + 1] = sums.error;
    }
}

// Ends the lists: cuts what is not above `threshold` times the row's whole mass, brings masses to the row's last
// `largest`, makes them entries of J by `scale`, and puts the target's own entry in its place. base [P, R]: the
// `largest` that the part_columns columns of each part were taken in with. `left` becomes the sums of |J|
// left out. A row whose list is full has the count -1 and nothing else.
void settle(double inverse, double threshold, const Matrix& base, int64_t part_columns,
            const Vector<float>& largest, const Vector<double>& others, const Vector<float>& target_z,
            const Vector<float>& scale, const Vector<int64_t>& target, const Matrix& state,
            const Vector<float>& widest, const Strided<float>& values, const Strided<int32_t>& columns,
            const Numbers& counts, const Matrix& left, int threads) {
    const Lists lists(values, columns, counts);
    const size_t rows = lists.rows;
    check_equal({{base.shape(1), rows},
                 {largest.shape(0), rows},
                 {others.shape(0), rows},
                 {target_z.shape(0), rows},
                 {scale.shape(0), rows},
                 {target.shape(0), rows},
                 {state.shape(0), rows},
                 {state.shape(1), 3},
                 {left.shape(0), rows},
                 {left.shape(1), 2}});
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < lists.rows; ++r) {
        List list = lists.of(r);
        const float m = largest.data()[r], unit = scale.data()[r];
        const double total = others.data()[r] + std::exp(std::min((target_z.data()[r] - m) * inverse, 80.0));
        const float bound = static_cast<float>(threshold * total);
        // A list that is full may lack more than small entries.
        if (list.count == list.room - 1) {
            lists.count[r] = -1;
            left.data()[2 * r] = left.data()[2 * r + 1] = 0;
            continue;
        }
        float mass = left.data()[2 * r], error = left.data()[2 * r + 1], factor = 1;
        int64_t kept = 0, part = -1, stop = 0;
        for (int64_t i = 0; i < list.count; ++i) {
            const int32_t column = list.column[i];
            if (column >= stop) {
                part = column / part_columns, stop = (part + 1) * part_columns;
                factor = static_cast<float>(std::exp((base.data()[part * rows + r] - m) * inverse));
            }
            const float x = list.value[i] * factor;
            list.value[kept] = x * unit, list.column[kept] = column;
            const bool above = x > bound;
            kept += above;
            mass += above ? 0.0f : x;
            error += above ? 0.0f : x * widest.data()[column];
        }
        // A row without a log-prob has nothing but NaN.
        const int32_t own = static_cast<int32_t>(target.data()[r]);
        const int64_t at = std::lower_bound(list.column, list.column + kept, own) - list.column;
        std::memmove(list.value + at + 1, list.value + at, (kept - at) * sizeof(float));
        std::memmove(list.column + at + 1, list.column + at, (kept - at) * sizeof(int32_t));
        list.column[at] = own, list.value[at] = state.data()[3 * r + 2];
        lists.count[r] = static_cast<int32_t>(kept + 1);
        left.data()[2 * r] = mass * unit, left.data()[2 * r + 1] = error * unit;
    }
}

// So many bytes of the head, or of the gradient's rows, stay in the second cache.
constexpr int64_t kCached = 384 * 1024;
// So many entries are added up apart before they are added to the rest, because long sums round more.
constexpr int64_t kShort = 64;

// Sets out [R, D] to the sum of value * matrix[column - first] over a list's columns from `first` on that the
// matrix [B, D] has, or adds it. `cursor` [R] is where a list stands, and moves on. Rows of factor 0 become 0.
void gather_rows(const Matrix& matrix, int64_t first, const Strided<float>& values,
                 const Strided<int32_t>& columns, const Numbers& counts, const Numbers& cursor,
                 const Vector<float>& factor, bool add, const Matrix& out, int threads,
                 const char* instructions) {
    const Lists lists(values, columns, counts);
    const int64_t width = matrix.shape(1), rows = lists.rows;
    check_equal({{cursor.shape(0), size_t(rows)},
                 {factor.shape(0), size_t(rows)},
                 {out.shape(0), size_t(rows)},
                 {out.shape(1), matrix.shape(1)}});
    const AddPart one = kVersions.of(instructions).add;
    const int64_t tile = std::max<int64_t>(16, kCached / (4 * std::max<int64_t>(width, 1)));
    const int64_t end = first + int64_t(matrix.shape(0));
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t begin_row = rows * t / threads, end_row = rows * (t + 1) / threads;
        if (!add)
            std::memset(out.data() + begin_row * width, 0, (end_row - begin_row) * width * sizeof(float));
        for (int64_t tile_first = first; tile_first < end; tile_first += tile) {
            const int64_t stop = std::min(tile_first + tile, end);
            for (int64_t r = begin_row; r < end_row; ++r) {
                if (r + 1 < end_row) lists.fetch(r + 1, cursor.data()[r + 1]);
                if (factor.data()[r] == 0) continue;
                const List list = lists.of(r);
                const int64_t begin = cursor.data()[r];
                int64_t i = begin;
                while (i < list.count && list.column[i] < stop) ++i;
                if (i == begin) continue;
                cursor.data()[r] = static_cast<int32_t>(i);
                for (int64_t from = begin; from < i; from += kShort)
                    one(matrix.data(), width, list.column, first, list.value, from, std::min(from + kShort, i),
                        true, 0, width, out.data() + r * width);
            }
        }
    }
}

// Sets out [V, D] to the sum over rows of factor * value * hidden[row], column by column of the lists, or adds
// it; d_bias [V] takes the sums of factor * value on top. Entries of at most `least` are left out of a column
// where the sum of their sizes times `weight` [R] is at most `allowed`; returns the largest such sum. Rows of
// factor 0 add nothing. The rows `full` have no lists: their entries are those of z [R, V].
double gather_columns(const Matrix& hidden, const Strided<float>& values, const Strided<int32_t>& columns,
                      const Numbers& counts, const Matrix& z, const Vector<int64_t>& full,
                      const Vector<float>& factor, const Vector<float>& weight, double least, double allowed,
                      bool add, std::optional<Matrix> out, std::optional<Vector<float>> d_bias, int threads,
                      const char* instructions) {
    const Lists lists(values, columns, counts);
    const int64_t width = hidden.shape(1), rows = lists.rows, vocabulary = z.shape(1), dense = full.shape(0);
    check_equal({{hidden.shape(0), size_t(rows)},
                 {z.shape(0), size_t(rows)},
                 {factor.shape(0), size_t(rows)},
                 {weight.shape(0), size_t(rows)},
                 {out ? out->shape(0) : size_t(vocabulary), size_t(vocabulary)},
                 {out ? out->shape(1) : size_t(width), size_t(width)},
                 {d_bias ? d_bias->shape(0) : size_t(vocabulary), size_t(vocabulary)}});
    const AddPart one = kVersions.of(instructions).add;
    constexpr int64_t tile = 512;
    const int64_t tiles = (vocabulary + tile - 1) / tile;
    // A multiple of 192 elements goes through registers without a rest.
    const int64_t slice = std::max<int64_t>(1, kCached / (4 * std::max<int64_t>(rows, 1)) / 192) * 192;
    const float bound = static_cast<float>(least);
    std::vector<double> largest(threads);
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t begin_tile = tiles * t / threads, end_tile = tiles * (t + 1) / threads;
        // Where each list stands at the tile, and at the next one; for each column of the tile where its entries
        // begin, the numbers of large and small ones, and what the small ones could change.
        std::vector<int32_t> cursor(rows), next(rows), begin(tile + 1), many(tile), few(tile), row;
        std::vector<float> factors, error(tile);
        for (int64_t r = 0; r < rows; ++r) {
            const List list = lists.of(r);
            cursor[r] = static_cast<int32_t>(
                std::lower_bound(list.column, list.column + std::max<int64_t>(list.count, 0),
                                 begin_tile * tile) -
                list.column);
        }
        for (int64_t n = begin_tile; n < end_tile; ++n) {
            const int64_t first = n * tile, stop = std::min(first + tile, vocabulary);
            std::fill(many.begin(), many.end(), static_cast<int32_t>(dense));
            std::fill(few.begin(), few.end(), 0);
            std::fill(error.begin(), error.end(), 0.0f);
            for (int64_t r = 0; r < rows; ++r) {
                if (r + 2 < rows) lists.fetch(r + 2, cursor[r + 2]);
                if (factor.data()[r] == 0) continue;
                const List list = lists.of(r);
                const float w = weight.data()[r];
                int64_t i = cursor[r];
                for (; i < list.count && list.column[i] < stop; ++i) {
                    const int64_t at = list.column[i] - first;
                    const float size = std::abs(list.value[i]);
                    const bool large = size > bound;
                    many[at] += large, few[at] += !large;
                    error[at] += large ? 0.0f : size * w;
                }
                next[r] = static_cast<int32_t>(i);
            }
            begin[0] = 0;
            for (int64_t v = 0; v < tile; ++v) {
                // Where the small ones count, none is left out.
                const bool all = !(error[v] <= allowed);
                if (!all) largest[t] = std::max(largest[t], double(error[v]));
                begin[v + 1] = begin[v] + many[v] + (all ? few[v] : 0);
                few[v] = all, many[v] = begin[v];
            }
            row.resize(begin[tile] + 1), factors.resize(begin[tile] + 1);
            for (int64_t r = 0; r < rows; ++r) {
                const float a = factor.data()[r];
                if (a == 0) continue;
                const List list = lists.of(r);
                for (int64_t i = cursor[r]; i < next[r]; ++i) {
                    const int64_t v = list.column[i] - first;
                    const bool wanted = few[v] != 0 || std::abs(list.value[i]) > bound;
                    // What is not wanted is overwritten, or stands behind the column's last.
                    const int32_t at = wanted ? many[v]++ : begin[tile];
                    row[at] = static_cast<int32_t>(r), factors[at] = list.value[i] * a;
                }
                cursor[r] = next[r];
            }
            for (int64_t k = 0; k < dense; ++k) {
                const int64_t r = full.data()[k];
                const float* entries = z.data() + r * vocabulary + first;
                for (int64_t v = 0; v < stop - first; ++v) {
                    row[many[v]] = static_cast<int32_t>(r);
                    factors[many[v]++] = entries[v] * factor.data()[r];
                }
            }
            // A slice of all states stays in the second cache.
            for (int64_t d = 0; out && d < width; d += slice)
                for (int64_t v = first; v < stop; ++v) {
                    const int64_t from = begin[v - first], to = begin[v - first + 1];
                    const int64_t last = std::min(d + slice, width);
                    float* sums = out->data() + v * width;
                    bool more = add;
                    if (from == to && !add) std::memset(sums + d, 0, (last - d) * sizeof(float));
                    for (int64_t i = from; i < to; i += kShort, more = true)
                        one(hidden.data(), width, row.data(), 0, factors.data(), i, std::min(i + kShort, to),
                            more, d, last, sums);
                }
            for (int64_t v = first; d_bias && v < stop; ++v) {
                double sum = 0;
                for (int64_t i = begin[v - first]; i < begin[v - first + 1]; ++i) sum += factors[i];
                d_bias->data()[v] += static_cast<float>(sum);
            }
        }
    }
    return *std::max_element(largest.begin(), largest.end());
}

// Sets out [R, K] to the entries of the lists at the wanted columns, 0 where a list has none.
void listed(const Strided<float>& values, const Strided<int32_t>& columns, const Numbers& counts,
            const Vector<int64_t>& wanted, const Matrix& out) {
    const Lists lists(values, columns, counts);
    const int64_t many = wanted.shape(0);
    check_equal({{out.shape(0), counts.shape(0)}, {out.shape(1), wanted.shape(0)}});
    for (int64_t r = 0; r < lists.rows; ++r) {
        const List list = lists.of(r);
        for (int64_t k = 0; k < many; ++k) {
            const int32_t v = static_cast<int32_t>(wanted.data()[k]);
            const int32_t* const end = list.column + std::max<int64_t>(list.count, 0);
            const int32_t* const at = std::lower_bound<const int32_t*>(list.column, end, v);
            const bool there = at < end && *at == v;
            out.data()[r * many + k] = there ? list.value[at - list.column] : 0.0f;
        }
    }
}

// Sets out [K, B] to 0 at the columns from `first` on that the lists of the rows `at` [K] have.
void strike(const Strided<float>& values, const Strided<int32_t>& columns, const Numbers& counts,
            const Vector<int64_t>& at, int64_t first, const Matrix& out) {
    const Lists lists(values, columns, counts);
    const int64_t width = out.shape(1);
    check_equal({{out.shape(0), at.shape(0)}});
    for (int64_t k = 0; k < int64_t(at.shape(0)); ++k) {
        const List list = lists.of(at.data()[k]);
        const int32_t* const end = list.column + std::max<int64_t>(list.count, 0);
        for (const int32_t* v = std::lower_bound<const int32_t*>(list.column, end, first);
             v < end && *v < first + width; ++v)
            out.data()[k * width + *v - first] = 0;
    }
}

// Sets out [R] to the largest absolute element of each row.
void widest(const Matrix& matrix, const Vector<float>& out, int threads, const char* instructions) {
    check_equal({{matrix.shape(0), out.shape(0)}});
    const Widest one = kVersions.of(instructions).widest;
    const int64_t rows = matrix.shape(0), width = matrix.shape(1);
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) out.data()[r] = one(matrix.data() + r * width, width);
}

}  // namespace

void bind_sparse(nb::module_& m) {
    m.def("collect", &collect, nb::arg("mass"), nb::arg("first"), nb::arg("inverse"), nb::arg("threshold"),
          nb::arg("largest"), nb::arg("others"), nb::arg("early"), nb::arg("widest"), nb::arg("values"),
          nb::arg("columns"), nb::arg("counts"), nb::arg("left"), nb::arg("threads"), nb::arg("instructions"));
    m.def("settle", &settle, nb::arg("inverse"), nb::arg("threshold"), nb::arg("base"),
          nb::arg("part_columns"), nb::arg("largest"), nb::arg("others"), nb::arg("target_z"),
          nb::arg("scale"), nb::arg("target"), nb::arg("state"), nb::arg("widest"), nb::arg("values"),
          nb::arg("columns"), nb::arg("counts"), nb::arg("left"), nb::arg("threads"));
    m.def("gather_rows", &gather_rows, nb::arg("matrix"), nb::arg("first"), nb::arg("values"),
          nb::arg("columns"), nb::arg("counts"), nb::arg("cursor"), nb::arg("factor"), nb::arg("add"),
          nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
    m.def("gather_columns", &gather_columns, nb::arg("hidden"), nb::arg("values"), nb::arg("columns"),
          nb::arg("counts"), nb::arg("z"), nb::arg("full"), nb::arg("factor"), nb::arg("weight"),
          nb::arg("least"), nb::arg("allowed"), nb::arg("add"), nb::arg("out").none(),
          nb::arg("d_bias").none(), nb::arg("threads"), nb::arg("instructions"));
    m.def("listed", &listed, nb::arg("values"), nb::arg("columns"), nb::arg("counts"), nb::arg("wanted"),
          nb::arg("out"));
    m.def("strike", &strike, nb::arg("values"), nb::arg("columns"), nb::arg("counts"), nb::arg("at"),
          nb::arg("first"), nb::arg("out"));
    m.def("widest", &widest, nb::arg("matrix"), nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
}
