// A bfloat16 in memory: the upper half of a float32.

#pragma once

#include <cstdint>

struct Bfloat16 {
    uint16_t bits;
};
