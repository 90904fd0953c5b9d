// Attention for few query tokens over the KV cache. What is computed stands
// in attention_prepare.cuh and attention_chunk.cuh; here are the kernels.
#include "attention_chunk.cuh"
#include "attention_prepare.cuh"

// Queries, keys and values of a chunk of tokens after their projections.
// Queries and keys: clamp to `limit` (infinity: none), RMS norm (NORM_...),
// rotation of the leading `2 * half` elements (`neighbours`: pairs 2i, 2i + 1,
// else i, i + half). Values: clamp. Keys and values join the cache.
//   q_raw [tokens, heads, q_stride]: the leading `width` of each head
//   k_raw, v_raw [tokens, kv_heads, width]; table [tokens, half, 2]: cos, sin
//   q [tokens, heads, width]; keys, values: cells, strides in cells
//   step, first: the first token's position, see first_position_of()
// NORM_WHOLE: each warp takes the sum over all heads for itself, from L2,
// which costs less than a launch of its own; q_stride == width then.
// Moves 4 tokens width (2 heads + 2 kv_heads) bytes, the table (8 tokens half)
// and 2 tokens kv_heads width cells.
// Grid: a warp per head of a token, ceil(tokens (heads + 2 kv_heads) / 4)
// blocks of 128.
#define PREPARE_PARAMETERS                                                                     \
    const float* q_raw, const float* k_raw, const float* v_raw, const float* q_norm,           \
        const float* k_norm, const float* table, float* q, u64 keys, u64 values, int tokens,   \
        int heads, int kv_heads, int width, int q_stride, int norm, float epsilon, float limit, \
        int half, int neighbours, const int* step, int first, int key_head_stride,             \
        int key_position_stride, int value_head_stride, int value_position_stride
#define PREPARE_CALL                                                                            \
    {q_raw, k_raw, v_raw, q_norm, k_norm, table, q, keys, values, tokens, heads, kv_heads,      \
     width, q_stride, norm, epsilon, limit, half, neighbours, step, first, key_head_stride,     \
     key_position_stride, value_head_stride, value_position_stride}

// The warp's index among all warps of the grid.
DEVICE int warp_of_grid() {
    return static_cast<int>(blockIdx.x * (blockDim.x / 32)) + warp_id();
}

extern "C" __global__ void __launch_bounds__(128) attention_prepare_f16(PREPARE_PARAMETERS) {
    const int all = heads + 2 * kv_heads, job = warp_of_grid();
    const PrepareCall call = PREPARE_CALL;
    if (job < tokens * all) prepare_head<HalfCells>(call, job / all, job % all);
}
extern "C" __global__ void __launch_bounds__(128) attention_prepare_f32(PREPARE_PARAMETERS) {
    const int all = heads + 2 * kv_heads, job = warp_of_grid();
    const PrepareCall call = PREPARE_CALL;
    if (job < tokens * all) prepare_head<FloatCells>(call, job / all, job % all);
}

// Latent attention (2405.04434): the rotary part of each query goes to the
// end of its absorbed row; each token's row [latent | rotary key], its latent
// normalised with `kv_norm [rank]`, joins the cache.
//   q_raw [tokens, heads, nope + rope], kv_raw [tokens, rank + rope]
//   table [tokens, half, 2]; absorbed [tokens, heads, rank + rope]: written
//   from element `rank` on; cells: rows of rank + rope, one head
//   step, first: as above
// Moves 4 tokens (2 heads rope + rank + rope) bytes, the table and
// tokens (rank + rope) cells. Grid: a warp per query head and per row.
#define LATENT_PARAMETERS                                                                      \
    const float* q_raw, const float* kv_raw, const float* kv_norm, const float* table,         \
        float* absorbed, u64 cells, int tokens, int heads, int nope, int rope, int rank,       \
        float epsilon, int half, int neighbours, const int* step, int first, int position_stride
#define LATENT_CALL                                                                           \
    {q_raw, kv_raw, kv_norm, table, absorbed, cells, tokens, heads, nope, rope, rank, epsilon, \
     half, neighbours, step, first, position_stride}

extern "C" __global__ void __launch_bounds__(128) latent_prepare_f16(LATENT_PARAMETERS) {
    const int all = heads + 1, job = warp_of_grid();
    const LatentCall call = LATENT_CALL;
    if (job < tokens * all) prepare_latent<HalfCells>(call, job / all, job % all);
}
extern "C" __global__ void __launch_bounds__(128) latent_prepare_f32(LATENT_PARAMETERS) {
    const int all = heads + 1, job = warp_of_grid();
    const LatentCall call = LATENT_CALL;
    if (job < tokens * all) prepare_latent<FloatCells>(call, job / all, job % all);
}

// Causal attention of `tokens` tokens over cells that hold them already;
// `attend_<cells>_q<n>` has n queries in a tile. Shapes in AttendCall; widths
// are multiples of 8 cells, rows start at multiples of 16 bytes. `step` and
// `first` say where the first token is, see first_position_of(); the grid has
// blocks for `chunks` chunks, at least as many as are seen. `counters`
// [kv_heads, tiles] or null: see attend().
// Moves, of each cache head, the keys and values that are seen, once (further
// tiles of the same cells find them in L2), 4 tokens heads key_width bytes of
// queries and twice 4 tokens heads (value_width + 2) per seen chunk of partial
// answers (L2), and writes 4 tokens heads value_width.
// Grid: [tiles, chunks, kv_heads] of 128 threads; dynamic shared memory: two
// stages (32 KiB), queries (4 n key_width) and scores (1 KiB n).
#define ATTEND_PARAMETERS                                                                      \
    const float* q, u64 keys, u64 values, const float* sinks, const float* gate,               \
        float* partial, float* stats, float* out, u32* counters, int tokens, int heads,        \
        int kv_heads, int key_width, int value_width, const int* step, int first, int chunks,  \
        int window, float scale, int key_head_stride, int key_position_stride,                 \
        int value_head_stride, int value_position_stride, int gate_stride
#define ATTEND_CALL                                                                            \
    {q, keys, values, sinks, gate, partial, stats, out, tokens, heads, kv_heads, key_width,    \
     value_width, step, first, chunks, window, scale, key_head_stride,                         \
     key_position_stride, value_head_stride, value_position_stride, gate_stride}

extern "C" __global__ void __launch_bounds__(128, 3) attend_f16_q1(ATTEND_PARAMETERS) {
    attend<HalfStage, 1>(ATTEND_CALL, counters);
}
extern "C" __global__ void __launch_bounds__(128, 3) attend_f16_q4(ATTEND_PARAMETERS) {
    attend<HalfStage, 4>(ATTEND_CALL, counters);
}
extern "C" __global__ void __launch_bounds__(128, 3) attend_f16_q8(ATTEND_PARAMETERS) {
    attend<HalfStage, 8>(ATTEND_CALL, counters);
}
extern "C" __global__ void __launch_bounds__(128, 3) attend_f32_q1(ATTEND_PARAMETERS) {
    attend<FloatStage, 1>(ATTEND_CALL, counters);
}
extern "C" __global__ void __launch_bounds__(128, 3) attend_f32_q4(ATTEND_PARAMETERS) {
    attend<FloatStage, 4>(ATTEND_CALL, counters);
}

// Joins the chunks of every query after an attend without counters: sink,
// division, output gate. Moves 4 tokens heads (value_width + 2) bytes per
// seen chunk and 4 tokens heads value_width. Grid: a warp per 128 elements of
// a query.
extern "C" __global__ void __launch_bounds__(128)
attention_merge(const float* sinks, const float* gate, float* partial, float* stats, float* out,
                int tokens, int heads, int value_width, const int* step, int first, int chunks,
                int window, int gate_stride) {
    AttendCall call = {};
    call.sinks = sinks;
    call.gate = gate;
    call.partial = partial;
    call.stats = stats;
    call.out = out;
    call.heads = heads;
    call.value_width = value_width;
    call.step = step;
    call.first = first;
    call.chunks = chunks;
    call.window = window;
    call.gate_stride = gate_stride;
    const int slices = (value_width + 127) / 128, job = warp_of_grid();
    const int row = job / slices;
    if (row >= tokens * heads) return;
    merge_slice(call, call.first_position(), row / heads, row % heads, job % slices);
}
