// What the prefill products of gemm.cu share: where a tile lies in shared
// memory, and how a slab of 256 columns gets there.
//
// A tile is ROWS weight rows times at most 64 tokens. Both sides of a slab
// stand in shared memory as int8, 256 bytes a row: weights unpacked and
// centred once per tile, activations as they were quantised. What belongs to
// rows and tokens (scales, sub-block scales, minimums, sums) stands beside.
#pragma once
#include "common.cuh"
#include "formats.cuh"

#define TILE_TOKENS 64
#define TILE_THREADS 256
#define SLAB 256

// Whether the next slab is copied while one is computed: two buffers, and the
// larger tiles that fit beside them. Turing has 64 KB and no asynchronous copy.
#if __CUDA_ARCH__ >= 800
#define TILE_AHEAD 1
#else
#define TILE_AHEAD 0
#endif

// What one block of threads computes.
struct Tile {
    const u8* first;   // the matrix [rows, cols]; with pairs, gate
    const u8* second;  // with pairs, up
    int rows;          // of each matrix
    int cols;
    int first_row;
    bool pair;
    int expert;  // 0 without experts
    int count;   // tokens, 1..=64

    // Row `i` of a tile lies in a matrix at: without pairs `first_row + i`;
    // with pairs sixteen rows of gate and the same sixteen of up take turns,
    // so that one thread holds both in the two halves of its accumulators.
    DEVICE int row(int i) const {
        return first_row + (pair ? (i >> 5) * 16 + (i & 15) : i);
    }
    DEVICE const u8* matrix(int i) const { return pair && (i & 16) ? second : first; }
    // Tokens in whole groups of eight: the columns of an mma.
    DEVICE int groups() const { return (count + 7) >> 3; }
};

// Quantised activations.
struct Input {
    const i8* q;          // [rows, cols]
    const float* scales;  // [rows, cols / group]
    const i16* sums;      // [rows, cols / 16]
};

// Rows of 256 bytes without padding would meet in the same banks. A row's
// sixteen 16-byte chunks are permuted by exclusive or with `turn(row)`: then
// eight rows by one chunk (4 bytes a thread) and four rows by two chunks
// (8 bytes a thread) both cover all 32 banks.
DEVICE int turn(int row) { return (row & 3) << 1 | (row >> 2 & 1); }
DEVICE int chunk_at(int row, int chunk) { return row * SLAB + ((chunk ^ turn(row)) << 4); }

// Offsets in dynamic shared memory for weights of format F.
template <class F>
struct Layout {
    // One block of 256, or eight of 32.
    static constexpr bool WHOLE = F::LEN == 256;
    static constexpr bool HAS_MIN = F::MINIMUM != NO_MINIMUM;
    static constexpr int BLOCKS = WHOLE ? 1 : 8;
    static constexpr int ROWS = WHOLE && TILE_AHEAD ? 128 : 64;
    // 16-byte chunks that cover a slab of one row wherever it starts.
    static constexpr int CHUNKS = (BLOCKS * F::BYTES + (16 - F::ALIGN) + 15) / 16;
    static constexpr int DIGITS = WHOLE && HAS_MIN ? 16 : 0;

    static constexpr int WEIGHTS = 0;                                      // i8 [ROWS, 256]
    static constexpr int X = WEIGHTS + ROWS * SLAB;                        // i8 [buffers, 64, 256]
    static constexpr int PACKED = X + (1 + TILE_AHEAD) * TILE_TOKENS * SLAB;  // [ROWS, CHUNKS * 16]
    static constexpr int D = PACKED + ROWS * CHUNKS * 16;                  // float [ROWS, BLOCKS]
    static constexpr int M = D + ROWS * BLOCKS * 4;                        // float [ROWS, BLOCKS]
    static constexpr int X_SCALE = M + (HAS_MIN ? ROWS * BLOCKS * 4 : 0);  // float [64, BLOCKS]
    static constexpr int X_SUM = X_SCALE + TILE_TOKENS * BLOCKS * 4;       // float [64, 8]
    static constexpr int X_LOW = X_SUM + (WHOLE || !HAS_MIN ? 0 : TILE_TOKENS * 8 * 4);
    static constexpr int X_HIGH = X_LOW + TILE_TOKENS * DIGITS;            // i8 [64, 16] both
    static constexpr int SUB_SCALES = X_HIGH + TILE_TOKENS * DIGITS;       // i8 [ROWS, 16]
    static constexpr int SUB_MINS = SUB_SCALES + (WHOLE ? ROWS * 16 : 0);  // i8 [ROWS, 16]
    static constexpr int ROW_AT = SUB_MINS + ROWS * DIGITS;                // u64 [ROWS]
    static constexpr int IN_ROW = ROW_AT + ROWS * 8;                       // int [64]
    static constexpr int OUT_ROW = IN_ROW + TILE_TOKENS * 4;               // int [64]
    static constexpr int SIZE = OUT_ROW + TILE_TOKENS * 4;
};

// Brings slab after slab into shared memory.
template <class F>
struct Slabs {
    typedef Layout<F> L;
    static constexpr bool HAS_MIN = L::HAS_MIN;
    const Tile& tile;
    Input input;
    u8* shared;
    int buffer;
    // What belongs to tokens, on its way through registers: the thread's part
    // is token `threadIdx.x / 4`, quarter `threadIdx.x % 4`.
    float scale[2];
    u32 sums[2];

    DEVICE Slabs(const Tile& tile, const Input& input, u8* shared)
        : tile(tile), input(input), shared(shared), buffer(0) {}

    template <class T>
    DEVICE T* at(int offset) const { return reinterpret_cast<T*>(shared + offset); }
    DEVICE int blocks() const { return tile.cols / F::LEN; }
    DEVICE int blocks_in(int slab) const {
        const int left = blocks() - slab * L::BLOCKS;
        return left < L::BLOCKS ? left : L::BLOCKS;
    }
    // Where the tile's rows start, before the first slab. Rows and tokens
    // behind the last repeat it; their answers go nowhere.
    DEVICE void find_rows() const {
        const int i = threadIdx.x;
        if (i < L::ROWS) {
            const int row = tile.row(i) < tile.rows ? tile.row(i) : tile.rows - 1;
            const u64 bytes = static_cast<u64>(row) * blocks() * F::BYTES;
            at<u64>(L::ROW_AT)[i] = reinterpret_cast<u64>(tile.matrix(i)) + bytes;
        }
    }
    DEVICE const u8* packed_row(int i, int slab) const {
        const u64 start = at<u64>(L::ROW_AT)[i];
        return reinterpret_cast<const u8*>(start) + slab * (L::BLOCKS * F::BYTES);
    }
    DEVICE static int shift_of(const u8* p) {
        return static_cast<int>(reinterpret_cast<u64>(p) & 15);
    }
    // The tokens' codes of the slab that is computed.
    DEVICE const u8* x() const { return shared + L::X + buffer * TILE_TOKENS * SLAB; }

    // Copies the packed bytes of all rows and the codes of all tokens.
    DEVICE void fetch(int slab, int to) const {
        const int bytes = blocks_in(slab) * F::BYTES;
        for (int item = threadIdx.x; item < L::ROWS * L::CHUNKS; item += TILE_THREADS) {
            const int i = item / L::CHUNKS, chunk = item % L::CHUNKS;
            const u8* from = packed_row(i, slab);
            const int shift = shift_of(from);
            if (chunk * 16 < shift + bytes) {
                cp_async_16(shared + L::PACKED + item * 16, from - shift + chunk * 16);
            }
        }
        const int* in_row = at<int>(L::IN_ROW);
        const int chunks = blocks_in(slab) * F::LEN / 16;
        u8* codes = shared + L::X + to * TILE_TOKENS * SLAB;
        for (int item = threadIdx.x; item < tile.groups() * 8 * 16; item += TILE_THREADS) {
            const int i = item >> 4, chunk = item & 15;
            if (chunk < chunks) {
                const i8* row = input.q + static_cast<u64>(in_row[i]) * tile.cols;
                cp_async_16(codes + chunk_at(i, chunk), row + slab * SLAB + chunk * 16);
            }
        }
    }

    DEVICE void read_tokens(int slab) {
        const int i = threadIdx.x >> 2, quarter = threadIdx.x & 3;
        if (i >= tile.groups() * 8) return;
        const u64 row = at<int>(L::IN_ROW)[i];
        const float* scales = input.scales + row * blocks() + slab * L::BLOCKS;
        const i16* pairs = input.sums + row * (tile.cols / 16) + slab * 16 + quarter * 4;
        if constexpr (L::WHOLE) {
            scale[0] = quarter == 0 ? scales[0] : 0.0f;
            if constexpr (HAS_MIN) load_words<8, 2>(reinterpret_cast<const u8*>(pairs), sums);
        } else {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (quarter * 2 + k < blocks_in(slab)) {
                    scale[k] = scales[quarter * 2 + k];
                    if constexpr (HAS_MIN) {
                        sums[k] = *reinterpret_cast<const u32*>(pairs + 2 * k);
                    }
                }
            }
        }
    }

    DEVICE void keep_tokens(int slab) {
        const int i = threadIdx.x >> 2, quarter = threadIdx.x & 3;
        if (i >= tile.groups() * 8) return;
        if constexpr (L::WHOLE) {
            if (quarter == 0) at<float>(L::X_SCALE)[i] = scale[0];
            if constexpr (HAS_MIN) keep_digits(i, quarter);
        } else {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int block = quarter * 2 + k;
                if (block < blocks_in(slab)) {
                    at<float>(L::X_SCALE)[i * 8 + block] = scale[k];
                    if constexpr (HAS_MIN) {
                        const int sum = low_half(sums[k]) + high_half(sums[k]);
                        at<float>(L::X_SUM)[i * 8 + block] = static_cast<float>(sum);
                    }
                }
            }
        }
    }

    DEVICE static int low_half(u32 pair) { return static_cast<i16>(pair & 0xffff); }
    DEVICE static int high_half(u32 pair) { return static_cast<i16>(pair >> 16); }

    // Sums of codes, at most 32 * 127 in magnitude, as two int8 digits:
    // sum = low + 64 * high, low in 0..64, high in -64..64.
    DEVICE void keep_digits(int i, int quarter) {
        int sum[4] = {low_half(sums[0]), high_half(sums[0]), low_half(sums[1]), high_half(sums[1])};
        u8* low = shared + L::X_LOW + i * 16;
        u8* high = shared + L::X_HIGH + i * 16;
        if constexpr (F::SUB == 32) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int both = sum[2 * k] + sum[2 * k + 1], slot = quarter * 2 + k;
                low[slot] = static_cast<u8>(both & 63);
                high[slot] = static_cast<u8>(both >> 6);
                low[8 + slot] = high[8 + slot] = 0;
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                low[quarter * 4 + k] = static_cast<u8>(sum[k] & 63);
                high[quarter * 4 + k] = static_cast<u8>(sum[k] >> 6);
            }
        }
    }

    // Packed bytes to centred int8, and what belongs to rows.
    DEVICE void unpack(int slab) const {
        const int blocks = blocks_in(slab);
        for (int item = threadIdx.x; item < L::ROWS * 8; item += TILE_THREADS) {
            const int i = item >> 3, j = item & 7;
            if (!L::WHOLE && j >= blocks) continue;
            const u8* block = packed_in_shared(i, slab) + (L::WHOLE ? 0 : j * F::BYTES);
            u32 w[8];
            F::run(block, L::WHOLE ? j : 0, w);
#pragma unroll
            for (int k = 0; k < 8; k++) w[k] = centred(w[k]);
            *at<uint4>(L::WEIGHTS + chunk_at(i, 2 * j)) = make_uint4(w[0], w[1], w[2], w[3]);
            *at<uint4>(L::WEIGHTS + chunk_at(i, 2 * j + 1)) = make_uint4(w[4], w[5], w[6], w[7]);
            if constexpr (!L::WHOLE) {
                const typename F::Head head = F::head(block);
                at<float>(L::D)[i * 8 + j] = head.d;
                if constexpr (HAS_MIN) at<float>(L::M)[i * 8 + j] = head.min;
            }
        }
        if constexpr (L::WHOLE) {
            if (threadIdx.x < L::ROWS) unpack_head(threadIdx.x, slab);
        }
    }

    DEVICE const u8* packed_in_shared(int i, int slab) const {
        return shared + L::PACKED + i * (L::CHUNKS * 16) + shift_of(packed_row(i, slab));
    }

    // Takes the format's offset from four codes; none of them is above 127.
    DEVICE static u32 centred(u32 codes) {
        if constexpr (F::OFFSET == 0) return codes;
        return ((codes | 0x80808080u) - F::OFFSET * 0x01010101u) ^ 0x80808080u;
    }

    // Scales and minimums of a row's block; sub-blocks that do not exist get 0.
    DEVICE void unpack_head(int i, int slab) const {
        const typename F::Head head = F::head(packed_in_shared(i, slab));
        at<float>(L::D)[i] = head.d;
        u32* scales = at<u32>(L::SUB_SCALES) + i * 4;
        u32* mins = at<u32>(L::SUB_MINS) + i * 4;
        if constexpr (HAS_MIN) at<float>(L::M)[i] = head.min;
#pragma unroll
        for (int word = 0; word < 4; word++) {
            u32 four_scales = 0, four_mins = 0;
            if (word * 4 < SLAB / F::SUB) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    four_scales |= (F::scale(head, word * 4 + k) & 0xff) << 8 * k;
                    four_mins |= (F::min(head, word * 4 + k) & 0xff) << 8 * k;
                }
            }
            scales[word] = four_scales;
            if constexpr (HAS_MIN) mins[word] = four_mins;
        }
    }

    // The first slab.
    DEVICE void start(int slab) {
        fetch(slab, 0);
        cp_async_commit();
        read_tokens(slab);
        finish(slab, true);
    }
    // Before a slab is computed: the next one sets out.
    DEVICE void set_out(int slab) {
        if (TILE_AHEAD) fetch(slab, buffer ^ 1);
        cp_async_commit();
        read_tokens(slab);
    }
    // After it was computed: the next one takes its place, if there is one.
    DEVICE void arrive(int slab, bool more) {
        if (!TILE_AHEAD) {
            __syncthreads();  // all have read the codes that are overwritten
            if (more) fetch(slab, 0);
            cp_async_commit();
        }
        if (more) buffer ^= TILE_AHEAD;
        finish(slab, more);
    }
    DEVICE void finish(int slab, bool more) {
        cp_async_wait<0>();
        __syncthreads();  // all have computed, and every copy is there
        if (more) {
            unpack(slab);
            keep_tokens(slab);
        }
        __syncthreads();  // what is unpacked can be read
    }
};
