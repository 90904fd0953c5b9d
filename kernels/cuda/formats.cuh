// Every tensor format: where the fields of a block are, and its integers.
//
// kernels/src/block.rs is the definition. A quantised format is a struct with
//   LEN      elements of a block, 256 or 32
//   BYTES    of a block
//   ALIGN    of a block, when the matrix starts at a multiple of 16 bytes
//   SUB      elements that share a sub-block scale
//   OFFSET   of the codes: element = code - OFFSET
//   MINIMUM  what is done with the minimums
//   head()   the scales of a block; scale(), min() those of sub-block j
//   Reader   reads the codes of a block, run by run: the words that SHARE runs
//            have in common are loaded once
//   run()    codes of elements 32 r .. 32 r + 31, four to a word, in order
//   code()   one code
//   scale_at(), min_at() as scale() and min(), from the block
// Indices into a head must be constants after unrolling: it is registers. For
// others there are scale_at() and min_at().
#pragma once
#include "common.cuh"

enum { NO_MINIMUM, MINIMUM_ADDED, MINIMUM_SUBTRACTED };

DEVICE float f16_at(const u8* p) { return f16_to_f32(load_u16(p)); }
DEVICE int byte_of(u32 word, int i) { return static_cast<int>(word >> 8 * i & 0xff); }
DEVICE int signed_byte_of(u32 word, int i) {
    return static_cast<int>(word << (24 - 8 * i)) >> 24;
}

// Four bits of a mask to bit 4 of four bytes.
DEVICE u32 spread_to_bit_4(u32 four_bits) { return four_bits * 0x02040810u & 0x10101010u; }

// The nibbles of 16 bytes: elements 0..15 low, 16..31 high.
DEVICE void split_nibbles(const u32 (&qs)[4], u32 (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[i] = qs[i] & 0x0f0f0f0fu;
        out[i + 4] = qs[i] >> 4 & 0x0f0f0f0fu;
    }
}

DEVICE int nibble_at(const u8* qs, int i) { return qs[i & 15] >> (i & 16) / 4 & 15; }

// The sixteen values of a table, four to a word.
struct Iq4Table {
    static constexpr u32 A = 0xbfad9881u, B = 0xf6eaddcfu, C = 0x26190d01u, D = 0x71594535u;
};
struct Mxfp4Table {
    static constexpr u32 A = 0x03020100u, B = 0x0c080604u, C = 0xfdfeff00u, D = 0xf4f8fafcu;
};

// Value of code `i`.
template <class Table>
DEVICE int table_at(int i) {
    const u32 word = i < 8 ? (i < 4 ? Table::A : Table::B) : (i < 12 ? Table::C : Table::D);
    return signed_byte_of(word, i & 3);
}

// The values of the nibbles of 16 bytes, in the order of `split_nibbles`.
// A byte pick looks four nibbles up in eight values; bit 3 chooses between the
// two halves of the table, again by a pick.
template <class Table>
DEVICE void look_nibbles_up(const u32 (&qs)[4], u32 (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 index = qs[i] & 0x77777777u;
        const u32 half = (qs[i] >> 1 & 0x44444444u) | 0x32103210u;
        // Elements 0, 16, 1, 17 and 2, 18, 3, 19 of this word.
        const u32 a = pick_bytes(pick_bytes(Table::A, Table::B, index),
                                 pick_bytes(Table::C, Table::D, index), half);
        const u32 b = pick_bytes(pick_bytes(Table::A, Table::B, index >> 16),
                                 pick_bytes(Table::C, Table::D, index >> 16), half >> 16);
        out[i] = pick_bytes(a, b, 0x6420);
        out[i + 4] = pick_bytes(a, b, 0x7531);
    }
}

// The reader of a format whose runs have no words in common.
template <class F>
struct RunReader {
    const u8* block;
    DEVICE explicit RunReader(const u8* block) : block(block) {}
    DEVICE void load(int) {}
    DEVICE void codes(int r, u32 (&out)[8]) const { F::run(block, r, out); }
};

// Run `r` by the reader of a format whose runs have.
template <class F>
DEVICE void run_by_reader(const u8* block, int r, u32 (&out)[8]) {
    typename F::Reader reader(block);
    reader.load(r);
    reader.codes(r, out);
}

// ------------------------------------------------------------ blocks of 32

// The head of a block without sub-blocks.
struct PlainHead {
    float d, min;
};

struct PlainBlocks {
    static constexpr int LEN = 32, SUB = 32, SHARE = 1;
    typedef PlainHead Head;
    DEVICE static int scale(const Head&, int) { return 1; }
    DEVICE static int min(const Head&, int) { return 1; }
    DEVICE static int scale_at(const u8*, int) { return 1; }
    DEVICE static int min_at(const u8*, int) { return 1; }
};

struct Q8_0 : PlainBlocks {
    typedef RunReader<Q8_0> Reader;
    static constexpr int BYTES = 34, ALIGN = 2, OFFSET = 0, MINIMUM = NO_MINIMUM;
    DEVICE static Head head(const u8* block) { return {f16_at(block), 0.0f}; }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) { load_words<2>(block + 2, out); }
    DEVICE static int code(const u8* block, int i) { return static_cast<i8>(block[2 + i]); }
};

struct Q4_0 : PlainBlocks {
    typedef RunReader<Q4_0> Reader;
    static constexpr int BYTES = 18, ALIGN = 2, OFFSET = 8, MINIMUM = NO_MINIMUM;
    DEVICE static Head head(const u8* block) { return {f16_at(block), 0.0f}; }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) {
        u32 qs[4];
        load_words<2>(block + 2, qs);
        split_nibbles(qs, out);
    }
    DEVICE static int code(const u8* block, int i) { return nibble_at(block + 2, i); }
};

struct Q4_1 : PlainBlocks {
    typedef RunReader<Q4_1> Reader;
    static constexpr int BYTES = 20, ALIGN = 4, OFFSET = 0, MINIMUM = MINIMUM_ADDED;
    DEVICE static Head head(const u8* block) { return {f16_at(block), f16_at(block + 2)}; }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) {
        u32 qs[4];
        load_words<4>(block + 4, qs);
        split_nibbles(qs, out);
    }
    DEVICE static int code(const u8* block, int i) { return nibble_at(block + 4, i); }
};

// Bit i of `high` is bit 4 of element i.
DEVICE void add_fifth_bits(u32 high, u32 (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] |= spread_to_bit_4(high >> 4 * i & 15);
}

struct Q5_0 : PlainBlocks {
    typedef RunReader<Q5_0> Reader;
    static constexpr int BYTES = 22, ALIGN = 2, OFFSET = 16, MINIMUM = NO_MINIMUM;
    DEVICE static Head head(const u8* block) { return {f16_at(block), 0.0f}; }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) {
        u32 fields[5];
        load_words<2>(block + 2, fields);
        const u32 qs[4] = {fields[1], fields[2], fields[3], fields[4]};
        split_nibbles(qs, out);
        add_fifth_bits(fields[0], out);
    }
    DEVICE static int code(const u8* block, int i) {
        return nibble_at(block + 6, i) | (block[2 + i / 8] >> (i & 7) & 1) << 4;
    }
};

struct Q5_1 : PlainBlocks {
    typedef RunReader<Q5_1> Reader;
    static constexpr int BYTES = 24, ALIGN = 8, OFFSET = 0, MINIMUM = MINIMUM_ADDED;
    DEVICE static Head head(const u8* block) { return {f16_at(block), f16_at(block + 2)}; }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) {
        u32 high[1], qs[4];
        load_words<4>(block + 4, high);
        load_words<8>(block + 8, qs);
        split_nibbles(qs, out);
        add_fifth_bits(high[0], out);
    }
    DEVICE static int code(const u8* block, int i) {
        return nibble_at(block + 8, i) | (block[4 + i / 8] >> (i & 7) & 1) << 4;
    }
};

struct IQ4_NL : PlainBlocks {
    typedef RunReader<IQ4_NL> Reader;
    static constexpr int BYTES = 18, ALIGN = 2, OFFSET = 0, MINIMUM = NO_MINIMUM;
    DEVICE static Head head(const u8* block) { return {f16_at(block), 0.0f}; }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) {
        u32 qs[4];
        load_words<2>(block + 2, qs);
        look_nibbles_up<Iq4Table>(qs, out);
    }
    DEVICE static int code(const u8* block, int i) {
        return table_at<Iq4Table>(nibble_at(block + 2, i));
    }
};

struct MXFP4 : PlainBlocks {
    typedef RunReader<MXFP4> Reader;
    static constexpr int BYTES = 17, ALIGN = 1, OFFSET = 0, MINIMUM = NO_MINIMUM;
    // 2^(e - 128): the table is doubled. Subnormal for e < 2.
    DEVICE static Head head(const u8* block) {
        const u32 e = block[0];
        return {float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0.0f};
    }
    DEVICE static void run(const u8* block, int, u32 (&out)[8]) {
        u32 qs[4];
        load_words<1>(block + 1, qs);
        look_nibbles_up<Mxfp4Table>(qs, out);
    }
    DEVICE static int code(const u8* block, int i) {
        return table_at<Mxfp4Table>(nibble_at(block + 1, i));
    }
};

// ----------------------------------------------------------- blocks of 256

// Two low bits of a run from the 32 bytes that four runs share (Q2_K, Q3_K).
DEVICE void two_bits(const u32 (&qs)[8], int r, u32 (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = qs[i] >> 2 * (r & 3) & 0x03030303u;
}
DEVICE int two_bits_at(const u8* qs, int i) {
    return qs[i / 128 * 32 + (i & 31)] >> 2 * (i / 32 & 3) & 3;
}

struct Q2_K {
    static constexpr int LEN = 256, BYTES = 84, ALIGN = 4, SUB = 16, OFFSET = 0, SHARE = 4;
    static constexpr int MINIMUM = MINIMUM_SUBTRACTED;
    struct Head {
        float d, min;
        u32 both[4];
    };
    DEVICE static Head head(const u8* block) {
        Head head = {f16_at(block + 80), f16_at(block + 82), {}};
        load_words<4>(block, head.both);
        return head;
    }
    DEVICE static int scale(const Head& head, int j) { return byte_of(head.both[j / 4], j & 3) & 15; }
    DEVICE static int min(const Head& head, int j) { return byte_of(head.both[j / 4], j & 3) >> 4; }
    DEVICE static int scale_at(const u8* block, int j) { return block[j] & 15; }
    DEVICE static int min_at(const u8* block, int j) { return block[j] >> 4; }
    struct Reader {
        const u8* block;
        u32 qs[8];
        DEVICE explicit Reader(const u8* block) : block(block) {}
        DEVICE void load(int r) { load_words<4>(block + 16 + 32 * (r / 4), qs); }
        DEVICE void codes(int r, u32 (&out)[8]) const { two_bits(qs, r, out); }
    };
    DEVICE static void run(const u8* block, int r, u32 (&out)[8]) {
        run_by_reader<Q2_K>(block, r, out);
    }
    DEVICE static int code(const u8* block, int i) { return two_bits_at(block + 16, i); }
};

struct Q3_K {
    static constexpr int LEN = 256, BYTES = 110, ALIGN = 2, SUB = 16, OFFSET = 4, SHARE = 4;
    static constexpr int MINIMUM = NO_MINIMUM;
    struct Head {
        float d, min;
        u32 scales[4];
    };
    DEVICE static Head head(const u8* block) {
        u32 p[3];
        load_words<2>(block + 96, p);
        return {f16_at(block + 108),
                0.0f,
                {(p[0] & 0x0f0f0f0fu) | (p[2] << 4 & 0x30303030u),
                 (p[1] & 0x0f0f0f0fu) | (p[2] << 2 & 0x30303030u),
                 (p[0] >> 4 & 0x0f0f0f0fu) | (p[2] & 0x30303030u),
                 (p[1] >> 4 & 0x0f0f0f0fu) | (p[2] >> 2 & 0x30303030u)}};
    }
    DEVICE static int scale(const Head& head, int j) {
        return byte_of(head.scales[j / 4], j & 3) - 32;
    }
    DEVICE static int min(const Head&, int) { return 0; }
    DEVICE static int scale_at(const u8* block, int j) {
        const int low = block[96 + (j & 7)] >> j / 8 * 4 & 15;
        return (low | (block[104 + (j & 3)] >> j / 4 * 2 & 3) << 4) - 32;
    }
    DEVICE static int min_at(const u8*, int) { return 0; }
    struct Reader {
        const u8* block;
        u32 qs[8], high[8];
        DEVICE explicit Reader(const u8* block) : block(block) { load_words<2>(block, high); }
        DEVICE void load(int r) { load_words<2>(block + 32 + 32 * (r / 4), qs); }
        DEVICE void codes(int r, u32 (&out)[8]) const {
            two_bits(qs, r, out);
#pragma unroll
            for (int i = 0; i < 8; i++) out[i] |= (high[i] >> r & 0x01010101u) << 2;
        }
    };
    DEVICE static void run(const u8* block, int r, u32 (&out)[8]) {
        run_by_reader<Q3_K>(block, r, out);
    }
    DEVICE static int code(const u8* block, int i) {
        return two_bits_at(block + 32, i) | (block[i & 31] >> i / 32 & 1) << 2;
    }
};

// Scales and minimums of Q4_K and Q5_K, six bits each in 12 bytes.
struct SixBitHead {
    float d, min;
    u32 scales[2], mins[2];
};

struct SixBitScales {
    static constexpr int LEN = 256, ALIGN = 16, SUB = 32, OFFSET = 0, SHARE = 2;
    static constexpr int MINIMUM = MINIMUM_SUBTRACTED;
    typedef SixBitHead Head;
    DEVICE static Head head(const u8* block) {
        u32 p[4];
        load_words<16>(block, p);
        return {f16_to_f32(static_cast<u16>(p[0])),
                f16_to_f32(static_cast<u16>(p[0] >> 16)),
                {p[1] & 0x3f3f3f3fu, (p[3] & 0x0f0f0f0fu) | (p[1] >> 2 & 0x30303030u)},
                {p[2] & 0x3f3f3f3fu, (p[3] >> 4 & 0x0f0f0f0fu) | (p[2] >> 2 & 0x30303030u)}};
    }
    DEVICE static int scale(const Head& head, int j) { return byte_of(head.scales[j / 4], j & 3); }
    DEVICE static int min(const Head& head, int j) { return byte_of(head.mins[j / 4], j & 3); }
    DEVICE static int scale_at(const u8* block, int j) {
        const u8* p = block + 4;
        return j < 4 ? p[j] & 63 : (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
    }
    DEVICE static int min_at(const u8* block, int j) {
        const u8* p = block + 4;
        return j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | p[j] >> 6 << 4;
    }
};

struct Q4_K : SixBitScales {
    static constexpr int BYTES = 144;
    struct Reader {
        const u8* block;
        u32 qs[8];
        DEVICE explicit Reader(const u8* block) : block(block) {}
        DEVICE void load(int r) { load_words<16>(block + 16 + 32 * (r / 2), qs); }
        DEVICE void codes(int r, u32 (&out)[8]) const {
#pragma unroll
            for (int i = 0; i < 8; i++) out[i] = qs[i] >> 4 * (r & 1) & 0x0f0f0f0fu;
        }
    };
    DEVICE static void run(const u8* block, int r, u32 (&out)[8]) {
        run_by_reader<Q4_K>(block, r, out);
    }
    DEVICE static int code(const u8* block, int i) {
        return block[16 + i / 64 * 32 + (i & 31)] >> 4 * (i / 32 & 1) & 15;
    }
};

struct Q5_K : SixBitScales {
    static constexpr int BYTES = 176;
    struct Reader {
        const u8* block;
        u32 qs[8], high[8];
        DEVICE explicit Reader(const u8* block) : block(block) { load_words<16>(block + 16, high); }
        DEVICE void load(int r) { load_words<16>(block + 48 + 32 * (r / 2), qs); }
        DEVICE void codes(int r, u32 (&out)[8]) const {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                out[i] = (qs[i] >> 4 * (r & 1) & 0x0f0f0f0fu) | (high[i] >> r & 0x01010101u) << 4;
            }
        }
    };
    DEVICE static void run(const u8* block, int r, u32 (&out)[8]) {
        run_by_reader<Q5_K>(block, r, out);
    }
    DEVICE static int code(const u8* block, int i) {
        return (block[48 + i / 64 * 32 + (i & 31)] >> 4 * (i / 32 & 1) & 15) |
               (block[16 + (i & 31)] >> i / 32 & 1) << 4;
    }
};

struct Q6_K {
    static constexpr int LEN = 256, BYTES = 210, ALIGN = 2, SUB = 16, OFFSET = 32, SHARE = 4;
    static constexpr int MINIMUM = NO_MINIMUM;
    struct Head {
        float d, min;
        u32 scales[4];
    };
    DEVICE static Head head(const u8* block) {
        Head head = {f16_at(block + 208), 0.0f, {}};
        load_words<2>(block + 192, head.scales);
        return head;
    }
    DEVICE static int scale(const Head& head, int j) {
        return signed_byte_of(head.scales[j / 4], j & 3);
    }
    DEVICE static int min(const Head&, int) { return 0; }
    DEVICE static int scale_at(const u8* block, int j) { return static_cast<i8>(block[192 + j]); }
    DEVICE static int min_at(const u8*, int) { return 0; }
    struct Reader {
        const u8* block;
        u32 low[2][8], high[8];  // of runs 0, 2 and 1, 3 of four; of all four
        DEVICE explicit Reader(const u8* block) : block(block) {}
        DEVICE void load(int r) {
            load_words<2>(block + 64 * (r / 4), low[0]);
            load_words<2>(block + 64 * (r / 4) + 32, low[1]);
            load_words<2>(block + 128 + 32 * (r / 4), high);
        }
        DEVICE void codes(int r, u32 (&out)[8]) const {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 qs = r & 1 ? low[1][i] : low[0][i];
                out[i] = (qs >> 4 * (r / 2 & 1) & 0x0f0f0f0fu) |
                         (high[i] >> 2 * (r & 3) & 0x03030303u) << 4;
            }
        }
    };
    DEVICE static void run(const u8* block, int r, u32 (&out)[8]) {
        run_by_reader<Q6_K>(block, r, out);
    }
    DEVICE static int code(const u8* block, int i) {
        const int half = i / 128, nibble = i / 64 & 1, part = i / 32 & 1, l = i & 31;
        return (block[64 * half + 32 * part + l] >> 4 * nibble & 15) |
               (block[128 + 32 * half + l] >> 2 * (i / 32 & 3) & 3) << 4;
    }
};

struct IQ4_XS {
    typedef RunReader<IQ4_XS> Reader;
    static constexpr int LEN = 256, BYTES = 136, ALIGN = 8, SUB = 32, OFFSET = 0, SHARE = 1;
    static constexpr int MINIMUM = NO_MINIMUM;
    struct Head {
        float d, min;
        u32 low, high;
    };
    DEVICE static Head head(const u8* block) {
        u32 p[2];
        load_words<8>(block, p);
        return {f16_to_f32(static_cast<u16>(p[0])), 0.0f, p[1], p[0] >> 16};
    }
    DEVICE static int scale(const Head& head, int j) {
        return static_cast<int>((head.low >> 4 * j & 15) | (head.high >> 2 * j & 3) << 4) - 32;
    }
    DEVICE static int min(const Head&, int) { return 0; }
    DEVICE static int scale_at(const u8* block, int j) { return scale(head(block), j); }
    DEVICE static int min_at(const u8*, int) { return 0; }
    DEVICE static void run(const u8* block, int r, u32 (&out)[8]) {
        u32 qs[4];
        load_words<8>(block + 8 + 16 * r, qs);
        look_nibbles_up<Iq4Table>(qs, out);
    }
    DEVICE static int code(const u8* block, int i) {
        return table_at<Iq4Table>(nibble_at(block + 8 + i / 32 * 16, i & 31));
    }
};

// ------------------------------------------------------------ float formats

// LEN 1; `load_8` gives eight elements from a 16-byte boundary.
struct F32 {
    static constexpr int LEN = 1, BYTES = 4;
    DEVICE static float at(const u8* p) { return float_of(*reinterpret_cast<const u32*>(p)); }
    DEVICE static void load_8(const u8* p, float (&out)[8]) {
        u32 words[8];
        load_words<16>(p, words);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = float_of(words[i]);
    }
};

struct F16 {
    static constexpr int LEN = 1, BYTES = 2;
    DEVICE static float at(const u8* p) { return f16_at(p); }
    DEVICE static void load_8(const u8* p, float (&out)[8]) {
        u32 words[4];
        load_words<16>(p, words);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[2 * i] = f16_to_f32(static_cast<u16>(words[i]));
            out[2 * i + 1] = f16_to_f32(static_cast<u16>(words[i] >> 16));
        }
    }
};

struct BF16 {
    static constexpr int LEN = 1, BYTES = 2;
    DEVICE static float at(const u8* p) { return bf16_to_f32(load_u16(p)); }
    DEVICE static void load_8(const u8* p, float (&out)[8]) {
        u32 words[4];
        load_words<16>(p, words);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[2 * i] = float_of(words[i] << 16);
            out[2 * i + 1] = float_of(words[i] & 0xffff0000u);
        }
    }
};

// --------------------------------------------------- what all of them share

// One element as kernels/src/dequant.rs defines it: the scale of the sub-block
// first, then the code, then the minimum, each rounded. `block` holds it.
template <class F>
DEVICE float element(const u8* block, int i) {
    if constexpr (F::LEN == 1) {
        return F::at(block);
    } else {
        const typename F::Head head = F::head(block);
        const int scale = F::scale_at(block, i / F::SUB), min = F::min_at(block, i / F::SUB);
        const float value =
            head.d * static_cast<float>(scale) * static_cast<float>(F::code(block, i) - F::OFFSET);
        if constexpr (F::MINIMUM == NO_MINIMUM) return value;
        const float offset = head.min * static_cast<float>(min);
        return F::MINIMUM == MINIMUM_ADDED ? value + offset : value - offset;
    }
}

// Integers that go beside the codes of a block's activations, one per
// sub-block, for formats with minimums or an offset.
template <class F>
DEVICE constexpr bool wants_starts() {
    return F::MINIMUM != NO_MINIMUM || F::OFFSET != 0;
}

// What they are: the sum of the codes where a minimum multiplies it, else
// where the sub-block's dot product starts so that its offset is subtracted.
template <class F>
DEVICE int start_of(int sum) {
    return F::MINIMUM != NO_MINIMUM ? sum : -F::OFFSET * sum;
}

// `lane` after a block: `q` its LEN activation codes (16-byte aligned),
// `starts` its LEN / SUB integers, `scale` that of its activations.
template <class F>
DEVICE float accumulate(const u8* block, const u8* q, const int* starts, float scale, float lane) {
    constexpr int SUBS = F::LEN / F::SUB;
    const typename F::Head head = F::head(block);
    u32 start[SUBS];
    if constexpr (wants_starts<F>() && SUBS == 1) start[0] = static_cast<u32>(starts[0]);
    if constexpr (wants_starts<F>() && SUBS > 1) {
        load_words<16>(reinterpret_cast<const u8*>(starts), start);
    }
    int s = 0, t = 0;
    typename F::Reader reader(block);
#pragma unroll
    for (int r = 0; r < F::LEN / 32; r++) {
        u32 w[8], x[8];
        if (r % F::SHARE == 0) reader.load(r);
        reader.codes(r, w);
        load_words<16>(q + 32 * r, x);
        constexpr int WORDS = F::SUB / 4;
#pragma unroll
        for (int half = 0; half < 8 / WORDS; half++) {
            const int j = r * (8 / WORDS) + half;
            int dot = 0;
            if constexpr (F::OFFSET != 0) dot = static_cast<int>(start[j]);
#pragma unroll
            for (int i = half * WORDS; i < (half + 1) * WORDS; i++) {
                dot = __dp4a(static_cast<int>(w[i]), static_cast<int>(x[i]), dot);
            }
            s += SUBS == 1 ? dot : F::scale(head, j) * dot;
            if constexpr (F::MINIMUM != NO_MINIMUM) {
                t += SUBS == 1 ? static_cast<int>(start[j])
                               : F::min(head, j) * static_cast<int>(start[j]);
            }
        }
    }
    lane = fma_rn(head.d * scale, static_cast<float>(s), lane);
    if constexpr (F::MINIMUM == MINIMUM_ADDED) {
        lane = fma_rn(head.min * scale, static_cast<float>(t), lane);
    }
    if constexpr (F::MINIMUM == MINIMUM_SUBTRACTED) {
        lane = fma_rn(-(head.min * scale), static_cast<float>(t), lane);
    }
    return lane;
}

// Calls X(name, struct) for each; `name` is the suffix of kernels' names.
#define FOR_EACH_QUANTISED(X)                                                             \
    X(q8_0, Q8_0) X(q4_0, Q4_0) X(q4_1, Q4_1) X(q5_0, Q5_0) X(q5_1, Q5_1) X(q2_k, Q2_K)   \
    X(q3_k, Q3_K) X(q4_k, Q4_K) X(q5_k, Q5_K) X(q6_k, Q6_K) X(iq4_nl, IQ4_NL)             \
    X(iq4_xs, IQ4_XS) X(mxfp4, MXFP4)
#define FOR_EACH_FLOAT(X) X(f32, F32) X(f16, F16) X(bf16, BF16)
