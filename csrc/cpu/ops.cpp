// The CPU operators: prologue, row kernel, epilogue. The schemas are in ops.py.
#include "../ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "call.h"
#include "stats.h"
#include "values.h"

namespace {

DType dtype_of(const Tensor& logits) {
  const DType dtype = logits.dtype();
  require(dtype <= DType::Float16,
          "logits and soft targets must be float64, float32, bfloat16 or float16");
  return dtype;
}

// Blocks of fixed size, so that no sum depends on the number of threads.
constexpr int64_t BLOCK = 4096;
int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }
template <class Body>
void for_blocks(int64_t n, const Body& body) {
  const int64_t blocks = blocks_of(n);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, b * BLOCK, std::min(n, (b + 1) * BLOCK));
  };
  if (blocks < 2) run(0, blocks);
  else parallel_for(blocks, 4, run);
}

struct RowWeights {
  double kept = 0, total = 0;                // number of rows not ignored; sum of their r_i
  int64_t bad_target = -1, bad_sample = -1;  // first row with an out-of-range value
  int64_t bad_targets = 0;
};

// scale[i] = r_i, negative where the row is ignored; checks every value that it reads.
template <class T>
RowWeights row_weights(const Call& a, const T* weight, const T* sample_weight,
                       std::optional<int64_t> ignore_index, int64_t n, T* scale) {
  const int64_t blocks = blocks_of(n);
  const std::unique_ptr<RowWeights[]> parts(new RowWeights[blocks]);
  const bool may_ignore = a.target && ignore_index.has_value();
  const int64_t ignored = ignore_index.value_or(0);
  for_blocks(n, [&](int64_t b, int64_t begin, int64_t end) {
    RowWeights p;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = a.target ? a.target[i] : 0;  // null: soft targets' weight comes later
      if (may_ignore && y == ignored) {
        scale[i] = -1;
        continue;
      }
      const bool background = a.has_background && y == a.background;
      if (!background && uint64_t(y) >= uint64_t(a.C)) {
        if (p.bad_targets++ == 0) p.bad_target = i;
        continue;
      }
      T r = weight && !background ? weight[y] : T(1);
      if (sample_weight) {
        const T s = sample_weight[i];
        if (!(s >= 0 && s < INFINITY) && p.bad_sample < 0) p.bad_sample = i;
        r *= s;
      }
      scale[i] = r;
      p.kept += 1, p.total += r;
    }
    parts[b] = p;
  });
  RowWeights all;
  for (int64_t b = 0; b < blocks; ++b) {
    const RowWeights& p = parts[b];
    all.kept += p.kept, all.total += p.total, all.bad_targets += p.bad_targets;
    if (all.bad_target < 0) all.bad_target = p.bad_target;
    if (all.bad_sample < 0) all.bad_sample = p.bad_sample;
  }
  return all;
}

template <class T>
double denominator(Reduction reduction, const OptionalTensor& normalizer, const RowWeights& p) {
  if (reduction == Reduction::WEIGHTED_MEAN) return p.total;
  if (reduction != Reduction::MEAN) return 1;
  if (!normalizer) return p.kept;
  const double value = *static_cast<const T*>(normalizer->const_data_ptr());
  require(value >= 0 && value < INFINITY, "normalizer must be finite and >= 0, got ", value);
  return value;
}

// For large new buffers: page faults of 4 KiB pages would take longer than the kernel.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096, LARGE = 4 << 20;
  const uintptr_t bytes = t.numel() * t.element_size();
  if (bytes < LARGE) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()) & ~(PAGE - 1);
  madvise(reinterpret_cast<void*>(begin), bytes & ~(PAGE - 1), MADV_HUGEPAGE);  // advice: may fail
#endif
}

// A thread's share of the chunks of rows, in a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Each thread begins with its own share, split as PyTorch splits elements: what it has computed or
// seen before is in its core's caches. Then it takes what is left of the others', chunk by chunk:
// where a core does other work, too, its thread would keep the others waiting.
void run_rows(RowKernel kernel, const Call& a, int64_t rows) {
  // Elements of a chunk: some 10 and 100 us of work.
  constexpr int64_t FEWEST = 1 << 14, MOST = 1 << 17, LANES = 16;
  // Whole vectors of rows, unless a row is long and its classes are side by side: what rows share a
  // vector may change a bit, and must not depend on the number of threads.
  const bool by_class = a.C >= 1024 && a.logits_stride.c == 1 && (!a.grad || a.grad_stride.c == 1);
  const auto rows_of = [&](int64_t elements) {
    const int64_t n = elements / a.C;
    return n < LANES ? (by_class ? std::max<int64_t>(n, 2) : LANES) : n / LANES * LANES;
  };
  const int64_t fewest = rows_of(FEWEST);
  if (rows <= fewest) return kernel(a, 0, rows);
  const int64_t threads = get_num_threads(), quarter = rows / threads / 4 * a.C;
  const int64_t chunk = std::max(fewest, rows_of(std::min(MOST, quarter)));
  const int64_t chunks = (rows + chunk - 1) / chunk, parts = std::min(threads, chunks);
  const std::unique_ptr<Share[]> shares(new Share[parts]);
  for (int64_t p = 0; p < parts; ++p)
    shares[p].next = p * chunks / parts, shares[p].end = (p + 1) * chunks / parts;
  const auto run = [&](int64_t own, int64_t) {
    for (int64_t p = 0; p < parts; ++p) {
      Share& share = shares[(own + p) % parts];
      for (int64_t i = share.next++; i < share.end; i = share.next++)
        kernel(a, i * chunk, std::min(rows, (i + 1) * chunk));
    }
  };
  parallel_for(parts, 1, run);
}

// The sum of one number per row, in a fixed order.
template <class T>
double epilogue(const T* row_loss, int64_t rows) {
  const int64_t blocks = blocks_of(rows);
  const std::unique_ptr<double[]> partial(new double[blocks]());
  for_blocks(rows, [&](int64_t b, int64_t begin, int64_t end) {
    double lanes[8] = {};
    for (int64_t i = begin; i < end; ++i) lanes[i % 8] += row_loss[i];
    for (double lane : lanes) partial[b] += lane;
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += partial[b];
  return total;
}

// Computes one number per row, scale[i] = r_i / denominator, negative where the row is ignored: the
// kernels know nothing of sample weights, ignore_index and reduction. Raises for the first value
// that is out of range.
template <class T>
void prologue(const Inputs& in, Reduction reduction, const Shape& shape, DType dtype, Call& a,
              T* scale) {
  const T* w = weights<T>(in.weight, shape.C, "weight");
  const T* s = data<T>(in.sample_weight, shape.rows, "sample_weight");
  data<T>(in.normalizer, 1, "normalizer");
  const bool of_rows = !a.soft && !a.formula.per_class;
  RowWeights p = row_weights<T>(a, of_rows ? w : nullptr, s, in.ignore_index, shape.rows, scale);
  if (p.bad_target >= 0)
    require<std::out_of_range>(false, "target", position(in.target, p.bad_target), " = ",
                               a.target[p.bad_target], " is out of range: expected 0 <= target < ",
                               shape.C, or_index("ignore", in.ignore_index),
                               or_index("background", in.background_index), " (", p.bad_targets,
                               " of ", shape.rows, " are wrong)");
  if (p.bad_sample >= 0)
    require(false, "sample_weight", position(*in.sample_weight, p.bad_sample), " = ",
            s[p.bad_sample], ": must be finite and >= 0");
  if (!of_rows) a.weight = w;  // which the row kernel applies
  if (a.soft && w && reduction == Reduction::WEIGHTED_MEAN) {
    Call labels = a;
    const std::unique_ptr<T[]> r(a.formula.sigmoid ? nullptr : new T[shape.rows]);
    labels.r = a.formula.sigmoid ? scale : r.get();  // softmax applies the weights class by class
    run_rows(find_kernel(dtype, Mode::LABELS, labels), labels, shape.rows);
    p.total = epilogue(static_cast<const T*>(labels.r), shape.rows);
    if (a.formula.sigmoid) a.weight = nullptr;
  }
  const double divisor = denominator<T>(reduction, in.normalizer, p);
  if (divisor != 1)
    for_blocks(shape.rows, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (scale[i] >= 0)  // an ignored row keeps its mark: a quotient could be -0
          scale[i] = divisor != 0 ? T(scale[i] / divisor) : T(0);  // 0: nothing to average
    });
}

// What a loss and a recomputed gradient have in common.
template <class T>
Call call_of(const Tensor& logits, const Inputs& in, const Shape& shape, const Formula& formula) {
  const Tensor& target = in.target;
  Call a{};
  a.logits = logits.const_data_ptr(), a.logits_stride = strides_of(logits);
  a.C = shape.C, a.K = shape.K;
  if (target.dtype() == DType::Int64) {
    check_vector(target, DType::Int64, shape.rows, "target");
    a.target = static_cast<const int64_t*>(target.const_data_ptr());
    a.has_background = in.background_index.has_value();
    a.background = in.background_index.value_or(0);
  } else {
    check_shape(target, logits, "target");
    a.soft = target.const_data_ptr(), a.soft_stride = strides_of(target);
    a.soft_type = target.dtype() == DType::Bool ? DType::Bool : dtype_of(target);
    a.unknown = in.ignore_index ? rounded(double(*in.ignore_index), a.soft_type) : -INFINITY;
    a.partial = formula.sigmoid && a.soft_type != DType::Bool && a.unknown > -INFINITY;
    a.unknown_seen = a.partial && sees_unknown(a, shape.rows);
  }
  a.logit_bias = finite<T>(in.logit_bias, shape.C, "logit_bias");
  a.margin = finite<T>(in.margin, shape.C, "margin");
  a.pos_weight = weights<T>(in.pos_weight, shape.C, "pos_weight");
  a.formula = formula;
  return a;
}

void set_grad(Call& a, const Tensor& grad, const Tensor& logits) {
  check_grad(grad, logits);
  a.grad = grad.mutable_data_ptr(), a.grad_stride = strides_of(grad);
  if (a.grad != a.logits) advise_huge_pages(grad);
}

// saved holds the row scale and, for softmax, M and R after it, or r with soft targets; each has
// that many bytes.
void set_saved(Call& a, void* saved, int64_t bytes) {
  a.scale = saved;
  if (a.formula.sigmoid) return;
  (a.soft ? a.r : a.M) = static_cast<char*>(saved) + bytes;
  if (!a.soft) a.R = static_cast<char*>(saved) + 2 * bytes;
}

// What a loss writes: the loss, or one loss per row; the others if they are there.
struct Outputs {
  const Tensor *loss, *grad, *saved, *stats;
};
const Tensor* get(const OptionalTensor& t) { return t ? &*t : nullptr; }

// Prologue, row kernel, epilogue.
template <class T>
void run_loss(const Tensor& logits, const Inputs& in, Reduction reduction, const Shape& shape,
              Call a, const Outputs& out) {
  const bool vector = out.loss->dim() > 0, sigmoid = a.formula.sigmoid;
  check_vector(*out.loss, COMPUTED<T>, vector ? shape.rows : 1, "loss");
  if (out.grad) set_grad(a, *out.grad, logits);
  const std::unique_ptr<T[]> own(new T[shape.rows * (out.stats ? saved_rows(sigmoid) : 1)]);
  T* scale = own.get();
  if (out.saved) {
    check_vector(*out.saved, COMPUTED<T>, saved_rows(sigmoid) * shape.rows, "saved");
    scale = static_cast<T*>(out.saved->mutable_data_ptr());
  }
  if (out.stats)
    require(out.stats->dtype() == DType::Float64 && out.stats->is_contiguous() &&
                out.stats->numel() == 4 * shape.C,
            "stats must be 4 * C contiguous elements of float64");
  if (out.saved || out.stats) set_saved(a, scale, shape.rows * sizeof(T));
  else a.scale = scale;
  prologue(in, reduction, shape, dtype_of(logits), a, scale);
  T* loss = static_cast<T*>(out.loss->mutable_data_ptr());
  T* row_loss = vector ? loss : own.get();  // over the row scale, which a kernel reads first
  a.loss = row_loss;
  BadTarget bad;
  a.bad = &bad;
  const auto run = [&](Mode mode) {
    run_rows(find_kernel(dtype_of(logits), mode, a), a, shape.rows);
    if (bad.at < 0) return;
    require(false, "target", position(in.target, bad.at), " = ", shortest(T(bad.value)),
            ": must be ", sigmoid ? "in [0, 1]" : "finite and >= 0",
            a.partial ? or_index("ignore", in.ignore_index) : "");
  };
  if (a.soft && a.soft_type != DType::Bool && a.grad == a.logits) run(Mode::CHECK);
  run(out.grad ? Mode::LOSS_AND_GRAD : Mode::LOSS);
  if (!vector) *loss = T(epilogue(row_loss, shape.rows));
  if (out.stats)
    class_stats(a, dtype_of(logits), shape.rows, in.ignore_index,
                static_cast<double*>(out.stats->mutable_data_ptr()));
}

void fill(const Tensor& logits, const Inputs& in, const Numbers& numbers, int64_t reduction,
          const Outputs& out) {
  const Shape shape(logits);
  const auto run = [&](auto t) {
    using T = decltype(t);
    const Call a = call_of<T>(logits, in, shape, Formula::of(numbers));
    run_loss<T>(logits, in, reduction_of(reduction), shape, a, out);
  };
  if (dtype_of(logits) == DType::Float64) run(double());
  else run(float());
}

void loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
          const OptionalTensor& sample_weight, const OptionalTensor& normalizer,
          const OptionalTensor& logit_bias, const OptionalTensor& margin,
          const OptionalTensor& pos_weight, const Numbers& numbers,
          std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
          int64_t reduction, const Tensor& loss, const OptionalTensor& grad,
          const OptionalTensor& saved) {
  const Inputs in{target, weight,     sample_weight, normalizer,      logit_bias,
                  margin, pos_weight, ignore_index,  background_index};
  fill(logits, in, numbers, reduction, {&loss, get(grad), get(saved), nullptr});
}

void loss_and_stats(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                    const OptionalTensor& sample_weight, const OptionalTensor& normalizer,
                    const OptionalTensor& logit_bias, const OptionalTensor& margin,
                    const OptionalTensor& pos_weight, const Numbers& numbers,
                    std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                    int64_t reduction, const Tensor& loss, const Tensor& grad,
                    const Tensor& stats) {
  require(target.dtype() == DType::Int64, "statistics need class indices");
  const Inputs in{target, weight,     sample_weight, normalizer,      logit_bias,
                  margin, pos_weight, ignore_index,  background_index};
  fill(logits, in, numbers, reduction, {&loss, &grad, nullptr, &stats});
}

void gradient(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
              const OptionalTensor& logit_bias, const OptionalTensor& margin,
              const OptionalTensor& pos_weight, const Tensor& saved, const Tensor& grad_loss,
              const Numbers& numbers, std::optional<int64_t> ignore_index,
              std::optional<int64_t> background_index, const Tensor& grad) {
  const Inputs in{target,       weight,          NONE, NONE, logit_bias, margin, pos_weight,
                  ignore_index, background_index};
  const Shape shape(logits);
  const Formula formula = Formula::of(numbers);
  const bool f64 = dtype_of(logits) == DType::Float64;
  Call a = f64 ? call_of<double>(logits, in, shape, formula)
               : call_of<float>(logits, in, shape, formula);
  set_grad(a, grad, logits);
  const DType dtype = f64 ? DType::Float64 : DType::Float32;
  check_vector(saved, dtype, saved_rows(formula.sigmoid) * shape.rows, "saved");
  set_saved(a, saved.mutable_data_ptr(), shape.rows * saved.element_size());
  if (weight && (formula.per_class || (a.soft && !formula.sigmoid)))
    a.weight = f64 ? static_cast<const void*>(data<double>(weight, shape.C, "weight"))
                   : data<float>(weight, shape.C, "weight");
  a.grad_loss_per_row = grad_loss.dim() > 0;
  check_vector(grad_loss, dtype, a.grad_loss_per_row ? shape.rows : 1, "grad_loss");
  a.grad_loss = grad_loss.const_data_ptr();
  run_rows(find_kernel(dtype_of(logits), Mode::GRAD, a), a, shape.rows);
}

}  // namespace

// Not in the kernels, since it is rare and needs no vectors.
void note_bad_target(BadTarget& first, int64_t at, double value) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (first.at < 0 || at < first.at) first = {at, value};
}

void register_operators(const char* library) {
  Library(library, "CPU")
      .impl<&loss>("loss")
      .impl<&loss_and_stats>("_loss_and_stats")
      .impl<&gradient>("gradient");
}
