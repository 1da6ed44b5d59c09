// The student as it runs, and the quantisation of weights.
#include "cpu/student.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "cpu/dispatch.h"

namespace xdf {
namespace {

constexpr int64_t kMaxSize = 1 << 20;   // of C, E and H: far above any use, far below overflow
constexpr int64_t kMaxIds = 1LL << 31;  // of a vocabulary

Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBf16;
  if (name == "int8") return Precision::kInt8;
  fail("precision: got '", name, "', must be 'float32', 'bfloat16' or 'int8'");
}

const char* name_of(Precision precision) {
  switch (precision) {
    case Precision::kFloat32:
      return "float32";
    case Precision::kBf16:
      return "bfloat16";
    default:
      return "int8";
  }
}

Pooling pooling_of(const std::optional<std::string>& name) {
  if (!name) return Pooling::kNone;
  if (*name == "max") return Pooling::kMax;
  if (*name == "mean") return Pooling::kMean;
  if (*name == "last") return Pooling::kLast;
  fail("pooling: got '", *name, "', must be 'max', 'mean', 'last' or None");
}

struct PyStudentWeights {
  py::array embedding;  // read by calls with ids that have no row in the table
  std::shared_ptr<const StudentWeights> weights;
};

// A weight matrix [N, K] as floats, or as a pair of bytes and the scales [N] of its rows.
struct Matrix {
  Matrix(const py::handle& object, const char* name, int64_t N, int64_t K, Precision precision) {
    if (precision != Precision::kInt8) {
      floats.emplace(object, name, std::vector<int64_t>{N, K});
      return;
    }
    XDF_CHECK(py::isinstance<py::sequence>(object) && py::len(object) == 2, name,
              ": must be a pair of int8 values and float32 scales");
    const py::sequence pair = py::reinterpret_borrow<py::sequence>(object);
    bytes.emplace(pair[0], name, std::vector<int64_t>{N, K});
    scales.emplace(pair[1], (std::string(name) + " scales").c_str(), std::vector<int64_t>{N});
    XDF_CHECK(valid_int8_rows(bytes->data(), N, static_cast<int>(K)), name,
              ": sums of its bytes could overflow; quantize_rows makes bytes whose sums cannot");
  }
  const float* float_data() const { return floats ? floats->data() : nullptr; }
  const int8_t* int8_data() const { return bytes ? bytes->data() : nullptr; }
  const float* scales_data() const { return scales ? scales->data() : nullptr; }

  std::optional<In<float>> floats, scales;
  std::optional<In<int8_t>> bytes;
};

struct DirectionArrays {
  DirectionArrays(const py::sequence& arrays, size_t at, int64_t H, int64_t E, Precision precision)
      : w_ih(arrays[at], "w_ih", {4 * H, E}),
        w_hh(arrays[at + 1], "w_hh", 4 * H, H, precision),
        bias(arrays[at + 2], "bias", {4 * H}) {}
  TokenBiLstm::Direction view() const {
    return {w_ih.data(), bias.data(), w_hh.float_data(), w_hh.int8_data(), w_hh.scales_data()};
  }
  In<float> w_ih;
  Matrix w_hh;
  In<float> bias;
};

// Weight [N, K], as of Matrix, and bias [N] of a layer.
struct LayerArrays {
  LayerArrays(const py::sequence& arrays, const std::string& name, int64_t K, Precision precision)
      : bias(second(arrays, name), (name + " bias").c_str(), {kAny}),
        weight(arrays[0], (name + " weight").c_str(), checked_rows(name), K, precision),
        layer{static_cast<int>(rows()), weight.float_data(), weight.int8_data(),
              weight.scales_data(), bias.data()} {}
  int64_t rows() const { return bias.dim(0); }

  In<float> bias;
  Matrix weight;
  StudentWeights::Layer layer;

 private:
  static py::object second(const py::sequence& arrays, const std::string& name) {
    XDF_CHECK(py::len(arrays) == 2, name, ": got ", py::len(arrays),
              " arrays, must be 2: weight, bias");
    return arrays[1];
  }
  int64_t checked_rows(const std::string& name) const {
    XDF_CHECK(rows() > 0 && rows() <= kMaxSize, name, " bias: has ", rows(),
              " values, must be 1 to ", kMaxSize);
    return rows();
  }
};

PyStudentWeights make(const std::string& precision_name, const py::object& embedding,
                      const py::sequence& bilstm, const py::sequence& output,
                      const py::object& table_ids, int threads,
                      const std::optional<std::string>& pooling_name,
                      const std::optional<py::sequence>& projection) {
  checked_threads(threads);
  const Precision precision = precision_of(precision_name);
  const Pooling pooling = pooling_of(pooling_name);
  const In<float> table(embedding, "embedding", {kAny, kAny});
  const int64_t V = table.dim(0), E = table.dim(1);
  XDF_CHECK(V > 0 && V < kMaxIds && E > 0 && E <= kMaxSize, "embedding: has shape [", V, ", ", E,
            "], must be at least [1, 1] and at most [", kMaxIds - 1, ", ", kMaxSize, "]");
  XDF_CHECK(py::len(bilstm) == 6, "bilstm: got ", py::len(bilstm),
            " arrays, must be 6: w_ih, w_hh, bias, then the same of the reverse direction");
  const int64_t gates = In<float>(bilstm[0], "w_ih", {kAny, E}).dim(0), H = gates / 4;
  XDF_CHECK(H > 0 && gates % 4 == 0 && H <= kMaxSize, "w_ih: has ", gates,
            " rows, must be 4 * hidden_size with hidden_size from 1 to ", kMaxSize);
  const DirectionArrays forward(bilstm, 0, H, E, precision), reverse(bilstm, 3, H, E, precision);
  std::optional<LayerArrays> projected;
  if (projection) projected.emplace(*projection, "projection", 2 * H, precision);
  const LayerArrays scored(output, "output", projected ? projected->rows() : 2 * H, precision);
  const In<int32_t> ids(table_ids, "table_ids", {kAny});
  check_ids(ids, "table_ids", V);
  std::vector<bool> seen(static_cast<size_t>(V));
  for (int64_t n = 0; n < ids.dim(0); ++n) {
    XDF_CHECK(!seen[static_cast<size_t>(ids.data()[n])], "table_ids: has ", ids.data()[n],
              " twice, must be distinct");
    seen[static_cast<size_t>(ids.data()[n])] = true;
  }
  PyStudentWeights made{table.array, nullptr};
  const py::gil_scoped_release release;
  made.weights = std::make_shared<const StudentWeights>(
      precision, TokenBiLstm::Sizes{static_cast<int>(V), static_cast<int>(E), static_cast<int>(H)},
      table.data(), forward.view(), reverse.view(), projected ? &projected->layer : nullptr,
      scored.layer, pooling, ids.data(), ids.dim(0), threads);
  return made;
}

void scores(const PyStudentWeights& self, const py::object& ids, const py::object& cu_seqlens,
            const py::object& out, int threads) {
  checked_threads(threads);
  XDF_CHECK(self.weights->pooling() == Pooling::kNone,
            "weights: have a pooling, must have none; student_class_scores takes these");
  const In<int32_t> ids_in(ids, "ids", {kAny});
  const In<int32_t> cu = cu_seqlens_input(cu_seqlens, ids_in.dim(0));
  Out<float> out_view(out, "out", {ids_in.dim(0), self.weights->num_labels()});
  check_no_overlap(out_view.array, "out", self.embedding, "embedding");
  check_ids(ids_in, "ids", self.weights->bilstm().sizes().vocab_size);
  float* out_data = out_view.data();
  const py::gil_scoped_release release;
  self.weights->forward(ids_in.data(), cu.data(), static_cast<int>(cu.dim(0) - 1), out_data,
                        threads);
}

void class_scores(const PyStudentWeights& self, const py::object& ids, const py::object& cu_seqlens,
                  const py::object& out, const py::object& cu_windows, const py::object& cores,
                  int threads) {
  checked_threads(threads);
  XDF_CHECK(self.weights->pooling() != Pooling::kNone,
            "weights: have no pooling, must have one; student_scores takes these");
  const In<int32_t> ids_in(ids, "ids", {kAny});
  const In<int32_t> cu = cu_seqlens_input(cu_seqlens, ids_in.dim(0));
  const int64_t windows = cu.dim(0) - 1;
  XDF_CHECK(cu_windows.is_none() == cores.is_none(), "cu_windows: must be given with cores");
  std::vector<int32_t> own_windows, own_cores;
  std::optional<In<int32_t>> windows_in, cores_in;
  StudentWeights::Texts texts;
  if (cores.is_none()) {  // a sequence, a text
    own_windows.resize(static_cast<size_t>(windows) + 1);
    std::iota(own_windows.begin(), own_windows.end(), 0);
    for (int64_t w = 0; w < windows; ++w)
      own_cores.insert(own_cores.end(), {cu.data()[w], cu.data()[w + 1]});
    texts = {own_windows.data(), own_cores.data(), static_cast<int>(windows)};
  } else {
    windows_in.emplace(cu_seqlens_input(cu_windows, windows, "cu_windows", "windows"));
    cores_in.emplace(cores, "cores", std::vector<int64_t>{windows, 2});
    texts = {windows_in->data(), cores_in->data(), static_cast<int>(windows_in->dim(0) - 1)};
    for (int64_t w = 0; w < windows; ++w) {
      const int32_t *core = texts.cores + 2 * w, *bounds = cu.data() + w;
      XDF_CHECK(bounds[0] <= core[0] && core[0] <= core[1] && core[1] <= bounds[1], "cores: has [",
                core[0], ", ", core[1], "] at position ", w, ", must ascend within its window, [",
                bounds[0], ", ", bounds[1], "]");
    }
  }
  Out<float> out_view(out, "out", {texts.count, self.weights->num_labels()});
  check_no_overlap(out_view.array, "out", self.embedding, "embedding");
  check_ids(ids_in, "ids", self.weights->bilstm().sizes().vocab_size);
  float* out_data = out_view.data();
  const py::gil_scoped_release release;
  self.weights->classify(ids_in.data(), cu.data(), texts, out_data, threads);
}

void quantize(const py::object& weight, const py::object& out, const py::object& scales) {
  const In<float> in(weight, "weight", {kAny, kAny});
  const int64_t N = in.dim(0), K = in.dim(1);
  XDF_CHECK(K > 0 && K <= 2 * kMaxSize, "weight: has ", K, " columns, must be 1 to ", 2 * kMaxSize);
  Out<int8_t> out_view(out, "out", {N, K});
  Out<float> scales_view(scales, "scales", {N});
  check_no_overlap({{out_view.array, "out"}, {scales_view.array, "scales"}},
                   {{in.array, "weight"}});
  for (int64_t n = 0; n < N * K; ++n)
    XDF_CHECK(in.data()[n] - in.data()[n] == 0, "weight: has a value that is not finite");
  int8_t* out_data = out_view.data();
  float* scales_data = scales_view.data();
  const py::gil_scoped_release release;
  quantize_rows(in.data(), N, static_cast<int>(K), out_data, scales_data);
}

void gelu(const py::object& values) {
  dispatch_real(values, "values", [&](auto zero) {
    using T = decltype(zero);
    Out<T> out(values, "values", {kAny});
    T* data = out.data();
    const py::gil_scoped_release release;
    kernels<T>().gelu(data, out.dim(0));
  });
}

bool valid_rows(const py::object& weight) {
  const In<int8_t> in(weight, "weight", {kAny, kAny});
  XDF_CHECK(in.dim(1) <= 2 * kMaxSize, "weight: has ", in.dim(1), " columns, must be at most ",
            2 * kMaxSize);
  const py::gil_scoped_release release;
  return valid_int8_rows(in.data(), in.dim(0), static_cast<int>(in.dim(1)));
}

}  // namespace

void register_student(py::module_& m) {
  using namespace py::literals;
  py::class_<PyStudentWeights>(m, "StudentWeights")
      .def(py::init(&make), "precision"_a, "embedding"_a, "bilstm"_a, "output"_a, "table_ids"_a,
           "threads"_a = 0, "pooling"_a = py::none(), "projection"_a = py::none())
      .def_property_readonly(
          "precision",
          [](const PyStudentWeights& w) { return name_of(w.weights->bilstm().precision()); })
      .def_property_readonly("nbytes",
                             [](const PyStudentWeights& w) { return w.weights->nbytes(); })
      .def_property_readonly(
          "table_nbytes",
          [](const PyStudentWeights& w) { return w.weights->bilstm().table_nbytes(); })
      .def_static(
          "table_row_nbytes",
          [](const std::string& precision, int64_t hidden_size) {
            XDF_CHECK(hidden_size > 0 && hidden_size <= kMaxSize, "hidden_size: got ", hidden_size,
                      ", must be 1 to ", kMaxSize);
            return TokenBiLstm::row_nbytes(precision_of(precision), static_cast<int>(hidden_size));
          },
          "precision"_a, "hidden_size"_a);
  m.def("student_scores", &scores, "weights"_a, "ids"_a, "cu_seqlens"_a, "out"_a, "threads"_a = 0);
  m.def("student_class_scores", &class_scores, "weights"_a, "ids"_a, "cu_seqlens"_a, "out"_a,
        "cu_windows"_a = py::none(), "cores"_a = py::none(), "threads"_a = 0);
  m.def("quantize_rows", &quantize, "weight"_a, "out"_a, "scales"_a);
  m.def("gelu", &gelu, "values"_a);
  m.def("valid_int8_rows", &valid_rows, "weight"_a);
}

}  // namespace xdf
