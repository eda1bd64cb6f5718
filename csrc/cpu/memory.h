// What the kernels tell the memory: which lines will be read. Included by kernels.h in the
// namespace of its instruction set.

// Ahead of a stream of loads in bytes. The hardware's own prefetching ends where a page of 4 KiB
// does; a line takes some 100 ns to come, in which a core reads 1 to 2 KiB.
constexpr int64_t AHEAD = 2048;
// Rows up to so many bytes are fetched while the row before is computed on: with that row and its
// gradient they fit into the smallest second-level caches.
constexpr int64_t NEXT_ROW = 1 << 16;

// Elements of a cache line.
template <class S>
constexpr int64_t LINE = 64 / sizeof(S);

// Any address will do: none faults.
CB_FN void prefetch(const void* p) { __builtin_prefetch(p); }
template <class S>
CB_FN const S* offset_by(const S* p, int64_t bytes) {
  return reinterpret_cast<const S*>(reinterpret_cast<uintptr_t>(p) + bytes);
}
template <class S>
CB_FN const S* ahead(const S* p) {
  return offset_by(p, AHEAD);
}

// Where a row of logits ends up in cache by a first pass, what the second pass should fetch.
template <class S>
CB_FN const S* next_to_fetch(const Call& a, const S* x) {
  if (a.C * int64_t(sizeof(S)) > NEXT_ROW) return ahead(x);
  return offset_by(x, row_step(a.logits_stride, a.K) * int64_t(sizeof(S)));
}
