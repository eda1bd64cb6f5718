// The row kernels for this instruction set, which the compiler's flags choose.
#define CBLOSS_ISA avx512
#include "../kernels.h"
