// The Python module `_core`: parse, check, release the GIL, call. Nothing else happens here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of xdistil-fast over NumPy arrays. See csrc/xdf/kernels.h.";
  m.attr("__version__") = XDF_VERSION;
  m.def("isas_compiled", &xdf::isas_compiled);
  m.def("isas_available", &xdf::isas_available);
  m.def("active_isa", &xdf::active_isa);
  m.def("multiplies_bfloat16", [] { return xdf::bf16_kernels() != nullptr; });
  m.def("set_isa", &xdf::set_isa, py::arg("name"));
  m.def("default_threads", &xdf::default_threads);
  xdf::register_lstm(m);
  xdf::register_student(m);
  xdf::register_crf(m);
  xdf::register_wordpiece(m);
  xdf::register_spans(m);
  xdf::active_isa();  // a wrong XDF_ISA is reported at import, not at the first call
}
