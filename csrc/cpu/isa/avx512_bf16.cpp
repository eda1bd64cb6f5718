// The row kernels for this instruction set, which the compiler's flags choose.
#define CBLOSS_ISA avx512_bf16
#include "../kernels.h"
