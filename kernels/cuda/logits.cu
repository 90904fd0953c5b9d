// The best of the logits, for sampling: ids and logits leave the device, the
// vocabulary does not.
#include "arrival.cuh"
#include "order.cuh"

// A logit and its id in one number: larger is better, equal logits by lower
// id. 0 stands for nothing.
#define ID_BITS 18
#define LARGEST_ID ((1u << ID_BITS) - 1u)

DEVICE u64 candidate(u32 key, int id) {
    return ((u64)key << ID_BITS) | (u64)(LARGEST_ID - (u32)id);
}
DEVICE int id_of(u64 candidate) { return (int)(LARGEST_ID - ((u32)candidate & LARGEST_ID)); }

// On a block's first candidate, between blocks: it has seen a NaN.
#define NAN_SEEN (1ull << 63)

DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

DEVICE u64 warp_largest(u64 value) {
#pragma unroll
    for (int s = 16; s > 0; s /= 2) {
        value = larger(value, __shfl_xor_sync(FULL_WARP, value, s));
    }
    return value;
}

// Whether any thread of the block says so. Barriers stand before and after.
DEVICE bool block_any(bool flag) {
    SHARED(u32, any, 1);
    if (threadIdx.x == 0) {
        any[0] = 0u;
    }
    __syncthreads();
    if (__ballot_sync(FULL_WARP, flag) != 0u && lane_id() == 0) {
        atomicOr(&any[0], 1u);
    }
    __syncthreads();
    const bool answer = any[0] != 0u;
    __syncthreads();
    return answer;
}

// ------------------------------------------------------------------- argmax

#define ARGMAX_THREADS 256

// The largest of `value` over the block, in warp 0.
DEVICE u64 block_largest(u64 value) {
    SHARED(u64, largest, ARGMAX_THREADS / 32);
    value = warp_largest(value);
    __syncthreads();
    if (lane_id() == 0) {
        largest[warp_id()] = value;
    }
    __syncthreads();
    return warp_largest(lane_id() < ARGMAX_THREADS / 32 ? largest[lane_id()] : 0ull);
}

// The largest logit of each row, the lowest id of equal ones (zeros of both
// signs are equal), NaN behind everything.
//
// `logits` [rows, vocab], 16-byte aligned, vocab at most 2^18; block x looks at
// `slice` of them, a multiple of 4. `partial` [rows, gridDim.x] is scratch, at
// most 256 a row; `arrived` [rows] is 0 before and after. `ids`, `best` [rows].
//
// Must move: 4 * rows * vocab bytes. Grid (ceil(vocab / slice), rows);
// block 256.
extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS) logits_argmax(
    const float *logits, int vocab, int slice, unsigned long long *partial,
    unsigned int *arrived, int *ids, float *best, int *has_nan
) {
    const u64 row = blockIdx.y;
    const float *own = logits + row * vocab;
    const int start = (int)blockIdx.x * slice;
    const int end = vocab - start < slice ? vocab : start + slice;
    // Rows of other lengths start anywhere.
    const bool by_four = vocab % 4 == 0;
    u64 mine = 0;
    bool nan = false;
    for (int i = start + 4 * (int)threadIdx.x; i < end; i += 4 * ARGMAX_THREADS) {
        if (by_four) {
            const float4 four = *(const float4 *)(own + i);
            mine = larger(mine, candidate(order_key(four.x), i));
            mine = larger(mine, candidate(order_key(four.y), i + 1));
            mine = larger(mine, candidate(order_key(four.z), i + 2));
            mine = larger(mine, candidate(order_key(four.w), i + 3));
            nan |= four.x != four.x || four.y != four.y || four.z != four.z || four.w != four.w;
        } else {
            for (int j = i; j < i + 4 && j < end; j++) {
                mine = larger(mine, candidate(order_key(own[j]), j));
                nan |= own[j] != own[j];
            }
        }
    }
    nan = block_any(nan);
    mine = block_largest(mine);
    u64 *row_partial = partial + row * gridDim.x;
    if (threadIdx.x == 0) {
        row_partial[blockIdx.x] = nan ? mine | NAN_SEEN : mine;
    }
    if (is_last_block(&arrived[row])) {
        const volatile u64 *all = row_partial;
        mine = threadIdx.x < gridDim.x ? all[threadIdx.x] : 0ull;
        nan = block_any((mine & NAN_SEEN) != 0);
        mine = block_largest(mine & ~NAN_SEEN);
        if (threadIdx.x == 0) {
            ids[row] = id_of(mine);
            best[row] = own[id_of(mine)];
            has_nan[row] = nan;
        }
    }
}

// -------------------------------------------------------------------- top-k

#define TOP_THREADS 512
#define TOP_WARPS (TOP_THREADS / 32)
// Candidates of a thread, so a block looks at up to 8192.
#define TOP_KEYS 16
#define TOP_MOST 256

// How many of the block's `keys` reach `bound`. `turn` alternates between 0
// and 1 from call to call, so that one barrier is enough.
DEVICE int count_reaching(const u64 (&keys)[TOP_KEYS], u64 bound, int turn) {
    SHARED(int, counts, 2 * TOP_WARPS);
    int mine = 0;
#pragma unroll
    for (int k = 0; k < TOP_KEYS; k++) {
        mine += keys[k] >= bound;
    }
    mine = group_sum<32>(mine);
    if (lane_id() == 0) {
        counts[turn * TOP_WARPS + warp_id()] = mine;
    }
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < TOP_WARPS; w++) {
        total += counts[turn * TOP_WARPS + w];
    }
    return total;
}

// Puts the `wanted` largest of the block's `keys` into `best`, in any order,
// 0 behind the last if there are fewer. Keys other than 0 are distinct.
//
// The bound that exactly `wanted` keys reach is found bit by bit: a bit stays
// if enough keys reach the bound with it. No order of threads matters.
template <class Best>
DEVICE void keep_largest(const u64 (&keys)[TOP_KEYS], int wanted, Best &best) {
    SHARED(int, kept, 1);
    if (threadIdx.x == 0) {
        kept[0] = 0;
    }
    for (int i = (int)threadIdx.x; i < TOP_MOST; i += TOP_THREADS) {
        best[i] = 0;
    }
    u64 bound = 0;
    int turn = 0;
    for (int bit = 32 + ID_BITS - 1; bit >= 0; bit--) {
        const u64 trial = bound | (1ull << bit);
        const int reaching = count_reaching(keys, trial, turn);
        turn ^= 1;
        if (reaching >= wanted) {
            bound = trial;
        }
        if (reaching == wanted) {
            break;
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < TOP_KEYS; k++) {
        if (keys[k] >= bound && keys[k] != 0) {
            best[atomicAdd(&kept[0], 1)] = keys[k];
        }
    }
    __syncthreads();
}

// The `wanted` best logits of each row, best first: falling in the order of
// `f32::total_cmp`, equal ones by rising id, NaN behind everything.
//
// `logits` [rows, vocab], 16-byte aligned, vocab at most 2^18; block x looks at
// `slice` of them, a multiple of 4, at most 8192. `partial`
// [rows, gridDim.x, wanted] is scratch, at most 8192 a row; `arrived` [rows]
// is 0 before and after. `ids`, `best` [rows, wanted]; wanted is at most 256
// and at most vocab. `has_nan` [rows] is 1 where a logit is NaN, else 0.
//
// Every block keeps its best; the last one of a row keeps the best of those.
// Must move: 4 * rows * vocab bytes. Grid (ceil(vocab / slice), rows);
// block 512.
extern "C" __global__ void __launch_bounds__(TOP_THREADS) logits_top_k(
    const float *logits, int vocab, int slice, int wanted, unsigned long long *partial,
    unsigned int *arrived, int *ids, float *best, int *has_nan
) {
    SHARED(u64, largest, TOP_MOST);
    const u64 row = blockIdx.y;
    const float *own = logits + row * vocab;
    const int start = (int)blockIdx.x * slice;
    const int end = vocab - start < slice ? vocab : start + slice;
    const bool by_four = vocab % 4 == 0;
    bool nan = false;
    u64 keys[TOP_KEYS];
#pragma unroll
    for (int k = 0; k < TOP_KEYS; k += 4) {
        const int i = start + (k / 4 * TOP_THREADS + (int)threadIdx.x) * 4;
        float four[4];
        if (by_four && i < end) {
            const float4 loaded = *(const float4 *)(own + i);
            four[0] = loaded.x;
            four[1] = loaded.y;
            four[2] = loaded.z;
            four[3] = loaded.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                four[j] = i + j < end ? own[i + j] : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            keys[k + j] = i + j < end ? candidate(total_order_key(four[j]), i + j) : 0ull;
            nan |= four[j] != four[j];
        }
    }
    nan = block_any(nan);
    keep_largest(keys, wanted, largest);
    u64 *row_partial = partial + row * gridDim.x * wanted;
    for (int i = (int)threadIdx.x; i < wanted; i += TOP_THREADS) {
        const u64 mark = nan && i == 0 ? NAN_SEEN : 0ull;
        row_partial[blockIdx.x * wanted + i] = largest[i] | mark;
    }
    if (is_last_block(&arrived[row])) {
        const volatile u64 *all = row_partial;
        const int count = (int)gridDim.x * wanted;
        nan = false;
#pragma unroll
        for (int k = 0; k < TOP_KEYS; k++) {
            const int i = k * TOP_THREADS + (int)threadIdx.x;
            const u64 key = i < count ? all[i] : 0ull;
            nan |= (key & NAN_SEEN) != 0;
            keys[k] = key & ~NAN_SEEN;
        }
        nan = block_any(nan);
        if (threadIdx.x == 0) {
            has_nan[row] = nan;
        }
        keep_largest(keys, wanted, largest);
        for (int i = (int)threadIdx.x; i < wanted; i += TOP_THREADS) {
            const u64 mine = largest[i];
            int rank = 0;
            for (int j = 0; j < wanted; j++) {
                rank += largest[j] > mine;
            }
            ids[row * wanted + rank] = id_of(mine);
            best[row * wanted + rank] = own[id_of(mine)];
        }
    }
}
