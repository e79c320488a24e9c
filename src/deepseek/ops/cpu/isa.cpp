#include "isa.h"

#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace deepseek {

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#if defined(DEEPSEEK_HAS_VNNI)
extern const Kernels kernels_avxvnni, kernels_vnni, kernels_bf16, kernels_amx, kernels_amx_emulated;
#endif
#endif

namespace {

using Named = std::vector<std::pair<std::string, const Kernels*>>;

#if defined(DEEPSEEK_HAS_VNNI)
// Whether the processor has tiles for int8 and bfloat16, and the system lets this process use them.
bool can_use_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTiles | kInt8;
  if ((d & kAll) != kAll) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Named find() {
  Named found = {{"plain", &kernels_plain}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) found.emplace_back("avx2", &kernels_avx2);
#if defined(DEEPSEEK_HAS_VNNI)
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.emplace_back("avxvnni", &kernels_avxvnni);
#endif
  if (avx512) found.emplace_back("avx512", &kernels_avx512);
#if defined(DEEPSEEK_HAS_VNNI)
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (vnni) found.emplace_back("vnni", &kernels_vnni);
  if (bf16) found.emplace_back("bf16", &kernels_bf16);
  if (bf16 && can_use_tiles()) found.emplace_back("amx", &kernels_amx);
#endif
#endif
  return found;
}

const Named& usable() {
  static const Named found = find();
  return found;
}

Named emulated() {
#if defined(__x86_64__) && defined(DEEPSEEK_HAS_VNNI)
  for (const auto& [name, kernels] : usable())
    if (name == "bf16") return {{"amx_emulated", &kernels_amx_emulated}};
#endif
  return {};
}

std::vector<std::string> names_of(const Named& found) {
  std::vector<std::string> names;
  for (const auto& [name, kernels] : found) names.push_back(name);
  return names;
}

}  // namespace

std::vector<std::string> usable_isas() { return names_of(usable()); }

std::vector<std::string> emulated_isas() { return names_of(emulated()); }

const Kernels* kernels_of(const std::string& wanted) {
  for (const auto& list : {usable(), emulated()})
    for (const auto& [name, kernels] : list)
      if (name == wanted) return kernels;
  return nullptr;
}

}  // namespace deepseek
