// Weights in the order in which the kernels read them (xdf/kernels.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "xdf/kernels.h"

namespace xdf {

// The torch row of interleaved gate column m, or -1 beyond the last unit.
inline int gate_row_of(int m, int H, int lanes) {
  const int gate = m / lanes % 4, unit = m / (4 * lanes) * lanes + m % lanes;
  return unit < H ? gate * H + unit : -1;
}

// Elements of a [K, N] matrix packed in panels.
inline size_t packed_size(int K, int N, int lanes) {
  return static_cast<size_t>(K) * static_cast<size_t>(round_up(N, lanes));
}

// Packs B [K, N] into panels; row(k) points to its N elements, or is null for a row of zeros.
template <class T, class Row>
T* pack_panels(T* to, int K, int N, int lanes, Row row) {
  const int num_vecs = (N + lanes - 1) / lanes;
  int col = 0;
  for (int p = 0; p < panel_count(num_vecs); ++p) {
    const int columns = panel_vecs(num_vecs, p) * lanes;
    for (int k = 0; k < K; ++k, to += columns) {
      const T* from = row(k);
      const int valid = from == nullptr ? 0 : std::min(columns, N - col);
      if (valid > 0) std::copy_n(from + col, valid, to);
      std::fill_n(to + valid, columns - valid, T{});
    }
    col += columns;
  }
  return to;
}

// w [4H, K] in torch's order -> panels of B[k, m] with m interleaved: [unit block][gate pair][K][2
// lanes]
template <class T>
T* pack_gates(T* to, const T* w, int K, int H, int lanes) {
  for (int unit = 0; unit < H; unit += lanes) {
    for (int gate = 0; gate < 4; ++gate) {
      for (int lane = 0; lane < lanes; ++lane) {
        T* column = to + static_cast<ptrdiff_t>(gate / 2) * K * 2 * lanes + gate % 2 * lanes + lane;
        if (unit + lane < H) {
          const T* row = w + (static_cast<ptrdiff_t>(gate) * H + unit + lane) * K;
          for (int k = 0; k < K; ++k) column[static_cast<ptrdiff_t>(k) * 2 * lanes] = row[k];
        } else {
          for (int k = 0; k < K; ++k) column[static_cast<ptrdiff_t>(k) * 2 * lanes] = T{};
        }
      }
    }
    to += static_cast<ptrdiff_t>(K) * 4 * lanes;
  }
  return to;
}

// w [4H, N] in torch's order -> panels of B[m, n] with m interleaved
template <class T>
T* pack_gate_rows(T* to, const T* w, int N, int H, int lanes) {
  return pack_panels(to, 4 * round_up(H, lanes), N, lanes, [=](int m) {
    const int row = gate_row_of(m, H, lanes);
    return row >= 0 ? w + static_cast<ptrdiff_t>(row) * N : nullptr;
  });
}

// The same two of operands that a kernel rounds: pairs along the inner dimension of each.
inline std::vector<Bf16Pair> rounded_rows(const LstmTable<float, Bf16Pair>& table, const float* w,
                                          int rows, int K) {
  const ptrdiff_t pairs = pair_count(K);
  std::vector<Bf16Pair> rounded(static_cast<size_t>(rows * pairs));
  for (ptrdiff_t row = 0; row < rows; ++row)
    table.to_operand(w + row * K, rounded.data() + row * pairs, K);
  return rounded;
}

inline Bf16Pair* pack_gate_pairs(const LstmTable<float, Bf16Pair>& table, Bf16Pair* to,
                                 const float* w, int K, int H) {
  const std::vector<Bf16Pair> rows = rounded_rows(table, w, 4 * H, K);
  return pack_gates(to, rows.data(), pair_count(K), H, table.lanes);
}

inline Bf16Pair* pack_gate_row_pairs(const LstmTable<float, Bf16Pair>& table, Bf16Pair* to,
                                     const float* w, int N, int H) {
  const int columns = 2 * pair_count(N), lanes = table.lanes;
  const std::vector<Bf16Pair> rows = rounded_rows(table, w, 4 * H, N);
  const std::vector<Bf16> zeros(static_cast<size_t>(columns));
  const int K = 2 * round_up(H, lanes);
  std::vector<Bf16Pair> pairs(static_cast<size_t>(K) * static_cast<size_t>(N));
  const auto row = [&](int m) {
    const ptrdiff_t at = gate_row_of(m, H, lanes);
    return at >= 0 ? rows[static_cast<size_t>(at * columns / 2)].of : zeros.data();
  };
  for (int k = 0; k < K; ++k) {
    const Bf16 *first = row(2 * k), *second = row(2 * k + 1);
    Bf16Pair* pair = pairs.data() + static_cast<ptrdiff_t>(k) * N;
    for (int n = 0; n < N; ++n) pair[n] = {{first[n], second[n]}};
  }
  return pack_panels(to, K, N, lanes,
                     [&](int k) { return pairs.data() + static_cast<ptrdiff_t>(k) * N; });
}

}  // namespace xdf
