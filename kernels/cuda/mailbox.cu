// What the host and the device tell each other while a token is computed: the
// step's words, which of a layer's chosen experts are missing, and what the
// host decided about those. Launchers: kernels/src/cuda/mailbox.rs, which says
// who writes what and when.
//
// "Mapped" is page-locked memory of the host: a read of it takes a microsecond
// or two, so that each kernel here reads it at once, in whole lines. A write
// is passed on at once; what was written before a flag is there when the flag
// is.
#include "common.cuh"

// Values of a decision that name no block.
#define DECIDED_HOST 1u

#define ERROR_LATE 1u
#define ERROR_ENTRY 2u

// Where blocks of experts may start: at multiples of 256 bytes of an arena.
struct Blocks {
    const u8* arena;
    u32 starts;

    // 0: entry 0, which names no block, or one outside the arena.
    DEVICE u64 address(u32 entry) const {
        if (entry == 0 || entry > starts) return 0;
        return reinterpret_cast<u64>(arena) + 256ull * (entry - 1);
    }
};

// Before anything else of a token. `block` (mapped) is the step: its number,
// the position, how many updates follow, 0, then as many pairs of an index
// into `slot_of` [entries] and its new entry; no index comes twice. `words` [4]
// = step, position, 0, 0. `to` [count] = `from` [count] (mapped), words of 4
// bytes. Bytes: 8 * count, 12 for an update, all across the link. Any number
// of blocks of 256.
extern "C" __global__ void __launch_bounds__(256)
begin_step(const u32* block, int most_updates, u32* slot_of, int entries, int* words,
           const u32* from, u32* to, int count) {
    const int stride = static_cast<int>(gridDim.x * blockDim.x);
    const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int updates = min(static_cast<int>(min(block[2], 0x7fffffffu)), most_updates);
    for (int i = first; i < updates; i += stride) {
        const u32 index = block[4 + 2 * i];
        if (index < static_cast<u32>(entries)) slot_of[index] = block[5 + 2 * i];
    }
    for (int i = first; i < count; i += stride) to[i] = from[i];
    if (first < 4) words[first] = first < 2 ? static_cast<int>(block[first]) : 0;
}

// Behind a layer's router: `table` [experts] gets, for each of the `k` (at most
// 32) chosen experts `ids`, the address of its block, or 0 where it is not
// resident; bit i of `missing` says that choice i is not. `slot_of` [experts]
// is read once for each: another stream may write an entry meanwhile, behind
// the block that it names. The mailbox (mapped,
// `to_...`) gets the mask, `ids`, `weights`, the
// logits [ahead, wide] of the layers ahead (rows `pitch` apart) and, if
// anything is missing, `x` [hidden]; last of all its flag, the step.
// Bytes: 4 * (ahead * wide + 4 * k + hidden if anything is missing), twice.
// One block of 256.
extern "C" __global__ void __launch_bounds__(256)
post(const int* step, const int* ids, const float* weights, int k, const u32* slot_of, int experts,
     const u8* arena, u32 starts, u64* table, u32* missing, const float* logits, int pitch,
     int ahead, int wide, const float* x, int hidden, u64* to_flag, u32* to_missing, int* to_ids,
     float* to_weights, float* to_logits, float* to_x) {
    SHARED(u32, mask, 1);
    const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (i < 32) {
        bool is_missing = false;
        if (i < k) {
            const int id = ids[i];
            const bool is_known = id >= 0 && id < experts;
            const Blocks blocks = {arena, starts};
            // An entry that is seen has its block in front of it.
            const u64 address = is_known ? blocks.address(load_acquire_system(slot_of + id)) : 0;
            if (is_known) table[id] = address;
            is_missing = address == 0;
            to_ids[i] = id;
            to_weights[i] = weights[i];
        }
        const u32 all = __ballot_sync(FULL_WARP, is_missing);
        if (i == 0) mask[0] = *missing = *to_missing = all;
    }
    for (int at = i; at < ahead * wide; at += threads) {
        to_logits[at] = logits[static_cast<u64>(at / wide) * pitch + at % wide];
    }
    __syncthreads();
    if (mask[0] != 0) {
        for (int at = i; at < hidden; at += threads) to_x[at] = x[at];
    }
    // What the whole block wrote comes before the flag.
    __syncthreads();
    if (i == 0) store_release_system(to_flag, static_cast<u32>(step[0]));
}

// What the host decided about a choice in this step: DECIDED_HOST, or an entry
// and one. Waits for it, but not for longer than `patience` nanoseconds, and
// not at all where an earlier layer of this step has waited in vain.
DEVICE u32 decision_of(const u64* decision, u32 step, u64 patience, u64* error) {
    const u64 start = nanoseconds();
    const bool is_lost = load_acquire_system(error) >> 32 == step;
    for (;;) {
        const u64 word = load_acquire_system(decision);
        if (word >> 32 == step) return static_cast<u32>(word);
        if (is_lost) return DECIDED_HOST;
        if (nanoseconds() - start > patience) {
            store_release_system(error, static_cast<u64>(step) << 32 | ERROR_LATE);
            return DECIDED_HOST;
        }
        pause();
    }
}

// Behind a layer's resident experts: waits until the host has decided about
// each choice that is missing. `late` [experts] gets at each chosen id the
// address of the block that has come meanwhile; 0 where the choice was not
// missing or is the host's, whose bits `from_host` has. `decisions` [k] and
// `error` are mapped: step << 32 | value, see above; step << 32 | code, 1: the
// host was not heard of, 2: it named a block outside the arena. Either way the
// choice is the host's. One warp.
extern "C" __global__ void __launch_bounds__(32)
settle(const int* step, const u32* missing, const int* ids, int k, int experts,
       const u64* decisions, const u8* arena, u32 starts, u64 patience, u64* error, u64* late,
       u32* from_host) {
    const int i = lane_id();
    const u32 now = static_cast<u32>(step[0]), mask = *missing;
    bool is_host = false;
    if (i < k) {
        u64 address = 0;
        if (mask >> i & 1) {
            const u32 value = decision_of(decisions + i, now, patience, error);
            const Blocks blocks = {arena, starts};
            if (value > DECIDED_HOST) address = blocks.address(value - 1);
            is_host = address == 0;
            if (is_host && value != DECIDED_HOST) {
                store_release_system(error, static_cast<u64>(now) << 32 | ERROR_ENTRY);
            }
        }
        const int id = ids[i];
        if (id >= 0 && id < experts) late[id] = address;
    }
    const u32 all = __ballot_sync(FULL_WARP, is_host);
    if (i == 0) *from_host = all;
}
