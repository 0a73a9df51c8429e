// What attention of a decoding step and of whole sequences must do alike, so that a token has the same bits in
// both. Each kernel's file includes it, and no name leaves that file.

#pragma once

#include "vectors.h"

namespace {

// How the product of a query and a key becomes a score.
struct Score {
    float scale;
    float softcap;  // 0 for none
};

// Turns the scores of a query, -inf where it does not see, into exp(score - largest); returns 1 / their sum.
// total: a multiple of kLanes.
template <int W>
INLINE float make_masses(float* row, int64_t total) {
    const float top = row_max<W>(row, total);
    float lanes[kLanes] = {};
    for (int64_t t = 0; t < total; t += W) {
        const Floats<W> mass = exp_negative<W>(load<W>(row + t) - top);
        store<W>(row + t, mass);
        store<W>(lanes + t % kLanes, load<W>(lanes + t % kLanes) + mass);
    }
    return 1 / lane_sum(lanes);
}

}  // namespace
