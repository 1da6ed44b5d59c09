// Which instruction set the kernels run with.
#pragma once

#include <string>
#include <vector>

#include "xdf/kernels.h"

namespace xdf {

std::vector<std::string> isas_compiled();   // lowest first, "generic" always there
std::vector<std::string> isas_available();  // those of them that this machine and its OS support

// The set in use: the best available, or the one the environment variable XDF_ISA names.
// Throws std::invalid_argument where XDF_ISA names one that cannot be used.
std::string active_isa();

// For tests: use another available set from now on. Not to be called while kernels run.
void set_isa(const std::string& name);

// The table of the active set; for double always the generic one.
template <class T>
const KernelTable<T>& kernels();

const InferenceTable& inference_kernels();

// Null where the active set does not multiply bfloat16.
const LstmTable<float, Bf16Pair>* bf16_kernels();

}  // namespace xdf
