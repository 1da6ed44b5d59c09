// The Python module `_cuda`, or `_cuda_emulated` of the tests: addresses of device memory as
// numbers, checked as far as numbers can be, and passed on. cuda/api.h says what is where.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>

#include "cuda/api.h"
#include "cuda/crf.cuh"
#include "cuda/device.h"
#include "cuda/errors.h"
#include "cuda/lstm_forward.cuh"
#include "cuda/pooling.cuh"
#include "xdf/check.h"
#include "xdf/crf.h"

#if !defined(XDF_CUDA_MODULE)
#define XDF_CUDA_MODULE _cuda
#endif

namespace xdf {
namespace cuda {
namespace {

namespace py = pybind11;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// An address; null is for arrays without elements alone, or where it says that there is none.
struct Address {
  uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

Address address(uintptr_t value, const char* name, size_t alignment = 16) {
  XDF_CHECK(value % alignment == 0, name, ": address ", value, " must be a multiple of ",
            alignment);
  return {value};
}

int size_of(int64_t value, const char* name, int64_t least = 0, int64_t most = kMost) {
  XDF_CHECK(value >= least && value <= most, name, ": got ", value, ", must be ", least, " to ",
            most);
  return static_cast<int>(value);
}

Kind kind_of(const std::string& name) {
  if (name == "float32") return Kind::kFloat32;
  if (name == "float64") return Kind::kFloat64;
  if (name == "bfloat16") return Kind::kBf16;
  if (name == "int8") return Kind::kInt8;
  fail("kind: got '", name, "', must be 'float32', 'float64', 'bfloat16' or 'int8'");
}

InputType input_type_of(const std::string& name, Kind kind) {
  const bool wide = kind == Kind::kFloat64;
  if (wide && name == "float64") return InputType::kFloat64;
  if (!wide && name == "float32") return InputType::kFloat32;
  if (!wide && name == "bfloat16") return InputType::kBf16;
  if (!wide && name == "float16") return InputType::kHalf;
  fail("input_type: got '", name, "', must be ",
       wide ? "'float64'" : "'float32', 'bfloat16' or 'float16'", " with this kind");
}

void check_plan(Kind kind, bool backward, int hidden, const LstmPlan& plan) {
  const LstmPlan again =
      lstm_plan(kind, backward, hidden, 1, {1, std::numeric_limits<size_t>::max(), plan.cluster},
                plan.rows, plan.cluster);
  XDF_CHECK(again.rows == plan.rows && has_kernel(kind, backward, plan.rows, plan.resident),
            "plan: is not one of this kind, pass and hidden_size");
}

void run_lstm(Kind kind, bool backward, int64_t hidden_size, const LstmPlan& plan, int64_t batch,
              int64_t total, LstmArgs args, int device, uintptr_t stream) {
  const int hidden = size_of(hidden_size, "hidden_size", 1, kMaxHidden);
  XDF_CHECK((kind == Kind::kInt8) == (args.scales != nullptr),
            "scales: must be given for kind 'int8', and for no other");
  args.batch = size_of(batch, "batch");
  args.total = size_of(total, "total");
  check_plan(kind, backward, hidden, plan);
  if (batch == 0 || total == 0) return;
  const DeviceGuard guard(device);
  lstm_run(kind, backward, hidden, plan, args, {device, stream});
}

template <class T>
struct CrfCall {
  CrfArgs<T> args{};
  CrfModelGrads<T> grads{};
};

// Fills in what all tasks have.
template <class T>
CrfCall<T> crf_call(int64_t num_tags, int64_t batch, int64_t total, uintptr_t emissions,
                    uintptr_t cu_seqlens, uintptr_t start, uintptr_t end, uintptr_t transitions,
                    uintptr_t memory) {
  CrfCall<T> call;
  call.args.num_tags = size_of(num_tags, "num_tags", 1, kMaxTags);
  call.args.batch = size_of(batch, "batch");
  call.args.total = size_of(total, "total");
  call.args.slots = crf_slots(call.args.num_tags, call.args.batch);
  call.args.emissions = address(emissions, "emissions");
  call.args.cu_seqlens = address(cu_seqlens, "cu_seqlens");
  call.args.start = address(start, "start");
  call.args.end = address(end, "end");
  call.args.transitions = address(transitions, "transitions");
  call.args.memory = address(memory, "memory");
  XDF_CHECK(num_tags <= kSharedTags || memory != 0, "memory: must be given for more than ",
            kSharedTags, " tags");
  return call;
}

template <class Body>
void with_real(bool is_double, Body body) {
  if (is_double)
    body(double{});
  else
    body(float{});
}

template <class T>
void run_crf(CrfTask task, const CrfCall<T>& call, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  crf_run<T>(task, call.args, call.grads, {device, stream});
}

PoolTask pool_task_of(const std::string& name) {
  if (name == "max") return PoolTask::kMax;
  if (name == "sum") return PoolTask::kSum;
  if (name == "last") return PoolTask::kLast;
  fail("task: got '", name, "', must be 'max', 'sum' or 'last'");
}

// body(X{}, Out{}) for the rows of a type.
template <class Body>
void with_rows(const std::string& name, Body body) {
  if (name == "float32") return body(float{}, float{});
  if (name == "float64") return body(double{}, double{});
  if (name == "bfloat16") return body(Bf16{}, float{});
  if (name == "int8") return body(int8_t{}, float{});
  fail("input_type: got '", name, "', must be 'float32', 'float64', 'bfloat16' or 'int8'");
}

void register_memory(py::module_& m) {
  using namespace py::literals;
  py::class_<Memory>(m, "Memory")
      .def(py::init([](int64_t nbytes, int device) {
             XDF_CHECK(nbytes >= 0, "nbytes: got ", nbytes, ", must not be negative");
             return std::make_unique<Memory>(static_cast<size_t>(nbytes), device);
           }),
           "nbytes"_a, "device"_a)
      .def_property_readonly("address", &Memory::address)
      .def_property_readonly("nbytes", &Memory::bytes)
      .def(
          "write",
          [](Memory& self, const py::array& from, int64_t offset) {
            XDF_CHECK((from.flags() & py::array::c_style) != 0, "from: must be C-contiguous");
            const size_t bytes = static_cast<size_t>(from.nbytes());
            XDF_CHECK(offset >= 0 && bytes <= self.bytes() &&
                          static_cast<size_t>(offset) <= self.bytes() - bytes,
                      "from: ", bytes, " bytes at ", offset, " do not fit into ", self.bytes());
            const void* data = from.data();
            const py::gil_scoped_release release;
            if (bytes > 0) self.write(static_cast<size_t>(offset), data, bytes);
          },
          "from_"_a, "offset"_a = 0)
      .def(
          "read",
          [](const Memory& self, py::array& to, int64_t offset) {
            XDF_CHECK((to.flags() & py::array::c_style) != 0 && to.writeable(),
                      "to: must be C-contiguous and writeable");
            const size_t bytes = static_cast<size_t>(to.nbytes());
            XDF_CHECK(offset >= 0 && bytes <= self.bytes() &&
                          static_cast<size_t>(offset) <= self.bytes() - bytes,
                      "to: ", bytes, " bytes at ", offset, " are not in ", self.bytes());
            void* data = to.mutable_data();
            const py::gil_scoped_release release;
            if (bytes > 0) self.read(static_cast<size_t>(offset), data, bytes);
          },
          "to"_a, "offset"_a = 0);
  m.def("driver_version", &driver_version);
  m.def("runtime_version", &runtime_version);
  m.def("device_count", &device_count);
  m.def(
      "device_info",
      [](int device) {
        const int count = device_count();
        XDF_CHECK(device >= 0 && device < count, "device: got ", device, ", this machine has ",
                  count, " GPUs");
        const DeviceInfo info = device_info(device);
        py::dict out;
        out["name"] = info.name;
        out["compute_capability"] = py::make_tuple(info.major, info.minor);
        out["processors"] = info.limits.processors;
        out["shared_memory"] = info.limits.shared_bytes;
        out["max_cluster"] = info.limits.max_cluster;
        out["total_memory"] = info.total_memory;
        out["free_memory"] = info.free_memory;
        return out;
      },
      "device"_a);
}

void register_lstm(py::module_& m) {
  using namespace py::literals;
  py::class_<LstmPlan>(m, "LSTMPlan")
      .def_readonly("rows", &LstmPlan::rows)
      .def_readonly("cluster", &LstmPlan::cluster)
      .def_readonly("resident", &LstmPlan::resident)
      .def_readonly("warps", &LstmPlan::warps)
      .def_readonly("shared_memory", &LstmPlan::shared_bytes)
      .def_readonly("cycles", &LstmPlan::cycles);
  m.def(
      "lstm_plan",
      [](const std::string& kind, bool backward, int64_t hidden_size, int64_t batch, int processors,
         int64_t shared_memory, int max_cluster, int rows, int cluster) {
        const int hidden = size_of(hidden_size, "hidden_size", 1, kMaxHidden);
        XDF_CHECK(processors > 0 && shared_memory >= 0 && max_cluster > 0,
                  "processors, shared_memory, max_cluster: must be positive");
        XDF_CHECK(kind != "int8" || !backward, "kind: 'int8' has no backward pass");
        const LstmPlan plan =
            lstm_plan(kind_of(kind), backward, hidden, size_of(batch, "batch"),
                      {processors, static_cast<size_t>(shared_memory), max_cluster}, rows, cluster);
        XDF_CHECK(plan.rows > 0, "hidden_size: ", hidden, " does not fit the ", shared_memory,
                  " bytes of shared memory that a block may have here, with rows ", rows,
                  " and cluster ", cluster, " (0: any)");
        return plan;
      },
      "kind"_a, "backward"_a, "hidden_size"_a, "batch"_a, "processors"_a, "shared_memory"_a,
      "max_cluster"_a, "rows"_a = 0, "cluster"_a = 0);
  m.def(
      "lstm_packed_size",
      [](const std::string& kind, bool backward, int64_t hidden_size) {
        return lstm_packed_size(kind_of(kind), backward,
                                size_of(hidden_size, "hidden_size", 1, kMaxHidden));
      },
      "kind"_a, "backward"_a, "hidden_size"_a);
  m.def(
      "lstm_pack",
      [](const std::string& kind, bool backward, int64_t hidden_size, bool from_float,
         uintptr_t forward, uintptr_t reverse, uintptr_t packed, int device, uintptr_t stream) {
        XDF_CHECK(kind != "int8" || !(backward || from_float),
                  "kind: 'int8' is packed from bytes, for the forward pass");
        const DeviceGuard guard(device);
        lstm_pack(kind_of(kind), backward, size_of(hidden_size, "hidden_size", 1, kMaxHidden),
                  from_float, static_cast<const void*>(address(forward, "forward")),
                  static_cast<const void*>(address(reverse, "reverse")),
                  static_cast<void*>(address(packed, "packed")), {device, stream});
      },
      "kind"_a, "backward"_a, "hidden_size"_a, "from_float"_a, "forward"_a, "reverse"_a, "packed"_a,
      "device"_a, "stream"_a);
  m.def(
      "order_by_length",
      [](int64_t batch, int64_t total, uintptr_t cu_seqlens, uintptr_t order, int device,
         uintptr_t stream) {
        const int sequences = size_of(batch, "batch");
        const DeviceGuard guard(device);
        order_by_length(sequences, size_of(total, "total"), address(cu_seqlens, "cu_seqlens"),
                        address(order, "order"), {device, stream});
      },
      "batch"_a, "total"_a, "cu_seqlens"_a, "order"_a, "device"_a, "stream"_a);
  m.def(
      "lstm_forward",
      [](const std::string& kind_name, int64_t hidden_size, const LstmPlan& plan, int64_t batch,
         int64_t total, uintptr_t cu_seqlens, uintptr_t order, uintptr_t packed, uintptr_t input,
         const std::string& input_type, uintptr_t ids, uintptr_t out, uintptr_t gates,
         uintptr_t cells, int device, uintptr_t stream, uintptr_t scales) {
        const Kind kind = kind_of(kind_name);
        LstmArgs args{};
        args.cu_seqlens = address(cu_seqlens, "cu_seqlens");
        args.order = address(order, "order");
        args.weights = address(packed, "packed");
        args.scales = address(scales, "scales");
        args.input = address(input, "input");
        args.input_type = input_type_of(input_type, kind);
        args.ids = address(ids, "ids");
        args.out = address(out, "out");
        args.gates = address(gates, "gates");
        args.cells = address(cells, "cells");
        XDF_CHECK((gates == 0) == (cells == 0), "gates, cells: give both or none");
        run_lstm(kind, false, hidden_size, plan, batch, total, args, device, stream);
      },
      "kind"_a, "hidden_size"_a, "plan"_a, "batch"_a, "total"_a, "cu_seqlens"_a, "order"_a,
      "packed"_a, "input"_a, "input_type"_a, "ids"_a, "out"_a, "gates"_a, "cells"_a, "device"_a,
      "stream"_a, "scales"_a = 0);
  m.def(
      "lstm_backward",
      [](const std::string& kind, int64_t hidden_size, const LstmPlan& plan, int64_t batch,
         int64_t total, uintptr_t cu_seqlens, uintptr_t order, uintptr_t packed, uintptr_t gates,
         uintptr_t cells, uintptr_t grad_out, uintptr_t grad_gates, int device, uintptr_t stream) {
        LstmArgs args{};
        args.cu_seqlens = address(cu_seqlens, "cu_seqlens");
        args.order = address(order, "order");
        args.weights = address(packed, "packed");
        args.gates = address(gates, "gates");
        args.cells = address(cells, "cells");
        args.grad_out = address(grad_out, "grad_out");
        args.grad_gates = address(grad_gates, "grad_gates");
        run_lstm(kind_of(kind), true, hidden_size, plan, batch, total, args, device, stream);
      },
      "kind"_a, "hidden_size"_a, "plan"_a, "batch"_a, "total"_a, "cu_seqlens"_a, "order"_a,
      "packed"_a, "gates"_a, "cells"_a, "grad_out"_a, "grad_gates"_a, "device"_a, "stream"_a);
}

void register_crf(py::module_& m) {
  using namespace py::literals;
  m.attr("shared_tags") = kSharedTags;
  m.def(
      "crf_slots",
      [](int64_t num_tags, int64_t batch) {
        return crf_slots(size_of(num_tags, "num_tags", 1, kMaxTags), size_of(batch, "batch"));
      },
      "num_tags"_a, "batch"_a);
  m.def(
      "crf_log_likelihood",
      [](bool is_double, int64_t num_tags, int64_t batch, int64_t total, uintptr_t emissions,
         uintptr_t cu_seqlens, uintptr_t start, uintptr_t end, uintptr_t transitions,
         uintptr_t memory, uintptr_t tags, uintptr_t out, int device, uintptr_t stream) {
        with_real(is_double, [&](auto zero) {
          auto call = crf_call<decltype(zero)>(num_tags, batch, total, emissions, cu_seqlens, start,
                                               end, transitions, memory);
          call.args.tags = address(tags, "tags");
          call.args.out = address(out, "out");
          run_crf(CrfTask::kLikelihood, call, device, stream);
        });
      },
      "is_double"_a, "num_tags"_a, "batch"_a, "total"_a, "emissions"_a, "cu_seqlens"_a, "start"_a,
      "end"_a, "transitions"_a, "memory"_a, "tags"_a, "out"_a, "device"_a, "stream"_a);
  m.def(
      "crf_log_likelihood_grad",
      [](bool is_double, int64_t num_tags, int64_t batch, int64_t total, uintptr_t emissions,
         uintptr_t cu_seqlens, uintptr_t start, uintptr_t end, uintptr_t transitions,
         uintptr_t memory, uintptr_t tags, uintptr_t grad_out, uintptr_t alpha, uintptr_t taken,
         uintptr_t partial, uintptr_t grad_emissions, uintptr_t grad_start, uintptr_t grad_end,
         uintptr_t grad_transitions, int device, uintptr_t stream) {
        with_real(is_double, [&](auto zero) {
          auto call = crf_call<decltype(zero)>(num_tags, batch, total, emissions, cu_seqlens, start,
                                               end, transitions, memory);
          call.args.tags = address(tags, "tags");
          call.args.grad_out = address(grad_out, "grad_out");
          call.args.alpha = address(alpha, "alpha");
          call.args.taken = address(taken, "taken");
          call.args.partial = address(partial, "partial");
          call.args.out = address(grad_emissions, "grad_emissions");
          call.grads = {address(grad_transitions, "grad_transitions"),
                        address(grad_start, "grad_start"), address(grad_end, "grad_end")};
          run_crf(CrfTask::kGradient, call, device, stream);
        });
      },
      "is_double"_a, "num_tags"_a, "batch"_a, "total"_a, "emissions"_a, "cu_seqlens"_a, "start"_a,
      "end"_a, "transitions"_a, "memory"_a, "tags"_a, "grad_out"_a, "alpha"_a, "taken"_a,
      "partial"_a, "grad_emissions"_a, "grad_start"_a, "grad_end"_a, "grad_transitions"_a,
      "device"_a, "stream"_a);
  m.def(
      "crf_marginals",
      [](bool is_double, int64_t num_tags, int64_t batch, int64_t total, uintptr_t emissions,
         uintptr_t cu_seqlens, uintptr_t start, uintptr_t end, uintptr_t transitions,
         uintptr_t memory, uintptr_t alpha, uintptr_t taken, uintptr_t out, int device,
         uintptr_t stream) {
        with_real(is_double, [&](auto zero) {
          auto call = crf_call<decltype(zero)>(num_tags, batch, total, emissions, cu_seqlens, start,
                                               end, transitions, memory);
          call.args.alpha = address(alpha, "alpha");
          call.args.taken = address(taken, "taken");
          call.args.out = address(out, "out");
          run_crf(CrfTask::kMarginals, call, device, stream);
        });
      },
      "is_double"_a, "num_tags"_a, "batch"_a, "total"_a, "emissions"_a, "cu_seqlens"_a, "start"_a,
      "end"_a, "transitions"_a, "memory"_a, "alpha"_a, "taken"_a, "out"_a, "device"_a, "stream"_a);
  m.def(
      "crf_viterbi",
      [](bool is_double, int64_t num_tags, int64_t batch, int64_t total, uintptr_t emissions,
         uintptr_t cu_seqlens, uintptr_t start, uintptr_t end, uintptr_t transitions,
         uintptr_t memory, uintptr_t pointers, uintptr_t tags, uintptr_t scores, int device,
         uintptr_t stream) {
        with_real(is_double, [&](auto zero) {
          auto call = crf_call<decltype(zero)>(num_tags, batch, total, emissions, cu_seqlens, start,
                                               end, transitions, memory);
          call.args.pointer = address(pointers, "pointers");
          call.args.best = address(tags, "tags");
          call.args.out = address(scores, "scores");
          run_crf(CrfTask::kViterbi, call, device, stream);
        });
      },
      "is_double"_a, "num_tags"_a, "batch"_a, "total"_a, "emissions"_a, "cu_seqlens"_a, "start"_a,
      "end"_a, "transitions"_a, "memory"_a, "pointers"_a, "tags"_a, "scores"_a, "device"_a,
      "stream"_a);
}

void register_rows(py::module_& m) {
  using namespace py::literals;
  m.def(
      "linear",
      [](const std::string& input_type, const std::string& output_type, int64_t rows, int64_t N,
         int64_t K, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int device,
         uintptr_t stream, bool gelu) {
        const bool small = input_type == "bfloat16" || input_type == "int8";
        XDF_CHECK((output_type == "float32" && (small || input_type == "float32")) ||
                      (output_type == "float16" && input_type == "float32"),
                  "input_type, output_type: got '", input_type, "' and '", output_type,
                  "', must be float32, bfloat16 or int8 to float32, or float32 to float16");
        const DeviceGuard guard(device);
        linear(input_type == "int8"       ? RowType::kInt8
               : input_type == "bfloat16" ? RowType::kBf16
                                          : RowType::kFloat32,
               output_type == "float16", size_of(rows, "rows"), size_of(N, "N", 1),
               size_of(K, "K", 1), static_cast<const void*>(address(x, "x")),
               address(weight, "weight"), address(bias, "bias"),
               static_cast<void*>(address(out, "out")), gelu, {device, stream});
      },
      "input_type"_a, "output_type"_a, "rows"_a, "N"_a, "K"_a, "x"_a, "weight"_a, "bias"_a, "out"_a,
      "device"_a, "stream"_a, "gelu"_a = false);
  m.def(
      "embedding_grad",
      [](bool is_double, int64_t positions, int64_t rows, int64_t E, uintptr_t ids, uintptr_t order,
         uintptr_t grad_out, uintptr_t grad_table, int device, uintptr_t stream) {
        with_real(is_double, [&](auto zero) {
          using T = decltype(zero);
          const DeviceGuard guard(device);
          embedding_grad<T>(size_of(positions, "positions"), size_of(rows, "rows"),
                            size_of(E, "E", 1), address(ids, "ids"), address(order, "order"),
                            address(grad_out, "grad_out"), address(grad_table, "grad_table"),
                            {device, stream});
        });
      },
      "is_double"_a, "positions"_a, "rows"_a, "E"_a, "ids"_a, "order"_a, "grad_out"_a,
      "grad_table"_a, "device"_a, "stream"_a);
  m.def(
      "pool_rows",
      [](const std::string& task, const std::string& input_type, int64_t rows, int64_t runs,
         int64_t width, uintptr_t bounds, uintptr_t divisors, uintptr_t x, uintptr_t out,
         uintptr_t where, int device, uintptr_t stream) {
        with_rows(input_type, [&](auto from, auto to) {
          PoolArgs<decltype(from), decltype(to)> args{};
          args.task = pool_task_of(task);
          args.rows = size_of(rows, "rows");
          args.runs = size_of(runs, "runs");
          args.width = size_of(width, "width", 1, 2 * kMaxHidden);
          args.bounds = address(bounds, "bounds");
          args.divisors = address(divisors, "divisors");
          args.x = address(x, "x");
          // A row of a larger array.
          args.out = address(out, "out", sizeof(to));
          args.where = address(where, "where");
          const DeviceGuard guard(device);
          pool_rows(args, {device, stream});
        });
      },
      "task"_a, "input_type"_a, "rows"_a, "runs"_a, "width"_a, "bounds"_a, "divisors"_a, "x"_a,
      "out"_a, "where"_a, "device"_a, "stream"_a);
}

}  // namespace
}  // namespace cuda
}  // namespace xdf

PYBIND11_MODULE(XDF_CUDA_MODULE, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Device code of xdistil-fast over addresses of device memory. See csrc/cuda/api.h.";
  m.attr("__version__") = XDF_VERSION;
  pybind11::register_exception<xdf::cuda::OutOfMemory>(m, "OutOfMemory", PyExc_MemoryError);
  xdf::cuda::register_memory(m);
  xdf::cuda::register_lstm(m);
  xdf::cuda::register_crf(m);
  xdf::cuda::register_rows(m);
}
