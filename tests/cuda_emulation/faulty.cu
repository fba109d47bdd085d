// Kernels with one mistake each, to prove that the emulation notices, and a sound one, to prove that it does not cry
// wolf.
#include "cuda/launch.h"
#include "request.h"

namespace {

constexpr int kThreads = 64;

// out[block] = sum of the block's 64 inputs, twice over, so that the shared array is written a second time.
template <bool BarrierAfterWrite, bool BarrierAfterRead>
__global__ void block_sum(const float* in, float* out) {
  __shared__ float values[kThreads];
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x] * float(round + 1);
    if (BarrierAfterWrite) __syncthreads();
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += values[i];
    total += sum;
    if (BarrierAfterRead) __syncthreads();
  }
  if (threadIdx.x == 5) out[blockIdx.x] = total;
}

__global__ void warp_sum(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float value = in[i];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  const float first = __shfl_sync(0xffffffffu, value, 0);
  const float other = __shfl_xor_sync(0xffffffffu, first, 1);
  const unsigned votes = __ballot_sync(0xffffffffu, first == other);
  if (threadIdx.x % 32 == 0 && votes == 0xffffffffu) atomicAdd(out + blockIdx.x, first);
}

// out[block] = three times the sum of the block's 64 inputs: of each warp, then of both, twice over.
template <bool BarrierAfterRead>
__global__ void sum_of_warps(const float* in, float* out) {
  __shared__ float warps[2];
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    float value = in[blockIdx.x * kThreads + threadIdx.x] * float(round + 1);
    for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
    if (BarrierAfterRead) __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    total += warps[0] + warps[1];
  }
  if (threadIdx.x == 5) out[blockIdx.x] = total;
}

__global__ void read_past_the_end(const float* in, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = in[gridDim.x * kThreads];
}

__global__ void write_past_shared(const float* in, float* out) {
  __shared__ float values[kThreads];
  float* next = values + 1;
  next[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = values[1];
}

__global__ void misaligned_vector(const float* in, float* out) {
  if (threadIdx.x == 0) reinterpret_cast<uint4*>(out)[0] = reinterpret_cast<const uint4*>(in + 1)[0];
}

__global__ void barrier_left_behind(const float* in, float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[blockIdx.x] = in[0];
}

__global__ void barrier_in_branches(const float* in, float* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x] = in[0];
}

__global__ void shuffle_without_a_lane(const float* in, float* out) {
  if (threadIdx.x == 3) return;
  out[blockIdx.x] = __shfl_down_sync(0xffffffffu, in[0], 1);
}

}  // namespace

int main(int, char** argv) {
  return emulation::serve(argv, [](emulation::Call& call) {
    const float* in = call.pointer<float>();
    float* out = call.pointer<float>();
    const std::int64_t blocks = call.integer();
    const auto launch = [&](auto kernel) {
      return pyface::cuda::launch(kernel, blocks, kThreads, call.stream(), in, out);
    };
    switch (call.op()) {
      case 0: return launch(block_sum<true, true>);
      case 1: return launch(block_sum<false, true>);
      case 2: return launch(block_sum<true, false>);
      case 3: return launch(warp_sum);
      case 4: return launch(read_past_the_end);
      case 5: return launch(write_past_shared);
      case 6: return launch(misaligned_vector);
      case 7: return launch(barrier_left_behind);
      case 8: return launch(barrier_in_branches);
      case 9: return launch(shuffle_without_a_lane);
      case 10: return pyface::cuda::launch(warp_sum, blocks, kThreads, nullptr, in, out);
      case 11: return launch(sum_of_warps<true>);
      case 12: return launch(sum_of_warps<false>);
      default: return pyface::cuda::launch(warp_sum, blocks, 2048, call.stream(), in, out);
    }
  });
}
