// The last block of a launch finishes what all have begun.
#pragma once
#include "common.cuh"

// Whether this is the last of the gridDim.x blocks that come here; what the
// others wrote before can be read then (through volatile pointers: not from
// this multiprocessor's first-level cache). `arrived` is 0 again after the
// last, so a launch can be replayed. All threads of the block call it, once.
//
// The fences are the one thread's, between barrier and atomic (PTX memory
// model, "release and acquire patterns"): the barrier orders what the block
// wrote before its fence, and what the block reads after the second one.
DEVICE bool is_last_block(u32 *arrived) {
    SHARED(int, is_last, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last[0] = atomicInc(arrived, gridDim.x - 1u) == gridDim.x - 1u;
        __threadfence();
    }
    __syncthreads();
    const bool last = is_last[0] != 0;
    if (last) {
        __threadfence();
    }
    return last;
}
