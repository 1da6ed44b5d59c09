// A trie over code points with all edges in one hash table. Memory is linear in the strings,
// whatever they are, and a step is one look-up.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xdf {

class Trie {
 public:
  static constexpr int32_t kRoot = 0;
  static constexpr int32_t kNone = -1;  // no value, no node

  struct Edge {
    uint64_t key;   // kFree, or the node it leaves and its code point
    int32_t child;  // the node it leads to
    int32_t value;  // of the string that ends there, or kNone
  };

  Trie() : slots_(kFewest, Edge{kFree, kNone, kNone}) {}

  // Gives `text` a value of 0 or more; of two values the later one holds. The empty string is left
  // out: it never matches.
  void add(const std::u32string& text, int32_t value) {
    int32_t node = kRoot;
    for (size_t i = 0; i < text.size(); ++i) {
      if (2 * static_cast<size_t>(edges_) >= slots_.size()) grow();
      Edge& edge = slots_[slot(key_of(node, text[i]))];
      if (edge.key == kFree) {
        edge.key = key_of(node, text[i]);
        edge.child = ++edges_;
      }
      node = edge.child;
      if (i + 1 == text.size()) edge.value = value;
    }
  }

  // The edge from `node` over c, or null.
  const Edge* find(int32_t node, uint32_t c) const {
    const Edge& edge = slots_[slot(key_of(node, c))];
    return edge.key == kFree ? nullptr : &edge;
  }

  // The node at the end of `text`, or kNone.
  int32_t node(const std::u32string& text) const {
    int32_t at = kRoot;
    for (const char32_t c : text) {
      const Edge* edge = find(at, c);
      if (edge == nullptr) return kNone;
      at = edge->child;
    }
    return at;
  }

 private:
  static constexpr uint64_t kFree = ~uint64_t{0};
  static constexpr size_t kFewest = 64;

  static uint64_t key_of(int32_t node, uint32_t c) { return static_cast<uint64_t>(node) << 21 | c; }

  // Where `key` is, or the free slot where it would be put.
  size_t slot(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t at = static_cast<size_t>(key * 0x9E3779B97F4A7C15u >> 32) & mask;
    while (slots_[at].key != key && slots_[at].key != kFree) at = (at + 1) & mask;
    return at;
  }

  void grow() {
    std::vector<Edge> old(2 * slots_.size(), Edge{kFree, kNone, kNone});
    old.swap(slots_);
    for (const Edge& edge : old)
      if (edge.key != kFree) slots_[slot(edge.key)] = edge;
  }

  std::vector<Edge> slots_;  // a power of two, at least twice the edges
  int32_t edges_ = 0;
};

}  // namespace xdf
