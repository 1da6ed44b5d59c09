#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>

#ifdef XDF_HAVE_neondot
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "xdf/check.h"

namespace xdf {

#define XDF_DECLARE_ISA(isa)                     \
  namespace isa {                                \
  extern const KernelTable<float> table_float;   \
  extern const KernelTable<double> table_double; \
  extern const InferenceTable table_inference;   \
  }
XDF_DECLARE_ISA(generic)
#ifdef XDF_HAVE_avx2
XDF_DECLARE_ISA(avx2)
#endif
#ifdef XDF_HAVE_avx512
XDF_DECLARE_ISA(avx512)
#endif
#ifdef XDF_HAVE_avx512vnni
XDF_DECLARE_ISA(avx512vnni)
#endif
#ifdef XDF_HAVE_avx512bf16
XDF_DECLARE_ISA(avx512bf16)
namespace avx512bf16 {
extern const LstmTable<float, Bf16Pair> table_bf16;
}
#endif
#ifdef XDF_HAVE_neondot
XDF_DECLARE_ISA(neondot)
#endif
#undef XDF_DECLARE_ISA

namespace {

struct Isa {
  const char* name;
  const KernelTable<float>* table;
  const InferenceTable* inference;
  bool available;
  const LstmTable<float, Bf16Pair>* bf16 = nullptr;
};

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
#define XDF_ISA_ENTRY(isa, available) {#isa, &isa::table_float, &isa::table_inference, available}
const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> isas{XDF_ISA_ENTRY(generic, true)};
#ifdef XDF_HAVE_avx2
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    isas.push_back(XDF_ISA_ENTRY(avx2, has_avx2));
#endif
#ifdef XDF_EMULATE
    isas.push_back(XDF_ISA_ENTRY(avx512, has_avx2));
    isas.push_back(XDF_ISA_ENTRY(avx512vnni, has_avx2));
    isas.push_back(XDF_ISA_ENTRY(avx512bf16, has_avx2));
#else
#ifdef XDF_HAVE_avx512
    const bool has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    isas.push_back(XDF_ISA_ENTRY(avx512, has_avx512));
#endif
#ifdef XDF_HAVE_avx512vnni
    const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    isas.push_back(XDF_ISA_ENTRY(avx512vnni, has_vnni));
#endif
#ifdef XDF_HAVE_avx512bf16
    isas.push_back(XDF_ISA_ENTRY(avx512bf16, has_vnni && __builtin_cpu_supports("avx512bf16")));
#endif
#endif
#ifdef XDF_HAVE_avx512bf16
    isas.back().bf16 = &avx512bf16::table_bf16;
#endif
#ifdef XDF_HAVE_neondot
    isas.push_back(XDF_ISA_ENTRY(neondot, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0));
#endif
    return isas;
  }();
  return list;
}
#undef XDF_ISA_ENTRY

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Isa& find_available(const std::string& name, const char* what) {
  for (const Isa& isa : isas()) {
    if (name != isa.name) continue;
    XDF_CHECK(isa.available, what, ": this machine does not support '", name,
              "'; available here: ", join(isas_available()));
    return isa;
  }
  fail(what, ": unknown instruction set '", name, "'; available here: ", join(isas_available()));
}

const Isa* choose() {
  const char* forced = std::getenv("XDF_ISA");
  if (forced != nullptr && *forced != 0) return &find_available(forced, "XDF_ISA");
  const Isa* best = nullptr;
  for (const Isa& isa : isas())
    if (isa.available) best = &isa;
  return best;
}

std::atomic<const Isa*> active{nullptr};

const Isa& current() {
  const Isa* isa = active.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = choose();
    active.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

std::vector<std::string> isas_compiled() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

std::vector<std::string> isas_available() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.available) names.emplace_back(isa.name);
  return names;
}

std::string active_isa() {
  return current().name;
}

void set_isa(const std::string& name) {
  active.store(&find_available(name, "set_isa"), std::memory_order_release);
}

template <>
const KernelTable<float>& kernels<float>() {
  return *current().table;
}

const InferenceTable& inference_kernels() {
  return *current().inference;
}

const LstmTable<float, Bf16Pair>* bf16_kernels() {
  return current().bf16;
}

template <>
const KernelTable<double>& kernels<double>() {
  return generic::table_double;
}

}  // namespace xdf
