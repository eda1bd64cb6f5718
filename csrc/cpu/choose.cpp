// Which instruction set's kernels run: the best that this machine has, chosen at run time.
#include <algorithm>
#include <iterator>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../ops.h"
#include "call.h"

namespace {

struct Isa {
  const char* name;
  FindKernel* find;
  bool supported;
};

#if defined(__x86_64__)
enum Register { EAX, EBX, ECX, EDX };
// For features whose names some compilers do not know.
bool cpuid(unsigned leaf, unsigned subleaf, Register reg, int bit) {
  unsigned r[4];
  return __get_cpuid_count(leaf, subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) && r[reg] >> bit & 1;
}
#endif

// The best that this machine has comes first.
const auto& isas() {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const Isa all[] = {
#if defined(__x86_64__)
      {"avx512_bf16", avx512_bf16::find, has_avx512 && cpuid(7, 1, EAX, 5)},
      {"avx512", avx512::find, has_avx512},
      {"avx2", avx2::find,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid(1, 0, ECX, 29)},
#endif
      {"baseline", baseline::find, true},
  };
  return all;
}

const Isa* best_isa() {
  return std::find_if(std::begin(isas()), std::end(isas()),
                      [](const Isa& isa) { return isa.supported; });
}
const Isa* isa = best_isa();

}  // namespace

std::string set_isa(const std::string& name) {
  std::string names;
  const Isa* found = isa;
  for (const Isa& each : isas()) {
    if (!each.supported) continue;
    names += (names.empty() ? "" : " ") + std::string(each.name);
    if (name == each.name) found = &each;
  }
  require(name.empty() || found->name == name, "instruction set '", name,
          "' is not available here: expected one of ", names);
  isa = found;
  return names;
}

RowKernel find_kernel(DType dtype, Mode mode, const Call& a) { return isa->find(dtype, mode, a); }
