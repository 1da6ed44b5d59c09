// Tags to entities, as Python objects.
#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "bindings/strings.h"
#include "text/spans.h"

namespace xdf {
namespace {

// The words of N texts: cu_words [N + 1], starts and ends [W].
struct Words {
  Words(const py::tuple& texts, const py::object& cu_words, const py::object& word_starts,
        const py::object& word_ends)
      : cu(cu_words, "cu_words", {static_cast<int64_t>(texts.size()) + 1}),
        starts(word_starts, "word_starts", {kAny}),
        ends(word_ends, "word_ends", {starts.dim(0)}) {
    const int64_t total = starts.dim(0);
    XDF_CHECK(cu.data()[0] == 0, "cu_words: starts with ", cu.data()[0], ", must start with 0");
    for (int64_t n = 1; n < cu.dim(0); ++n)
      XDF_CHECK(cu.data()[n] >= cu.data()[n - 1], "cu_words: descends at position ", n);
    XDF_CHECK(cu.data()[cu.dim(0) - 1] == total, "cu_words: ends with ", cu.data()[cu.dim(0) - 1],
              ", must end with the number of words, ", total);
  }

  // From word `begin` to word `stop` (exclusive), mended.
  Span finish(const unicode::Text& text, int64_t begin, int64_t stop, int64_t floor) const {
    const int64_t start = starts.data()[begin], end = ends.data()[stop - 1];
    XDF_CHECK(start >= 0 && start <= text.size, "word_starts[", begin, "]: got ", start,
              ", must be 0 to ", text.size, ", the length of its text");
    XDF_CHECK(end >= 0 && end <= text.size, "word_ends[", stop - 1, "]: got ", end,
              ", must be 0 to ", text.size, ", the length of its text");
    return finish_span(text, {start, end}, floor);
  }

  In<int32_t> cu, starts, ends;
};

unicode::Text text_at(const py::tuple& texts, size_t n) {
  return text_view(texts[n], [&] { return element("texts", n); });
}

py::tuple finish_words(const py::object& texts, const py::object& cu_words,
                       const py::object& word_starts, const py::object& word_ends) {
  const py::tuple held = snapshot(texts, "texts");
  const Words words(held, cu_words, word_starts, word_ends);
  py::array_t<int32_t> starts(words.starts.dim(0)), ends(words.starts.dim(0));
  int32_t *starts_data = starts.mutable_data(), *ends_data = ends.mutable_data();
  for (size_t n = 0; n < held.size(); ++n) {
    const unicode::Text text = text_at(held, n);
    int64_t floor = 0;
    for (int64_t w = words.cu.data()[n]; w < words.cu.data()[n + 1]; ++w) {
      const Span span = words.finish(text, w, w + 1, floor);
      starts_data[w] = static_cast<int32_t>(span.start);
      ends_data[w] = static_cast<int32_t>(span.end);
      if (span.start < span.end) floor = span.end;
    }
  }
  return py::make_tuple(starts, ends);
}

// The keys of an entity, made once and kept.
struct Keys {
  PyObject* group = PyUnicode_InternFromString("entity_group");
  PyObject* score = PyUnicode_InternFromString("score");
  PyObject* word = PyUnicode_InternFromString("word");
  PyObject* start = PyUnicode_InternFromString("start");
  PyObject* end = PyUnicode_InternFromString("end");
};

// Takes over `value`.
void set_item(const py::dict& dict, PyObject* key, PyObject* value) {
  const py::object held = py::reinterpret_steal<py::object>(value);
  if (value == nullptr || PyDict_SetItem(dict.ptr(), key, value) != 0)
    throw py::error_already_set();
}

py::dict make_entity(const py::handle& text, const Span& span, const py::handle& type,
                     double score) {
  static const Keys keys;
  py::dict entity;
  set_item(entity, keys.group, type.inc_ref().ptr());
  set_item(entity, keys.score, PyFloat_FromDouble(score));
  set_item(entity, keys.word, PyUnicode_Substring(text.ptr(), span.start, span.end));
  set_item(entity, keys.start, PyLong_FromLongLong(span.start));
  set_item(entity, keys.end, PyLong_FromLongLong(span.end));
  return entity;
}

py::list join_entities(const py::object& texts, const py::object& cu_words,
                       const py::object& word_starts, const py::object& word_ends,
                       const py::object& tags, const py::object& probabilities,
                       const py::object& labels) {
  const py::tuple held = snapshot(texts, "texts"), names = snapshot(labels, "labels");
  const Words words(held, cu_words, word_starts, word_ends);
  const int64_t total = words.starts.dim(0);
  const In<int32_t> tags_in(tags, "tags", {total});
  const In<float> scores(probabilities, "probabilities", {total});
  // Of each tag its type, null for "O"; and whether it goes on with an entity.
  std::vector<py::object> types;
  std::vector<bool> inside;
  for (size_t tag = 0; tag < names.size(); ++tag) {
    const unicode::Text name = text_view(names[tag], [&] { return element("labels", tag); });
    const bool typed = name.size >= 2 && name[1] == '-';
    types.push_back(typed ? py::reinterpret_steal<py::object>(
                                PyUnicode_Substring(names[tag].ptr(), 2, name.size))
                          : py::object());
    inside.push_back(typed && name[0] == 'I');
  }
  for (int64_t w = 0; w < total; ++w)
    XDF_CHECK(tags_in.data()[w] >= 0 && tags_in.data()[w] < static_cast<int64_t>(names.size()),
              "tags[", w, "]: got ", tags_in.data()[w], ", must be 0 to ",
              static_cast<int64_t>(names.size()) - 1);
  py::list out(held.size());
  for (size_t n = 0; n < held.size(); ++n) {
    py::list entities;
    const unicode::Text text = text_at(held, n);
    const int64_t last = words.cu.data()[n + 1];
    int64_t floor = 0;
    for (int64_t begin = words.cu.data()[n], stop; begin < last; begin = stop) {
      stop = begin + 1;
      const int32_t tag = tags_in.data()[begin];
      if (!types[tag] || inside[tag]) continue;
      double sum = scores.data()[begin];
      for (; stop < last && inside[tags_in.data()[stop]]; ++stop) sum += scores.data()[stop];
      const Span span = words.finish(text, begin, stop, floor);
      if (span.start == span.end) continue;
      floor = span.end;
      entities.append(
          make_entity(held[n], span, types[tag], sum / static_cast<double>(stop - begin)));
    }
    out[n] = std::move(entities);
  }
  return out;
}

}  // namespace

void register_spans(py::module_& m) {
  using namespace py::literals;
  m.def("finish_words", &finish_words, "texts"_a, "cu_words"_a, "word_starts"_a, "word_ends"_a);
  m.def("join_entities", &join_entities, "texts"_a, "cu_words"_a, "word_starts"_a, "word_ends"_a,
        "tags"_a, "probabilities"_a, "labels"_a);
}

}  // namespace xdf
