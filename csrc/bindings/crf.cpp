// Linear-chain CRF, Viterbi and softmax.
#include "cpu/crf.h"

#include <pybind11/pybind11.h>

#include <limits>
#include <optional>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "cpu/words.h"

namespace xdf {
namespace {

// Refuses NaN and +inf; -inf forbids.
template <class T>
void check_scores(const In<T>& scores, const char* name) {
  const T* x = scores.data();
  const int64_t size = scores.array.size();
  int bad = 0;  // no branch: this runs over every emission of every call
  for (int64_t i = 0; i < size; ++i) bad |= !(x[i] < std::numeric_limits<T>::infinity());
  if (!bad) return;
  int64_t first = 0;
  while (x[first] < std::numeric_limits<T>::infinity()) ++first;
  std::vector<int64_t> index(static_cast<size_t>(scores.array.ndim()));
  int64_t rest = first;
  for (size_t d = index.size(); d-- > 0; rest /= scores.array.shape(d))
    index[d] = rest % scores.array.shape(d);
  fail(name, ": has ", x[first], " at ", shape_text(index), ", must be finite or -inf");
}

// What all four CRF functions take.
template <class T>
struct CrfInputs {
  CrfInputs(const py::object& emissions_, const py::object& cu_seqlens_, const py::object& start_,
            const py::object& end_, const py::object& transitions_)
      : emissions(emissions_, "emissions", {kAny, kAny}),
        cu_seqlens(cu_seqlens_input(cu_seqlens_, emissions.dim(0))),
        start(start_, "start", {num_tags()}),
        end(end_, "end", {num_tags()}),
        transitions(transitions_, "transitions", {num_tags(), num_tags()}) {
    check_scores(start, "start");
    check_scores(end, "end");
    check_scores(transitions, "transitions");
    check_scores(emissions, "emissions");
  }
  int64_t num_tags() const {
    const int64_t n = emissions.dim(1);
    XDF_CHECK(n >= 1 && n <= kMaxTags, "emissions: has ", n, " tags (columns), must be 1 to ",
              kMaxTags);
    return n;
  }
  int64_t total() const { return emissions.dim(0); }
  int64_t sequences() const { return cu_seqlens.dim(0) - 1; }
  CrfBatch<T> batch() const {
    return {{static_cast<int>(num_tags()), start.data(), end.data(), transitions.data()},
            emissions.data(),
            cu_seqlens.data(),
            static_cast<int>(sequences())};
  }
  std::vector<Named> named() const {
    return {{emissions.array, "emissions"},
            {cu_seqlens.array, "cu_seqlens"},
            {start.array, "start"},
            {end.array, "end"},
            {transitions.array, "transitions"}};
  }

  In<T> emissions;
  In<int32_t> cu_seqlens;
  In<T> start, end, transitions;
};

In<int32_t> tags_input(const py::object& object, int64_t total, int64_t num_tags) {
  In<int32_t> tags(object, "tags", {total});
  for (int64_t t = 0; t < total; ++t)
    XDF_CHECK(tags.data()[t] >= 0 && tags.data()[t] < num_tags, "tags: has ", tags.data()[t],
              " at position ", t, ", must be 0 to ", num_tags - 1);
  return tags;
}

void log_likelihood(const py::object& emissions, const py::object& cu_seqlens,
                    const py::object& tags, const py::object& start, const py::object& end,
                    const py::object& transitions, const py::object& out, int threads) {
  checked_threads(threads);
  dispatch_real(emissions, "emissions", [&](auto zero) {
    using T = decltype(zero);
    const CrfInputs<T> in(emissions, cu_seqlens, start, end, transitions);
    const In<int32_t> tags_in = tags_input(tags, in.total(), in.num_tags());
    Out<T> result(out, "out", {in.sequences()});
    check_no_overlap({{result.array, "out"}}, in.named());
    T* data = result.data();
    const py::gil_scoped_release release;
    crf_log_likelihood(in.batch(), tags_in.data(), data, threads);
  });
}

void log_likelihood_grad(const py::object& emissions, const py::object& cu_seqlens,
                         const py::object& tags, const py::object& start, const py::object& end,
                         const py::object& transitions, const py::object& grad_out,
                         const py::object& grad_emissions, const py::object& grad_start,
                         const py::object& grad_end, const py::object& grad_transitions,
                         int threads) {
  checked_threads(threads);
  dispatch_real(emissions, "emissions", [&](auto zero) {
    using T = decltype(zero);
    const CrfInputs<T> in(emissions, cu_seqlens, start, end, transitions);
    const int64_t C = in.num_tags();
    const In<int32_t> tags_in = tags_input(tags, in.total(), C);
    const In<T> weights(grad_out, "grad_out", {in.sequences()});
    Out<T> of_emissions(grad_emissions, "grad_emissions", {in.total(), C});
    Out<T> of_start(grad_start, "grad_start", {C}), of_end(grad_end, "grad_end", {C});
    Out<T> of_transitions(grad_transitions, "grad_transitions", {C, C});
    std::vector<Named> inputs = in.named();
    inputs.push_back({weights.array, "grad_out"});
    check_no_overlap({{of_emissions.array, "grad_emissions"},
                      {of_start.array, "grad_start"},
                      {of_end.array, "grad_end"},
                      {of_transitions.array, "grad_transitions"}},
                     inputs);
    T *e = of_emissions.data(), *s = of_start.data(), *d = of_end.data(),
      *t = of_transitions.data();
    const py::gil_scoped_release release;
    crf_log_likelihood_grad(in.batch(), tags_in.data(), weights.data(), e, s, d, t, threads);
  });
}

void marginals(const py::object& emissions, const py::object& cu_seqlens, const py::object& start,
               const py::object& end, const py::object& transitions, const py::object& out,
               int threads) {
  checked_threads(threads);
  dispatch_real(emissions, "emissions", [&](auto zero) {
    using T = decltype(zero);
    const CrfInputs<T> in(emissions, cu_seqlens, start, end, transitions);
    Out<T> result(out, "out", {in.total(), in.num_tags()});
    check_no_overlap({{result.array, "out"}}, in.named());
    T* data = result.data();
    const py::gil_scoped_release release;
    crf_marginals(in.batch(), data, threads);
  });
}

void viterbi(const py::object& emissions, const py::object& cu_seqlens, const py::object& start,
             const py::object& end, const py::object& transitions, const py::object& tags,
             const py::object& scores, int threads) {
  checked_threads(threads);
  dispatch_real(emissions, "emissions", [&](auto zero) {
    using T = decltype(zero);
    const CrfInputs<T> in(emissions, cu_seqlens, start, end, transitions);
    Out<int32_t> tags_out(tags, "tags", {in.total()});
    Out<T> scores_out(scores, "scores", {in.sequences()});
    check_no_overlap({{tags_out.array, "tags"}, {scores_out.array, "scores"}}, in.named());
    int32_t* tags_data = tags_out.data();
    T* scores_data = scores_out.data();
    const py::gil_scoped_release release;
    crf_viterbi(in.batch(), tags_data, scores_data, threads);
  });
}

void words(const py::object& emissions, const py::object& cu_seqlens, const py::object& start,
           const py::object& end, const py::object& transitions, const py::object& first,
           const py::object& cu_words, const py::object& begins, int outside, bool marginals,
           const py::object& tags, const py::object& probabilities, int threads) {
  checked_threads(threads);
  const CrfInputs<float> in(emissions, cu_seqlens, start, end, transitions);
  const In<int64_t> first_in(first, "first", {kAny});
  const int64_t total = first_in.dim(0), C = in.num_tags();
  const In<int32_t> cu(cu_words, "cu_words", {in.sequences() + 1});
  XDF_CHECK(cu.data()[0] == 0 && cu.data()[in.sequences()] == total,
            "cu_words: must start with 0 and end with the number of words, ", total);
  for (int64_t b = 0; b < in.sequences(); ++b) {
    XDF_CHECK(cu.data()[b] <= cu.data()[b + 1], "cu_words: descends at position ", b + 1);
    for (int64_t w = cu.data()[b]; w < cu.data()[b + 1]; ++w)
      XDF_CHECK(first_in.data()[w] >= in.cu_seqlens.data()[b] &&
                    first_in.data()[w] < in.cu_seqlens.data()[b + 1],
                "first: has ", first_in.data()[w], " at position ", w,
                ", must be a piece of its text");
  }
  const In<int32_t> begins_in(begins, "begins", {C});
  for (int64_t tag = 0; tag < C; ++tag)
    XDF_CHECK(begins_in.data()[tag] >= 0 && begins_in.data()[tag] < C, "begins: has ",
              begins_in.data()[tag], " at position ", tag, ", must be 0 to ", C - 1);
  XDF_CHECK(outside >= -1 && outside < C, "outside: got ", outside, ", must be -1 (none) to ",
            C - 1);
  Out<int32_t> tags_out(tags, "tags", {total});
  std::vector<Named> outputs{{tags_out.array, "tags"}};
  std::optional<Out<float>> probabilities_out;
  if (!probabilities.is_none()) {
    probabilities_out.emplace(probabilities, "probabilities", std::vector<int64_t>{total});
    outputs.push_back({probabilities_out->array, "probabilities"});
  }
  std::vector<Named> inputs = in.named();
  inputs.push_back({first_in.array, "first"});
  inputs.push_back({cu.array, "cu_words"});
  inputs.push_back({begins_in.array, "begins"});
  check_no_overlap(outputs, inputs);
  int32_t* tags_data = tags_out.data();
  float* probabilities_data = probabilities_out ? probabilities_out->data() : nullptr;
  const py::gil_scoped_release release;
  decode_words(in.batch(), {first_in.data(), cu.data()}, {begins_in.data(), outside}, marginals,
               tags_data, probabilities_data, threads);
}

void softmax_rows(const py::object& logits, const py::object& out, int threads) {
  checked_threads(threads);
  dispatch_real(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const In<T> in(logits, "logits", {kAny, kAny});
    const int64_t C = in.dim(1);
    XDF_CHECK(C >= 1 && C <= std::numeric_limits<int>::max(), "logits: has ", C,
              " columns, must be at least 1");
    Out<T> result(out, "out", {in.dim(0), C});
    check_no_overlap({{result.array, "out"}}, {{in.array, "logits"}});
    T* data = result.data();
    const py::gil_scoped_release release;
    softmax(in.data(), in.dim(0), static_cast<int>(C), data, threads);
  });
}

}  // namespace

void register_crf(py::module_& m) {
  using namespace py::literals;
  m.def("crf_log_likelihood", &log_likelihood, "emissions"_a, "cu_seqlens"_a, "tags"_a, "start"_a,
        "end"_a, "transitions"_a, "out"_a, "threads"_a = 0);
  m.def("crf_log_likelihood_grad", &log_likelihood_grad, "emissions"_a, "cu_seqlens"_a, "tags"_a,
        "start"_a, "end"_a, "transitions"_a, "grad_out"_a, "grad_emissions"_a, "grad_start"_a,
        "grad_end"_a, "grad_transitions"_a, "threads"_a = 0);
  m.def("crf_marginals", &marginals, "emissions"_a, "cu_seqlens"_a, "start"_a, "end"_a,
        "transitions"_a, "out"_a, "threads"_a = 0);
  m.def("crf_viterbi", &viterbi, "emissions"_a, "cu_seqlens"_a, "start"_a, "end"_a, "transitions"_a,
        "tags"_a, "scores"_a, "threads"_a = 0);
  m.def("decode_words", &words, "emissions"_a, "cu_seqlens"_a, "start"_a, "end"_a, "transitions"_a,
        "first"_a, "cu_words"_a, "begins"_a, "outside"_a, "marginals"_a, "tags"_a,
        "probabilities"_a = py::none(), "threads"_a = 0);
  m.def("softmax", &softmax_rows, "logits"_a, "out"_a, "threads"_a = 0);
}

}  // namespace xdf
