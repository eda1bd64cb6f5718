// The row kernels for any processor.
#define CBLOSS_ISA baseline
#include "../kernels.h"
