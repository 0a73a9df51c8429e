// Attention among packed tokens, and its gradients.
//
// Tokens lie run after run: prompts, and behind each of them its responses. A token sees the prompt of its run
// and the run up to itself; a prompt has no other one before it. The forward pass sums in the order of a decoding
// step (attention.h), so that a token's result has the bits that it had when it was sampled. The gradients
// compute the scores again. One thread does one prompt with all its responses, one key head at a time, in the order of
// the tokens: results are bit for bit the same for any number of threads, and for AVX2 and AVX-512.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "dispatch.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kTile = 16;   // queries that are done together
constexpr int64_t kChunk = 32;  // tokens whose keys, values and gradients stay in the first cache meanwhile

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Where the rows of one key head lie: `group` of d numbers side by side for each token, tokens `stride` apart.
struct Place {
    int64_t at, stride, group, d;
    int64_t of(int64_t row) const { return at + row / group * stride + row % group * d; }
};

// Reads rows of d numbers as float32 [rows, wide], with zeros behind the d.
template <typename T>
void read(const T* from, const Place& place, int64_t rows, int64_t wide, std::vector<float>& to) {
    to.assign(rows * wide, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < place.d; ++i) to[r * wide + i] = number(from[place.of(r) + i]);
}

// Writes rows [rows, wide], rounded once.
template <typename T>
void write(T* to, const Place& place, int64_t rows, int64_t wide, const std::vector<float>& from) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < place.d; ++i) to[place.of(r) + i] = stored<T>(from[r * wide + i]);
}

// The tokens of a run in one key head.
struct Tokens {
    std::vector<float> rows;    // [tokens, wide]
    std::vector<float> blocks;  // [blocks, d, kLanes], zeros behind the last token

    void make_blocks(int64_t tokens, int64_t d, int64_t wide) {
        blocks.assign(padded(tokens) * d, 0.0f);
        for (int64_t t = 0; t < tokens; ++t) {
            float* lane = blocks.data() + t / kLanes * kLanes * d + t % kLanes;
            for (int64_t i = 0; i < d; ++i) lane[i * kLanes] = rows[t * wide + i];
        }
    }
};

// Keys and values of a run, and where their gradients are added up.
struct Part {
    Tokens keys, values;
    std::vector<float> d_keys, d_values;  // [tokens, wide]
    int64_t tokens = 0;
};

// What some queries see of a part: from `begin`, a multiple of kLanes, to `end`.
struct Seen {
    Part* part;
    int64_t begin, end;
    int64_t size() const { return padded(end - begin); }
};

// What one query sees of the prompt and of its own run.
struct Visible {
    int64_t from[2], to[2];
};

// The queries of a run in one key head, `group` of them for each token, some of which are done together.
struct Tile {
    const float* q;  // [rows, wide]
    int64_t rows, d, wide;
    Visible visible[kTile];
    Seen seen[2];
    int64_t begins(int s) const { return s ? seen[0].size() : 0; }  // in a row of scores
    int64_t total() const { return seen[0].size() + seen[1].size(); }
};

Tile tile_of(const float* q, int64_t first, int64_t rows, int64_t group, int64_t d, int64_t wide, Part& prompt,
             Part& own, int64_t window) {
    const int64_t before = prompt.tokens;
    Tile tile = {q + first * wide, rows, d, wide, {}, {{&prompt, before, before}, {&own, own.tokens, 0}}};
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t position = (first + j) / group, from = before + position + 1 - window;
        tile.visible[j] = {{std::clamp<int64_t>(from, 0, before), std::max<int64_t>(from - before, 0)},
                           {before, position + 1}};
        for (int s = 0; s < 2; ++s) {
            tile.seen[s].begin = std::min(tile.seen[s].begin, tile.visible[j].from[s] / kLanes * kLanes);
            tile.seen[s].end = std::max(tile.seen[s].end, tile.visible[j].to[s]);
        }
    }
    return tile;
}

// Calls work for 4 rows at a time, and for those left; Q is their number.
#define BY_FOUR(rows, work)                                                             \
    for (int64_t r = 0; r < (rows); r += 4) {                                           \
        const int64_t count = (rows) - r;                                               \
        if (count >= 4) { constexpr int Q = 4; work; }                                  \
        if (count == 3) { constexpr int Q = 3; work; }                                  \
        if (count == 2) { constexpr int Q = 2; work; }                                  \
        if (count == 1) { constexpr int Q = 1; work; }                                  \
    }

// Makes out[j, lane] = row j . lane of a block [d, kLanes], for rows [Q, wide].
template <int W, int Q>
INLINE void block_products(const float* row, int64_t wide, int64_t d, const float* block, int64_t total,
                           float* out) {
    constexpr int vectors = kLanes / W;
    Floats<W> sums[Q][vectors] = {};
    for (int64_t i = 0; i < d; ++i)
        for (int v = 0; v < vectors; ++v) {
            const Floats<W> x = load<W>(block + i * kLanes + v * W);
            for (int j = 0; j < Q; ++j) sums[j][v] += x * row[j * wide + i];
        }
    for (int j = 0; j < Q; ++j)
        for (int v = 0; v < vectors; ++v) store<W>(out + j * total + v * W, sums[j][v]);
}

// Makes out[row, t] = rows [tile.rows, wide] . the keys, or values, that the tile sees.
template <int W>
INLINE void products(const Tile& tile, const float* rows, Tokens Part::* of, float* out) {
    const int64_t total = tile.total();
    for (int s = 0; s < 2; ++s) {
        const Seen& seen = tile.seen[s];
        float* to = out + tile.begins(s);
        for (int64_t t = seen.begin; t < seen.end; t += kLanes, to += kLanes) {
            const float* block = (seen.part->*of).blocks.data() + t * tile.d;
            BY_FOUR(tile.rows,
                    (block_products<W, Q>(rows + r * tile.wide, tile.wide, tile.d, block, total, to + r * total)))
        }
    }
}

// Makes masses exp(score - largest) of the products of one row, and returns 1 / their sum; -inf where the row
// does not see. slope: where the scores' slopes go, nullptr for nowhere.
template <int W>
INLINE float masses(const Tile& tile, int64_t row, const Score& score, float* mass, float* slope) {
    const int64_t total = tile.total();
    for (int64_t t = 0; t < total; t += W) {
        Floats<W> value = load<W>(mass + t) * score.scale, factor = spread<W>(score.scale);
        if (score.softcap > 0) {
            const Floats<W> bent = tanh_of<W>(value / score.softcap);
            value = bent * score.softcap;
            factor = factor * (1.0f - bent * bent);
        }
        store<W>(mass + t, value);
        if (slope != nullptr) store<W>(slope + t, factor);
    }
    const Visible& visible = tile.visible[row];
    for (int s = 0; s < 2; ++s) {
        float* at = mass + tile.begins(s);
        std::fill(at, at + (visible.from[s] - tile.seen[s].begin), -kInfinity);
        std::fill(at + (visible.to[s] - tile.seen[s].begin), at + tile.seen[s].size(), -kInfinity);
    }
    return make_masses<W>(mass, total);
}

// Adds to V vectors of out [Q, wide] those of the values of some tokens, by their masses.
template <int W, int Q, int V>
INLINE void add_columns(const float* value, int64_t tokens, int64_t wide, const float* mass, int64_t total,
                        float* out) {
    Floats<W> sums[Q][V];
    for (int j = 0; j < Q; ++j)
        for (int v = 0; v < V; ++v) sums[j][v] = load<W>(out + j * wide + v * W);
    for (int64_t t = 0; t < tokens; ++t)
        for (int v = 0; v < V; ++v) {
            const Floats<W> x = load<W>(value + t * wide + v * W);
            for (int j = 0; j < Q; ++j) sums[j][v] += x * mass[j * total + t];
        }
    for (int j = 0; j < Q; ++j)
        for (int v = 0; v < V; ++v) store<W>(out + j * wide + v * W, sums[j][v]);
}

template <int W, int Q>
INLINE void add_values(const float* value, int64_t tokens, int64_t wide, const float* mass, int64_t total,
                       float* out) {
    int64_t i = 0;
    for (; i + 2 * W <= wide; i += 2 * W)
        add_columns<W, Q, 2>(value + i, tokens, wide, mass, total, out + i);
    for (; i < wide; i += W) add_columns<W, Q, 1>(value + i, tokens, wide, mass, total, out + i);
}

// Attends with a tile's queries: out [rows, wide].
template <int W>
INLINE void attend(const Tile& tile, const Score& score, float* mass, float* out) {
    const int64_t total = tile.total(), wide = tile.wide;
    products<W>(tile, tile.q, &Part::keys, mass);
    float factor[kTile];
    for (int64_t j = 0; j < tile.rows; ++j)
        factor[j] = masses<W>(tile, j, score, mass + j * total, nullptr);
    std::fill(out, out + tile.rows * wide, 0.0f);
    for (int s = 0; s < 2; ++s) {
        const Seen& seen = tile.seen[s];
        for (int64_t t = seen.begin; t < seen.end; t += kChunk) {
            const float* value = seen.part->values.rows.data() + t * wide;
            const int64_t tokens = std::min(kChunk, seen.end - t), at = tile.begins(s) + t - seen.begin;
            BY_FOUR(tile.rows,
                    (add_values<W, Q>(value, tokens, wide, mass + r * total + at, total, out + r * wide)))
        }
    }
    for (int64_t j = 0; j < tile.rows; ++j)
        for (int64_t i = 0; i < wide; i += W) store<W>(out + j * wide + i, load<W>(out + j * wide + i) * factor[j]);
}

// Adds what some tokens and Q queries have to do with one another: to d_q [Q, wide] from the keys, to d_key
// and d_value [tokens, wide] from q and gradient (of the result) [Q, wide].
template <int W, int Q>
INLINE void add_gradients(const float* q, const float* gradient, const float* key, int64_t tokens, int64_t wide,
                          const float* mass, const float* change, int64_t total, float* d_q, float* d_key,
                          float* d_value) {
    for (int64_t i = 0; i < wide; i += W) {
        Floats<W> sums[Q], qs[Q], gradients[Q];
        for (int j = 0; j < Q; ++j) {
            sums[j] = load<W>(d_q + j * wide + i);
            qs[j] = load<W>(q + j * wide + i);
            gradients[j] = load<W>(gradient + j * wide + i);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t at = t * wide + i;
            const Floats<W> k = load<W>(key + at);
            Floats<W> dk = load<W>(d_key + at), dv = load<W>(d_value + at);
            for (int j = 0; j < Q; ++j) {
                sums[j] += k * change[j * total + t];
                dk += qs[j] * change[j * total + t];
                dv += gradients[j] * mass[j * total + t];
            }
            store<W>(d_key + at, dk);
            store<W>(d_value + at, dv);
        }
        for (int j = 0; j < Q; ++j) store<W>(d_q + j * wide + i, sums[j]);
    }
}

// Adds a tile's gradients to those of the keys and values that it sees, and to its queries' d_q [rows, wide].
template <int W>
INLINE void add_tile(const Tile& tile, const float* gradient, const Score& score, float* mass, float* change,
                     float* slope, float* d_q) {
    const int64_t total = tile.total(), wide = tile.wide;
    products<W>(tile, tile.q, &Part::keys, mass);
    products<W>(tile, gradient, &Part::values, change);
    for (int64_t j = 0; j < tile.rows; ++j) {
        float *p = mass + j * total, *c = change + j * total;
        const float factor = masses<W>(tile, j, score, p, slope);
        float dots[kLanes] = {};
        for (int64_t t = 0; t < total; t += W) {
            const Floats<W> share = load<W>(p + t) * factor;
            store<W>(p + t, share);
            store<W>(dots + t % kLanes, load<W>(dots + t % kLanes) + share * load<W>(c + t));
        }
        const float mean = lane_sum(dots);
        for (int64_t t = 0; t < total; t += W)
            store<W>(c + t, load<W>(p + t) * (load<W>(c + t) - mean) * load<W>(slope + t));
    }
    for (int s = 0; s < 2; ++s) {
        const Seen& seen = tile.seen[s];
        for (int64_t t = seen.begin; t < seen.end; t += kChunk) {
            const int64_t tokens = std::min(kChunk, seen.end - t), at = tile.begins(s) + t - seen.begin;
            const float* key = seen.part->keys.rows.data() + t * wide;
            float *d_key = seen.part->d_keys.data() + t * wide, *d_value = seen.part->d_values.data() + t * wide;
            BY_FOUR(tile.rows,
                    (add_gradients<W, Q>(tile.q + r * wide, gradient + r * wide, key, tokens, wide,
                                         mass + r * total + at, change + r * total + at, total, d_q + r * wide,
                                         d_key, d_value)))
        }
    }
}

struct Kernels {
    void (*attend)(const Tile&, const Score&, float*, float*);
    void (*add_tile)(const Tile&, const float*, const Score&, float*, float*, float*, float*);
};

#define KERNELS(name, target, W)                                                                             \
    target void attend_##name(const Tile& tile, const Score& score, float* mass, float* out) {               \
        attend<W>(tile, score, mass, out);                                                                   \
    }                                                                                                        \
    target void add_tile_##name(const Tile& tile, const float* gradient, const Score& score, float* mass,    \
                                float* change, float* slope, float* d_q) {                                   \
        add_tile<W>(tile, gradient, score, mass, change, slope, d_q);                                        \
    }

#ifdef AVX512
KERNELS(avx512, AVX512, 16)
KERNELS(avx2, AVX2, 8)
constexpr Versions<Kernels> kKernels = {{{attend_avx512, add_tile_avx512}, {attend_avx2, add_tile_avx2}}};
#else
KERNELS(generic, , 4)
constexpr Versions<Kernels> kKernels = {{{attend_generic, add_tile_generic}}};
#endif

template <typename T>
using Rows = Array<T, -1, -1, -1>;
using Numbers = Array<int64_t, -1>;

// The work of a call, a prompt with its responses and a key head at a time.
struct Work {
    int64_t heads, kv_heads, d;
    const int64_t* begin;          // of each run, and the end
    std::vector<int64_t> prompts;  // the runs that are prompts, and the number of runs at the end

    int64_t tasks() const { return (int64_t(prompts.size()) - 1) * kv_heads; }
    int64_t first(int64_t task) const { return prompts[task / kv_heads]; }
    int64_t last(int64_t task) const { return prompts[task / kv_heads + 1]; }
    int64_t tokens(int64_t run) const { return begin[run + 1] - begin[run]; }
    int64_t group() const { return heads / kv_heads; }
    Place keys(int64_t task, int64_t run) const {
        return {(begin[run] * kv_heads + task % kv_heads) * d, kv_heads * d, 1, d};
    }
    Place queries(int64_t task, int64_t run) const {
        return {(begin[run] * heads + task % kv_heads * group()) * d, heads * d, group(), d};
    }
};

template <typename T>
Work checked(const Rows<T>& q, const Rows<T>& key, const Rows<T>& value, const Numbers& begins,
             const Numbers& prompt_of, int64_t window) {
    const size_t tokens = q.shape(0), d = q.shape(2), kv_heads = key.shape(1), runs = prompt_of.shape(0);
    const size_t sizes[][2] = {{key.shape(0), tokens}, {value.shape(0), tokens},   {key.shape(2), d},
                               {value.shape(2), d},    {value.shape(1), kv_heads}, {begins.shape(0), runs + 1}};
    check_equal(sizes);
    check(kv_heads > 0 && q.shape(1) % kv_heads == 0, "query heads must be a multiple of key heads");
    check(window > 0, "the window is empty");
    const int64_t *begin = begins.data(), *of = prompt_of.data();
    check(begin[0] == 0 && begin[runs] == int64_t(tokens), "the runs are not all tokens");
    Work work = {int64_t(q.shape(1)), int64_t(kv_heads), int64_t(d), begin, {}};
    for (int64_t n = 0; n < int64_t(runs); ++n) {
        check(begin[n] <= begin[n + 1], "a run has less than no token");
        check(of[n] == n || (n > 0 && of[n] == of[n - 1]), "a run is not behind its prompt");
        if (of[n] == n) work.prompts.push_back(n);
    }
    work.prompts.push_back(runs);
    return work;
}

template <typename T>
void check_like(const Rows<T>& x, const Rows<T>& model) {
    const size_t sizes[][2] = {
        {x.shape(0), model.shape(0)}, {x.shape(1), model.shape(1)}, {x.shape(2), model.shape(2)}};
    check_equal(sizes);
}

void make_room(std::vector<float>& x, int64_t numbers) {
    if (int64_t(x.size()) < numbers) x.resize(numbers);
}

template <typename T>
void packed_attention(const Rows<T>& q, const Rows<T>& key, const Rows<T>& value, const Numbers& begins,
                      const Numbers& prompt_of, float scale, float softcap, int64_t window,
                      const Rows<T>& out, int threads, const char* instructions) {
    const Work work = checked(q, key, value, begins, prompt_of, window);
    check_like(out, q);
    const Kernels& kernels = kKernels.of(instructions);
    const int64_t tasks = work.tasks(), d = work.d, wide = padded(d), group = work.group();
    const T *qs = q.data(), *ks = key.data(), *vs = value.data();
    T* outs = out.data();
    const Score score = {scale, softcap};
    nb::gil_scoped_release release;
#pragma omp parallel num_threads(threads)
    {
        Part none, parts[2];  // of the prompt, and of a run behind it
        std::vector<float> wide_q, wide_out, mass;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            for (int64_t run = work.first(task); run < work.last(task); ++run) {
                const bool behind = run != work.first(task);
                Part &own = parts[behind], &prompt = behind ? parts[0] : none;
                own.tokens = work.tokens(run);
                read(ks, work.keys(task, run), own.tokens, wide, own.keys.rows);
                own.keys.make_blocks(own.tokens, d, wide);
                read(vs, work.keys(task, run), own.tokens, wide, own.values.rows);
                const int64_t rows = own.tokens * group;
                read(qs, work.queries(task, run), rows, wide, wide_q);
                make_room(wide_out, rows * wide);
                for (int64_t r = 0; r < rows; r += kTile) {
                    const Tile tile = tile_of(wide_q.data(), r, std::min(kTile, rows - r), group, d, wide, prompt,
                                              own, window);
                    make_room(mass, tile.rows * tile.total());
                    kernels.attend(tile, score, mass.data(), wide_out.data() + r * wide);
                }
                write(outs, work.queries(task, run), rows, wide, wide_out);
            }
        }
    }
}

template <typename T>
void packed_attention_gradients(const Rows<T>& q, const Rows<T>& key, const Rows<T>& value,
                                const Numbers& begins, const Numbers& prompt_of, float scale, float softcap,
                                int64_t window, const Rows<T>& gradient, const Rows<T>& d_q,
                                const Rows<T>& d_key, const Rows<T>& d_value, int threads,
                                const char* instructions) {
    const Work work = checked(q, key, value, begins, prompt_of, window);
    check_like(gradient, q);
    check_like(d_q, q);
    check_like(d_key, key);
    check_like(d_value, key);
    const Kernels& kernels = kKernels.of(instructions);
    const int64_t tasks = work.tasks(), d = work.d, wide = padded(d), group = work.group();
    const T *qs = q.data(), *ks = key.data(), *vs = value.data(), *gs = gradient.data();
    T *dqs = d_q.data(), *dks = d_key.data(), *dvs = d_value.data();
    const Score score = {scale, softcap};
    nb::gil_scoped_release release;
#pragma omp parallel num_threads(threads)
    {
        Part none, parts[2];  // of the prompt, and of a run behind it
        std::vector<float> wide_q, wide_gradient, wide_d_q, mass, change, slope;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const auto finish = [&](int64_t run, const Part& part) {
                write(dks, work.keys(task, run), part.tokens, wide, part.d_keys);
                write(dvs, work.keys(task, run), part.tokens, wide, part.d_values);
            };
            for (int64_t run = work.first(task); run < work.last(task); ++run) {
                const bool behind = run != work.first(task);
                Part &own = parts[behind], &prompt = behind ? parts[0] : none;
                own.tokens = work.tokens(run);
                read(ks, work.keys(task, run), own.tokens, wide, own.keys.rows);
                read(vs, work.keys(task, run), own.tokens, wide, own.values.rows);
                own.keys.make_blocks(own.tokens, d, wide);
                own.values.make_blocks(own.tokens, d, wide);
                own.d_keys.assign(own.tokens * wide, 0.0f);
                own.d_values.assign(own.tokens * wide, 0.0f);
                const int64_t rows = own.tokens * group;
                read(qs, work.queries(task, run), rows, wide, wide_q);
                read(gs, work.queries(task, run), rows, wide, wide_gradient);
                wide_d_q.assign(rows * wide, 0.0f);
                for (int64_t r = 0; r < rows; r += kTile) {
                    const Tile tile = tile_of(wide_q.data(), r, std::min(kTile, rows - r), group, d, wide, prompt,
                                              own, window);
                    for (std::vector<float>* x : {&mass, &change, &slope})
                        make_room(*x, tile.rows * tile.total());
                    kernels.add_tile(tile, wide_gradient.data() + r * wide, score, mass.data(), change.data(),
                                     slope.data(), wide_d_q.data() + r * wide);
                }
                write(dqs, work.queries(task, run), rows, wide, wide_d_q);
                if (behind) finish(run, own);
            }
            // All responses have added to the prompt's by now.
            finish(work.first(task), parts[0]);
        }
    }
}

template <typename T>
void bind_packed_of(nb::module_& m) {
    m.def("packed_attention", &packed_attention<T>, nb::arg("q"), nb::arg("key"), nb::arg("value"),
          nb::arg("begins"), nb::arg("prompt_of"), nb::arg("scale"), nb::arg("softcap"), nb::arg("window"),
          nb::arg("out"), nb::arg("threads"), nb::arg("instructions"));
    m.def("packed_attention_gradients", &packed_attention_gradients<T>, nb::arg("q"), nb::arg("key"),
          nb::arg("value"), nb::arg("begins"), nb::arg("prompt_of"), nb::arg("scale"), nb::arg("softcap"),
          nb::arg("window"), nb::arg("gradient"), nb::arg("d_q"), nb::arg("d_key"), nb::arg("d_value"),
          nb::arg("threads"), nb::arg("instructions"));
}

}  // namespace

void bind_packed_attention(nb::module_& m) {
    bind_packed_of<float>(m);
    bind_packed_of<Bfloat16>(m);
}
