// Attention of one new token per row over a cache: rows that answer the same prompt share its keys and
// values.
//
// Keys lie in blocks of 16 tokens, [blocks, d, 16], so that 16 scores are made side by side; values lie as
// [tokens, d]. They are float32 or bfloat16; arithmetic is float32, and results are rounded once. One thread
// does one row, in an order that depends on the row alone: results are bit for bit the same for any number of
// threads and rows, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>

#include <cstring>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "dispatch.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

// Keys and values of one head, token after token. A row sees the tokens skip, ..., tokens - 1.
template <typename T>
struct Segment {
    const T* keys;
    const T* values;
    int64_t skip;  // less than kLanes
    int64_t tokens;
    int64_t padded() const { return (tokens + kLanes - 1) / kLanes * kLanes; }
};

// Returns the tokens first, ..., tokens - 1 of keys [blocks, d, kLanes] and values [tokens, d], from the
// block that holds the first.
template <typename T>
Segment<T> segment_from(const T* keys, const T* values, int64_t first, int64_t tokens, int64_t d) {
    if (first >= tokens) return {keys, values, 0, 0};
    const int64_t skip = first > 0 ? first % kLanes : 0, begin = first > 0 ? first - skip : 0;
    return {keys + begin * d, values + begin * d, skip, tokens - begin};
}

// Attends with Q queries q [Q, d] of one key head to both segments; out [Q, d]. scores has room for Q times
// all padded tokens.
template <int W, int Q, typename T>
INLINE void attend(const float* q, int64_t d, const Segment<T> (&segments)[2], const Score& score,
                   float* scores, float* out) {
    constexpr int vectors = kLanes / W;
    const int64_t total = segments[0].padded() + segments[1].padded();
    float* to = scores;
    for (const Segment<T>& segment : segments) {
        for (int64_t t = 0; t < segment.tokens; t += kLanes, to += kLanes) {
            const T* keys = segment.keys + t * d;
            Floats<W> sums[Q][vectors] = {};
            for (int64_t i = 0; i < d; ++i) {
                for (int v = 0; v < vectors; ++v) {
                    const Floats<W> key = load<W>(keys + i * kLanes + v * W);
                    for (int j = 0; j < Q; ++j) sums[j][v] += key * q[j * d + i];
                }
            }
            for (int j = 0; j < Q; ++j) {
                for (int v = 0; v < vectors; ++v) {
                    Floats<W> value = sums[j][v] * score.scale;
                    if (score.softcap > 0) value = tanh_of<W>(value / score.softcap) * score.softcap;
                    store<W>(to + j * total + v * W, value);
                }
                for (int64_t lane = 0; t == 0 && lane < segment.skip; ++lane)
                    to[j * total + lane] = -kInfinity;
                for (int64_t lane = segment.tokens - t; lane < kLanes; ++lane)
                    to[j * total + lane] = -kInfinity;
            }
        }
    }
    float factor[Q];
    for (int j = 0; j < Q; ++j) factor[j] = make_masses<W>(scores + j * total, total);
    int64_t i = 0;
    for (; i + W <= d; i += W) {
        Floats<W> sums[Q] = {};
        const float* mass = scores;
        for (const Segment<T>& segment : segments) {
            for (int64_t t = segment.skip; t < segment.tokens; ++t) {
                const Floats<W> value = load<W>(segment.values + t * d + i);
                for (int j = 0; j < Q; ++j) sums[j] += value * mass[j * total + t];
            }
            mass += segment.padded();
        }
        for (int j = 0; j < Q; ++j) store<W>(out + j * d + i, sums[j] * factor[j]);
    }
    for (; i < d; ++i) {
        for (int j = 0; j < Q; ++j) {
            float sum = 0;
            const float* mass = scores + j * total;
            for (const Segment<T>& segment : segments) {
                for (int64_t t = segment.skip; t < segment.tokens; ++t)
                    sum = std::fma(number(segment.values[t * d + i]), mass[t], sum);
                mass += segment.padded();
            }
            out[j * d + i] = sum * factor[j];
        }
    }
}

template <int W, typename T>
INLINE void attend_head(const float* q, int64_t queries, int64_t d, const Segment<T> (&segments)[2],
                        const Score& score, float* scores, float* out) {
    for (; queries >= 4; queries -= 4, q += 4 * d, out += 4 * d)
        attend<W, 4>(q, d, segments, score, scores, out);
    if (queries == 3) attend<W, 3>(q, d, segments, score, scores, out);
    if (queries == 2) attend<W, 2>(q, d, segments, score, scores, out);
    if (queries == 1) attend<W, 1>(q, d, segments, score, scores, out);
}

template <typename T>
using AttendHead = void (*)(const float*, int64_t, int64_t, const Segment<T> (&)[2], const Score&, float*,
                            float*);

#define ATTEND(name, target, W)                                                                     \
    template <typename T>                                                                           \
    target void attend_##name(const float* q, int64_t n, int64_t d, const Segment<T>(&segments)[2], \
                              const Score& score, float* scores, float* out) {                      \
        attend_head<W>(q, n, d, segments, score, scores, out);                                      \
    }

#ifdef AVX512
ATTEND(avx512, AVX512, 16)
ATTEND(avx2, AVX2, 8)
template <typename T>
constexpr Versions<AttendHead<T>> kVersions = {{attend_avx512<T>, attend_avx2<T>}};
#else
ATTEND(generic, , 4)
template <typename T>
constexpr Versions<AttendHead<T>> kVersions = {{attend_generic<T>}};
#endif

template <typename T>
using Blocks = Array<T, -1, -1, -1, -1, kLanes>;
template <typename T>
using Values = Array<T, -1, -1, -1, -1>;
template <typename T>
using Rows = Array<T, -1, -1, -1>;
using Numbers = Array<int64_t, -1>;

template <typename T>
void decode_attention(const Rows<T>& q, const Rows<T>& key, const Rows<T>& value,
                      const Blocks<T>& prompt_keys, const Values<T>& prompt_values,
                      const Numbers& prompt_tokens, const Numbers& owner, const Blocks<T>& own_keys,
                      const Values<T>& own_values, int64_t used, float scale, float softcap, int64_t window,
                      const Rows<T>& out, int threads, const char* instructions) {
    const size_t rows = q.shape(0), heads = q.shape(1), d = q.shape(2), kv_heads = key.shape(1),
                 prompts = prompt_keys.shape(0);
    const int64_t prompt_room = prompt_values.shape(2), own_room = own_values.shape(2);
    const int64_t prompt_blocks = prompt_keys.shape(2), own_blocks = own_keys.shape(2);
    const size_t sizes[][2] = {{key.shape(0), rows},
                               {value.shape(0), rows},
                               {out.shape(0), rows},
                               {owner.shape(0), rows},
                               {own_keys.shape(0), rows},
                               {own_values.shape(0), rows},
                               {out.shape(1), heads},
                               {value.shape(1), kv_heads},
                               {prompt_keys.shape(1), kv_heads},
                               {prompt_values.shape(1), kv_heads},
                               {own_keys.shape(1), kv_heads},
                               {own_values.shape(1), kv_heads},
                               {key.shape(2), d},
                               {value.shape(2), d},
                               {out.shape(2), d},
                               {prompt_keys.shape(3), d},
                               {prompt_values.shape(3), d},
                               {own_keys.shape(3), d},
                               {own_values.shape(3), d},
                               {prompt_values.shape(0), prompts},
                               {prompt_tokens.shape(0), prompts}};
    check_equal(sizes);
    check(kv_heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of key heads");
    check(prompt_blocks * kLanes >= prompt_room && own_blocks * kLanes >= own_room, "too few key blocks");
    check(used >= 0 && used < own_room, "the cache is full");
    check(window > 0, "the window is empty");
    const int64_t *tokens = prompt_tokens.data(), *of = owner.data();
    for (size_t p = 0; p < prompts; ++p)
        check(tokens[p] >= 0 && tokens[p] <= prompt_room, "a prompt is longer than its room");
    for (size_t r = 0; r < rows; ++r) check(of[r] >= 0 && of[r] < int64_t(prompts), "a row has no prompt");
    const AttendHead<T> attend_row = kVersions<T>.of(instructions);
    const int64_t group = heads / kv_heads, queries = group < 4 ? group : 4, width = d, key_heads = kv_heads,
                  all_rows = rows;
    const T *qs = q.data(), *ks = key.data(), *vs = value.data(), *pk = prompt_keys.data(),
            *pv = prompt_values.data();
    const Score score = {scale, softcap};
    T *ok = own_keys.data(), *ov = own_values.data(), *outs = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(queries * (prompt_blocks + own_blocks) * kLanes);
        std::vector<float> wide_q(group * width), wide_out(group * width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < all_rows; ++r) {
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t at = r * key_heads + h, from = of[r] * key_heads + h;
                T* keys = ok + at * own_blocks * kLanes * width;
                T* block = keys + used / kLanes * kLanes * width + used % kLanes;
                for (int64_t i = 0; i < width; ++i) block[i * kLanes] = ks[at * width + i];
                T* values = ov + at * own_room * width;
                std::memcpy(values + used * width, vs + at * width, width * sizeof(T));
                // `first` is the first position in the window, counted from the prompt's first token.
                const int64_t length = tokens[of[r]], first = length + used + 1 - window;
                const Segment<T> segments[2] = {
                    segment_from(pk + from * prompt_blocks * kLanes * width, pv + from * prompt_room * width,
                                 first, length, width),
                    segment_from(keys, values, first - length, used + 1, width)};
                const int64_t head = (r * key_heads * group + h * group) * width;
                for (int64_t i = 0; i < group * width; ++i) wide_q[i] = number(qs[head + i]);
                attend_row(wide_q.data(), group, width, segments, score, scores.data(), wide_out.data());
                for (int64_t i = 0; i < group * width; ++i) outs[head + i] = stored<T>(wide_out[i]);
            }
        }
    }
}

template <typename T>
void bind_attention_of(nb::module_& m) {
    m.def("decode_attention", &decode_attention<T>, nb::arg("q"), nb::arg("key"), nb::arg("value"),
          nb::arg("prompt_keys"), nb::arg("prompt_values"), nb::arg("prompt_tokens"), nb::arg("owner"),
          nb::arg("own_keys"), nb::arg("own_values"), nb::arg("used"), nb::arg("scale"), nb::arg("softcap"),
          nb::arg("window"), nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
}

}  // namespace

void bind_attention(nb::module_& m) {
    bind_attention_of<float>(m);
    bind_attention_of<Bfloat16>(m);
}
