// The recurrence of a bidirectional LSTM over a ragged batch:
//
//   [i, f, g, o] = input_t + W_hh h_{t-1}       input_t = W_ih x_t + b, computed before
//   c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),   h_t = sigmoid(o) tanh(c_t)
//
// In bytes (lstm_layout.cuh: Bytes) the product is  s (W8 h8_{t-1}) / 63  with s a row's scale, and
// h8 = round(63 h).
//
// Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000. One launch runs all
// steps of all sequences; lstm_layout.cuh says who computes what.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/lstm_products.cuh"

namespace xdf {
namespace cuda {

// Both passes. Pointers are to device memory, of the types of the pass's arithmetic P.
struct LstmArgs {
  Geometry x;
  int batch;
  int64_t total;
  const int32_t* cu_seqlens;  // [B + 1]
  const int32_t* order;       // [B]: sequences by descending length
  const void* weights;        // P::Store, packed, [2][groups][weights_a_group]
  const float* scales;        // of Bytes, s / 63 of each row, [2][H][4]
  // forward
  const void* input;  // of input_type, row r at 8 H r: [2][H][4]
  InputType input_type;
  const int32_t* ids;  // [total]: row of a token; null: the token's own
  void* out;           // P::Store [total, 2 H]
  void* gates;         // P::Acc [total, 2, H, 4], activated; null in inference
  void* cells;         // P::Acc [total, 2, H]; null in inference
  // backward; reads gates and cells
  const void* grad_out;  // P::Store [total, 2 H]
  void* grad_gates;      // P::Store [total, 2, H, 4]
};

// What both passes share: who is who in a block.
template <class P, bool kResident>
struct LstmBlock {
  using Acc = typename P::Acc;
  using Store = typename P::Store;

  static XDF_DEVICE int steps(const LstmArgs& args, const Block& block) {
    const int b = args.order[block.x / block.cluster * args.x.rows];
    return sequence_of(args.cu_seqlens, b, args.total).length;
  }

  static XDF_DEVICE const Store* packed(const LstmArgs& args, const Block& block) {
    const int group = block.y * args.x.groups + block.rank * args.x.groups_a_block;
    return static_cast<const Store*>(args.weights) +
           static_cast<int64_t>(group) * args.x.weights_a_group;
  }
  // Groups of this block.
  static XDF_DEVICE int groups(const LstmArgs& args, const Block& block) {
    const int left = args.x.groups - block.rank * args.x.groups_a_block;
    return left < args.x.groups_a_block ? (left > 0 ? left : 0) : args.x.groups_a_block;
  }
  static XDF_DEVICE const Store* weights_of(const LstmArgs& args, const Block& block, int local) {
    const Store* from = kResident ? reinterpret_cast<const Store*>(block.shared + args.x.weights_at)
                                  : packed(args, block);
    return from + local * args.x.weights_a_group;
  }

  static XDF_DEVICE void prologue(const LstmArgs& args, const Block& block, int warp) {
    const Geometry& x = args.x;
    const int threads = block.warps * kLanes;
    XDF_EACH_LANE(lane) {
      const int me = warp * kLanes + lane;
      if (kResident) {
        const Chunk* from = reinterpret_cast<const Chunk*>(packed(args, block));
        Chunk* to = reinterpret_cast<Chunk*>(block.shared + x.weights_at);
        const int bytes = groups(args, block) * x.weights_a_group * static_cast<int>(sizeof(Store));
        for (int n = me; n < bytes / 16; n += threads) to[n] = from[n];
      }
      // Zero everywhere: the exchange, also where no unit is, and the cells.
      Chunk* zeros = reinterpret_cast<Chunk*>(block.shared);
      for (int n = me; n < x.first_at / 16; n += threads) zeros[n] = Chunk{{0, 0, 0, 0}};
      int32_t* first = reinterpret_cast<int32_t*>(block.shared + x.first_at);
      int32_t* lengths = reinterpret_cast<int32_t*>(block.shared + x.lengths_at);
      for (int row = me; row < x.rows; row += threads) {
        const int place = block.x / block.cluster * x.rows + row;
        Sequence sequence = {0, 0};
        if (place < args.batch)
          sequence = sequence_of(args.cu_seqlens, args.order[place], args.total);
        first[row] = sequence.first + (block.y == 1 ? sequence.length - 1 : 0);
        lengths[row] = sequence.length;
      }
    }
  }

  // Rows longer than s; they are the first ones.
  static XDF_DEVICE int active(const LstmArgs& args, const Block& block, int s) {
    const int32_t* lengths = reinterpret_cast<const int32_t*>(block.shared + args.x.lengths_at);
    Lane<bool> longer;
    XDF_EACH_LANE(lane) {
      longer[lane] = lane < args.x.rows && lengths[lane] > s;
    }
    return warp_count(longer);
  }
  // Token of a row at step s.
  static XDF_DEVICE int64_t token(const LstmArgs& args, const Block& block, int row, int s) {
    const int32_t* first = reinterpret_cast<const int32_t*>(block.shared + args.x.first_at);
    return first[row] + (block.y == 1 ? -s : s);
  }
};

template <class T>
XDF_DEVICE void load_gates(const void* input, InputType type, int64_t at, T (&out)[4]) {
  if (sizeof(T) == 8) {
    const Quad<double> x =
        *reinterpret_cast<const Quad<double>*>(static_cast<const double*>(input) + at);
    for (int k = 0; k < 4; ++k) out[k] = static_cast<T>(x.v[k]);
  } else if (type == InputType::kFloat32) {
    const Quad<float> x =
        *reinterpret_cast<const Quad<float>*>(static_cast<const float*>(input) + at);
    for (int k = 0; k < 4; ++k) out[k] = static_cast<T>(x.v[k]);
  } else {
    const Quad<uint16_t> x =
        *reinterpret_cast<const Quad<uint16_t>*>(static_cast<const uint16_t*>(input) + at);
    for (int k = 0; k < 4; ++k)
      out[k] = static_cast<T>(type == InputType::kHalf ? to_float(Half{x.v[k]})
                                                       : to_float(Bf16{x.v[k]}));
  }
}

// Activates the gates in place; returns h.
template <class P, class T>
XDF_DEVICE T lstm_cell(T (&gates)[4], T& c) {
  if constexpr (P::kTensor) {
    gates[0] = fast_sigmoid(gates[0]);
    gates[1] = fast_sigmoid(gates[1]);
    gates[2] = fast_tanh(gates[2]);
    gates[3] = fast_sigmoid(gates[3]);
    c = gates[1] * c + gates[0] * gates[2];
    return gates[3] * fast_tanh(c);
  } else {
    gates[0] = exact_sigmoid(gates[0]);
    gates[1] = exact_sigmoid(gates[1]);
    gates[2] = exact_tanh(gates[2]);
    gates[3] = exact_sigmoid(gates[3]);
    c = gates[1] * c + gates[0] * gates[2];
    return gates[3] * exact_tanh(c);
  }
}

template <class P, int NB, bool kResident>
struct LstmForward {
  using Args = LstmArgs;
  using Acc = typename P::Acc;
  using Sum = typename P::Sum;
  using Store = typename P::Store;
  using Common = LstmBlock<P, kResident>;
  static constexpr int kWarps = lstm_warps(kResident);
  static constexpr bool kBytes = std::is_same_v<P, Bytes>;

  static XDF_DEVICE int phases(const Args& args, const Block& block) {
    const int steps = Common::steps(args, block);
    return steps == 0 ? 0 : 1 + steps;
  }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int p) {
    if (p == 0) return Common::prologue(args, block, warp);
    const int s = p - 1, active = Common::active(args, block, s);
    const int groups = Common::groups(args, block);
    for (int local = warp; local < groups; local += block.warps)
      group_step(args, block, local, s, active);
  }

  static XDF_DEVICE void group_step(const Args& args, const Block& block, int local, int s,
                                    int active) {
    const Geometry& x = args.x;
    const int H = x.hidden, group = block.rank * x.groups_a_block + local;
    // Asked for before the product, used after it.
    Lane<Acc> input[NB][2][4];
    XDF_EACH_LANE(lane) {
      const int unit = group * 8 + (lane >> 2);
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        XDF_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int row = n * 8 + 2 * (lane & 3) + e;
          Acc gates[4] = {Acc(0), Acc(0), Acc(0), Acc(0)};
          if (row < active && unit < H)
            load_gates(args.input, args.input_type, input_at(args, block, row, s, unit), gates);
          XDF_UNROLL
          for (int gate = 0; gate < 4; ++gate) input[n][e][gate][lane] = gates[gate];
        }
      }
    }
    Lane<Quad<float>> scales;
    if constexpr (kBytes) {
      XDF_EACH_LANE(lane) {
        const int unit = group * 8 + (lane >> 2);
        if (unit < H)
          scales[lane] = reinterpret_cast<const Quad<float>*>(args.scales)[block.y * H + unit];
      }
    }
    Lane<Sum> sums[NB][2][4];
    XDF_EACH_LANE(lane) {
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        XDF_UNROLL
        for (int r = 0; r < 4; ++r) sums[n][0][r][lane] = sums[n][1][r][lane] = Sum(0);
      }
    }
    if (s > 0)
      Products<P, NB>::forward(x, Common::weights_of(args, block, local),
                               reinterpret_cast<const Store*>(block.shared + x.exchange_at[s & 1]),
                               active, sums);

    const int next_at = x.exchange_at[(s + 1) & 1];
    XDF_EACH_LANE(lane) {
      const int unit = group * 8 + (lane >> 2);
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        XDF_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int row = n * 8 + 2 * (lane & 3) + e;
          if (row < active && unit < H) {
            Acc gates[4];
            XDF_UNROLL
            for (int gate = 0; gate < 4; ++gate) {
              const Acc x_part = input[n][e][gate][lane];
              const Sum sum = sums[n][gate / 2][gate % 2 * 2 + e][lane];
              if constexpr (kBytes)
                gates[gate] = multiply_add(static_cast<float>(sum), scales[lane].v[gate], x_part);
              else
                gates[gate] = x_part + sum;
            }
            finish(args, block, local * 8 + (lane >> 2), unit, row, s, next_at, gates);
          }
        }
      }
    }
    push_group<P, false>(block, x, next_at, group, active);
  }

  static XDF_DEVICE int64_t input_at(const Args& args, const Block& block, int row, int s,
                                     int unit) {
    const int64_t token = Common::token(args, block, row, s);
    const int64_t from = args.ids == nullptr ? token : args.ids[token];
    return ((from * 2 + block.y) * args.x.hidden + unit) * 4;
  }

  static XDF_DEVICE void finish(const Args& args, const Block& block, int own_unit, int unit,
                                int row, int s, int next_at, Acc (&gates)[4]) {
    const Geometry& x = args.x;
    Acc& c = reinterpret_cast<Acc*>(block.shared + x.cells_at)[own_unit * x.rows + row];
    Acc cell = c;
    const Acc h = lstm_cell<P>(gates, cell);
    c = cell;
    const Store stored = Rounded<Store>::of(kBytes ? Acc(kHiddenLevels) * h : h);
    reinterpret_cast<Store*>(block.shared + next_at)[exchange_place<P>(x, row, unit)] = stored;
    const int64_t token = Common::token(args, block, row, s);
    const int64_t at = (token * 2 + block.y) * x.hidden + unit;
    static_cast<Store*>(args.out)[at] = stored;
    if (args.gates != nullptr) {
      Quad<Acc> kept;
      XDF_UNROLL
      for (int gate = 0; gate < 4; ++gate) kept.v[gate] = gates[gate];
      reinterpret_cast<Quad<Acc>*>(args.gates)[at] = kept;
      static_cast<Acc*>(args.cells)[at] = cell;
    }
    const int64_t lengths_left =
        reinterpret_cast<const int32_t*>(block.shared + x.lengths_at)[row] - s - 1;
    if (lengths_left > 0)
      prefetch(static_cast<const char*>(args.input) +
               input_at(args, block, row, s + 1, unit) * input_bytes(args.input_type));
  }
  static XDF_DEVICE int input_bytes(InputType type) {
    return type == InputType::kFloat64 ? 8 : type == InputType::kFloat32 ? 4 : 2;
  }
};

}  // namespace cuda
}  // namespace xdf
