// BiLSTM, linear layer and embedding.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <variant>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "cpu/bilstm.h"
#include "cpu/dispatch.h"

namespace xdf {
namespace {

constexpr int64_t kMaxSize =
    1 << 20;  // of I, H, E and features: far above any use, far below overflow

template <class T>
using Shared = std::shared_ptr<const T>;

struct PyBiLstmWeights {
  std::variant<Shared<BiLstmWeights<float>>, Shared<BiLstmWeights<double>>,
               Shared<BiLstmWeights<float, Bf16Pair>>>
      weights;

  template <class Body>
  auto visit(Body&& body) const {
    return std::visit([&](const auto& w) { return body(*w); }, weights);
  }
};

struct PyLinearWeights {
  std::variant<Shared<LinearWeights<float>>, Shared<LinearWeights<double>>> weights;

  template <class Body>
  auto visit(Body&& body) const {
    return std::visit([&](const auto& w) { return body(*w); }, weights);
  }
};

template <class W>
struct RealOf;
template <template <class...> class W, class T, class... Operand>
struct RealOf<W<T, Operand...>> {
  using type = T;
};
template <class W>
using real_of = typename RealOf<std::remove_cv_t<std::remove_reference_t<W>>>::type;

PyBiLstmWeights make_bilstm_weights(const py::sequence& arrays, bool training, bool bfloat16) {
  XDF_CHECK(py::len(arrays) == 8, "weights: got ", py::len(arrays),
            " arrays, must be 8: w_ih, w_hh, b_ih, b_hh, then the same of the reverse direction");
  return dispatch_real(arrays[0], "weights[0]", [&](auto zero) -> PyBiLstmWeights {
    using T = decltype(zero);
    const In<T> w_ih(arrays[0], "weights[0] (w_ih)", {kAny, kAny});
    const int64_t H = w_ih.dim(0) / 4, I = w_ih.dim(1);
    XDF_CHECK(!bfloat16 || (std::is_same_v<T, float>), "bfloat16: got True, must be False for ",
              "weights of float64");
    XDF_CHECK(!bfloat16 || bf16_kernels() != nullptr, "bfloat16: got True, must be False with ",
              "the instruction set '", active_isa(), "', which does not multiply bfloat16");
    XDF_CHECK(H > 0 && w_ih.dim(0) % 4 == 0 && H <= kMaxSize, "weights[0] (w_ih): has ",
              w_ih.dim(0), " rows, must be 4 * hidden_size with hidden_size from 1 to ", kMaxSize);
    XDF_CHECK(I > 0 && I <= kMaxSize, "weights[0] (w_ih): has ", I, " columns, must be 1 to ",
              kMaxSize);
    const In<T> w_hh(arrays[1], "weights[1] (w_hh)", {4 * H, H});
    const In<T> b_ih(arrays[2], "weights[2] (b_ih)", {4 * H}),
        b_hh(arrays[3], "weights[3] (b_hh)", {4 * H});
    const In<T> w_ih_r(arrays[4], "weights[4] (w_ih_reverse)", {4 * H, I});
    const In<T> w_hh_r(arrays[5], "weights[5] (w_hh_reverse)", {4 * H, H});
    const In<T> b_ih_r(arrays[6], "weights[6] (b_ih_reverse)", {4 * H});
    const In<T> b_hh_r(arrays[7], "weights[7] (b_hh_reverse)", {4 * H});
    const py::gil_scoped_release release;
    const auto make = [&](auto operand) -> PyBiLstmWeights {
      using Weights = BiLstmWeights<T, decltype(operand)>;
      using Direction = typename Weights::Direction;
      return {std::make_shared<const Weights>(
          Direction{w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data()},
          Direction{w_ih_r.data(), w_hh_r.data(), b_ih_r.data(), b_hh_r.data()},
          static_cast<int>(I), static_cast<int>(H), training)};
    };
    if constexpr (std::is_same_v<T, float>)
      if (bfloat16) return make(Bf16Pair{});
    return make(zero);
  });
}

void forward(const PyBiLstmWeights& self, const py::object& x, const py::object& cu_seqlens,
             const py::object& out, const py::object& reserve, int threads) {
  checked_threads(threads);
  self.visit([&](const auto& weights) {
    using T = real_of<decltype(weights)>;
    const int H = weights.hidden_size();
    const In<T> x_in(x, "x", {kAny, weights.input_size()});
    const int64_t total = x_in.dim(0);
    const In<int32_t> cu = cu_seqlens_input(cu_seqlens, total);
    Out<T> out_view(out, "out", {total, 2 * H});
    std::vector<Named> outputs{{out_view.array, "out"}};
    T* reserve_data = nullptr;
    std::optional<Out<T>> reserve_view;
    if (!reserve.is_none()) {
      reserve_view.emplace(reserve, "reserve",
                           std::vector<int64_t>{static_cast<int64_t>(lstm_reserve_size(total, H))});
      reserve_data = reserve_view->data();
      outputs.push_back({reserve_view->array, "reserve"});
    }
    check_no_overlap(outputs, {{x_in.array, "x"}});
    T* out_data = out_view.data();
    const py::gil_scoped_release release;
    bilstm_forward(weights, x_in.data(), cu.data(), static_cast<int>(cu.dim(0) - 1), out_data,
                   reserve_data, threads);
  });
}

void backward(const PyBiLstmWeights& self, const py::object& x, const py::object& cu_seqlens,
              const py::object& out, const py::object& reserve, const py::object& grad_out,
              const py::object& grad_x, const py::sequence& grad_weights, int threads) {
  checked_threads(threads);
  XDF_CHECK(py::len(grad_weights) == 6, "grad_weights: got ", py::len(grad_weights),
            " arrays, must be 6: w_ih, w_hh, b, then the same of the reverse direction");
  self.visit([&](const auto& weights) {
    using T = real_of<decltype(weights)>;
    XDF_CHECK(weights.training(), "weights: packed for inference, must be made with training=True");
    const int64_t H = weights.hidden_size(), I = weights.input_size();
    const In<T> x_in(x, "x", {kAny, I});
    const int64_t total = x_in.dim(0);
    const In<int32_t> cu = cu_seqlens_input(cu_seqlens, total);
    const In<T> out_in(out, "out", {total, 2 * H}), grad_in(grad_out, "grad_out", {total, 2 * H});
    const In<T> reserve_in(reserve, "reserve",
                           {static_cast<int64_t>(lstm_reserve_size(total, static_cast<int>(H)))});
    T* grad_x_data = nullptr;
    std::optional<Out<T>> grad_x_view;
    if (!grad_x.is_none()) {
      grad_x_view.emplace(grad_x, "grad_x", std::vector<int64_t>{total, I});
      grad_x_data = grad_x_view->data();
    }
    static const char* const names[6] = {
        "grad_weights w_ih",           "grad_weights w_hh",           "grad_weights b",
        "grad_weights (reverse) w_ih", "grad_weights (reverse) w_hh", "grad_weights (reverse) b"};
    Out<T> grads_out[6] = {
        {grad_weights[0], names[0], {4 * H, I}}, {grad_weights[1], names[1], {4 * H, H}},
        {grad_weights[2], names[2], {4 * H}},    {grad_weights[3], names[3], {4 * H, I}},
        {grad_weights[4], names[4], {4 * H, H}}, {grad_weights[5], names[5], {4 * H}},
    };
    std::vector<Named> outputs;
    if (grad_x_view) outputs.push_back({grad_x_view->array, "grad_x"});
    for (size_t n = 0; n < 6; ++n) outputs.push_back({grads_out[n].array, names[n]});
    check_no_overlap(outputs, {{x_in.array, "x"},
                               {out_in.array, "out"},
                               {reserve_in.array, "reserve"},
                               {grad_in.array, "grad_out"}});
    const LstmGrads<T> grads[2] = {{grads_out[0].data(), grads_out[1].data(), grads_out[2].data()},
                                   {grads_out[3].data(), grads_out[4].data(), grads_out[5].data()}};
    const py::gil_scoped_release release;
    bilstm_backward(weights, x_in.data(), cu.data(), static_cast<int>(cu.dim(0) - 1), out_in.data(),
                    reserve_in.data(), grad_in.data(), grad_x_data, grads, threads);
  });
}

PyLinearWeights make_linear_weights(const py::object& weight, const py::object& bias) {
  return dispatch_real(weight, "weight", [&](auto zero) -> PyLinearWeights {
    using T = decltype(zero);
    const In<T> w(weight, "weight", {kAny, kAny});
    const int64_t N = w.dim(0), K = w.dim(1);
    XDF_CHECK(N > 0 && N <= kMaxSize && K > 0 && K <= kMaxSize, "weight: has shape [", N, ", ", K,
              "], both must be 1 to ", kMaxSize);
    const T* bias_data = nullptr;
    if (!bias.is_none()) bias_data = In<T>(bias, "bias", {N}).data();
    return {std::make_shared<const LinearWeights<T>>(w.data(), bias_data, static_cast<int>(N),
                                                     static_cast<int>(K))};
  });
}

void linear(const PyLinearWeights& self, const py::object& x, const py::object& out, int threads) {
  checked_threads(threads);
  self.visit([&](const auto& weights) {
    using T = real_of<decltype(weights)>;
    const In<T> x_in(x, "x", {kAny, weights.in_features()});
    Out<T> out_view(out, "out", {x_in.dim(0), weights.out_features()});
    check_no_overlap(out_view.array, "out", x_in.array, "x");
    T* out_data = out_view.data();
    const py::gil_scoped_release release;
    weights.apply(x_in.data(), x_in.dim(0), out_data, threads);
  });
}

void gradient_of_linear(const py::object& x, const py::object& grad_out,
                        const py::object& grad_weight, const py::object& grad_bias, int threads) {
  checked_threads(threads);
  dispatch_real(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const In<T> x_in(x, "x", {kAny, kAny});
    const In<T> grad_in(grad_out, "grad_out", {x_in.dim(0), kAny});
    const int64_t N = grad_in.dim(1), K = x_in.dim(1);
    XDF_CHECK(N <= kMaxSize && K <= kMaxSize, "x, grad_out: have ", K, " and ", N,
              " columns, must be at most ", kMaxSize);
    Out<T> weight_out(grad_weight, "grad_weight", {N, K});
    Out<T> bias_out(grad_bias, "grad_bias", {N});
    check_no_overlap({{weight_out.array, "grad_weight"}, {bias_out.array, "grad_bias"}},
                     {{x_in.array, "x"}, {grad_in.array, "grad_out"}});
    T *weight_data = weight_out.data(), *bias_data = bias_out.data();
    const py::gil_scoped_release release;
    linear_grad(x_in.data(), grad_in.data(), x_in.dim(0), static_cast<int>(N), static_cast<int>(K),
                weight_data, bias_data, threads);
  });
}

void gather(const py::object& table, const py::object& ids, const py::object& out, int threads) {
  checked_threads(threads);
  dispatch_real(table, "table", [&](auto zero) {
    using T = decltype(zero);
    const In<T> table_in(table, "table", {kAny, kAny});
    const In<int32_t> ids_in(ids, "ids", {kAny});
    Out<T> out_view(out, "out", {ids_in.dim(0), table_in.dim(1)});
    check_no_overlap(out_view.array, "out", table_in.array, "table");
    check_ids(ids_in, "ids", table_in.dim(0));
    T* out_data = out_view.data();
    const py::gil_scoped_release release;
    embedding_gather(table_in.data(), static_cast<int>(table_in.dim(1)), ids_in.data(),
                     ids_in.dim(0), out_data, threads);
  });
}

void gather_grad(const py::object& ids, const py::object& grad_out, const py::object& grad_table,
                 int threads) {
  checked_threads(threads);
  dispatch_real(grad_out, "grad_out", [&](auto zero) {
    using T = decltype(zero);
    const In<int32_t> ids_in(ids, "ids", {kAny});
    const In<T> grad_in(grad_out, "grad_out", {ids_in.dim(0), kAny});
    Out<T> table_out(grad_table, "grad_table", {kAny, grad_in.dim(1)});
    check_no_overlap(table_out.array, "grad_table", grad_in.array, "grad_out");
    check_ids(ids_in, "ids", table_out.dim(0));
    T* table_data = table_out.data();
    const int64_t vocab_size = table_out.dim(0);
    const py::gil_scoped_release release;
    embedding_grad(ids_in.data(), grad_in.data(), ids_in.dim(0), static_cast<int>(grad_in.dim(1)),
                   vocab_size, table_data, threads);
  });
}

template <class W>
py::dtype dtype_of(const W& self) {
  return self.visit(
      [](const auto& w) -> py::dtype { return py::dtype::of<real_of<decltype(w)>>(); });
}

}  // namespace

void register_lstm(py::module_& m) {
  using namespace py::literals;
  py::class_<PyBiLstmWeights>(m, "BiLSTMWeights")
      .def(py::init(&make_bilstm_weights), "weights"_a, "training"_a = false, "bfloat16"_a = false)
      .def_property_readonly("input_size",
                             [](const PyBiLstmWeights& w) {
                               return w.visit([](const auto& x) { return x.input_size(); });
                             })
      .def_property_readonly("hidden_size",
                             [](const PyBiLstmWeights& w) {
                               return w.visit([](const auto& x) { return x.hidden_size(); });
                             })
      .def_property_readonly("nbytes",
                             [](const PyBiLstmWeights& w) {
                               return w.visit([](const auto& x) { return x.nbytes(); });
                             })
      .def_property_readonly("dtype", &dtype_of<PyBiLstmWeights>);
  m.def(
      "bilstm_forward",
      [](const PyBiLstmWeights& weights, const py::object& x, const py::object& cu_seqlens,
         const py::object& out,
         int threads) { forward(weights, x, cu_seqlens, out, py::none(), threads); },
      "weights"_a, "x"_a, "cu_seqlens"_a, "out"_a, "threads"_a = 0);
  m.def("bilstm_forward_train", &forward, "weights"_a, "x"_a, "cu_seqlens"_a, "out"_a, "reserve"_a,
        "threads"_a = 0);
  m.def("bilstm_backward", &backward, "weights"_a, "x"_a, "cu_seqlens"_a, "out"_a, "reserve"_a,
        "grad_out"_a, "grad_x"_a, "grad_weights"_a, "threads"_a = 0);
  m.def(
      "bilstm_reserve_size",
      [](int64_t total, int64_t hidden_size) {
        XDF_CHECK(total >= 0, "total: got ", total, ", must not be negative");
        XDF_CHECK(hidden_size > 0 && hidden_size <= kMaxSize, "hidden_size: got ", hidden_size,
                  ", must be 1 to ", kMaxSize);
        return lstm_reserve_size(total, static_cast<int>(hidden_size));
      },
      "total"_a, "hidden_size"_a);

  py::class_<PyLinearWeights>(m, "LinearWeights")
      .def(py::init(&make_linear_weights), "weight"_a, "bias"_a = py::none())
      .def_property_readonly("in_features",
                             [](const PyLinearWeights& w) {
                               return w.visit([](const auto& x) { return x.in_features(); });
                             })
      .def_property_readonly("out_features",
                             [](const PyLinearWeights& w) {
                               return w.visit([](const auto& x) { return x.out_features(); });
                             })
      .def_property_readonly("nbytes",
                             [](const PyLinearWeights& w) {
                               return w.visit([](const auto& x) { return x.nbytes(); });
                             })
      .def_property_readonly("dtype", &dtype_of<PyLinearWeights>);
  m.def("linear", &linear, "weights"_a, "x"_a, "out"_a, "threads"_a = 0);
  m.def("linear_grad", &gradient_of_linear, "x"_a, "grad_out"_a, "grad_weight"_a, "grad_bias"_a,
        "threads"_a = 0);
  m.def("embedding_gather", &gather, "table"_a, "ids"_a, "out"_a, "threads"_a = 0);
  m.def("embedding_grad", &gather_grad, "ids"_a, "grad_out"_a, "grad_table"_a, "threads"_a = 0);
}

}  // namespace xdf
