// Kernels that wait for somebody while they run.

// Thread i waits until flags [threads] has `wanted` at i; out[i] = 1 then, or 2
// when its clock has moved by more than `patience`.
extern "C" __global__ void standin_spin(unsigned* out, const unsigned long long* flags,
                                        unsigned long long wanted, unsigned long long patience) {
  SHARED(unsigned, answers, 64);
  const int i = threadIdx.x;
  const unsigned long long start = nanoseconds();
  unsigned answer = 1;
  while (load_acquire_system(flags + i) != wanted) {
    if (nanoseconds() - start > patience) {
      answer = 2;
      break;
    }
    pause();
  }
  answers[i] = answer;
  __syncthreads();
  out[i] = answers[i];
}

// Each thread but the last waits for the next one's word, and then stores its
// own: nobody outside is needed. words [threads] are 0 before.
extern "C" __global__ void standin_relay(unsigned long long* words) {
  const int i = threadIdx.x, last = blockDim.x - 1;
  while (i < last && load_acquire_system(words + i + 1) == 0) pause();
  store_release_system(words + i, (unsigned long long)(last - i + 1));
}
