#pragma once

#include <pybind11/pybind11.h>

namespace xdf {

void register_lstm(pybind11::module_& m);  // BiLSTM, linear layer, embedding
void register_crf(pybind11::module_& m);   // CRF, Viterbi, softmax
void register_text(pybind11::module_& m);  // word pieces, entities

}  // namespace xdf
