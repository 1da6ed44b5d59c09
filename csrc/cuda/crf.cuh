// Linear-chain CRF: likelihood, gradient, marginals, Viterbi; xdf/crf.h says what they are, also
// where scores of -inf leave something to define.
//
// A warp takes a sequence, lane j its tags j, j + 32, ... All sums over paths are taken in log
// space,
//
//   alpha_t[j] = e_t[j] + log sum_i exp(alpha_{t-1}[i] + transitions[i, j])
//   beta_t[i]  = log sum_j exp(transitions[i, j] + e_{t+1}[j] + beta_{t+1}[j])
//
// with the largest term taken off before exponentials, exactly, for each tag. So nothing underflows
// that matters, and -inf needs no second path as on the CPU: a GPU has exponentials to spare, one
// sequence is latency anyway. Each row is kept with its largest value at 0; what was taken off is
// summed in double, so that precision does not fade with length. The gradient needs no such sum:
//
//   p_t[j]     = exp(alpha_t[j] + beta_t[j] - log sum_k exp(alpha_t[k] + beta_t[k]))
//   p_t[i, j]  = p_t[j] exp(alpha_{t-1}[i] + transitions[i, j] + e_t[j] - alpha_t[j] - taken_t)
//
// which hold whatever was taken off alpha and beta. A warp may take several sequences, `slots`
// apart; it sums their gradients of start, end and transitions, and crf_reduce sums those of all
// warps: an order that depends on the batch's size and num_tags alone.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/lstm_layout.cuh"

namespace xdf {
namespace cuda {

constexpr int kSharedTags = 32;  // up to here scores and rows live in shared memory
constexpr int kCrfWarps = 4;
constexpr int kViterbiShiftSteps = 16;  // as on the CPU, so that ties fall alike

enum class CrfTask { kLikelihood, kGradient, kMarginals, kViterbi };

template <class T>
struct CrfArgs {
  int num_tags;  // C
  int batch;
  int slots;  // warps that work
  int64_t total;
  const T* start;        // [C]
  const T* end;          // [C]
  const T* transitions;  // [C, C]
  const T* emissions;    // [total, C]
  const int32_t* cu_seqlens;
  const int32_t* tags;  // [total], of likelihood and gradient
  const T* grad_out;    // [B]
  T* out;               // likelihood and Viterbi score [B]; gradient, marginals [total, C]
  int32_t* best;        // Viterbi tags [total]
  // Workspace.
  T* alpha;           // [total, C], gradient and marginals
  T* taken;           // [total], likewise
  T* partial;         // gradient: [slots, C * C + 2 C]: transitions, start, end
  T* memory;          // C > kSharedTags: [slots, 2, C]
  uint16_t* pointer;  // Viterbi [total, C]
};

// Shared memory: transitions [C][C | 1], then for each warp two rows [C] and [C][C] of what its
// task needs.
template <class T>
XDF_HD int crf_warp_elements(int num_tags) {
  return num_tags * (num_tags + 2);
}
template <class T>
XDF_HD size_t crf_shared_bytes(int num_tags) {
  if (num_tags > kSharedTags) return 0;
  return sizeof(T) * static_cast<size_t>(num_tags * (num_tags | 1) +
                                         kCrfWarps * crf_warp_elements<T>(num_tags));
}

template <class T, CrfTask kTask, bool kShared>
struct Crf {
  using Args = CrfArgs<T>;
  static constexpr int kWarps = kCrfWarps;

  struct Model {
    int C;
    const T* transitions;
    int stride;  // odd in shared memory: rows and columns alike are then free of bank conflicts
    T* rows[2];
    T* extra;  // [C, C] of this warp: sums of moves, or pointers of some steps
  };

  static XDF_DEVICE int phases(const Args&, const Block&) { return kShared ? 2 : 1; }

  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int p) {
    const int C = args.num_tags, slot = block.x * block.warps + warp;
    if (kShared && p == 0) {
      T* to = reinterpret_cast<T*>(block.shared);
      XDF_EACH_LANE(lane) {
        for (int n = warp * kLanes + lane; n < C * C; n += block.warps * kLanes)
          to[n / C * (C | 1) + n % C] = args.transitions[n];
      }
      return;
    }
    if (slot >= args.slots) return;
    Model model;
    model.C = C;
    if constexpr (kShared) {
      T* shared = reinterpret_cast<T*>(block.shared);
      model.transitions = shared;
      model.stride = C | 1;
      model.rows[0] = shared + C * (C | 1) + warp * crf_warp_elements<T>(C);
      model.extra = model.rows[0] + 2 * C;
    } else {
      model.transitions = args.transitions;
      model.stride = C;
      model.rows[0] = args.memory + static_cast<int64_t>(slot) * 2 * C;
      model.extra = nullptr;
      if (kTask == CrfTask::kGradient) model.extra = partial_of(args, slot);
    }
    model.rows[1] = model.rows[0] + C;
    if constexpr (kTask == CrfTask::kGradient) clear(args, model, slot);
    for (int b = slot; b < args.batch; b += args.slots) {
      const Sequence sequence = sequence_of(args.cu_seqlens, b, args.total);
      if constexpr (kTask == CrfTask::kLikelihood) {
        likelihood(args, model, b, sequence);
      } else if constexpr (kTask == CrfTask::kViterbi) {
        viterbi(args, model, b, sequence);
      } else {
        gradient(args, model, b, sequence, slot);
      }
      warp_sync();  // the rows are written anew
    }
    if constexpr (kTask == CrfTask::kGradient && kShared) {
      T* partial = partial_of(args, slot);
      XDF_EACH_LANE(lane) {
        for (int n = lane; n < C * C; n += kLanes) partial[n] = model.extra[n];
      }
    }
  }

  static XDF_DEVICE T* partial_of(const Args& args, int slot) {
    const int C = args.num_tags;
    return args.partial + static_cast<int64_t>(slot) * (static_cast<int64_t>(C) * C + 2 * C);
  }
  static XDF_DEVICE void clear(const Args& args, const Model& model, int slot) {
    const int64_t moves = static_cast<int64_t>(model.C) * model.C;
    T* partial = partial_of(args, slot);
    XDF_EACH_LANE(lane) {
      for (int64_t n = lane; n < moves; n += kLanes) model.extra[n] = T(0);
      for (int64_t n = lane; n < 2 * model.C; n += kLanes) partial[moves + n] = T(0);
    }
    warp_sync();
  }

  // --- rows ------------------------------------------------------------------------------------

  static XDF_DEVICE T none() { return T(-INFINITY); }

  // log sum exp over n terms; term(k) is asked twice.
  template <class Term>
  static XDF_DEVICE T log_sum(int n, Term term) {
    T largest = none();
    XDF_PIPELINE
    for (int k = 0; k < n; ++k) {
      const T x = term(k);
      largest = x > largest ? x : largest;
    }
    if (!(largest > none())) return none();
    T sum = T(0);
    XDF_PIPELINE
    for (int k = 0; k < n; ++k) sum += exp_of(term(k) - largest);
    return largest + log_of(sum);
  }

  // Takes the largest value of a row off all; returns it. `largest`: of a lane's own tags.
  static XDF_DEVICE T normalise(const Model& model, T* row, Lane<T>& largest) {
    warp_reduce(largest, Larger<T>());
    T taken = none();
    XDF_EACH_LANE(lane) {
      taken = largest[lane];
      if (taken > none())
        for (int j = lane; j < model.C; j += kLanes) row[j] -= taken;
    }
    warp_sync();
    return taken;
  }

  static XDF_DEVICE T first_row(const Args& args, const Model& model, const T* e, T* to) {
    Lane<T> largest;
    XDF_EACH_LANE(lane) {
      largest[lane] = none();
      for (int j = lane; j < model.C; j += kLanes) {
        to[j] = args.start[j] + e[j];
        largest[lane] = to[j] > largest[lane] ? to[j] : largest[lane];
      }
    }
    return normalise(model, to, largest);
  }

  static XDF_DEVICE T forward_row(const Model& model, const T* from, const T* e, T* to) {
    Lane<T> largest;
    XDF_EACH_LANE(lane) {
      largest[lane] = none();
      for (int j = lane; j < model.C; j += kLanes) {
        const T* column = model.transitions + j;
        const int stride = model.stride;
        const T emission = e[j];
        const T value =
            emission + log_sum(model.C, [&](int i) { return from[i] + column[i * stride]; });
        to[j] = value;
        largest[lane] = value > largest[lane] ? value : largest[lane];
      }
    }
    return normalise(model, to, largest);
  }

  // later[j] = e_{t+1}[j] + beta_{t+1}[j] is written over beta.
  static XDF_DEVICE void backward_row(const Model& model, T* later, const T* e, T* to) {
    XDF_EACH_LANE(lane) {
      for (int j = lane; j < model.C; j += kLanes) later[j] += e[j];
    }
    warp_sync();
    Lane<T> largest;
    XDF_EACH_LANE(lane) {
      largest[lane] = none();
      for (int i = lane; i < model.C; i += kLanes) {
        const T* row = model.transitions + i * model.stride;
        const T value = log_sum(model.C, [&](int j) { return row[j] + later[j]; });
        to[i] = value;
        largest[lane] = value > largest[lane] ? value : largest[lane];
      }
    }
    normalise(model, to, largest);
  }

  // log sum_j exp(a[j] + b[j]) over the tags of all lanes.
  static XDF_DEVICE T log_sum_rows(const Model& model, const T* a, const T* b) {
    Lane<T> largest, sum;
    XDF_EACH_LANE(lane) {
      largest[lane] = none();
      for (int j = lane; j < model.C; j += kLanes) {
        const T x = a[j] + b[j];
        largest[lane] = x > largest[lane] ? x : largest[lane];
      }
    }
    warp_reduce(largest, Larger<T>());
    XDF_EACH_LANE(lane) {
      sum[lane] = T(0);
      if (largest[lane] > none())
        for (int j = lane; j < model.C; j += kLanes)
          sum[lane] += exp_of(a[j] + b[j] - largest[lane]);
    }
    warp_reduce(sum, Sum<T>());
    T result = none();
    XDF_EACH_LANE(lane) {
      if (largest[lane] > none()) result = largest[lane] + log_of(sum[lane]);
    }
    return result;
  }

  // Score of the tags; NaN if one is none.
  static XDF_DEVICE double path_score(const Args& args, const Model& model,
                                      const Sequence& sequence, const int32_t* tags) {
    Lane<double> score;
    XDF_EACH_LANE(lane) {
      score[lane] = 0.0;
      for (int t = lane; t < sequence.length; t += kLanes) {
        const int64_t at = static_cast<int64_t>(sequence.first) + t;
        const int tag = tags[at], before = t == 0 ? 0 : tags[at - 1];
        if (tag < 0 || tag >= model.C || before < 0 || before >= model.C) {
          score[lane] = static_cast<double>(NAN);
        } else {
          score[lane] += to_float(args.emissions[at * model.C + tag]);
          score[lane] +=
              to_float(t == 0 ? args.start[tag] : model.transitions[before * model.stride + tag]);
          if (t == sequence.length - 1) score[lane] += to_float(args.end[tag]);
        }
      }
    }
    warp_reduce(score, Sum<double>());
    double result = 0.0;
    XDF_EACH_LANE(lane) {
      result = score[lane];
    }
    return result;
  }

  // --- tasks -----------------------------------------------------------------------------------

  static XDF_DEVICE void likelihood(const Args& args, const Model& model, int b,
                                    const Sequence& sequence) {
    const int C = model.C;
    double result = 0.0;
    if (sequence.length > 0) {
      const double score = path_score(args, model, sequence, args.tags);
      const T* e = args.emissions + static_cast<int64_t>(sequence.first) * C;
      T taken = first_row(args, model, e, model.rows[0]);
      double log_z = to_float(taken);
      int at = 0;
      for (int t = 1; t < sequence.length && taken > none(); ++t, at ^= 1) {
        e += C;
        taken = forward_row(model, model.rows[at], e, model.rows[at ^ 1]);
        log_z += to_float(taken);
      }
      log_z += to_float(log_sum_rows(model, model.rows[at], args.end));
      // Without a possible path log Z and the score are both -inf.
      result = score > static_cast<double>(none()) ? score - log_z : score;
    }
    XDF_EACH_LANE(lane) {
      if (lane == 0) args.out[b] = static_cast<T>(result);
    }
  }

  static XDF_DEVICE void gradient(const Args& args, const Model& model, int b,
                                  const Sequence& sequence, int slot) {
    if (sequence.length == 0) return;
    constexpr bool kWithTags = kTask == CrfTask::kGradient;
    const int C = model.C, length = sequence.length;
    const int64_t first = sequence.first;
    const T* emissions = args.emissions + first * C;
    T* alpha = args.alpha + first * C;
    T* taken = args.taken + first;
    T* rows = args.out + first * C;
    T last_taken = first_row(args, model, emissions, alpha);
    for (int t = 1; t < length && last_taken > none(); ++t) {
      last_taken =
          forward_row(model, alpha + static_cast<int64_t>(t - 1) * C,
                      emissions + static_cast<int64_t>(t) * C, alpha + static_cast<int64_t>(t) * C);
      XDF_EACH_LANE(lane) {
        if (lane == 0) taken[t] = last_taken;
      }
    }
    warp_sync();
    T possible = last_taken;
    if (possible > none())
      possible = log_sum_rows(model, alpha + static_cast<int64_t>(length - 1) * C, args.end);
    if (!(possible > none())) {
      XDF_EACH_LANE(lane) {
        for (int64_t n = lane; n < static_cast<int64_t>(length) * C; n += kLanes) rows[n] = T(0);
      }
      return;
    }

    const T weight = kWithTags ? args.grad_out[b] : T(-1);
    XDF_EACH_LANE(lane) {
      for (int j = lane; j < C; j += kLanes) model.rows[0][j] = args.end[j];
    }
    warp_sync();
    int at = 0;
    for (int t = length - 1; t >= 0; --t, at ^= 1) {
      const T* a = alpha + static_cast<int64_t>(t) * C;
      const T* e = emissions + static_cast<int64_t>(t) * C;
      T* beta = model.rows[at];
      const T all = log_sum_rows(model, a, beta);
      const int tag = kWithTags ? args.tags[first + t] : -1;
      const int before = kWithTags && t > 0 ? args.tags[first + t - 1] : -1;
      XDF_EACH_LANE(lane) {
        for (int j = lane; j < C; j += kLanes) {
          const T probability = exp_of(a[j] + beta[j] - all);
          const T row = -weight * probability + (j == tag ? weight : T(0));
          rows[static_cast<int64_t>(t) * C + j] = row;
          if constexpr (kWithTags) {
            T* ends = partial_of(args, slot) + static_cast<int64_t>(C) * C;
            if (t == 0) ends[j] += row;
            if (t == length - 1) ends[C + j] += row;
            if (t > 0) {
              T* moves = model.extra + j;
              const T share = -weight * probability;
              if (probability > T(0)) {
                const T* from = a - C;
                const T* column = model.transitions + j;
                const T rest = e[j] - a[j] - taken[t];
                XDF_PIPELINE
                for (int i = 0; i < C; ++i)
                  moves[static_cast<int64_t>(i) * C] +=
                      share * exp_of(from[i] + column[i * model.stride] + rest);
              }
              if (j == tag && before >= 0 && before < C)
                moves[static_cast<int64_t>(before) * C] += weight;
            }
          }
        }
      }
      if (t > 0) backward_row(model, beta, e, model.rows[at ^ 1]);
    }
  }

  static XDF_DEVICE void viterbi(const Args& args, const Model& model, int b,
                                 const Sequence& sequence) {
    const int C = model.C, length = sequence.length;
    if (length == 0) {
      XDF_EACH_LANE(lane) {
        if (lane == 0) args.out[b] = T(0);
      }
      return;
    }
    const int64_t first = sequence.first;
    XDF_EACH_LANE(lane) {
      for (int j = lane; j < C; j += kLanes)
        model.rows[0][j] = args.start[j] + args.emissions[first * C + j];
    }
    warp_sync();
    int at = 0;
    for (int t = 1; t < length; ++t, at ^= 1) {
      const T* from = model.rows[at];
      T* to = model.rows[at ^ 1];
      const T* e = args.emissions + (first + t) * C;
      uint16_t* pointer = args.pointer + (first + t) * C;
      Lane<T> largest;
      XDF_EACH_LANE(lane) {
        largest[lane] = none();
        for (int j = lane; j < C; j += kLanes) {
          const T* column = model.transitions + j;
          T best = none();
          int which = 0;
          XDF_PIPELINE
          for (int i = 0; i < C; ++i) {
            const T x = from[i] + column[i * model.stride];
            which = x > best ? i : which;
            best = x > best ? x : best;
          }
          to[j] = best + e[j];
          pointer[j] = static_cast<uint16_t>(which);
          largest[lane] = to[j] > largest[lane] ? to[j] : largest[lane];
        }
      }
      if (t % kViterbiShiftSteps == 0)
        normalise(model, to, largest);
      else
        warp_sync();
    }

    // The last tag: each lane's best, then the best of all, the lower tag of equal ones.
    Lane<T> best;
    Lane<int> tag;
    XDF_EACH_LANE(lane) {
      best[lane] = none();
      tag[lane] = C;
      for (int j = lane; j < C; j += kLanes) {
        const T x = model.rows[at][j] + args.end[j];
        if (x > best[lane]) {
          best[lane] = x;
          tag[lane] = j;
        }
      }
    }
    Lane<T> highest = best;
    warp_reduce(highest, Larger<T>());
    XDF_EACH_LANE(lane) {
      if (!(best[lane] == highest[lane])) tag[lane] = C;
    }
    warp_reduce(tag, Smaller());
    int last = C;
    XDF_EACH_LANE(lane) {
      last = tag[lane];
    }
    int32_t* tags = args.best + first;
    if (last >= C) {
      XDF_EACH_LANE(lane) {
        for (int t = lane; t < length; t += kLanes) tags[t] = 0;
        if (lane == 0) args.out[b] = none();
      }
      return;
    }
    way_back(args, model, sequence, last, tags);
    const double score = path_score(args, model, sequence, args.best);
    XDF_EACH_LANE(lane) {
      if (lane == 0) args.out[b] = static_cast<T>(score);
    }
  }

  struct Smaller {
    XDF_DEVICE int operator()(int a, int b) const { return a < b ? a : b; }
  };

  // Follows the pointers. In shared memory some steps of them are fetched at once, since to follow
  // them through global memory would cost its latency a step.
  static XDF_DEVICE void way_back(const Args& args, const Model& model, const Sequence& sequence,
                                  int last, int32_t* tags) {
    const int C = model.C;
    const uint16_t* pointers = args.pointer + static_cast<int64_t>(sequence.first) * C;
    uint16_t* some = reinterpret_cast<uint16_t*>(model.extra);
    int tag = last;
    for (int stop = sequence.length; stop > 0;) {
      // Steps [begin, stop): as many as `extra` has room for.
      const int steps = C * static_cast<int>(sizeof(T) / sizeof(uint16_t));
      const int begin = !kShared || stop <= steps ? 0 : stop - steps;
      if (kShared) {
        warp_sync();
        XDF_EACH_LANE(lane) {
          for (int n = (begin > 0 ? 0 : C) + lane; n < (stop - begin) * C; n += kLanes)
            some[n] = pointers[static_cast<int64_t>(begin) * C + n];
        }
        warp_sync();
      }
      const uint16_t* from = kShared ? some : pointers;
      // All lanes go the same way; the first one writes.
      int at = tag;
      XDF_EACH_LANE(lane) {
        at = tag;
        for (int t = stop - 1; t >= begin; --t) {
          if (lane == 0) tags[t] = at;
          if (t > 0) at = from[static_cast<int64_t>(t - begin) * C + at];
        }
      }
      tag = at;
      stop = begin;
    }
    warp_sync();
  }
};

// Sums the warps' partial gradients: out[n] for n < C * C + 2 C, into three arrays.
template <class T>
struct CrfReduce {
  struct Args {
    int num_tags, slots;
    const T* partial;
    T* transitions;
    T* start;
    T* end;
  };
  static constexpr int kWarps = 4;
  static XDF_DEVICE int phases(const Args&, const Block&) { return 1; }
  static XDF_DEVICE void phase(const Args& args, const Block& block, int warp, int) {
    const int64_t C = args.num_tags, moves = C * C, width = moves + 2 * C;
    const int64_t n = static_cast<int64_t>(block.x) * block.warps + warp;
    if (n >= width) return;
    Lane<double> sum;
    XDF_EACH_LANE(lane) {
      sum[lane] = 0.0;
      XDF_PIPELINE
      for (int slot = lane; slot < args.slots; slot += kLanes)
        sum[lane] += to_float(args.partial[slot * width + n]);
    }
    warp_reduce(sum, Sum<double>());
    XDF_EACH_LANE(lane) {
      if (lane == 0) {
        T* to = n < moves       ? args.transitions + n
                : n < moves + C ? args.start + (n - moves)
                                : args.end + (n - moves - C);
        *to = static_cast<T>(sum[lane]);
      }
    }
  }
};

}  // namespace cuda
}  // namespace xdf
