// One token's normalised state, and a row of a router times it.
#pragma once
#include "formats.cuh"
#include "routing.cuh"

// Warps of a block; each computes one row.
#define STEP_ROWS (ROUTING_THREADS / 32)
// Elements of the state that are in shared memory at once; a multiple of what
// the lanes of any format take together, 64 and 8 * 32.
#define TILE 4096
// Loads of a row that are under way at once, of 64 elements each.
#define BATCH 16

// --------------------------------------------------------------- the state

// `tile[0..count] = from[0..count]`, both 16-byte aligned, by the block.
DEVICE void load_tile(const float *from, int count, float *tile) {
    for (int i = 4 * (int)threadIdx.x; i < count; i += 4 * ROUTING_THREADS) {
        if (i + 4 <= count) {
            *(float4 *)(tile + i) = *(const float4 *)(from + i);
        } else {
            for (int j = i; j < count; j++) {
                tile[j] = from[j];
            }
        }
    }
}

DEVICE int tile_end(int first, int hidden) { return hidden - first < TILE ? hidden - first : TILE; }

// `sum_i (x_i - shift)^power`, power 1 or 2, in the 64 lanes of ops.rs. Every
// warp of the block computes all of it; thread t has lanes 2t and 2t + 1. A
// state of one tile is in shared memory already and stays there.
DEVICE float lane_sum(const float *state, int hidden, float *tile, float shift, bool squares) {
    const int pair = 2 * lane_id();
    float low = 0.0f, high = 0.0f;
    for (int first = 0; first < hidden; first += TILE) {
        const int count = tile_end(first, hidden);
        if (hidden > TILE) {
            __syncthreads();
            load_tile(state + first, count, tile);
            __syncthreads();
        }
        for (int i = pair; i < count; i += 64) {
            const float value = tile[i] - shift;
            low = low + (squares ? value * value : value);
            if (i + 1 < count) {
                const float next = tile[i + 1] - shift;
                high = high + (squares ? next * next : next);
            }
        }
    }
    const float sum = lane_tree<32>(low) + lane_tree<32>(high);
    return __shfl_sync(FULL_WARP, sum, 0);
}

// The norm in front of a router, as three numbers and two vectors.
struct Norm {
    const float *weight;
    const float *bias; // or null
    bool is_layer_norm;
    float mean;
    float factor;
};

DEVICE Norm read_norm(const u64 *record, const float *state, int hidden, float *tile) {
    Norm norm;
    norm.weight = (const float *)record[WORD_NORM_WEIGHT];
    norm.bias = (const float *)record[WORD_NORM_BIAS];
    norm.is_layer_norm = record[WORD_LAYER_NORM] != 0;
    const float width = (float)hidden;
    norm.mean = norm.is_layer_norm ? lane_sum(state, hidden, tile, 0.0f, false) / width : 0.0f;
    const float squares = lane_sum(state, hidden, tile, norm.mean, true);
    norm.factor = 1.0f / sqrtf(squares / width + float_of((u32)record[WORD_EPSILON]));
    return norm;
}

// In place, for elements `first .. first + count` of the state.
DEVICE void normalise_tile(const Norm &norm, int first, int count, float *tile) {
    for (int i = (int)threadIdx.x; i < count; i += ROUTING_THREADS) {
        const float weight = norm.weight[first + i];
        if (norm.is_layer_norm) {
            const float bias = norm.bias ? norm.bias[first + i] : 0.0f;
            tile[i] = (tile[i] - norm.mean) * norm.factor * weight + bias;
        } else {
            tile[i] = tile[i] * norm.factor * weight;
        }
    }
}

// ---------------------------------------------------------------- the rows

// Two neighbouring elements of a row; `Raw` is what a load of both gives.
struct PairOfF32 : F32 {
    typedef uint2 Raw;
    static DEVICE float first(Raw raw) { return float_of(raw.x); }
    static DEVICE float second(Raw raw) { return float_of(raw.y); }
};
struct PairOfF16 : F16 {
    typedef u32 Raw;
    static DEVICE float first(Raw raw) { return f16_to_f32((u16)(raw & 0xffffu)); }
    static DEVICE float second(Raw raw) { return f16_to_f32((u16)(raw >> 16)); }
};
struct PairOfBF16 : BF16 {
    typedef u32 Raw;
    static DEVICE float first(Raw raw) { return float_of(raw << 16); }
    static DEVICE float second(Raw raw) { return float_of(raw & 0xffff0000u); }
};

// Adds `row[0..count] . x[0..count]` to the warp's 64 lanes, of which a thread
// has 2t (`low`) and 2t + 1 (`high`). Rows of an odd number of elements start
// at odd addresses, so they are read element by element.
template <class Pair>
DEVICE void add_row(const u8 *row, const float *x, int count, bool by_pairs, float &low,
                    float &high) {
    const int pair = 2 * lane_id();
    if (!by_pairs) {
        for (int i = pair; i < count; i += 64) {
            low = fma_rn(Pair::at(row + Pair::BYTES * i), x[i], low);
            if (i + 1 < count) {
                high = fma_rn(Pair::at(row + Pair::BYTES * (i + 1)), x[i + 1], high);
            }
        }
        return;
    }
    for (int base = pair; base < count; base += 64 * BATCH) {
        typename Pair::Raw raw[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int i = base + 64 * b;
            if (i < count) {
                raw[b] = *(const typename Pair::Raw *)(row + Pair::BYTES * i);
            }
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int i = base + 64 * b;
            if (i < count) {
                low = fma_rn(Pair::first(raw[b]), x[i], low);
                high = fma_rn(Pair::second(raw[b]), x[i + 1], high);
            }
        }
    }
}

// A tile of activations, quantised in groups of 32.
struct Codes {
    uint4 *codes;  // [TILE / 16], an int8 per element
    float *scales; // [TILE / 32]
};

// Quantises `x[0..count]`, a warp per group.
DEVICE void quantise_tile(const float *x, int count, const Codes &to) {
    u8 *codes = (u8 *)to.codes;
    for (int group = warp_id(); group < count / 32; group += STEP_ROWS) {
        const float value = x[32 * group + lane_id()];
        float scale, inverse;
        quantisation_scale(group_max<32>(bits_of(value) & 0x7fffffffu), scale, inverse);
        codes[32 * group + lane_id()] = (u8)quantised(value, inverse);
        if (lane_id() == 0) {
            to.scales[group] = scale;
        }
    }
}

// Adds a Q8_0 row's blocks to the contract's eight lanes, which threads 0..8
// of the warp have in `low`. All threads of the block call it; `row` is null
// in warps that have none. Rare (files keep routers as floats), so rows are
// not shared out any further.
DEVICE void add_blocks(const u8 *row, const float *x, int count, const Codes &scratch,
                       float &low) {
    quantise_tile(x, count, scratch);
    __syncthreads();
    if (row && lane_id() < 8) {
        for (int block = lane_id(); block < count / 32; block += 8) {
            const u8 *q = (const u8 *)scratch.codes + 32 * block;
            low = accumulate<Q8_0>(row + (u64)block * Q8_0::BYTES, q, nullptr,
                                   scratch.scales[block], low);
        }
    }
}

// Formats by their numbers in GGUF files (`Format::ggml_type`).
#define FORMAT_F32 0
#define FORMAT_F16 1
#define FORMAT_Q8_0 8

// Bytes of `count` elements, whole blocks.
DEVICE u64 bytes_of(int format, int count) {
    if (format == FORMAT_Q8_0) {
        return (u64)(count / 32) * Q8_0::BYTES;
    }
    return (u64)count * (format == FORMAT_F32 ? 4 : 2);
}

DEVICE void add_floats(int format, const u8 *row, const float *x, int count, bool by_pairs,
                       float &low, float &high) {
    if (format == FORMAT_F32) {
        add_row<PairOfF32>(row, x, count, by_pairs, low, high);
    } else if (format == FORMAT_F16) {
        add_row<PairOfF16>(row, x, count, by_pairs, low, high);
    } else {
        add_row<PairOfBF16>(row, x, count, by_pairs, low, high);
    }
}

// ----------------------------------------------------------------- together

// The row of router `record` that this warp has, times the normalised state;
// in lane 0 of the warp. Warps without a row (`row_index` behind the last) help
// with the state.
DEVICE float row_product(const u64 *record, const float *state, int hidden, int row_index,
                         float *tile, const Codes &scratch) {
    const int format = (int)record[WORD_FORMAT];
    const bool has_row = row_index < (int)record[WORD_EXPERTS];
    const u64 row_bytes = bytes_of(format, hidden);
    const u8 *row = (const u8 *)record[WORD_WEIGHT] + (has_row ? row_index : 0) * row_bytes;
    if (has_row) {
        // The row travels while the norm is computed.
        for (u64 at = 128 * lane_id(); at < row_bytes; at += 128 * 32) {
            prefetch_l2(row + at);
        }
    }
    if (hidden <= TILE) {
        load_tile(state, hidden, tile);
        __syncthreads();
    }
    const Norm norm = read_norm(record, state, hidden, tile);
    const bool by_pairs = hidden % 2 == 0;
    float low = 0.0f, high = 0.0f;
    for (int first = 0; first < hidden; first += TILE) {
        const int count = tile_end(first, hidden);
        __syncthreads();
        if (hidden > TILE) {
            load_tile(state + first, count, tile);
            __syncthreads();
        }
        normalise_tile(norm, first, count, tile);
        __syncthreads();
        const u8 *part = row + bytes_of(format, first);
        if (format == FORMAT_Q8_0) {
            add_blocks(has_row ? part : nullptr, tile, count, scratch, low);
        } else if (has_row) {
            add_floats(format, part, tile, count, by_pairs, low, high);
        }
    }
    if (format == FORMAT_Q8_0) {
        return lane_tree<8>(low);
    }
    return lane_tree<32>(low) + lane_tree<32>(high);
}
