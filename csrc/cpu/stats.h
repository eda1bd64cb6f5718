// Statistics of the rows of each class, from what the row kernels have written.
#pragma once
#include <cstdint>
#include <optional>

#include "call.h"

// For each class, over the rows whose target it is: stats, double[4][C] = the number of rows, the
// sum of their losses, the sum of |gradient at the target|, the mean p of the target. The sums are
// in the order of the rows. The call has class indices, loss, grad and, for softmax, M and R.
void class_stats(const Call& a, DType dtype, int64_t rows, std::optional<int64_t> ignore_index,
                 double* stats);
