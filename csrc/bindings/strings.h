// Python strings as views, without a copy.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "text/unicode.h"
#include "xdf/check.h"

namespace xdf {

namespace py = pybind11;

// "texts[3]"
inline std::string element(const std::string& name, size_t index) {
  return name + "[" + std::to_string(index) + "]";
}

// The code points of a str, which the caller keeps alive. `name` is called only for errors.
template <class Name>
unicode::Text text_view(const py::handle& object, const Name& name) {
  if (!PyUnicode_Check(object.ptr()))
    throw py::type_error(name() + " is " + Py_TYPE(object.ptr())->tp_name +
                         "; it must be a string");
#if PY_VERSION_HEX < 0x030C0000
  if (PyUnicode_READY(object.ptr()) != 0) throw py::error_already_set();
#endif
  return {PyUnicode_DATA(object.ptr()), PyUnicode_GET_LENGTH(object.ptr()),
          static_cast<int>(PyUnicode_KIND(object.ptr()))};
}

// The elements of a list or tuple, in a tuple, which no other thread can change.
inline py::tuple snapshot(const py::handle& object, const std::string& name) {
  if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr()))
    throw py::type_error(name + " is " + Py_TYPE(object.ptr())->tp_name +
                         "; it must be a list or a tuple");
  PyObject* copy = PySequence_Tuple(object.ptr());
  if (copy == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::tuple>(copy);
}

}  // namespace xdf
