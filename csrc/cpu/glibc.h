// The versions of libm's functions that every glibc has: what is built here also runs on systems
// with an older glibc than this one's, from 2.28 on (manylinux_2_28).
#pragma once
#include <cmath>
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
__asm__(".symver log,log@GLIBC_2.17");
#endif
