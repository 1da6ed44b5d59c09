#pragma once

#include <pybind11/pybind11.h>

namespace xdf {

void register_lstm(pybind11::module_& m);       // BiLSTM, linear layer, embedding
void register_student(pybind11::module_& m);    // the student as it runs, in any precision
void register_crf(pybind11::module_& m);        // CRF, Viterbi, softmax
void register_wordpiece(pybind11::module_& m);  // text to word pieces
void register_spans(pybind11::module_& m);      // tags to entities

}  // namespace xdf
