// Row arithmetic over logits on the CPU: sampling, and log-probs with their gradient.
//
// One thread does one row, in an order that depends on V alone: results are bit for bit the same for any
// number of threads, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kBlock = 128;

// Returns the 128 logits of block b; a last one that is not whole is copied into `padded`, with -inf past the
// row's end.
INLINE const float* block_of(const float* row, int64_t columns, int64_t b, float* padded) {
    const int64_t left = columns - b * kBlock;
    if (left >= kBlock) return row + b * kBlock;
    for (int64_t i = 0; i < kBlock; ++i) padded[i] = i < left ? row[b * kBlock + i] : -kInfinity;
    return padded;
}

// Returns the sum of exp((z - m) inverse) over 128 logits; the terms go to `out` where it is not null.
template <int W>
INLINE float block_mass(const float* z, float m, float inverse, float* out) {
    constexpr int vectors = kLanes / W;
    Floats<W> sums[2 * vectors] = {};
    for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
        for (int j = 0; j < 2 * vectors; ++j) {
            const Floats<W> mass = exp_negative<W>((load<W>(z + i + j * W) - m) * inverse);
            sums[j] += mass;
            if (out != nullptr) store<W>(out + i + j * W, mass);
        }
    }
    float lanes[kLanes];
    for (int j = 0; j < vectors; ++j) store<W>(lanes + j * W, sums[j] + sums[j + vectors]);
    return lane_sum(lanes);
}

// Returns log p of an outcome that has mass `mass` = exp(shifted) where all the others have `others`. The
// others are summed apart from it, so that nothing is lost where p is close to 1.
INLINE float log_share(double shifted, double mass, double others) {
    return static_cast<float>(mass == 1 ? -std::log1p(others) : shifted - std::log(mass + others));
}

struct Sampled {
    int64_t token;
    float logprob;        // among the tokens kept
    float model_logprob;  // among all
    float gap;            // between the logarithms of the two best speeds of the race
};

// The top_k largest tokens are kept (0: all), then the fewest of these that hold top_p of their mass.
struct Truncation {
    int64_t top_k;
    double top_p;
    bool any() const { return top_k > 0 || top_p < 1; }
};

// The memory that one thread works in.
struct Scratch {
    std::vector<float> sums, kept_sums, mass, largest;
    std::vector<uint32_t> keys;
    std::vector<double> weights;

    Scratch(int64_t blocks, const Truncation& truncation) : sums(blocks) {
        if (!truncation.any()) return;
        kept_sums.resize(blocks), largest.resize(blocks);
        mass.resize(blocks * kBlock), keys.resize(blocks * kBlock);
        weights.resize((0x3f800000 >> 18) + 1);
    }
};

// Applies lowbias32, a bijection of 32 bits whose outputs look random.
template <typename T>
INLINE T scrambled(T x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Returns the random bits of column i in a row's stream; see kernels.random.exponential.
template <typename T>
INLINE T random_bits(T i, uint32_t low, uint32_t high) {
    return scrambled(scrambled(i * 0x9e3779b9u + low) ^ high);
}

// In a race column i arrives at time E_i / mass_i with an exponential E_i, and the first one is drawn: each
// with a probability in proportion to its mass.
struct Race {
    double best = -1, second = -1;  // the largest mass_i / E_i so far
    int64_t token = 0;
};

// Lets the 128 columns from `first` on run. E is computed only where a column can come second, because -log(1
// - v) is at least v.
template <int W>
INLINE void race_block(const float* mass, int64_t first, uint64_t stream, Race& race) {
    using Words = typename Vectors<W>::Words;
    using Ints = typename Vectors<W>::Ints;
    const uint32_t low = static_cast<uint32_t>(stream), high = static_cast<uint32_t>(stream >> 32);
    uint32_t bits[kBlock];
    Words lane;
    for (int j = 0; j < W; ++j) lane[j] = j;
    // The bound is a little below `second`, so that rounding never hides a column.
    const float bound = static_cast<float>(race.second * 0x0.fffffp-31);
    Ints may = {};
    for (int64_t i = 0; i < kBlock; i += W) {
        const Words words = random_bits<Words>(lane + static_cast<uint32_t>(first + i), low, high);
        std::memcpy(bits + i, &words, sizeof words);
        may |= load<W>(mass + i) >= __builtin_convertvector((Ints)(words >> 1), Floats<W>) * bound;
    }
    if (!any<W>(may)) return;
    for (int64_t i = 0; i < kBlock; ++i) {
        if (!(mass[i] > 0) || mass[i] < static_cast<float>(bits[i] >> 1) * bound) continue;
        const uint32_t more = random_bits<uint32_t>(bits[i], high, low) | 1;
        const double speed = mass[i] / -std::log1p(-(bits[i] * 0x1p-32 + more * 0x1p-64));
        if (speed > race.best) {
            race.second = race.best;
            race.best = speed;
            race.token = first + i;
        } else if (speed > race.second) {
            race.second = speed;
        }
    }
}

// A prefix of a row's masses in falling order, where equal masses have the order of their columns: all masses
// above `mass`, and the first `equals` of those equal to it.
struct Prefix {
    float mass;
    int64_t equals;
};

// Finds the prefix of `keys`, the bits of masses in (0, 1], whose elements each have less than `limit` before
// them; an element counts 1 where `counted`, else its mass. The digits of the boundary's key are found one by
// one, the highest first; `keys` is used up.
INLINE Prefix find_prefix(uint32_t* keys, int64_t count, double limit, bool counted, double* weights) {
    // The bits of masses have the order of the masses.
    const auto mass_of = [](uint32_t key) {
        float mass;
        std::memcpy(&mass, &key, sizeof mass);
        return mass;
    };
    double before = 0;
    for (const int shift : {18, 9, 0}) {
        const uint32_t most = shift == 18 ? 0x3f800000 >> 18 : 511, mask = shift == 18 ? ~0u : 511;
        std::memset(weights, 0, (most + 1) * sizeof(double));
        for (int64_t i = 0; i < count; ++i)
            weights[keys[i] >> shift & mask] += counted ? 1.0 : mass_of(keys[i]);
        uint32_t boundary = 0;
        double above = before;
        for (uint32_t digit = most + 1; digit-- > 0;) {
            if (weights[digit] == 0) continue;
            boundary = digit, before = above;
            above += weights[digit];
            if (above >= limit) break;
        }
        int64_t left = 0;
        for (int64_t i = 0; i < count; ++i) {
            keys[left] = keys[i];
            left += (keys[i] >> shift & mask) == boundary;
        }
        count = left;
    }
    Prefix prefix{mass_of(keys[0]), 0};
    const double weight = counted ? 1.0 : prefix.mass;
    while (prefix.equals < count && before + prefix.equals * weight < limit) ++prefix.equals;
    return prefix;
}

// Zeroes the masses outside the prefix that `limit` makes (see find_prefix); no mass below `bound` > 0 lies
// in it. `kept_sums` takes the sums of blocks. Returns the sum of all.
template <int W>
INLINE double keep_prefix(float bound, double limit, bool counted, Scratch& scratch) {
    using Ints = typename Vectors<W>::Ints;
    constexpr int vectors = kLanes / W;
    float* mass = scratch.mass.data();
    const int64_t columns = scratch.mass.size();
    int64_t count = 0;
    for (int64_t i = 0; i < columns; i += W) {
        if (!any<W>(load<W>(mass + i) >= bound)) continue;
        for (int64_t j = i; j < i + W; ++j) {
            std::memcpy(&scratch.keys[count], mass + j, sizeof(float));
            count += mass[j] >= bound;
        }
    }
    Prefix prefix = find_prefix(scratch.keys.data(), count, limit, counted, scratch.weights.data());
    double total = 0;
    for (int64_t b = 0; b < columns / kBlock; ++b) {
        Floats<W> sums[vectors] = {};
        for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += kLanes) {
            for (int j = 0; j < vectors; ++j) {
                float* at = mass + i + j * W;
                const Floats<W> masses = load<W>(at);
                Floats<W> kept = masses > prefix.mass ? masses : Floats<W>{};
                if (any<W>((Ints)(masses == prefix.mass)))
                    for (int lane = 0; lane < W; ++lane)
                        if (masses[lane] == prefix.mass && prefix.equals-- > 0) kept[lane] = prefix.mass;
                store<W>(at, kept);
                sums[j] += kept;
            }
        }
        float lanes[kLanes];
        for (int j = 0; j < vectors; ++j) store<W>(lanes + j * W, sums[j]);
        total += scratch.kept_sums[b] = lane_sum(lanes);
    }
    return total;
}

// Zeroes the masses of a row, `total` in all, that are not kept.
template <int W>
INLINE void truncate(const Truncation& truncation, double total, Scratch& scratch) {
    constexpr float smallest = std::numeric_limits<float>::min();
    int64_t most = scratch.mass.size();
    if (const int64_t k = truncation.top_k; k > 0 && k < most) {
        // The k-th largest of the blocks' largest masses is no larger than the k-th of all.
        float bound = smallest;
        if (k <= static_cast<int64_t>(scratch.largest.size())) {
            for (size_t b = 0; b < scratch.largest.size(); ++b)
                scratch.largest[b] = row_max<W>(scratch.mass.data() + b * kBlock, kBlock);
            std::nth_element(scratch.largest.begin(), scratch.largest.begin() + (k - 1),
                             scratch.largest.end(), std::greater<float>());
            bound = std::max(bound, scratch.largest[k - 1]);
        }
        total = keep_prefix<W>(bound, static_cast<double>(k), true, scratch);
        most = k;
    }
    if (truncation.top_p < 1) {
        // Masses below the bound make up less than half of what may be left out.
        const float bound = static_cast<float>(0.5 * (1 - truncation.top_p) * total / most);
        keep_prefix<W>(std::max(bound, smallest), truncation.top_p * total, false, scratch);
    }
}

// Draws from the tokens that are kept of a row. A row with NaN gives NaN.
template <int W>
INLINE Sampled sample_row(const float* row, int64_t columns, uint64_t stream, double inverse,
                          const Truncation& truncation, Scratch& scratch) {
    const float m = row_max<W>(row, columns), scale = static_cast<float>(inverse);
    const int64_t blocks = (columns + kBlock - 1) / kBlock;
    const bool cut = truncation.any();
    float padded[kBlock], mass[kBlock];
    float* const sums = scratch.sums.data();
    double total = 0;
    Race race;
    for (int64_t b = 0; b < blocks; ++b) {
        const float* z = block_of(row, columns, b, padded);
        if (cut) {
            sums[b] = block_mass<W>(z, m, scale, scratch.mass.data() + b * kBlock);
        } else {
            sums[b] = block_mass<W>(z, m, scale, mass);
            race_block<W>(mass, b * kBlock, stream, race);
        }
        total += sums[b];
    }
    if (!(total > 0)) {
        constexpr float nan = std::numeric_limits<float>::quiet_NaN();
        return {0, nan, nan, nan};
    }
    if (cut) {
        truncate<W>(truncation, total, scratch);
        for (int64_t b = 0; b < blocks; ++b)
            if (scratch.kept_sums[b] > 0)
                race_block<W>(scratch.mass.data() + b * kBlock, b * kBlock, stream, race);
    }
    const int64_t token = race.token, chosen = token / kBlock, within = token % kBlock;
    const double shifted = (static_cast<double>(row[token]) - m) * inverse;
    // Returns the token's log-prob among the columns that have mass, from the sums of blocks and the masses
    // of its block.
    const auto logprob = [&](const float* of_blocks, const float* near) {
        double others = 0;
        for (int64_t b = 0; b < blocks; ++b)
            if (b != chosen) others += of_blocks[b];
        for (int64_t i = 0; i < kBlock; ++i)
            if (i != within) others += near[i];
        return log_share(shifted, near[within], others);
    };
    block_mass<W>(block_of(row, columns, chosen, padded), m, scale, mass);
    const float model = logprob(sums, mass),
                gap = race.second > 0 ? std::log(race.best / race.second) : kInfinity;
    return {token, cut ? logprob(scratch.kept_sums.data(), scratch.mass.data() + chosen * kBlock) : model,
            model, gap};
}

// The state of rows of logits while their columns come in parts. The target's logit is kept apart from the
// others, so that nothing is lost where its probability is close to 1.
struct Running {
    float* largest;   // [R] of the others so far; -inf before the first
    double* others;   // [R] sum of exp((z - largest) inverse) over the others so far
    float* target_z;  // [R] the target's logit, once its column was seen
};

// Takes in one part of a row. With `product` (width floats) z is overwritten by exp((z - largest) inverse),
// the target's by 0, and `product`, a sum of such terms of earlier parts, is brought to the present
// `largest`.
template <int W>
INLINE void accumulate_part(float* z, int64_t columns, int64_t target, float inverse, int64_t r,
                            const Running& running, float* product, int64_t width) {
    const bool has_target = target >= 0 && target < columns;
    const float target_z = has_target ? z[target] : 0.0f;
    if (has_target) {
        running.target_z[r] = target_z;
        z[target] = -kInfinity;
    }
    float m = running.largest[r];
    const float top = row_max<W>(z, columns);
    double& others = running.others[r];
    if (top > m) {
        if (others != 0) {
            const float shrink = exp_negative<W>((spread<W>(m) - top) * inverse)[0];
            others *= shrink;
            if (product != nullptr)
                for (int64_t d = 0; d < width; ++d) product[d] *= shrink;
        }
        running.largest[r] = m = top;
    }
    // A maximum of -inf stands for -inf only, or for NaN, which the row's maximum passes over but its sum
    // must not.
    const float shift = m == -kInfinity ? 0.0f : m;
    float padded[kBlock], mass[kBlock];
    const int64_t whole = columns / kBlock;
    for (int64_t b = 0; b < whole; ++b)
        others += block_mass<W>(z + b * kBlock, shift, inverse, product ? z + b * kBlock : nullptr);
    if (const int64_t rest = columns - whole * kBlock) {
        others +=
            block_mass<W>(block_of(z, columns, whole, padded), shift, inverse, product ? mass : nullptr);
        if (product != nullptr) std::memcpy(z + whole * kBlock, mass, rest * sizeof(float));
    }
    if (has_target) z[target] = product ? 0.0f : target_z;
}

// Sets out to one part of a row of J times `factor`: exp((z - shift) inverse) factor, and `target_j` at the
// target. All of it is 0 where factor is.
template <int W>
INLINE void jacobian_part(const float* z, int64_t columns, int64_t target, float inverse, float shift,
                          float factor, float target_j, float* out) {
    if (factor == 0) {
        std::memset(out, 0, columns * sizeof(float));
        return;
    }
    int64_t i = 0;
    for (; i + W <= columns; i += W)
        store<W>(out + i, exp_negative<W>((load<W>(z + i) - shift) * inverse) * factor);
    if (i < columns) {
        float padded[W];
        for (int j = 0; j < W; ++j) padded[j] = i + j < columns ? z[i + j] : -kInfinity;
        store<W>(padded, exp_negative<W>((load<W>(padded) - shift) * inverse) * factor);
        std::memcpy(out + i, padded, (columns - i) * sizeof(float));
    }
    if (target >= 0 && target < columns) out[target] = target_j;
}

using SampleRow = Sampled (*)(const float*, int64_t, uint64_t, double, const Truncation&, Scratch&);
using AccumulatePart = void (*)(float*, int64_t, int64_t, float, int64_t, const Running&, float*, int64_t);
using JacobianPart = void (*)(const float*, int64_t, int64_t, float, float, float, float, float*);

struct Kernels {
    SampleRow sample;
    AccumulatePart accumulate;
    JacobianPart jacobian;
};

#define KERNELS(name, target, W)                                                                       \
    target Sampled sample_##name(const float* row, int64_t columns, uint64_t stream, double inverse,   \
                                 const Truncation& truncation, Scratch& scratch) {                     \
        return sample_row<W>(row, columns, stream, inverse, truncation, scratch);                      \
    }                                                                                                  \
    target void accumulate_##name(float* z, int64_t columns, int64_t target_column, float inverse,     \
                                  int64_t r, const Running& running, float* product, int64_t width) {  \
        accumulate_part<W>(z, columns, target_column, inverse, r, running, product, width);            \
    }                                                                                                  \
    target void jacobian_##name(const float* z, int64_t columns, int64_t target_column, float inverse, \
                                float shift, float factor, float target_j, float* out) {               \
        jacobian_part<W>(z, columns, target_column, inverse, shift, factor, target_j, out);            \
    }                                                                                                  \
    constexpr Kernels k_##name = {sample_##name, accumulate_##name, jacobian_##name};

#ifdef AVX512
KERNELS(avx512, AVX512, 16)
KERNELS(avx2, AVX2, 8)
constexpr Versions<Kernels> kVersions = {{k_avx512, k_avx2}};
#else
KERNELS(generic, , 4)
constexpr Versions<Kernels> kVersions = {{k_generic}};
#endif

using Matrix = Array<float, -1, -1>;
template <typename T>
using Vector = Array<T, -1>;

void check_rows(const Matrix& logits, size_t a, size_t b) {
    check(logits.shape(0) == a && logits.shape(0) == b && logits.shape(1) > 0,
          "logits [R, V] with V > 0 and vectors [R] are wanted");
}

// Draws a token for each row. `kept`, where it is given, takes the masses of the tokens kept, in units of the
// largest.
void sample_rows(const Matrix& logits, const Vector<int64_t>& stream, double inverse, int64_t top_k,
                 double top_p, const Vector<int64_t>& token, const Vector<float>& logprob,
                 const Vector<float>& model_logprob, const Vector<float>& gap, std::optional<Matrix> kept,
                 int threads, const char* instructions) {
    check_rows(logits, stream.shape(0), token.shape(0));
    check_rows(logits, logprob.shape(0), model_logprob.shape(0));
    check_rows(logits, gap.shape(0), kept ? kept->shape(0) : gap.shape(0));
    const SampleRow one = kVersions.of(instructions).sample;
    const int64_t rows = logits.shape(0), columns = logits.shape(1);
    // Where top_k holds all tokens, none is left out.
    const Truncation truncation{top_k < columns ? top_k : 0, top_p};
    const bool fits = !kept || (static_cast<int64_t>(kept->shape(1)) == columns && truncation.any());
    check(top_k >= 0 && top_p > 0 && fits,
          "top_k >= 0 and top_p > 0 are wanted, and kept [R, V] only where they leave tokens out");
    const float* z = logits.data();
    const int64_t* streams = stream.data();
    float* masses = kept ? kept->data() : nullptr;
    nb::gil_scoped_release release;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch((columns + kBlock - 1) / kBlock, truncation);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const Sampled sampled = one(z + r * columns, columns, static_cast<uint64_t>(streams[r]), inverse,
                                        truncation, scratch);
            token.data()[r] = sampled.token;
            logprob.data()[r] = sampled.logprob;
            model_logprob.data()[r] = sampled.model_logprob;
            gap.data()[r] = sampled.gap;
            if (masses != nullptr)
                std::memcpy(masses + r * columns, scratch.mass.data(), columns * sizeof(float));
        }
    }
}

// A part [R, B] of the columns of logits, whose rows may lie further apart than B.
using Part = StridedArray<float, -1, -1>;

void check_part(const Part& part, size_t rows) {
    check(part.shape(0) == rows && (part.shape(1) == 1 || part.stride(1) == 1),
          "a part [R, B] with dense columns is wanted");
}

void accumulate(const Part& logits, const Vector<int64_t>& target, int64_t first, double inverse,
                const Vector<float>& largest, const Vector<double>& others, const Vector<float>& target_z,
                std::optional<Matrix> product, int threads, const char* instructions) {
    const int64_t rows = logits.shape(0), columns = logits.shape(1), stride = logits.stride(0);
    check_part(logits, target.shape(0));
    const size_t count = target.shape(0);
    const bool alike = largest.shape(0) == count && others.shape(0) == count && target_z.shape(0) == count;
    check(alike && (!product || product->shape(0) == count), "vectors and product of R rows are wanted");
    const AccumulatePart one = kVersions.of(instructions).accumulate;
    const Running running{largest.data(), others.data(), target_z.data()};
    float* z = logits.data();
    const int64_t* y = target.data();
    float* sums = product ? product->data() : nullptr;
    const int64_t width = product ? product->shape(1) : 0;
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        one(z + r * stride, columns, y[r] - first, static_cast<float>(inverse), r, running,
            sums ? sums + r * width : nullptr, width);
}

// Sets the log-probs, after all columns were taken in, and the state (shift, scale, target's J) that J =
// exp((z - shift) inverse) scale is made of. `product_scale` is to `largest` what scale is to shift. A row
// without a log-prob has NaN in all of them.
void finish(double inverse, double slope, const Vector<float>& largest, const Vector<double>& others,
            const Vector<float>& target_z, const Vector<float>& logprob, const Matrix& state,
            const Vector<float>& product_scale) {
    const int64_t rows = logprob.shape(0);
    float* out = state.data();
    for (int64_t r = 0; r < rows; ++r) {
        const float z = target_z.data()[r], m = largest.data()[r];
        const double shift = z > m || z != z ? z : m;
        const double shrink = m == shift ? 1 : std::exp((m - shift) * inverse),
                     rest = others.data()[r] * shrink;
        const double mass = z == shift ? 1 : std::exp((z - shift) * inverse);
        const double total = std::isfinite(shift) ? mass + rest : std::numeric_limits<double>::quiet_NaN();
        logprob.data()[r] =
            total == total ? log_share((z - shift) * inverse, mass, rest) : static_cast<float>(total);
        out[3 * r] = static_cast<float>(shift);
        out[3 * r + 1] = static_cast<float>(slope / total);
        out[3 * r + 2] = static_cast<float>(-slope * (rest / total));
        product_scale.data()[r] = static_cast<float>(slope / total * shrink);
    }
}

void jacobian(const Part& logits, const Vector<int64_t>& target, int64_t first, double inverse,
              const Matrix& state, const Vector<float>& factor, const Matrix& out, int threads,
              const char* instructions) {
    const int64_t rows = logits.shape(0), columns = logits.shape(1), stride = logits.stride(0);
    check_part(logits, target.shape(0));
    const size_t count = target.shape(0);
    const bool alike = state.shape(0) == count && factor.shape(0) == count && out.shape(0) == count;
    check(alike && state.shape(1) == 3 && out.shape(1) == logits.shape(1),
          "state [R, 3], factor [R] and out [R, B] are wanted");
    const JacobianPart one = kVersions.of(instructions).jacobian;
    const float* z = logits.data();
    const int64_t* y = target.data();
    const float* known = state.data();
    const float* a = factor.data();
    float* to = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = known + 3 * r;
        // A row of factor 0 is 0, whatever it holds, and 0 times NaN is not.
        const float scale = a[r] == 0 ? 0.0f : row[1] * a[r];
        one(z + r * stride, columns, y[r] - first, static_cast<float>(inverse), row[0], scale, row[2] * a[r],
            to + r * columns);
    }
}

}  // namespace

void bind_rows(nb::module_& m) {
    m.def("sample_rows", &sample_rows, nb::arg("logits"), nb::arg("stream"), nb::arg("inverse_temperature"),
          nb::arg("top_k"), nb::arg("top_p"), nb::arg("token"), nb::arg("logprob"), nb::arg("model_logprob"),
          nb::arg("gap"), nb::arg("kept").none(), nb::arg("threads"), nb::arg("instructions"));
    m.def("accumulate", &accumulate, nb::arg("logits"), nb::arg("target"), nb::arg("first"),
          nb::arg("inverse"), nb::arg("largest"), nb::arg("others"), nb::arg("target_z"),
          nb::arg("product").none(), nb::arg("threads"), nb::arg("instructions"));
    m.def("finish", &finish, nb::arg("inverse"), nb::arg("slope"), nb::arg("largest"), nb::arg("others"),
          nb::arg("target_z"), nb::arg("logprob"), nb::arg("state"), nb::arg("product_scale"));
    m.def("jacobian", &jacobian, nb::arg("logits"), nb::arg("target"), nb::arg("first"), nb::arg("inverse"),
          nb::arg("state"), nb::arg("factor"), nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
}
