// The kernels for one dtype, CBLOSS_DTYPE, and which of them a call takes. Compiled once per dtype.
#include "sigmoid.cuh"
#include "softmax.cuh"
#include "prologue.cuh"
#include "tiles.cuh"

#include <algorithm>

namespace cbloss {
namespace {

using S = CBLOSS_DTYPE;
using T = Compute<S>;
constexpr int N = Vec<S>::N;
constexpr bool F64 = std::is_same_v<S, double>;  // rare: no kernels that hold a row in registers
// Up to FEW_CLASSES a row has a thread, up to SOME_CLASSES a part of a warp.
constexpr int FEW_CLASSES = IS_HALF<S> ? 128 : 56, SOME_CLASSES = 128;
constexpr int PART_OF_WARP = IS_HALF<S> ? 16 : 8;
constexpr int SMALL = 16, MEDIUM = 32, LARGE = 64;  // elements of a row in a thread's registers
constexpr int HELD = 256 * LARGE;                   // the longest row that registers hold
constexpr int SHARE = 4096, MOST_PARTS = 32;  // rows per block of a prologue; most such blocks

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

TypedCall<S> typed(const Call& c) {
  TypedCall<S> a{};
  a.logits = static_cast<const S*>(c.logits), a.grad = static_cast<S*>(c.grad);
  a.x = c.logits_stride, a.g = c.grad_stride;
  a.rows = int(c.rows), a.C = int(c.C), a.K = int(c.K);
  a.f = formula_of<T>(c.formula);
  a.bias = static_cast<const T*>(c.logit_bias), a.margin = static_cast<const T*>(c.margin);
  a.pos_weight = static_cast<const T*>(c.pos_weight);
  a.has_background = c.has_background, a.background = c.background;
  a.target = c.target, a.saved = static_cast<T*>(c.saved);
  a.weight = static_cast<const T*>(c.weight);
  a.sample_weight = static_cast<const T*>(c.sample_weight);
  a.grad_loss = static_cast<const T*>(c.grad_loss), a.grad_loss_per_row = c.grad_loss_per_row;
  a.ignore = c.ignore, a.ignored = c.ignored;
  a.denominator = 1;
  return a;
}

// How a row lies over threads.
struct Layout {
  bool aligned;          // rows of the gradient and of the logits have equal addresses modulo 16
  bool tiles;            // a thread has a whole row
  bool one_piece;        // and there is no gap between the rows
  int splits = 1, span;  // blocks per row, vectors per block
  explicit Layout(const Call& c, const Device& device) {
    const auto apart = [&](int64_t x, int64_t g, int64_t size) {
      return size > 1 && (x - g) * int64_t(sizeof(S)) % 16 != 0;
    };
    const auto x = reinterpret_cast<uintptr_t>(c.logits), g = reinterpret_cast<uintptr_t>(c.grad);
    aligned =
        !c.grad || ((x - g) % 16 == 0 && !apart(c.logits_stride.n, c.grad_stride.n, c.rows / c.K) &&
                    !apart(c.logits_stride.k, c.grad_stride.k, c.K));
    const auto packed = [&](const Strides& s) {
      return s.c == 1 && c.K == 1 && (s.n == c.C || c.rows == 1);
    };
    one_piece =
        !F64 && c.C <= FEW_CLASSES && packed(c.logits_stride) && (!c.grad || packed(c.grad_stride));
    tiles = one_piece || c.C <= (F64 || !aligned ? SOME_CLASSES : 16) || c.logits_stride.c != 1 ||
            (c.grad && c.grad_stride.c != 1);
    span = int(c.C / N) + 1;
    // Few rows that registers do not hold are split, so that there are about four blocks per
    // multiprocessor; not where another block could overwrite the target's logit before it is read.
    const bool in_place_backward = c.grad_loss && c.grad == c.logits;
    const int wanted = ceil_div(4 * device.multiprocessors, c.rows);
    if (tiles || c.C <= HELD || wanted < 3 || (in_place_backward && !c.formula.sigmoid)) return;
    const int step = 8192 / N;
    span = ceil_div(ceil_div(span, std::min(wanted, ceil_div(c.C, 8192))), step) * step;
    splits = ceil_div(c.C / N, span);
  }
};

template <class K, class... A>
cudaError_t launch_with(int shared, K kernel, dim3 grid, int threads, const Device& device,
                        A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads)), config.stream = device.stream;
  config.dynamicSmemBytes = size_t(shared);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
template <class K, class... A>
cudaError_t launch(K kernel, dim3 grid, int threads, const Device& device, A... arguments) {
  return launch_with(0, kernel, grid, threads, device, arguments...);
}

template <int THREADS, class K>
cudaError_t launch_rows(K kernel, const TypedCall<S>& a, int splits, const Device& device) {
  constexpr int TOGETHER_ = TOGETHER<THREADS>;
  const dim3 grid(unsigned(ceil_div(a.rows, TOGETHER_)), unsigned(splits));
  return launch(kernel, grid, THREADS * TOGETHER_, device, a);
}

// Kernels with a row per thread.
template <bool SHARED, class K>
cudaError_t tiles(K kernel, const TypedCall<S>& a, bool per_row, const Device& device) {
  const int bytes = SHARED ? TILE * pitch_of<S>(a.C) * int(sizeof(S)) : 0;
  return launch_with(bytes, kernel, dim3(unsigned(ceil_div(a.rows, TILE))), TILE, device, a,
                     per_row);
}

template <bool GENERAL, int THREADS, int ELEMENTS>
cudaError_t held(const TypedCall<S>& a, const Device& device) {
  return launch_rows<THREADS>(softmax_rows<S, GENERAL, THREADS, ELEMENTS / N>, a, 1, device);
}
// A row that registers do not hold is kept in shared memory for the second read, if a
// multiprocessor has room for more than one row, so that one is read while another is written.
// Otherwise the second read falls back to the L2 cache, which is fast only if few rows are read at
// a time: with as many threads per row as possible. A loss without gradient reads once.
template <bool GENERAL, int THREADS>
cudaError_t shared_rows(const TypedCall<S>& a, int bytes, const Device& device) {
  const auto kernel = softmax_long<S, GENERAL, THREADS, true>;
  // The limit is the kernel's in every thread of the process: a call's own bytes could undercut
  // what another thread launches.
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.dynamic_limit());
  if (error) return error;
  return launch_with(bytes, kernel, dim3(unsigned(a.rows)), THREADS, device, a);
}
template <bool GENERAL>
cudaError_t longer(const TypedCall<S>& a, const Device& device) {
  constexpr int FULL = GENERAL || IS_HALF<S> ? 512 : 1024;
  const int64_t bytes = int64_t(a.C) / N * 16,
                together = device.shared / (bytes + Device::RESERVED);
  const int most = device.dynamic_limit();
  if (!a.grad) return launch_rows<256>(softmax_long<S, GENERAL, 256, false>, a, 1, device);
  if constexpr (!GENERAL)
    if (bytes <= most && together >= 3) return shared_rows<GENERAL, 384>(a, int(bytes), device);
  if (bytes <= most && together >= 2) return shared_rows<GENERAL, 512>(a, int(bytes), device);
  return launch_rows<FULL>(softmax_long<S, GENERAL, FULL, false>, a, 1, device);
}

template <bool GENERAL>
cudaError_t launch_softmax(TypedCall<S> a, const Layout& layout, bool per_row,
                           const Device& device) {
  if (layout.tiles)
    return layout.one_piece ? tiles<true>(softmax_tiles<S, GENERAL, true>, a, per_row, device)
                            : tiles<false>(softmax_tiles<S, GENERAL, false>, a, per_row, device);
  if (a.grad_loss && a.C <= SOME_CLASSES)
    return launch_rows<PART_OF_WARP>(softmax_apply<S, GENERAL, true, PART_OF_WARP>, a, 1, device);
  if (a.grad_loss && a.C <= 2048)
    return launch_rows<WARP>(softmax_apply<S, GENERAL, true, WARP>, a, layout.splits, device);
  if (a.grad_loss)
    return launch_rows<256>(softmax_apply<S, GENERAL, true, 256>, a, layout.splits, device);
  if constexpr (!F64)
    if (layout.aligned && a.C <= HELD) {
      if (a.C <= SOME_CLASSES)
        return held<GENERAL, PART_OF_WARP, SOME_CLASSES / PART_OF_WARP>(a, device);
      if (a.C <= WARP * SMALL) return held<GENERAL, WARP, SMALL>(a, device);
      if (a.C <= WARP * MEDIUM) return held<GENERAL, WARP, MEDIUM>(a, device);
      if (a.C <= WARP * LARGE) return held<GENERAL, WARP, LARGE>(a, device);
      if (a.C <= 128 * MEDIUM) return held<GENERAL, 128, MEDIUM>(a, device);
      if (a.C <= 128 * LARGE) return held<GENERAL, 128, LARGE>(a, device);
      return held<GENERAL, 256, LARGE>(a, device);
    }
  if constexpr (!F64)
    if (layout.splits == 1 && a.C > HELD) return longer<GENERAL>(a, device);
  if (layout.splits == 1)
    return launch_rows<256>(softmax_long<S, GENERAL, 256, false>, a, 1, device);
  const cudaError_t error =
      launch_rows<256>(softmax_parts<S, GENERAL, 256>, a, layout.splits, device);
  if (error) return error;
  return launch_rows<256>(softmax_apply<S, GENERAL, false, 256>, a, layout.splits, device);
}

// The code that serves cases too rare for code for every gamma: float64, unaligned gradients.
constexpr Gamma coarse(Gamma g) { return g == Gamma::ZERO || g == Gamma::GENERAL ? g : Gamma::ANY; }

template <Gamma G, bool SMOOTH>
cudaError_t launch_sigmoid(const TypedCall<S>& a, const Layout& layout, bool per_row,
                           const Device& device) {
  if (layout.tiles)
    return layout.one_piece ? tiles<true>(sigmoid_tiles<S, G, SMOOTH, true>, a, per_row, device)
                            : tiles<false>(sigmoid_tiles<S, G, SMOOTH, false>, a, per_row, device);
  // With half types, 64 elements per thread need more registers, so fewer loads are in flight.
  constexpr int LONG = 128, MOST = IS_HALF<S> ? MEDIUM : LARGE;
  constexpr int ITEMS = (G == Gamma::GENERAL ? SMALL : MOST) / N;  // no spills
  if constexpr (!F64) {
    if (layout.aligned && a.C <= SOME_CLASSES)
      return launch_rows<PART_OF_WARP>(
          sigmoid_rows<S, G, SMOOTH, PART_OF_WARP, SOME_CLASSES / PART_OF_WARP / N, true>, a, 1,
          device);
    if (layout.aligned && a.C <= WARP * LARGE)
      return launch_rows<WARP>(sigmoid_rows<S, G, SMOOTH, WARP, SMALL / N, true>, a, 1, device);
    if (layout.aligned && a.C <= LONG * MEDIUM)
      return launch_rows<LONG>(sigmoid_rows<S, G, SMOOTH, LONG, SMALL / N, true>, a, 1, device);
    if (layout.aligned)
      return launch_rows<LONG>(sigmoid_rows<S, G, SMOOTH, LONG, ITEMS, true>, a, layout.splits,
                               device);
  }
  return launch_rows<LONG>(sigmoid_rows<S, coarse(G), SMOOTH, LONG, SMALL / N, false>, a,
                           layout.splits, device);
}

// What only GENERAL code has here: adjusted logits, alpha, pos_weight, gamma with label smoothing.
bool only_general(const Call& c) {
  const Formula& f = c.formula;
  return c.adjusted() || has_alpha(f) || c.pos_weight || (f.eps != 0 && f.gamma != 0);
}

template <Gamma G>
cudaError_t sigmoid(const TypedCall<S>& a, const Layout& layout, const Call& c, bool per_row,
                    const Device& device) {
  if constexpr (G == Gamma::ZERO || G == Gamma::GENERAL)  // see only_general
    if (c.formula.eps != 0) return launch_sigmoid<G, true>(a, layout, per_row, device);
  return launch_sigmoid<F64 ? coarse(G) : G, false>(a, layout, per_row, device);
}

// The row kernel of a call. per_row: one loss per row, not per block.
cudaError_t row_kernel(const TypedCall<S>& a, const Layout& layout, const Call& c, bool per_row,
                       const Device& device) {
  const auto run = [&](auto kernel) { return kernel(a, layout, c, per_row, device); };
  if (!c.formula.sigmoid)
    return c.formula.eps != 0 || c.adjusted() ? launch_softmax<true>(a, layout, per_row, device)
                                              : launch_softmax<false>(a, layout, per_row, device);
  switch (gamma_code(c.formula, only_general(c))) {
    case Gamma::ZERO: return run(sigmoid<Gamma::ZERO>);
    case Gamma::HALF: return run(sigmoid<Gamma::HALF>);
    case Gamma::ONE: return run(sigmoid<Gamma::ONE>);
    case Gamma::TWO: return run(sigmoid<Gamma::TWO>);
    case Gamma::ANY: return run(sigmoid<Gamma::ANY>);
    default: return run(sigmoid<Gamma::GENERAL>);
  }
}

// How many numbers a loss passes from launch to launch: parts of the denominator, losses, maxima.
struct Scratch {
  int denominators = 0;
  int64_t losses = 0, maxima = 0;
  Scratch(const Call& c, const Layout& layout) {
    const bool weights = c.weight || c.sample_weight;
    if ((c.reduction == Reduction::MEAN && c.ignore && !c.normalizer) ||
        (c.reduction == Reduction::WEIGHTED_MEAN && (c.ignore || weights)))
      denominators = std::min(MOST_PARTS, ceil_div(c.rows, SHARE));
    const bool per_row = c.loss_per_row;
    if (layout.tiles) losses = per_row ? 0 : ceil_div(c.rows, TILE);
    else if (c.formula.sigmoid) losses = per_row && layout.splits == 1 ? 0 : c.rows * layout.splits;
    else losses = per_row ? 0 : c.rows;
    if (!c.formula.sigmoid && layout.splits > 1) maxima = c.rows * layout.splits * PART;
  }
};

}  // namespace

template <>
cudaError_t loss<S>(const Call& c, const Device& device,
                    const std::function<void*(int64_t)>& allocate) {
  const Layout layout(c, device);
  const Scratch s(c, layout);
  TypedCall<S> a = typed(c);
  const int64_t size = s.denominators + s.losses + s.maxima;
  T* scratch = size ? static_cast<T*>(allocate(size)) : nullptr;
  if (s.denominators) {
    a.denominators = scratch, a.parts = s.denominators;
    const int share = ceil_div(c.rows, s.denominators);
    const bool total = c.reduction == Reduction::WEIGHTED_MEAN;
    const cudaError_t error =
        launch(prologue<S>, dim3(s.denominators), BLOCK, device, a, scratch, share, total);
    if (error) return error;
  } else if (c.normalizer) {
    a.denominators = static_cast<const T*>(c.normalizer), a.parts = 1;
  } else if (c.reduction == Reduction::MEAN || c.reduction == Reduction::WEIGHTED_MEAN) {
    a.denominator = T(c.rows);
  }
  T* out = static_cast<T*>(c.loss);
  a.loss = s.losses ? scratch + s.denominators : out;
  a.maxima = s.maxima ? scratch + s.denominators + s.losses : nullptr;
  a.span = layout.span;
  const bool per_row = c.loss_per_row;
  const cudaError_t error = row_kernel(a, layout, c, per_row, device);
  if (error || !s.losses) return error;
  const int sums = per_row ? a.rows : 1;
  return launch(epilogue<T>, dim3(unsigned(sums)), BLOCK, device, static_cast<const T*>(a.loss),
                out, int(s.losses / sums));
}

template <>
cudaError_t gradient<S>(const Call& c, const Device& device) {
  const Layout layout(c, device);
  TypedCall<S> a = typed(c);
  a.span = layout.span;
  return row_kernel(a, layout, c, true, device);
}

template <>
cudaError_t scale_gradient<S>(void* g, const void* factor, int64_t numel, const Device& device) {
  const int blocks = std::min(2 * device.multiprocessors, ceil_div(numel, int64_t(BLOCK) * N));
  return launch(multiply_gradient<S>, dim3(unsigned(blocks)), BLOCK, device, static_cast<S*>(g),
                static_cast<const T*>(factor), numel);
}

}  // namespace cbloss
