// NumPy arrays as checked pointers. Nothing is converted or copied: an array of another type, shape
// or layout than asked for is refused by name.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "xdf/check.h"

namespace xdf {

namespace py = pybind11;

constexpr int64_t kAny = -1;  // a dimension of any size

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] == kAny ? "*" : std::to_string(shape[i]);
  }
  return text + "]";
}

inline py::array checked_array(const py::handle& object, const char* name,
                               const std::vector<int64_t>& shape) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error(std::string(name) + ": got " +
                         py::str(py::type::of(object).attr("__name__")).cast<std::string>() +
                         ", must be a NumPy array");
  py::array array = py::reinterpret_borrow<py::array>(object);
  std::vector<int64_t> got(array.shape(), array.shape() + array.ndim());
  bool fits = got.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == got[i];
  XDF_CHECK(fits, name, ": has shape ", shape_text(got), ", must be ", shape_text(shape));
  XDF_CHECK(array.size() == 0 || (array.flags() & py::array::c_style) != 0, name,
            ": must be C-contiguous");
  return array;
}

template <class T>
void check_dtype(const py::array& array, const char* name) {
  if (!array.dtype().is(py::dtype::of<T>()) && !array.dtype().equal(py::dtype::of<T>()))
    throw py::type_error(std::string(name) + ": has dtype " +
                         py::str(array.dtype()).cast<std::string>() + ", must be " +
                         py::str(py::dtype::of<T>()).cast<std::string>());
}

// A view of `object` as an input of the given shape; [i] of `shape` may be kAny.
template <class T>
struct In {
  In(const py::handle& object, const char* name, const std::vector<int64_t>& shape)
      : array(checked_array(object, name, shape)) {
    check_dtype<T>(array, name);
  }
  const T* data() const { return static_cast<const T*>(array.data()); }
  int64_t dim(int i) const { return array.shape(i); }
  py::array array;
};

template <class T>
struct Out {
  Out(const py::handle& object, const char* name, const std::vector<int64_t>& shape)
      : array(checked_array(object, name, shape)) {
    check_dtype<T>(array, name);
    XDF_CHECK(array.writeable(), name, ": must be writeable");
  }
  T* data() { return static_cast<T*>(array.mutable_data()); }
  int64_t dim(int i) const { return array.shape(i); }
  py::array array;
};

struct Named {
  const py::array& array;
  const char* name;
};

inline void check_no_overlap(const py::array& out, const char* out_name, const py::array& in,
                             const char* in_name) {
  const char* a = static_cast<const char*>(out.data());
  const char* b = static_cast<const char*>(in.data());
  XDF_CHECK(out.nbytes() == 0 || in.nbytes() == 0 || a + out.nbytes() <= b || b + in.nbytes() <= a,
            out_name, ": must not share memory with ", in_name);
}

// An output must not share memory with an input, which may still be read when it is written, nor
// with another output.
inline void check_no_overlap(const std::vector<Named>& outputs, const std::vector<Named>& inputs) {
  for (size_t n = 0; n < outputs.size(); ++n) {
    for (const Named& in : inputs)
      check_no_overlap(outputs[n].array, outputs[n].name, in.array, in.name);
    for (size_t m = 0; m < n; ++m)
      check_no_overlap(outputs[n].array, outputs[n].name, outputs[m].array, outputs[m].name);
  }
}

// cu_seqlens [B + 1] int32: starts at 0, never descends, ends at total. `name` and `rows` are for
// messages: what the array is, and what it counts.
inline In<int32_t> cu_seqlens_input(const py::handle& object, int64_t total,
                                    const char* name = "cu_seqlens", const char* rows = "rows") {
  In<int32_t> cu(object, name, {kAny});
  const int64_t n = cu.dim(0);
  XDF_CHECK(n >= 1, name, ": is empty, must have one element more than the batch has sequences");
  XDF_CHECK(cu.data()[0] == 0, name, ": starts with ", cu.data()[0], ", must start with 0");
  for (int64_t b = 1; b < n; ++b)
    XDF_CHECK(cu.data()[b] >= cu.data()[b - 1], name, ": descends at position ", b, " (",
              cu.data()[b - 1], " to ", cu.data()[b], "), must ascend");
  XDF_CHECK(cu.data()[n - 1] == total, name, ": ends with ", cu.data()[n - 1],
            ", must end with the number of ", rows, ", ", total);
  return cu;
}

inline void check_ids(const In<int32_t>& ids, const char* name, int64_t vocab_size) {
  for (int64_t n = 0; n < ids.dim(0); ++n)
    XDF_CHECK(ids.data()[n] >= 0 && ids.data()[n] < vocab_size, name, ": has ", ids.data()[n],
              " at position ", n, ", must be 0 to ", vocab_size - 1);
}

inline int checked_threads(int threads) {
  XDF_CHECK(threads >= 0 && threads <= 4096, "threads: got ", threads,
            ", must be 0 (all cores) to 4096");
  return threads;
}

// Calls body(float{}) or body(double{}) by the dtype of `array`.
template <class Body>
auto dispatch_real(const py::handle& array, const char* name, Body&& body) {
  if (py::isinstance<py::array>(array)) {
    const py::dtype dtype = py::reinterpret_borrow<py::array>(array).dtype();
    if (dtype.equal(py::dtype::of<float>())) return body(float{});
    if (dtype.equal(py::dtype::of<double>())) return body(double{});
    throw py::type_error(std::string(name) + ": has dtype " + py::str(dtype).cast<std::string>() +
                         ", must be float32 or float64");
  }
  throw py::type_error(std::string(name) + ": got " +
                       py::str(py::type::of(array).attr("__name__")).cast<std::string>() +
                       ", must be a NumPy array");
}

}  // namespace xdf
