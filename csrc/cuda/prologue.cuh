// The small kernels before and after the row kernels, and the one that scales a stored gradient.
#pragma once
#include "row.cuh"

namespace cbloss {

constexpr int BLOCK = 1024;

// The block's part of the denominator: the sum of r_i (total) or the number of rows not ignored.
template <class S>
__global__ void __launch_bounds__(BLOCK)
    prologue(TypedCall<S> a, Compute<S>* parts, int share, bool total) {
  using T = Compute<S>;
  const int begin = blockIdx.x * share, end = ::min(begin + share, a.rows);
  T sum = 0;
  for (int i = begin + threadIdx.x; i < end; i += BLOCK) {
    const int64_t y = a.target[i];
    if (a.ignore && y == a.ignored) continue;
    T r = 1;
    if (total && a.weight && y >= 0 && y < a.C) r = a.weight[y];
    if (total && a.sample_weight) r *= a.sample_weight[i];
    sum += r;
  }
  sum = sum_block<BLOCK>(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// loss[i] = the sum of `count` losses, in a fixed order.
template <class T>
__global__ void __launch_bounds__(BLOCK) epilogue(const T* losses, T* loss, int count) {
  losses += int64_t(blockIdx.x) * count;
  T sum = 0;
  for (int j = threadIdx.x; j < count; j += BLOCK) sum += losses[j];
  sum = sum_block<BLOCK>(sum);
  if (threadIdx.x == 0) loss[blockIdx.x] = sum;
}

// g *= *factor; where that is 1, every thread returns at once.
template <class S>
__global__ void __launch_bounds__(BLOCK)
    multiply_gradient(S* g, const Compute<S>* factor, int64_t numel) {
  using T = Compute<S>;
  constexpr int N = Vec<S>::N;
  const T f = *factor;
  if (f == 1) return;
  const int64_t head = ::min(numel, int64_t(-(reinterpret_cast<uintptr_t>(g) / sizeof(S)) % N));
  const int64_t whole = (numel - head) / N, tail = numel - head - whole * N;
  const int64_t thread = int64_t(blockIdx.x) * BLOCK + threadIdx.x;
  uint4* vectors = reinterpret_cast<uint4*>(g + head);
  for (int64_t v = thread; v < whole; v += int64_t(gridDim.x) * BLOCK) {
    Vec<S> z{vectors[v]};
#pragma unroll
    for (int j = 0; j < N; j += 2) z.set(j, z[j] * f, z[j + 1] * f);
    vectors[v] = z.words;
  }
  if (thread < head) g[thread] = S(T(g[thread]) * f);
  if (thread < tail) g[head + whole * N + thread] = S(T(g[head + whole * N + thread]) * f);
}

}  // namespace cbloss
