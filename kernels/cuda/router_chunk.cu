// Routing of a prompt's chunk: logits of many tokens, their choices, and the
// choices sorted by expert.
//
// Bits are those of kernels/src/contract.rs (`dot_float`) and
// kernels/src/routing.rs; the order is that of `Grouping::gather` in
// kernels/src/backend.rs.
#include "router_rows.cuh"

// The rule of one layer on the logits of many tokens.
//
// `record` is one record of the table (its rule and selection bias are read);
// `logits` [tokens, experts], bias included; `ids` and `weights`
// [tokens, top_k] in router order.
//
// (One block at least on a multiprocessor: else ptxas keeps to 40 registers on
// sm_90, one too few.)
// Must move: 4 * tokens * (experts + 2 * top_k) bytes. Grid tokens; block 128.
extern "C" __global__ void __launch_bounds__(ROUTING_THREADS, 1) chunk_choose(
    const unsigned long long *record, const float *logits, int *ids, float *weights
) {
    ROUTING_WORKSPACE(work);
    const Rule rule = read_rule(record);
    const u64 token = blockIdx.x;
    const float *own = logits + token * rule.experts;
    choose(rule, work, own, ids + token * rule.top_k, weights + token * rule.top_k);
}

// What `router_step` forecasts, from logits that were computed elsewhere
// (routers of formats that it does not read).
//
// `record` as above; `logits` [rows, experts]; `ids` and `scores`
// [rows, forecasts]: the experts that the rule would prefer, best first, -1
// behind the last.
//
// Must move: 4 * rows * (experts + 2 * forecasts) bytes. Grid rows; block 128.
extern "C" __global__ void __launch_bounds__(ROUTING_THREADS) chunk_rank(
    const unsigned long long *record, const float *logits, int forecasts, int *ids, float *scores
) {
    ROUTING_WORKSPACE(work);
    const Rule rule = read_rule(record);
    const u64 row = blockIdx.x;
    const float *own = logits + row * rule.experts;
    foresee(rule, work, own, forecasts, ids + row * forecasts, scores + row * forecasts);
}

// Rows of a warp and tokens of a block of `chunk_logits`.
#define BATCH_ROWS 2
#define BATCH_TOKENS 8
// Elements of each token in shared memory; a multiple of 64.
#define BATCH_TILE 512

// Adds a tile of BATCH_ROWS rows times BATCH_TOKENS tokens to the lanes.
template <class Pair>
DEVICE void add_batch(const u8 *const (&rows)[BATCH_ROWS], const float *x, int count,
                      float (&low)[BATCH_ROWS][BATCH_TOKENS],
                      float (&high)[BATCH_ROWS][BATCH_TOKENS]) {
    for (int i = 2 * lane_id(); i < count; i += 64) {
        const bool is_pair = i + 1 < count;
        float first[BATCH_ROWS], second[BATCH_ROWS];
#pragma unroll
        for (int r = 0; r < BATCH_ROWS; r++) {
            first[r] = Pair::at(rows[r] + Pair::BYTES * i);
            second[r] = is_pair ? Pair::at(rows[r] + Pair::BYTES * (i + 1)) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < BATCH_TOKENS; t++) {
            const float a = x[t * BATCH_TILE + i];
            const float b = is_pair ? x[t * BATCH_TILE + i + 1] : 0.0f;
#pragma unroll
            for (int r = 0; r < BATCH_ROWS; r++) {
                low[r][t] = fma_rn(first[r], a, low[r][t]);
                if (is_pair) {
                    high[r][t] = fma_rn(second[r], b, high[r][t]);
                }
            }
        }
    }
}

// Router logits of many tokens, for routers of float formats.
//
// `x` [tokens, hidden] is normalised; `logits` [tokens, experts], bias
// included. A row is read once for BATCH_TOKENS tokens.
//
// Must move: the router, 4 * tokens * (hidden + experts) bytes.
// Grid (ceil(experts / 8), ceil(tokens / 8)); block 128.
extern "C" __global__ void __launch_bounds__(ROUTING_THREADS) chunk_logits(
    const unsigned long long *record, const float *x, int tokens, int hidden, float *logits
) {
    SHARED(float, tile, BATCH_TOKENS * BATCH_TILE);
    const int experts = (int)record[WORD_EXPERTS];
    const int format = (int)record[WORD_FORMAT];
    const int first_token = (int)blockIdx.y * BATCH_TOKENS;
    const int first_row = ((int)blockIdx.x * STEP_ROWS + warp_id()) * BATCH_ROWS;
    const u8 *rows[BATCH_ROWS];
    float low[BATCH_ROWS][BATCH_TOKENS], high[BATCH_ROWS][BATCH_TOKENS];
#pragma unroll
    for (int r = 0; r < BATCH_ROWS; r++) {
        // Rows behind the last compute the last once more and write nothing.
        const int row = first_row + r < experts ? first_row + r : experts - 1;
        rows[r] = (const u8 *)record[WORD_WEIGHT] + row * bytes_of(format, hidden);
#pragma unroll
        for (int t = 0; t < BATCH_TOKENS; t++) {
            low[r][t] = high[r][t] = 0.0f;
        }
    }
    for (int first = 0; first < hidden; first += BATCH_TILE) {
        const int count = hidden - first < BATCH_TILE ? hidden - first : BATCH_TILE;
        __syncthreads();
        for (int i = (int)threadIdx.x; i < BATCH_TOKENS * BATCH_TILE; i += ROUTING_THREADS) {
            const int token = first_token + i / BATCH_TILE, at = i % BATCH_TILE;
            if (token < tokens && at < count) {
                tile[i] = x[(u64)token * hidden + first + at];
            } else {
                tile[i] = 0.0f;
            }
        }
        __syncthreads();
        if (format == FORMAT_F32) {
            add_batch<PairOfF32>(rows, tile, count, low, high);
        } else if (format == FORMAT_F16) {
            add_batch<PairOfF16>(rows, tile, count, low, high);
        } else {
            add_batch<PairOfBF16>(rows, tile, count, low, high);
        }
#pragma unroll
        for (int r = 0; r < BATCH_ROWS; r++) {
            rows[r] += bytes_of(format, BATCH_TILE);
        }
    }
    const float *bias = (const float *)record[WORD_BIAS];
#pragma unroll
    for (int r = 0; r < BATCH_ROWS; r++) {
#pragma unroll
        for (int t = 0; t < BATCH_TOKENS; t++) {
            const float product = lane_tree<32>(low[r][t]) + lane_tree<32>(high[r][t]);
            const int row = first_row + r, token = first_token + t;
            if (lane_id() == 0 && row < experts && token < tokens) {
                logits[(u64)token * experts + row] = bias ? product + bias[row] : product;
            }
        }
    }
}

// ---------------------------------------------------------------- gathering

#define GATHER_THREADS 256
#define GATHER_WARPS (GATHER_THREADS / 32)

// Sorts the choices of a chunk by expert, stably: `Grouping::gather` of
// kernels/src/backend.rs.
//
// `ids` [choices], each below `experts`; choice c belongs to token
// c / per_token. Row r of the answer is choice `choice_of[r]` of token
// `token_of[r]`; `row_of[choice]` is the inverse; expert e has rows
// `starts[e] .. starts[e + 1]`, `starts` [experts + 1].
//
// One block per expert: it counts the choices of the experts before it, then
// places its own. Nothing is shared between blocks.
// Must move: 16 bytes per choice and 4 per expert (each block reads `ids`
// twice from L2). Grid experts; block 256.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS) chunk_gather(
    const int *ids, int choices, int per_token, int experts, int *starts, int *token_of,
    int *row_of, int *choice_of
) {
    SHARED(int, before, GATHER_WARPS);
    SHARED(int, equal, GATHER_WARPS);
    const int expert = (int)blockIdx.x;
    int less = 0, same = 0;
    for (int c = (int)threadIdx.x; c < choices; c += GATHER_THREADS) {
        const int id = ids[c];
        less += id < expert;
        same += id == expert;
    }
    less = group_sum<32>(less);
    same = group_sum<32>(same);
    if (lane_id() == 0) {
        before[warp_id()] = less;
        equal[warp_id()] = same;
    }
    __syncthreads();
    int next = 0, total = 0;
    for (int w = 0; w < GATHER_WARPS; w++) {
        next += before[w];
        total += equal[w];
    }
    if (threadIdx.x == 0) {
        starts[expert] = next;
        if (expert == experts - 1) {
            starts[experts] = next + total;
        }
    }
    // `next`: the row of the next choice of this expert, the same in all
    // threads.
    const int end = next + total;
    for (int base = 0; base < choices && next < end; base += GATHER_THREADS) {
        const int c = base + (int)threadIdx.x;
        const bool mine = c < choices && ids[c] == expert;
        const u32 flags = __ballot_sync(FULL_WARP, mine);
        __syncthreads();
        if (lane_id() == 0) {
            equal[warp_id()] = __popc(flags);
        }
        __syncthreads();
        int row = next + __popc(flags & ((1u << lane_id()) - 1u));
        for (int w = 0; w < GATHER_WARPS; w++) {
            row += w < warp_id() ? equal[w] : 0;
            next += equal[w];
        }
        if (mine) {
            token_of[row] = c / per_token;
            choice_of[row] = c;
            row_of[c] = row;
        }
    }
}
