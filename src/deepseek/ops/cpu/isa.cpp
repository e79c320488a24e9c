#include "isa.h"

#include <utility>

namespace deepseek {

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#if defined(DEEPSEEK_HAS_VNNI)
extern const Kernels kernels_avxvnni, kernels_vnni, kernels_bf16;
#endif
#endif

namespace {

std::vector<std::pair<std::string, const Kernels*>> all() {
  std::vector<std::pair<std::string, const Kernels*>> found = {{"plain", &kernels_plain}};
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
  if (vnni) found.emplace_back("vnni", &kernels_vnni);
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.emplace_back("bf16", &kernels_bf16);
#endif
#endif
  return found;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const auto& [name, kernels] : all()) names.push_back(name);
  return names;
}

const Kernels* kernels_of(const std::string& wanted) {
  for (const auto& [name, kernels] : all())
    if (name == wanted) return kernels;
  return nullptr;
}

}  // namespace deepseek
