// The BiLSTM that reads token ids, and the quantisation of its weights.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "cpu/bilstm_tokens.h"

namespace xdf {
namespace {

constexpr int64_t kMaxSize = 1 << 20;   // of E and H: far above any use, far below overflow
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

struct PyTokenBiLstm {
  py::array embedding;  // read by calls whose ids have no row in the table
  std::shared_ptr<const TokenBiLstm> model;
};

// One direction's arrays, kept alive while they are packed.
struct DirectionArrays {
  DirectionArrays(const py::sequence& arrays, size_t at, int64_t H, int64_t E, Precision precision)
      : w_ih(arrays[at], "weights w_ih", {4 * H, E}),
        bias(arrays[at + 2], "weights bias", {4 * H}) {
    if (precision == Precision::kInt8) {
      w_hh_int8.emplace(arrays[at + 1], "weights w_hh", std::vector<int64_t>{4 * H, H});
      scales.emplace(arrays[at + 3], "weights w_hh_scales", std::vector<int64_t>{4 * H});
      XDF_CHECK(valid_int8_recurrent(w_hh_int8->data(), static_cast<int>(H)),
                "weights w_hh: its bytes could overflow a kernel's sums; quantize_recurrent makes "
                "weights that cannot");
    } else {
      w_hh.emplace(arrays[at + 1], "weights w_hh", std::vector<int64_t>{4 * H, H});
    }
  }
  TokenBiLstm::Direction view() const {
    return {w_ih.data(), bias.data(), w_hh ? w_hh->data() : nullptr,
            w_hh_int8 ? w_hh_int8->data() : nullptr, scales ? scales->data() : nullptr};
  }
  In<float> w_ih, bias;
  std::optional<In<float>> w_hh, scales;
  std::optional<In<int8_t>> w_hh_int8;
};

PyTokenBiLstm make(const std::string& precision_name, const py::object& embedding,
                   const py::sequence& weights, const py::object& table_ids, int threads) {
  checked_threads(threads);
  const Precision precision = precision_of(precision_name);
  const size_t each = precision == Precision::kInt8 ? 4 : 3;
  XDF_CHECK(py::len(weights) == 2 * each, "weights: got ", py::len(weights), " arrays, must be ",
            2 * each, " for ", precision_name);
  const In<float> table(embedding, "embedding", {kAny, kAny});
  const int64_t V = table.dim(0), E = table.dim(1);
  XDF_CHECK(V > 0 && V < kMaxIds && E > 0 && E <= kMaxSize, "embedding: has shape [", V, ", ", E,
            "], must be at least [1, 1] and at most [", kMaxIds - 1, ", ", kMaxSize, "]");
  const int64_t H = In<float>(weights[0], "weights w_ih", {kAny, E}).dim(0) / 4;
  XDF_CHECK(H > 0 && H <= kMaxSize, "weights w_ih: must have 4 * hidden_size rows");
  const DirectionArrays forward(weights, 0, H, E, precision),
      reverse(weights, each, H, E, precision);
  const In<int32_t> ids(table_ids, "table_ids", {kAny});
  check_ids(ids, "table_ids", V);
  std::vector<bool> seen(static_cast<size_t>(V));
  for (int64_t n = 0; n < ids.dim(0); ++n) {
    XDF_CHECK(!seen[static_cast<size_t>(ids.data()[n])], "table_ids: has ", ids.data()[n],
              " twice, must be distinct");
    seen[static_cast<size_t>(ids.data()[n])] = true;
  }
  const TokenBiLstm::Sizes sizes{static_cast<int>(V), static_cast<int>(E), static_cast<int>(H)};
  PyTokenBiLstm made{table.array, nullptr};
  const py::gil_scoped_release release;
  made.model = std::make_shared<const TokenBiLstm>(precision, sizes, table.data(), forward.view(),
                                                   reverse.view(), ids.data(), ids.dim(0), threads);
  return made;
}

void run(const PyTokenBiLstm& self, const py::object& ids, const py::object& cu_seqlens,
         const py::object& out, int threads) {
  checked_threads(threads);
  const TokenBiLstm::Sizes& sizes = self.model->sizes();
  const In<int32_t> ids_in(ids, "ids", {kAny});
  const In<int32_t> cu = cu_seqlens_input(cu_seqlens, ids_in.dim(0));
  Out<float> out_view(out, "out", {ids_in.dim(0), 2 * sizes.hidden_size});
  check_no_overlap(out_view.array, "out", self.embedding, "embedding");
  check_ids(ids_in, "ids", sizes.vocab_size);
  float* out_data = out_view.data();
  const std::shared_ptr<const TokenBiLstm> model = self.model;
  const py::gil_scoped_release release;
  model->forward(ids_in.data(), cu.data(), static_cast<int>(cu.dim(0) - 1), out_data, threads);
}

void quantize(const py::object& w_hh, const py::object& out, const py::object& scales) {
  const In<float> in(w_hh, "w_hh", {kAny, kAny});
  const int64_t H = in.dim(1);
  XDF_CHECK(H > 0 && H <= kMaxSize && in.dim(0) == 4 * H, "w_hh: has shape [", in.dim(0), ", ", H,
            "], must be [4 * hidden_size, hidden_size]");
  Out<int8_t> out_view(out, "out", {4 * H, H});
  Out<float> scales_view(scales, "scales", {4 * H});
  check_no_overlap({{out_view.array, "out"}, {scales_view.array, "scales"}}, {{in.array, "w_hh"}});
  for (int64_t n = 0; n < 4 * H * H; ++n)
    XDF_CHECK(in.data()[n] - in.data()[n] == 0, "w_hh: has a value that is not finite");
  int8_t* out_data = out_view.data();
  float* scales_data = scales_view.data();
  const py::gil_scoped_release release;
  quantize_recurrent(in.data(), static_cast<int>(H), out_data, scales_data);
}

}  // namespace

void register_token_lstm(py::module_& m) {
  using namespace py::literals;
  py::class_<PyTokenBiLstm>(m, "TokenBiLSTM")
      .def(py::init(&make), "precision"_a, "embedding"_a, "weights"_a, "table_ids"_a,
           "threads"_a = 0)
      .def_property_readonly("precision",
                             [](const PyTokenBiLstm& w) { return name_of(w.model->precision()); })
      .def_property_readonly("vocab_size",
                             [](const PyTokenBiLstm& w) { return w.model->sizes().vocab_size; })
      .def_property_readonly("embedding_size",
                             [](const PyTokenBiLstm& w) { return w.model->sizes().embedding_size; })
      .def_property_readonly("hidden_size",
                             [](const PyTokenBiLstm& w) { return w.model->sizes().hidden_size; })
      .def_property_readonly("weights_nbytes",
                             [](const PyTokenBiLstm& w) { return w.model->weights_nbytes(); })
      .def_property_readonly("table_nbytes",
                             [](const PyTokenBiLstm& w) { return w.model->table_nbytes(); })
      .def_static(
          "row_nbytes",
          [](const std::string& precision, int64_t hidden_size) {
            XDF_CHECK(hidden_size > 0 && hidden_size <= kMaxSize, "hidden_size: got ", hidden_size,
                      ", must be 1 to ", kMaxSize);
            return TokenBiLstm::row_nbytes(precision_of(precision), static_cast<int>(hidden_size));
          },
          "precision"_a, "hidden_size"_a);
  m.def("token_bilstm_forward", &run, "weights"_a, "ids"_a, "cu_seqlens"_a, "out"_a,
        "threads"_a = 0);
  m.def("quantize_recurrent", &quantize, "w_hh"_a, "out"_a, "scales"_a);
}

}  // namespace xdf
