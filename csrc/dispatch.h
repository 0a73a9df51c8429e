// Instruction sets: each kernel is compiled once for each of them, and a call names the one that it wants.
// Checks of arguments too.

#pragma once

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

// AVX512 and AVX2 stand before a function that is compiled for that instruction set. On other processors than
// x86 there is one version.
#if defined(__x86_64__) || defined(__i386__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define AVX2 __attribute__((target("avx2,fma")))
#endif

// The names of all instruction sets of this build, fastest first.
#ifdef AVX512
inline constexpr const char* kInstructionSets[] = {"avx512", "avx2"};
#else
inline constexpr const char* kInstructionSets[] = {"generic"};
#endif

// Whether this build has products of pairs of bfloat16 (AVX512-BF16), which are written in GCC's assembly.
#if defined(AVX512) && !defined(__clang__) && __GNUC__ >= 10
#define PAIRS
#endif

// Returns whether this processor runs an instruction set of this name.
inline bool runs(const char* name) {
#ifdef AVX512
    __builtin_cpu_init();
    if (std::strcmp(name, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return std::strcmp(name, "generic") == 0;
#endif
}

// Returns whether this build and this processor multiply pairs of bfloat16.
inline bool runs_pairs() {
#ifdef PAIRS
    __builtin_cpu_init();
    return runs("avx512") && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// A kernel, or a table of kernels, in a version for each instruction set, in the order of kInstructionSets.
template <typename T>
struct Versions {
    T versions[sizeof kInstructionSets / sizeof *kInstructionSets];

    const T& of(const char* name) const {
        if (runs(name))
            for (size_t i = 0; i < sizeof kInstructionSets / sizeof *kInstructionSets; ++i)
                if (std::strcmp(kInstructionSets[i], name) == 0) return versions[i];
        throw std::invalid_argument(std::string("this processor does not run ") + name);
    }
};

inline void check(bool good, const char* wanted) {
    if (!good) throw std::invalid_argument(wanted);
}

// Throws unless the two sizes of each pair are equal.
template <size_t N>
void check_equal(const size_t (&sizes)[N][2]) {
    for (const auto& pair : sizes) check(pair[0] == pair[1], "shapes do not agree");
}
