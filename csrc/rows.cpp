// Row arithmetic over logits on the CPU: sampling by inversion, and log-probs with their gradient.
//
// One thread does one row, in an order that depends on V alone: results are bit for bit the same for any number of threads, and for
// AVX2 and AVX-512.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "vectors.h"

namespace nb = nanobind;

void bind_attention(nb::module_& m);

namespace {

constexpr int64_t kBlock = 128;

// The 128 logits of block b; past the row's end -inf, by a copy into `padded`.
INLINE const float* block_of(const float* row, int64_t columns, int64_t b, float* padded) {
    const int64_t left = columns - b * kBlock;
    if (left >= kBlock) return row + b * kBlock;
    for (int64_t i = 0; i < kBlock; ++i) padded[i] = i < left ? row[b * kBlock + i] : -kInfinity;
    return padded;
}

// Sum of exp((z - m) inverse) over 128 logits; the terms go to `out` where it is not null.
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

// log p of an outcome that has mass `own` = exp(shifted) where all the others have `others`. The others are summed apart from it, so
// that nothing is lost where p is close to 1.
INLINE float log_share(double shifted, double own, double others) {
    return static_cast<float>(own == 1 ? -std::log1p(others) : shifted - std::log(own + others));
}

struct Sampled {
    int64_t token;
    float logprob;
};

// The first token at which the cumulative mass passes u times the total: blocks first, then inside one block. NaN in, NaN out.
template <int W>
INLINE Sampled sample_row(const float* row, int64_t columns, double u, double inverse, float* sums) {
    const float m = row_max<W>(row, columns), scale = static_cast<float>(inverse);
    const int64_t blocks = (columns + kBlock - 1) / kBlock;
    float padded[kBlock], mass[kBlock];
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        sums[b] = block_mass<W>(block_of(row, columns, b, padded), m, scale, nullptr);
        total += sums[b];
    }
    if (!(total > 0)) return {0, std::numeric_limits<float>::quiet_NaN()};
    const double goal = u * total;
    double before = 0;
    int64_t chosen = 0;
    for (int64_t b = 0; b < blocks && !(before > goal); ++b) {
        // Rounding may put the goal at the total: the last block with mass then stands.
        if (sums[b] > 0) chosen = b;
        before += sums[b];
    }
    double others = 0;
    before = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (b < chosen) before += sums[b];
        if (b != chosen) others += sums[b];
    }
    block_mass<W>(block_of(row, columns, chosen, padded), m, scale, mass);
    int64_t within = 0;
    double cumulative = 0;
    for (int64_t i = 0; i < kBlock && !(cumulative > goal - before); ++i) {
        if (mass[i] > 0) within = i;
        cumulative += mass[i];
    }
    for (int64_t i = 0; i < kBlock; ++i)
        if (i != within) others += mass[i];
    const int64_t token = chosen * kBlock + within;
    return {token, log_share((static_cast<double>(row[token]) - m) * inverse, mass[within], others)};
}

struct Normalised {
    float logprob;
    float scale;
};

// log p of the target. With `gradient` the row is overwritten by (softmax - onehot) * inverse / scale, so that it is passed over once after
// the maximum is known; else it is left as it was. A row with NaN or without a finite maximum becomes 0 with scale NaN.
template <int W>
INLINE Normalised logprob_row(float* row, int64_t columns, int64_t target, double inverse, bool gradient) {
    const float m = row_max<W>(row, columns), scale = static_cast<float>(inverse);
    const float z = row[target];
    float padded[kBlock], mass[kBlock];
    const double own = exp_negative<W>((spread<W>(z) - m) * scale)[0];
    // NaN stays: it must reach the log-prob and the scale.
    if (z == z) row[target] = -kInfinity;
    double others = 0;
    const int64_t whole = columns / kBlock;
    for (int64_t b = 0; b < whole; ++b) others += block_mass<W>(row + b * kBlock, m, scale, gradient ? row + b * kBlock : nullptr);
    if (const int64_t rest = columns - whole * kBlock) {
        others += block_mass<W>(block_of(row, columns, whole, padded), m, scale, mass);
        if (gradient) std::memcpy(row + whole * kBlock, mass, rest * sizeof(float));
    }
    const double total = own + others;
    if (gradient) {
        row[target] = static_cast<float>(-others);
        if (!(total == total)) std::memset(row, 0, columns * sizeof(float));
    } else {
        row[target] = z;
    }
    return {log_share((static_cast<double>(z) - m) * inverse, own, others), static_cast<float>(inverse / total)};
}

using SampleRow = Sampled (*)(const float*, int64_t, double, double, float*);
using LogprobRow = Normalised (*)(float*, int64_t, int64_t, double, bool);

struct Rows {
    const char* name;
    SampleRow sample;
    LogprobRow logprob;
};

#if defined(__x86_64__) || defined(__i386__)

AVX512 Sampled sample_row_avx512(const float* row, int64_t columns, double u, double inverse, float* sums) {
    return sample_row<16>(row, columns, u, inverse, sums);
}
AVX512 Normalised logprob_row_avx512(float* row, int64_t columns, int64_t target, double inverse, bool gradient) {
    return logprob_row<16>(row, columns, target, inverse, gradient);
}
AVX2 Sampled sample_row_avx2(const float* row, int64_t columns, double u, double inverse, float* sums) {
    return sample_row<8>(row, columns, u, inverse, sums);
}
AVX2 Normalised logprob_row_avx2(float* row, int64_t columns, int64_t target, double inverse, bool gradient) {
    return logprob_row<8>(row, columns, target, inverse, gradient);
}

std::vector<Rows> supported() {
    __builtin_cpu_init();
    std::vector<Rows> found;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back({"avx512", sample_row_avx512, logprob_row_avx512});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", sample_row_avx2, logprob_row_avx2});
    return found;
}

#else

Sampled sample_row_generic(const float* row, int64_t columns, double u, double inverse, float* sums) {
    return sample_row<4>(row, columns, u, inverse, sums);
}
Normalised logprob_row_generic(float* row, int64_t columns, int64_t target, double inverse, bool gradient) {
    return logprob_row<4>(row, columns, target, inverse, gradient);
}

std::vector<Rows> supported() { return {{"generic", sample_row_generic, logprob_row_generic}}; }

#endif

const std::vector<Rows> kSupported = supported();

const Rows& rows_of(const char* instructions) {
    for (const Rows& rows : kSupported)
        if (std::strcmp(rows.name, instructions) == 0) return rows;
    throw std::invalid_argument(std::string("this processor does not run ") + instructions);
}

using Matrix = nb::ndarray<float, nb::shape<-1, -1>, nb::device::cpu, nb::c_contig>;
template <typename T>
using Vector = nb::ndarray<T, nb::shape<-1>, nb::device::cpu, nb::c_contig>;

void check_rows(const Matrix& logits, size_t a, size_t b) {
    if (logits.shape(0) != a || logits.shape(0) != b || logits.shape(1) == 0)
        throw std::invalid_argument("logits [R, V] with V > 0 and vectors [R] are wanted");
}

void sample_rows(const Matrix& logits, const Vector<double>& u, double inverse, const Vector<int64_t>& token, const Vector<float>& logprob,
                 int threads, const char* instructions) {
    check_rows(logits, u.shape(0), token.shape(0));
    check_rows(logits, u.shape(0), logprob.shape(0));
    const SampleRow one = rows_of(instructions).sample;
    const int64_t rows = logits.shape(0), columns = logits.shape(1);
    const float* z = logits.data();
    const double* uniform = u.data();
    int64_t* out = token.data();
    float* log = logprob.data();
    nb::gil_scoped_release release;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums((columns + kBlock - 1) / kBlock);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const Sampled sampled = one(z + r * columns, columns, uniform[r], inverse, sums.data());
            out[r] = sampled.token;
            log[r] = sampled.logprob;
        }
    }
}

void rows_logprob(const Matrix& logits, const Vector<int64_t>& target, double inverse, bool gradient, const Vector<float>& logprob,
                  const Vector<float>& scale, int threads, const char* instructions) {
    check_rows(logits, target.shape(0), logprob.shape(0));
    check_rows(logits, target.shape(0), scale.shape(0));
    const LogprobRow one = rows_of(instructions).logprob;
    const int64_t rows = logits.shape(0), columns = logits.shape(1);
    float* z = logits.data();
    const int64_t* y = target.data();
    float* log = logprob.data();
    float* factor = scale.data();
    for (int64_t r = 0; r < rows; ++r)
        if (y[r] < 0 || y[r] >= columns) throw std::out_of_range("target " + std::to_string(y[r]) + " does not lie in [0, V)");
    nb::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const Normalised normalised = one(z + r * columns, columns, y[r], inverse, gradient);
        log[r] = normalised.logprob;
        factor[r] = normalised.scale;
    }
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Row arithmetic over logits on the CPU; call it through kernels.native.";
    nb::list names;
    for (const Rows& rows : kSupported) names.append(rows.name);
    // Fastest first; empty where this processor runs none of them.
    m.attr("instructions") = nb::tuple(names);
    m.def("sample_rows", &sample_rows, nb::arg("logits"), nb::arg("u"), nb::arg("inverse_temperature"), nb::arg("token"),
          nb::arg("logprob"), nb::arg("threads"), nb::arg("instructions"));
    m.def("rows_logprob", &rows_logprob, nb::arg("logits"), nb::arg("target"), nb::arg("inverse_temperature"), nb::arg("gradient"),
          nb::arg("logprob"), nb::arg("scale"), nb::arg("threads"), nb::arg("instructions"));
    bind_attention(m);
}
