// Kernels with a fault each, which the stand-in must find, and their right
// twins, which it must not. `fault` is 0 for the twin.

// out [n] = in reversed, one block of n <= 256 threads. Fault: no barrier.
extern "C" __global__ void standin_reverse(int* out, const int* in, int n, int fault) {
  SHARED(int, row, 256);
  const int i = threadIdx.x;
  row[i] = in[i];
  if (!fault) __syncthreads();
  out[i] = row[n - 1 - i];
}

// Each lane writes its word and reads its neighbour's; one warp. Mode 0: with
// __syncwarp between; 1: with nothing; 2: with a shuffle, which orders nothing.
extern "C" __global__ void standin_neighbours(int* out, int mode) {
  SHARED(int, row, 32);
  const int lane = threadIdx.x;
  row[lane] = lane;
  int other = 0;
  if (mode == 0) __syncwarp();
  if (mode == 2) other = __shfl_xor_sync(0xffffffffu, lane, 1);
  out[lane] = row[(lane + 1) & 31] + 0 * other;
}

// Rounds of a ring of two buffers. Fault: one barrier a round, so that a fast
// thread writes what a slow one still reads.
extern "C" __global__ void standin_rounds(int* out, int rounds, int fault) {
  DYNAMIC_SHARED(int, row);
  const int i = threadIdx.x, n = blockDim.x;
  int sum = 0;
  for (int round = 0; round < rounds; round++) {
    row[i] = i + round;
    __syncthreads();
    sum += row[(i + 1) % n];
    if (!fault) __syncthreads();
  }
  out[i] = sum;
}

// out [32] = in [at .. at + 32]
extern "C" __global__ void standin_read(float* out, const float* in, int at) {
  out[threadIdx.x] = in[at + (int)threadIdx.x];
}

// Writes a word at byte `at` of an array of 64 bytes and of the dynamic part:
// through the array's name, through a pointer, and in dynamic memory.
extern "C" __global__ void standin_shared_bounds(int* out, int at, int how) {
  SHARED(int, row, 16);
  DYNAMIC_SHARED(int, rest);
  if (how == 0) row[at / 4] = 1;
  int* p = row;
  if (how == 1) p[at / 4] = 1;
  if (how == 2) rest[at / 4] = 1;
  out[0] = 1;
}

// A barrier that only `limit` threads reach; the others have ended, or wait at
// another one, or wait for their warp.
extern "C" __global__ void standin_barriers(int* out, int limit, int how) {
  const int i = threadIdx.x;
  if (how == 0) {
    if (i >= limit) return;
    __syncthreads();
  } else if (how == 1) {
    if (i < limit) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (how == 2) {
    if (i < limit) {
      __syncthreads();
    } else {
      __shfl_xor_sync(0xffffffffu, i, 1);
    }
  } else if (how == 3) {
    if (i < limit) __shfl_xor_sync(0xffffffffu, i, 1);
  } else if (how == 4) {
    __shfl_xor_sync(0xffffu, i, 1);
  }
  out[i] = i;
}

// out [0] = the word at `in + at` bytes.
extern "C" __global__ void standin_word_at(unsigned* out, const unsigned char* in, int at) {
  out[0] = *reinterpret_cast<const unsigned*>(in + at);
}
extern "C" __global__ void standin_vector_at(unsigned* out, const unsigned char* in, int at) {
  const uint4 v = load_16(in + at);
  out[0] = v.x + v.y + v.z + v.w;
}

// Doubles 16 bytes a thread through shared memory. Fault 1: no wait before the
// own bytes are read; 2: a neighbour's are read without a barrier; 3: ends with
// copies in flight; 4: a group too few is waited for; 5: the target is still
// being read by a neighbour when the copy starts.
extern "C" __global__ void standin_copies(float* out, const float* in, int fault) {
  SHARED(float4, row, 64);
  const int i = threadIdx.x, n = blockDim.x;
  if (fault == 5) {
    row[i] = make_float4(0, 0, 0, 0);
    __syncthreads();
    out[0] = row[(i + 1) % n].x;
  }
  cp_async_16(&row[i], in + 4 * i);
  cp_async_commit();
  if (fault == 4) cp_async_wait<1>();
  if (fault == 3) return;
  if (fault != 1 && fault != 4) cp_async_wait<0>();
  if (fault != 2) __syncthreads();
  const float4 v = row[fault == 1 || fault == 4 ? i : (i + 1) % n];
  float* to = out + 4 * i;
  to[0] = 2 * v.x, to[1] = 2 * v.y, to[2] = 2 * v.z, to[3] = 2 * v.w;
}

// Wide shifts and casts that a device and a CPU answer differently.
extern "C" __global__ void standin_undefined(int* out, int by, float x) {
  out[0] = 1 << by;
  out[1] = (int)x;
}

// out [n] through device memory that another thread has written. Mode 0: in the
// block, behind a barrier; 1: without one; 2: of the block before, without
// order; 3: the same by a counter, as the last block to come does; 4: all
// threads write one word, the same; 5: not the same; 6: as 3, by atomicInc; 7:
// with the fence before the barrier.
extern "C" __global__ void standin_global(unsigned* out, unsigned* scratch, unsigned* count, int mode) {
  SHARED(unsigned, last, 1);
  const unsigned i = threadIdx.x, n = blockDim.x, block = blockIdx.x, blocks = gridDim.x;
  if (mode == 4 || mode == 5) {
    scratch[0] = mode == 4 ? 7 : i;
    return;
  }
  scratch[block * n + i] = i;
  if (mode == 7) __threadfence();
  if (mode != 1) __syncthreads();
  if (mode <= 1) {
    out[block * n + i] = scratch[block * n + (i + 1) % n];
    return;
  }
  if (mode == 2) {
    out[block * n + i] = scratch[(block + 1) % blocks * n + i];
    return;
  }
  if (mode != 7) __threadfence();
  if (i == 0) last[0] = mode == 3 ? atomicAdd(count, 1u) : atomicInc(count, blocks - 1);
  __syncthreads();
  if (last[0] != blocks - 1) return;
  unsigned sum = 0;
  for (unsigned b = 0; b < blocks; b++) sum += scratch[b * n + i];
  out[i] = sum;
}

// All threads read a word that the last one then writes. Fault: no barrier.
extern "C" __global__ void standin_readers(int* out, int fault) {
  SHARED(int, word, 1);
  const int i = threadIdx.x, last = blockDim.x - 1;
  if (i == 0) word[0] = 5;
  __syncthreads();
  const int seen = word[0];
  if (!fault) __syncthreads();
  if (i == last) word[0] = seen + 1;
  out[i] = seen;
}
