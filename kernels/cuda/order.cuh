// Unsigned numbers that stand in the order of floats, for ranking by integer
// comparison. NaN is smallest; 0 is no value's number.
#pragma once
#include "common.cuh"

// As `<` has it: zeros of both signs are equal.
DEVICE u32 order_key(float value) {
    if (value != value) {
        return 1u;
    }
    const u32 bits = bits_of(value == 0.0f ? 0.0f : value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// As `f32::total_cmp` has it: -0 is less than +0.
DEVICE u32 total_order_key(float value) {
    if (value != value) {
        return 1u;
    }
    const u32 bits = bits_of(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
