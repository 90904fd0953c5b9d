// What the stand-in must compute as a device does.
#define FULL 0xffffffffu

// A kernel made by a macro, and one with bounds from a constant.
#define ADD(type, name) \
  extern "C" __global__ void name(type* out, const type* in, type by, int n) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i < n) out[i] = in[i] + by; \
  }
ADD(float, standin_add_f32)
ADD(unsigned char, standin_add_u8)

constexpr int MOST = 2 * 32;
extern "C" __global__ void __launch_bounds__(MOST, 1) standin_bounded(int* out) { out[threadIdx.x] = 1; }

// out [8, 32]: what each lane gets of each shuffle of `3 * lane`.
extern "C" __global__ void standin_shuffles(long long* out) {
  const int lane = threadIdx.x;
  const int v = 3 * lane;
  out[lane] = __shfl_sync(FULL, v, (lane * 7 + 3) & 31);
  out[32 + lane] = __shfl_up_sync(FULL, v, 5);
  out[64 + lane] = __shfl_down_sync(FULL, v, 5);
  out[96 + lane] = __shfl_xor_sync(FULL, v, 9);
  out[128 + lane] = __shfl_down_sync(FULL, v, 3, 8);
  out[160 + lane] = __shfl_xor_sync(FULL, (long long)v << 33, 1);
  out[192 + lane] = __ballot_sync(FULL, lane % 3 == 0);
  out[224 + lane] = __any_sync(FULL, lane == 31) + 2 * __all_sync(FULL, lane >= 0);
}

// c [16, 8] += a [16, 32] b [8, 32], b by column; one warp.
extern "C" __global__ void standin_mma_s8(int* c, const signed char* a, const signed char* b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned left[4], right[2];
  for (int r = 0; r < 4; r++)
    left[r] = *reinterpret_cast<const unsigned*>(a + (g + 8 * (r & 1)) * 32 + 16 * (r >> 1) + 4 * t);
  for (int r = 0; r < 2; r++) right[r] = *reinterpret_cast<const unsigned*>(b + g * 32 + 16 * r + 4 * t);
  int sum[4];
  for (int i = 0; i < 4; i++) sum[i] = c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)];
  mma_s8(sum, left, right);
  for (int i = 0; i < 4; i++) c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = sum[i];
}

// c [16, 8] += a [16, 16] b [8, 16], f16 in f32; b by column; one warp.
extern "C" __global__ void standin_mma_f16(float* c, const unsigned short* a, const unsigned short* b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned left[4], right[2];
  for (int r = 0; r < 4; r++)
    left[r] = *reinterpret_cast<const unsigned*>(a + (g + 8 * (r & 1)) * 16 + 8 * (r >> 1) + 2 * t);
  for (int r = 0; r < 2; r++) right[r] = *reinterpret_cast<const unsigned*>(b + g * 16 + 8 * r + 2 * t);
  float sum[4] = {};
  mma_f16(sum, left, right);
  for (int i = 0; i < 4; i++) c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] += sum[i];
}

// order [n] = the threads of the grid in the order in which they came; count
// starts at 0.
extern "C" __global__ void standin_order(unsigned* order, unsigned* count) {
  order[atomicAdd(count, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// out [blocks * threads] = shared memory that nobody has written.
extern "C" __global__ void standin_unwritten(unsigned* out) {
  SHARED(unsigned, row, 64);
  out[blockIdx.x * blockDim.x + threadIdx.x] = row[threadIdx.x];
  __syncthreads();
  row[threadIdx.x] = 5;
}

// out [65536 * 2]: every f16 as f32, and back.
extern "C" __global__ void standin_halves(float* wide, unsigned short* back) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float x = f16_to_f32((unsigned short)i);
  wide[i] = x;
  back[i] = f32_to_f16(x);
}
// out [n] = in [n] rounded to f16.
extern "C" __global__ void standin_to_half(unsigned short* out, const float* in, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = f32_to_f16(in[i]);
}

// a + b * c in two roundings and in one.
extern "C" __global__ void standin_roundings(float* out, float a, float b, float c) {
  out[0] = a + b * c;
  out[1] = fma_rn(b, c, a);
}
