// Which instruction set's kernels serve: the best that this machine has, chosen at run time.
#include <algorithm>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../ops.h"
#include "rows.h"

namespace {

struct Isa {
  const char* name;
  FindKernel* find;
  bool supported;
};

#if defined(__x86_64__)
enum Register { EAX, EBX, ECX, EDX };
// For features that not every compiler knows by name.
bool cpuid(unsigned leaf, unsigned subleaf, Register reg, int bit) {
  unsigned r[4];
  return __get_cpuid_count(leaf, subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) && r[reg] >> bit & 1;
}
#endif

const std::vector<Isa>& isas() {  // best first
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const std::vector<Isa> all = {
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
  return &*std::find_if(isas().begin(), isas().end(), [](const Isa& isa) { return isa.supported; });
}
const Isa* isa = best_isa();

// For tests: runs the variant of that name from now on. Returns the names of those that this
// machine can run, best first; "" asks and changes nothing.
std::string set_isa(std::string name) {
  std::string names;
  const Isa* found = isa;
  for (const Isa& each : isas()) {
    if (!each.supported) continue;
    names += (names.empty() ? "" : " ") + std::string(each.name);
    if (name == each.name) found = &each;
  }
  require(name.empty() || found->name == name, "no such instruction set here: '", name, "', only ",
          names);
  isa = found;
  return names;
}

}  // namespace

RowKernel find_kernel(DType dtype, Family family, Mode mode, const Rows& a) {
  return isa->find(dtype, family, mode, a);
}

STABLE_TORCH_LIBRARY_IMPL(cbloss_fused, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&set_isa));
}
