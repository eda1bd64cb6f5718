// Statistics of the rows of each class, from what the row kernels leave.
#pragma once
#include <cstdint>
#include <optional>

#include "rows.h"

// stats, T[4][C] = rows, sums of losses and of |gradient at the target|, mean p of the target, by
// its class, in the rows' order. Of class indices, with loss, grad and, for softmax, M and R.
void class_stats(const Rows& a, DType dtype, int64_t rows, std::optional<int64_t> ignore_index,
                 void* stats);
