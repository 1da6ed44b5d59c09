// Compiled once per instruction set. Its only symbols are the tables.
#include "xdf/kernels.h"

#include "cpu/crf_grad-inl.h"
#include "cpu/gelu-inl.h"
#include "cpu/half-inl.h"
#include "cpu/linear_int8-inl.h"
#include "cpu/lstm-inl.h"
#include "cpu/lstm_backward-inl.h"
#include "cpu/lstm_int8-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/viterbi-inl.h"

#define XDF_STRING_(x) #x
#define XDF_STRING(x) XDF_STRING_(x)

namespace xdf {
namespace XDF_ISA {

extern const KernelTable<float> table_float;
const KernelTable<float> table_float = {
    {Vec<float>::lanes, gemm<float>, lstm_step<float, float, float>, lstm_backward<float, float>,
     lstm_weight_grad<float, float>, nullptr},
    XDF_STRING(XDF_ISA),
    crf_prepare<float>,
    crf_log_likelihood<float>,
    crf_grad<float>,
    viterbi_prepare<float>,
    viterbi<float>,
    softmax<float>,
    gelu<float>,
};

#ifdef XDF_ISA_avx512bf16
constexpr decltype(InferenceTable::lstm_step_bf16) kStepBf16 = nullptr;
constexpr decltype(InferenceTable::lstm_step_bf16_pairs) kStepBf16Pairs =
    lstm_step<float, Bf16Pair, Half>;
#else
constexpr decltype(InferenceTable::lstm_step_bf16) kStepBf16 = lstm_step<float, Bf16, Half>;
constexpr decltype(InferenceTable::lstm_step_bf16_pairs) kStepBf16Pairs = nullptr;
#endif

extern const InferenceTable table_inference;
const InferenceTable table_inference = {
    kStepBf16, kStepBf16Pairs, lstm_step_int8, linear_int8, to_half,
};

#ifdef XDF_ISA_avx512bf16
extern const LstmTable<float, Bf16Pair> table_bf16;
const LstmTable<float, Bf16Pair> table_bf16 = {
    Vec<float>::lanes,
    gemm<float, Bf16Pair>,
    lstm_step<float, Bf16Pair, float>,
    lstm_backward<float, Bf16Pair>,
    lstm_weight_grad<float, Bf16Pair>,
    to_pairs,
};
#endif

#ifdef XDF_ISA_generic
extern const KernelTable<double> table_double;
const KernelTable<double> table_double = {
    {Vec<double>::lanes, gemm<double>, lstm_step<double, double, double>,
     lstm_backward<double, double>, lstm_weight_grad<double, double>, nullptr},
    XDF_STRING(XDF_ISA),
    crf_prepare<double>,
    crf_log_likelihood<double>,
    crf_grad<double>,
    viterbi_prepare<double>,
    viterbi<double>,
    softmax<double>,
    gelu<double>,
};
#endif

}  // namespace XDF_ISA
}  // namespace xdf
