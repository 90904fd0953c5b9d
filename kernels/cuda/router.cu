// Routers: which experts a token gets, and which the next layers' routers
// would name for the same state (pre-gated lookahead, 2308.12066).
//
// Bits are those of kernels/src/ops.rs (norms), kernels/src/contract.rs (rows)
// and kernels/src/routing.rs (rules), whatever the number of blocks and the
// order in which they end.
#include "arrival.cuh"
#include "router_rows.cuh"

// One token's choice in one layer and the forecasts for up to four others, all
// from the same residual stream.
//
// `table`: one record of ROUTER_WORDS per layer (routing.cuh); here routers are
// F32, F16, BF16 or Q8_0. `state` [hidden], 16-byte aligned. `target0 ..` are the
// records that the gridDim.y rows of blocks answer for; where `routes` is 1
// the first is this layer, whose rule gives `ids` and `weights` [top_k] in
// router order; the others give row 0, 1, ... of `forecast_ids` and
// `forecast_scores` [.., forecasts]: the experts that their rule would prefer,
// best first, -1 behind the last. `logits` [gridDim.y, MAX_EXPERTS] are left
// for who wants them. `arrived` [gridDim.y] is 0 before and after.
//
// Every warp computes one row of a router, reading 8 bytes a lane (4 of 16-bit
// formats), 16 loads under way: with 64 lanes of the contract on 32 threads, a
// thread's two lanes are neighbours. The last block of a target selects; no
// target waits for another.
//
// Must move: per target its router, its norm and its biases, once from memory;
// the state once. (Each block of four rows reads state and norm from L2.)
// Grid (ceil(most experts / 4), targets); block 128.
extern "C" __global__ void __launch_bounds__(ROUTING_THREADS) router_step(
    const unsigned long long *table, const float *state, int hidden, int routes, int target0,
    int target1, int target2, int target3, int target4, int forecasts, float *logits,
    unsigned int *arrived, int *ids, float *weights, int *forecast_ids, float *forecast_scores
) {
    SHARED(float, tile, TILE);
    SHARED(uint4, codes, TILE / 16);
    SHARED(float, scales, TILE / 32);
    ROUTING_WORKSPACE(work);
    const int y = (int)blockIdx.y;
    const int target = y == 0   ? target0
                       : y == 1 ? target1
                       : y == 2 ? target2
                       : y == 3 ? target3
                                : target4;
    const u64 *record = table + (u64)target * ROUTER_WORDS;
    const int row_index = (int)blockIdx.x * STEP_ROWS + warp_id();
    const Codes scratch = {codes, scales};
    const float product = row_product(record, state, hidden, row_index, tile, scratch);
    float *own_logits = logits + y * MAX_EXPERTS;
    if (row_index < (int)record[WORD_EXPERTS] && lane_id() == 0) {
        const float *bias = (const float *)record[WORD_BIAS];
        own_logits[row_index] = bias ? product + bias[row_index] : product;
    }
    if (is_last_block(&arrived[y])) {
        const Rule rule = read_rule(record);
        const volatile float *all = own_logits;
        if (y < routes) {
            choose(rule, work, all, ids, weights);
        } else {
            const int at = (y - routes) * forecasts;
            foresee(rule, work, all, forecasts, forecast_ids + at, forecast_scores + at);
        }
    }
}
