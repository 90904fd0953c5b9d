// Routed experts (and dense feed-forward blocks, as a table of one) for
// decoding: gate-up-activation, down, combine. Every bit is that of
// kernels/src/contract.rs. Launchers: kernels/src/cuda/experts.rs.
//
// A choice is one expert of one token: choice t * k + i is the i-th of token
// t in router order. `ids` [tokens * k] names its expert (null: expert 0),
// `chosen` [grid.y] the choices to compute (null: choice blockIdx.y). `table`
// [experts] has the address of each expert's weights on the device, a multiple
// of 16, or 0: then the choice is skipped and its row left as it is, for the
// CPU to fill. Matrices lie at offsets (multiples of 16) behind that address.
#include "rows.cuh"

// What a block of threads works on.
struct Chosen {
    int choice;
    int expert;
    const u8* weights;  // null: not resident

    DEVICE static Chosen of(const u64* table, const int* ids, const int* chosen, int experts) {
        Chosen out;
        out.choice = chosen == nullptr ? static_cast<int>(blockIdx.y) : chosen[blockIdx.y];
        const int id = ids == nullptr ? 0 : ids[out.choice];
        const bool is_known = id >= 0 && id < experts;
        out.expert = is_known ? id : 0;
        out.weights = is_known ? reinterpret_cast<const u8*>(table[id]) : nullptr;
        return out;
    }
};

// --------------------------------------------------- gate, up, activation

// Where gate and up rows of a block meet: [gate or up][row of the block].
struct GateUpSink {
    float* values;
    int first;

    DEVICE void operator()(int, int row, float value) const { values[row - first] = value; }
};

// The biases and the activation of the block's rows, by its first threads.
struct Activation {
    const float* gate_bias;
    const float* up_bias;
    int kind;
    float alpha, limit;

    DEVICE void apply(const float* values, int pitch, int first, int rows, int inner, int expert,
                      float* out) const {
        const int threads = static_cast<int>(blockDim.x);
        for (int i = static_cast<int>(threadIdx.x); i < rows && first + i < inner; i += threads) {
            const u64 at = static_cast<u64>(expert) * inner + first + i;
            float gate = values[i], up = values[pitch + i];
            if (gate_bias != nullptr) gate = gate + gate_bias[at];
            if (up_bias != nullptr) up = up + up_bias[at];
            out[first + i] = contract_gated(kind, alpha, limit, gate, up);
        }
    }
};

// Most rows of a block: four warps of 32 rows.
#define MOST_GATE_UP_ROWS 128

// The first half of the warps has gate rows, the second the same rows of up.
template <class F>
DEVICE void gate_up(const Chosen& chosen, const Quantised& x, const Activation& activation,
                    int gate_offset, int up_offset, int hidden, int inner, float* out) {
    DYNAMIC_SHARED(u8, shared);
    SHARED(float, values, 2 * MOST_GATE_UP_ROWS);
    const int blocks = hidden / F::LEN, each = rows_of_warp(blocks);
    const int pairs = static_cast<int>(blockDim.x) / 64, half = warp_id() / pairs;
    const int first = static_cast<int>(blockIdx.x) * pairs * each;
    if (chosen.weights != nullptr) {
        const GateUpSink sink = {values + half * MOST_GATE_UP_ROWS, first};
        multiply_rows<F>(chosen.weights + (half == 0 ? gate_offset : up_offset), inner, blocks,
                         first + warp_id() % pairs * each, 1, x, Buffers<F>(shared, 1), sink);
        __syncthreads();
        activation.apply(values, MOST_GATE_UP_ROWS, first, pairs * each, inner, chosen.expert, out);
    }
}

template <class F>
DEVICE void gate_up_floats(const Chosen& chosen, const float* x, const Activation& activation,
                           int gate_offset, int up_offset, int hidden, int inner, float* out) {
    DYNAMIC_SHARED(u8, shared);
    SHARED(float, values, 2 * MOST_GATE_UP_ROWS);
    constexpr int each = FloatStage<F>::WARP_ROWS;
    const int pairs = static_cast<int>(blockDim.x) / 64, half = warp_id() / pairs;
    const int first = static_cast<int>(blockIdx.x) * pairs * each;
    if (chosen.weights != nullptr) {
        const GateUpSink sink = {values + half * MOST_GATE_UP_ROWS, first};
        multiply_float_rows<F, 1>(chosen.weights + (half == 0 ? gate_offset : up_offset), inner,
                                  hidden, first + warp_id() % pairs * each, 1, x, 0, shared, sink);
        __syncthreads();
        activation.apply(values, MOST_GATE_UP_ROWS, first, pairs * each, inner, chosen.expert, out);
    }
}

// For each choice c to compute: out[c] [inner] = activation(gate row * x[c / k]
// + gate_bias[expert], up row * x[c / k] + up_bias[expert]); gate and up are
// [inner, hidden] of one format, biases [experts, inner] or null, x quantised
// (q [tokens, hidden] and so on), out [tokens * k, inner].
// `activation`: 0 silu(gate) * up; 1 gpt-oss's, with alpha and limit.
// Bytes: n * (2 * inner * row bytes of hidden + 4 * inner), + n * hidden * 1.25
// for each block of threads, from L2. Grid: (inner / rows of a block, n), a
// block having `warps / 2 * 32 / min(blocks, 8)` rows. Block: 64, 128 or 256
// threads. Dynamic shared memory: see `Buffers`.
#define EXPERT_GATE_UP(name, F)                                                                \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    expert_gate_up_##name(const u64* table, const int* ids, const int* chosen, int experts,    \
                          const i8* q, const float* scales, const i16* sums, int k,            \
                          int gate_offset, int up_offset, const float* gate_bias,              \
                          const float* up_bias, int hidden, int inner, int activation,         \
                          float alpha, float limit, float* out) {                              \
        const Chosen c = Chosen::of(table, ids, chosen, experts);                              \
        const u64 at = static_cast<u64>(c.choice / k) * hidden;                                \
        const Quantised x = {q + at, scales + at / F::LEN, sums + at / 16, hidden};            \
        gate_up<F>(c, x, {gate_bias, up_bias, activation, alpha, limit}, gate_offset,          \
                   up_offset, hidden, inner, out + static_cast<u64>(c.choice) * inner);        \
    }
FOR_EACH_QUANTISED(EXPERT_GATE_UP)

// The same for float formats: x [tokens, hidden] as it is.
#define EXPERT_GATE_UP_FLOATS(name, F)                                                         \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    expert_gate_up_##name(const u64* table, const int* ids, const int* chosen, int experts,    \
                          const float* x, int k, int gate_offset, int up_offset,               \
                          const float* gate_bias, const float* up_bias, int hidden, int inner, \
                          int activation, float alpha, float limit, float* out) {              \
        const Chosen c = Chosen::of(table, ids, chosen, experts);                              \
        gate_up_floats<F>(c, x + static_cast<u64>(c.choice / k) * hidden,                      \
                          {gate_bias, up_bias, activation, alpha, limit}, gate_offset,         \
                          up_offset, hidden, inner, out + static_cast<u64>(c.choice) * inner); \
    }
FOR_EACH_FLOAT(EXPERT_GATE_UP_FLOATS)

// -------------------------------------------------------------------- down

struct DownSink {
    float* out;
    const float* bias;

    DEVICE void operator()(int, int row, float value) const {
        out[row] = bias == nullptr ? value : value + bias[row];
    }
};

// For each choice c to compute: answers[c] [hidden] = down row * inner[c] +
// bias[expert]; down is [hidden, inner], `vectors` [tokens * k, inner] what
// gate-up gave, which each block of threads quantises on its way to shared
// memory, while its weights arrive; bias [experts, hidden] or null.
// Bytes: n * (hidden * row bytes of inner + 4 * hidden), + 4 * inner for each
// block of threads, from L2. Grid: (hidden / rows of a block, n), a block
// having `warps * 32 / min(blocks, 8)` rows. Block: 32 to 256 threads. Dynamic
// shared memory: see `Buffers`.
#define EXPERT_DOWN(name, F)                                                                   \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    expert_down_##name(const u64* table, const int* ids, const int* chosen, int experts,       \
                       const float* vectors, int offset, const float* bias, int hidden,        \
                       int inner, float* answers) {                                            \
        DYNAMIC_SHARED(u8, shared);                                                            \
        const Chosen c = Chosen::of(table, ids, chosen, experts);                              \
        const int blocks = inner / F::LEN, warps = static_cast<int>(blockDim.x) / 32;          \
        const int first =                                                                      \
            (static_cast<int>(blockIdx.x) * warps + warp_id()) * rows_of_warp(blocks);         \
        const Unquantised x = {vectors + static_cast<u64>(c.choice) * inner};                  \
        const DownSink sink = {                                                                \
            answers + static_cast<u64>(c.choice) * hidden,                                     \
            bias == nullptr ? nullptr : bias + static_cast<u64>(c.expert) * hidden};           \
        if (c.weights != nullptr) {                                                            \
            multiply_rows<F>(c.weights + offset, hidden, blocks, first, 1, x,                  \
                             Buffers<F>(shared, 1), sink);                                     \
        }                                                                                      \
    }
FOR_EACH_QUANTISED(EXPERT_DOWN)

#define EXPERT_DOWN_FLOATS(name, F)                                                            \
    extern "C" __global__ void ROW_BOUNDS                                                      \
    expert_down_##name(const u64* table, const int* ids, const int* chosen, int experts,       \
                       const float* vectors, int offset, const float* bias, int hidden,        \
                       int inner, float* answers) {                                            \
        DYNAMIC_SHARED(u8, shared);                                                            \
        const Chosen c = Chosen::of(table, ids, chosen, experts);                              \
        const int warps = static_cast<int>(blockDim.x) / 32;                                   \
        const int first =                                                                      \
            (static_cast<int>(blockIdx.x) * warps + warp_id()) * FloatStage<F>::WARP_ROWS;     \
        const DownSink sink = {                                                                \
            answers + static_cast<u64>(c.choice) * hidden,                                     \
            bias == nullptr ? nullptr : bias + static_cast<u64>(c.expert) * hidden};           \
        if (c.weights != nullptr) {                                                            \
            multiply_float_rows<F, 1>(c.weights + offset, hidden, inner, first, 1,             \
                                      vectors + static_cast<u64>(c.choice) * inner, 0, shared, \
                                      sink);                                                   \
        }                                                                                      \
    }
FOR_EACH_FLOAT(EXPERT_DOWN_FLOATS)

// ----------------------------------------------------------------- combine

// out[t] = fma(w_k, y_k, ... fma(w_1, y_1, +0)) over the choices of token t in
// router order; then, where `shared` [tokens, hidden] is not null, out +=
// gate * shared, the gate being sigmoid(gate_logits[t]), or 1 where those are
// null; then, where `residual` [tokens, hidden] is not null, residual +=
// residual_scale * out. Each product and sum of these rounds. `weights`
// [tokens, k], `answers` [tokens * k, hidden]; `out` may be null. Where
// `from_host` is not null, of one token, choices whose bit is set there are
// rows of `host_rows` [k, hidden] (mapped: read across the link).
// Bytes: tokens * hidden * (4 * k, + 4 with shared, + 8 with residual, + 4 for
// out). Grid: (hidden / threads, tokens).
extern "C" __global__ void __launch_bounds__(256)
combine(const float* answers, const float* weights, int k, int hidden, const float* shared,
        const float* gate_logits, float* residual, float residual_scale, float* out,
        const float* host_rows, const u32* from_host) {
    const int col = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const u64 token = blockIdx.y, at = token * hidden + col;
    if (col >= hidden) return;
    const float* answer = answers + token * k * hidden + col;
    const u32 hosts = from_host == nullptr ? 0 : *from_host;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < k; i++) {
        const float* rows = i < 32 && (hosts >> i & 1) ? host_rows + col : answer;
        sum = fma_rn(weights[token * k + i], rows[static_cast<u64>(i) * hidden], sum);
    }
    if (shared != nullptr) {
        const float gate = gate_logits == nullptr ? 1.0f : contract_sigmoid(gate_logits[token]);
        sum = sum + gate * shared[at];
    }
    if (out != nullptr) out[at] = sum;
    if (residual != nullptr) residual[at] = residual[at] + residual_scale * sum;
}
