// Compiled once per instruction set. Its only symbols are the tables.
#include "xdf/kernels.h"

#include "cpu/crf_grad-inl.h"
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
    XDF_STRING(XDF_ISA),  Vec<float>::lanes,
    gemm<float>,          lstm_step<float, float, float>,
    lstm_backward<float>, lstm_weight_grad<float>,
    crf_prepare<float>,   crf_log_likelihood<float>,
    crf_grad<float>,      viterbi_prepare<float>,
    viterbi<float>,       softmax<float>,
};

extern const InferenceTable table_inference;
const InferenceTable table_inference = {
    lstm_step<float, Bf16, Half>,
    lstm_step_int8,
    linear_int8,
    to_half,
};

#ifdef XDF_ISA_generic
extern const KernelTable<double> table_double;
const KernelTable<double> table_double = {
    XDF_STRING(XDF_ISA),   Vec<double>::lanes,
    gemm<double>,          lstm_step<double, double, double>,
    lstm_backward<double>, lstm_weight_grad<double>,
    crf_prepare<double>,   crf_log_likelihood<double>,
    crf_grad<double>,      viterbi_prepare<double>,
    viterbi<double>,       softmax<double>,
};
#endif

}  // namespace XDF_ISA
}  // namespace xdf
