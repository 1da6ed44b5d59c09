// From the gradient at the outputs of the recurrence to that at its gates before activation, steps
// taken in reverse:
//
//   dh = grad_out_t + W_hh^T dz_{t+1}
//   dc = dc_{t+1} f_{t+1} + dh o (1 - tanh(c_t)^2)
//   dz = [dc g i (1 - i),  dc c_{t-1} f (1 - f),  dc i (1 - g^2),  dh tanh(c_t) o (1 - o)]
//
// All other gradients are products of dz with what the forward pass had, over all tokens at once,
// and are left to a matrix library.
#pragma once

#include "cuda/lstm_forward.cuh"

namespace xdf {
namespace cuda {

template <class P, int NB, bool kResident>
struct LstmBackward {
  using Args = LstmArgs;
  using Acc = typename P::Acc;
  using Store = typename P::Store;
  using Common = LstmBlock<P, kResident>;
  static constexpr int kWarps = lstm_warps(kResident);

  // What a unit and row need of a step besides dh.
  struct Kept {
    Acc gates[4];
    Acc cell, before;  // c_t, c_{t-1}
    Acc grad;          // of h, from outside
  };

  static XDF_DEVICE int phases(const Args& args, const Block& block) {
    const int steps = Common::steps(args, block);
    return steps == 0 ? 0 : 1 + steps;
  }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int p) {
    if (p == 0) return Common::prologue(args, block, warp);
    const int s = Common::steps(args, block) - p;
    const int active = Common::active(args, block, s), later = Common::active(args, block, s + 1);
    const int groups = Common::groups(args, block);
    for (int local = warp; local < groups; local += block.warps)
      group_step(args, block, local, s, active, later);
  }

  // later: rows that have a step s + 1, whose dz the exchange holds.
  static XDF_DEVICE void group_step(const Args& args, const Block& block, int local, int s,
                                    int active, int later) {
    const Geometry& x = args.x;
    const int H = x.hidden, group = block.rank * x.groups_a_block + local;
    Lane<Kept> kept[NB][4];
    XDF_EACH_LANE(lane) {
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        XDF_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int unit = group * 16 + (lane >> 2) + r / 2 * 8;
          const int row = n * 8 + 2 * (lane & 3) + r % 2;
          if (row < active && unit < H) load(args, block, row, s, unit, kept[n][r][lane]);
        }
      }
    }
    Lane<Acc> sums[NB][4];
    XDF_EACH_LANE(lane) {
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        XDF_UNROLL
        for (int r = 0; r < 4; ++r) sums[n][r][lane] = Acc(0);
      }
    }
    if (later > 0)
      Products<P, NB>::backward(
          x, Common::weights_of(args, block, local),
          reinterpret_cast<const Store*>(block.shared + x.exchange_at[(s + 1) & 1]), later, sums);

    const int next_at = x.exchange_at[s & 1];
    XDF_EACH_LANE(lane) {
      XDF_UNROLL
      for (int n = 0; n < NB; ++n) {
        XDF_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int in_group = (lane >> 2) + r / 2 * 8, unit = group * 16 + in_group;
          const int row = n * 8 + 2 * (lane & 3) + r % 2;
          if (row < active && unit < H)
            finish(args, block, local * 16 + in_group, unit, row, s, next_at, kept[n][r][lane],
                   row < later ? sums[n][r][lane] : Acc(0));
        }
      }
    }
    push_group<P, true>(block, x, next_at, group, active);
  }

  static XDF_DEVICE void load(const Args& args, const Block& block, int row, int s, int unit,
                              Kept& kept) {
    const int H = args.x.hidden;
    const int64_t at = (Common::token(args, block, row, s) * 2 + block.y) * H + unit;
    const Quad<Acc> gates = reinterpret_cast<const Quad<Acc>*>(args.gates)[at];
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate) kept.gates[gate] = gates.v[gate];
    kept.cell = static_cast<const Acc*>(args.cells)[at];
    kept.grad = to_float(static_cast<const Store*>(args.grad_out)[at]);
    kept.before = Acc(0);
    if (s > 0) {
      const int64_t previous = (Common::token(args, block, row, s - 1) * 2 + block.y) * H + unit;
      kept.before = static_cast<const Acc*>(args.cells)[previous];
      prefetch(reinterpret_cast<const Quad<Acc>*>(args.gates) + previous);
      prefetch(static_cast<const Store*>(args.grad_out) + previous);
    }
  }

  static XDF_DEVICE void finish(const Args& args, const Block& block, int own_unit, int unit,
                                int row, int s, int next_at, const Kept& kept, Acc recurrent) {
    const Geometry& x = args.x;
    const Acc i = kept.gates[0], f = kept.gates[1], g = kept.gates[2], o = kept.gates[3];
    Acc& carried = reinterpret_cast<Acc*>(block.shared + x.cells_at)[own_unit * x.rows + row];
    Acc tanh_c;
    if constexpr (P::kTensor)
      tanh_c = fast_tanh(kept.cell);
    else
      tanh_c = exact_tanh(kept.cell);
    const Acc dh = kept.grad + recurrent;
    const Acc dc = carried + dh * o * (Acc(1) - tanh_c * tanh_c);
    carried = dc * f;
    const Acc dz[4] = {dc * g * i * (Acc(1) - i), dc * kept.before * f * (Acc(1) - f),
                       dc * i * (Acc(1) - g * g), dh * tanh_c * o * (Acc(1) - o)};
    Quad<Store> stored;
    Store* exchange = reinterpret_cast<Store*>(block.shared + next_at);
    XDF_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      stored.v[gate] = Rounded<Store>::of(dz[gate]);
      exchange[exchange_place<P>(x, row, unit * 4 + gate)] = stored.v[gate];
    }
    const int64_t at = (Common::token(args, block, row, s) * 2 + block.y) * x.hidden + unit;
    reinterpret_cast<Quad<Store>*>(args.grad_gates)[at] = stored;
  }
};

}  // namespace cuda
}  // namespace xdf
