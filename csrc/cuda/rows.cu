// The kernels for one dtype, CBLOSS_DTYPE, and which of them a call takes.
#include "sigmoid.cuh"
#include "softmax.cuh"
#include "steps.cuh"
#include "tiles.cuh"

#include <algorithm>

namespace cbloss {
namespace {

using S = CBLOSS_DTYPE;
using T = Compute<S>;
constexpr int N = Vec<S>::N;
constexpr bool F64 = std::is_same_v<S, double>;  // by loops alone: not worth the registers' kernels
constexpr int FEW_CLASSES = 128;                 // up to here a thread has a whole row
constexpr int SMALL = 16, MEDIUM = 32, LARGE = 64;  // elements of a row that a thread holds
constexpr int HELD = 256 * LARGE;                   // elements of a row that registers hold
constexpr int SHARE = 4096, MOST_PARTS = 32;        // rows of a prologue's block; most of these

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

Rows<S> typed(const Call& c) {
  Rows<S> a{};
  a.logits = static_cast<const S*>(c.logits), a.grad = static_cast<S*>(c.grad);
  a.x = c.logits_stride, a.g = c.grad_stride;
  a.rows = int(c.rows), a.C = int(c.C), a.K = int(c.K);
  a.f = numbers<T>(c.formula);
  a.bias = static_cast<const T*>(c.logit_bias), a.margin = static_cast<const T*>(c.margin);
  a.target = c.target, a.saved = static_cast<T*>(c.saved);
  a.weight = static_cast<const T*>(c.weight);
  a.sample_weight = static_cast<const T*>(c.sample_weight);
  a.grad_loss = static_cast<const T*>(c.grad_loss), a.grad_loss_per_row = c.grad_loss_per_row;
  a.ignore = c.ignore, a.ignored = c.ignored;
  a.denominator = 1;
  return a;
}

// How a row is laid out over threads.
struct Plan {
  bool tiles, aligned;   // aligned: rows of the gradient lie modulo 16 bytes as those of the logits
  int splits = 1, span;  // blocks a row, vectors that each takes
  explicit Plan(const Call& c, const Device& device) {
    const auto apart = [&](int64_t x, int64_t g, int64_t size) {
      return size > 1 && (x - g) * int64_t(sizeof(S)) % 16 != 0;
    };
    const auto x = reinterpret_cast<uintptr_t>(c.logits), g = reinterpret_cast<uintptr_t>(c.grad);
    aligned =
        !c.grad || ((x - g) % 16 == 0 && !apart(c.logits_stride.n, c.grad_stride.n, c.rows / c.K) &&
                    !apart(c.logits_stride.k, c.grad_stride.k, c.K));
    tiles = c.C <= FEW_CLASSES || c.logits_stride.c != 1 || (c.grad && c.grad_stride.c != 1);
    span = int(c.C / N) + 1;
    // Few rows that registers do not hold: shared by some four blocks a multiprocessor.
    const bool in_place_backward =
        c.grad_loss && c.grad == c.logits;  // all read the target's logit
    const int wanted = ceil_div(4 * device.multiprocessors, c.rows);
    if (tiles || c.C <= HELD || wanted < 3 || (in_place_backward && !c.formula.sigmoid)) return;
    const int step = 8192 / N;
    span = ceil_div(ceil_div(span, std::min(wanted, ceil_div(c.C, 8192))), step) * step;
    splits = ceil_div(c.C / N, span);
  }
};

template <class K, class... A>
cudaError_t launch(K kernel, dim3 grid, int threads, const Device& device, A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads)), config.stream = device.stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int THREADS, class K>
cudaError_t launch_rows(K kernel, const Rows<S>& a, int splits, const Device& device) {
  constexpr int TOGETHER_ = TOGETHER<THREADS>;
  const dim3 grid(unsigned(ceil_div(a.rows, TOGETHER_)), unsigned(splits));
  return launch(kernel, grid, THREADS * TOGETHER_, device, a);
}

template <bool GENERAL, int THREADS, int ELEMENTS>
cudaError_t held(const Rows<S>& a, const Device& device) {
  return launch_rows<THREADS>(softmax_rows<S, GENERAL, THREADS, ELEMENTS / N>, a, 1, device);
}
template <bool GENERAL>
cudaError_t softmax(Rows<S> a, const Plan& plan, bool per_row, const Device& device) {
  if (plan.tiles)
    return launch(softmax_tiles<S, GENERAL>, dim3(ceil_div(a.rows, TILE)), TILE, device, a,
                  per_row);
  if (a.grad_loss && a.C <= 2048)
    return launch_rows<WARP>(softmax_apply<S, GENERAL, true, WARP>, a, plan.splits, device);
  if (a.grad_loss)
    return launch_rows<256>(softmax_apply<S, GENERAL, true, 256>, a, plan.splits, device);
  if constexpr (!F64)
    if (plan.aligned && a.C <= HELD) {
      if (a.C <= WARP * SMALL) return held<GENERAL, WARP, SMALL>(a, device);
      if (a.C <= WARP * MEDIUM) return held<GENERAL, WARP, MEDIUM>(a, device);
      if (a.C <= WARP * LARGE) return held<GENERAL, WARP, LARGE>(a, device);
      if (a.C <= 128 * MEDIUM) return held<GENERAL, 128, MEDIUM>(a, device);
      if (a.C <= 128 * LARGE) return held<GENERAL, 128, LARGE>(a, device);
      return held<GENERAL, 256, LARGE>(a, device);
    }
  constexpr int FULL = GENERAL ? 512 : 1024;  // few rows at a time: L2 holds them for a second read
  if constexpr (!F64)
    if (plan.splits == 1 && a.C > HELD)
      return launch_rows<FULL>(softmax_long<S, GENERAL, FULL>, a, 1, device);
  if (plan.splits == 1) return launch_rows<256>(softmax_long<S, GENERAL, 256>, a, 1, device);
  const cudaError_t error =
      launch_rows<256>(softmax_parts<S, GENERAL, 256>, a, plan.splits, device);
  if (error) return error;
  return launch_rows<256>(softmax_apply<S, GENERAL, false, 256>, a, plan.splits, device);
}

template <Gamma G, bool SMOOTH>
cudaError_t sigmoid(const Rows<S>& a, const Plan& plan, bool per_row, const Device& device) {
  if (plan.tiles)
    return launch(sigmoid_tiles<S, G, SMOOTH>, dim3(ceil_div(a.rows, TILE)), TILE, device, a,
                  per_row);
  constexpr int LONG = 128, ITEMS = (G == Gamma::GENERAL ? SMALL : LARGE) / N;  // no spills
  if constexpr (!F64) {
    if (plan.aligned && a.C <= WARP * LARGE)
      return launch_rows<WARP>(sigmoid_rows<S, G, SMOOTH, WARP, SMALL / N, true>, a, 1, device);
    if (plan.aligned && a.C <= LONG * MEDIUM)
      return launch_rows<LONG>(sigmoid_rows<S, G, SMOOTH, LONG, SMALL / N, true>, a, 1, device);
    if (plan.aligned)
      return launch_rows<LONG>(sigmoid_rows<S, G, SMOOTH, LONG, ITEMS, true>, a, plan.splits,
                               device);
  }
  constexpr bool KEEP = G == Gamma::ZERO || G == Gamma::GENERAL;
  constexpr Gamma ANY = KEEP ? G : Gamma::ANY;  // rare: not worth code of its own
  return launch_rows<LONG>(sigmoid_rows<S, ANY, SMOOTH, LONG, SMALL / N, false>, a, plan.splits,
                           device);
}

// The row kernel of a call; a loss a row, or one a block.
cudaError_t row_kernel(const Rows<S>& a, const Plan& plan, const Call& c, bool per_row,
                       const Device& device) {
  const auto run = [&](auto kernel) { return kernel(a, plan, per_row, device); };
  const Formula& f = c.formula;
  const bool smooth = f.eps != 0, adjusted = c.adjusted();
  if (!f.sigmoid) return smooth || adjusted ? run(softmax<true>) : run(softmax<false>);
  if (smooth)
    return f.gamma == 0 && f.plain() && !adjusted ? run(sigmoid<Gamma::ZERO, true>)
                                                  : run(sigmoid<Gamma::GENERAL, true>);
  if (adjusted || !f.plain()) return run(sigmoid<Gamma::GENERAL, false>);
  if (f.gamma == 0) return run(sigmoid<Gamma::ZERO, false>);
  if constexpr (!F64) {
    if (f.gamma == 0.5) return run(sigmoid<Gamma::HALF, false>);
    if (f.gamma == 1) return run(sigmoid<Gamma::ONE, false>);
    if (f.gamma == 2) return run(sigmoid<Gamma::TWO, false>);
  }
  return run(sigmoid<Gamma::ANY, false>);
}

// What a loss leaves between its launches: parts of the denominator, losses, maxima.
struct Scratch {
  int denominators = 0;
  int64_t losses = 0, maxima = 0;
  Scratch(const Call& c, const Plan& plan) {
    const bool weights = c.weight || c.sample_weight;
    if ((c.reduction == Reduction::MEAN && c.ignore && !c.normalizer) ||
        (c.reduction == Reduction::WEIGHTED_MEAN && (c.ignore || weights)))
      denominators = std::min(MOST_PARTS, ceil_div(c.rows, SHARE));
    const bool per_row = c.loss_per_row;
    if (plan.tiles) losses = per_row ? 0 : ceil_div(c.rows, TILE);
    else if (c.formula.sigmoid) losses = per_row && plan.splits == 1 ? 0 : c.rows * plan.splits;
    else losses = per_row ? 0 : c.rows;
    if (!c.formula.sigmoid && plan.splits > 1) maxima = c.rows * plan.splits * PART;
  }
};

}  // namespace

template <>
cudaError_t loss<S>(const Call& c, const Device& device,
                    const std::function<void*(int64_t)>& allocate) {
  const Plan plan(c, device);
  const Scratch s(c, plan);
  Rows<S> a = typed(c);
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
  a.span = plan.span;
  const bool per_row = c.loss_per_row;
  const cudaError_t error = row_kernel(a, plan, c, per_row, device);
  if (error || !s.losses) return error;
  const int sums = per_row ? a.rows : 1;
  return launch(epilogue<T>, dim3(unsigned(sums)), BLOCK, device, static_cast<const T*>(a.loss),
                out, int(s.losses / sums));
}

template <>
cudaError_t gradient<S>(const Call& c, const Device& device) {
  const Plan plan(c, device);
  Rows<S> a = typed(c);
  a.span = plan.span;
  return row_kernel(a, plan, c, true, device);
}

template <>
cudaError_t scale<S>(void* g, const void* factor, int64_t numel, const Device& device) {
  const int blocks = std::min(2 * device.multiprocessors, ceil_div(numel, int64_t(BLOCK) * N));
  return launch(scale_gradient<S>, dim3(unsigned(blocks)), BLOCK, device, static_cast<S*>(g),
                static_cast<const T*>(factor), numel);
}

}  // namespace cbloss
