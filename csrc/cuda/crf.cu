// Launches of the CRF kernels.
#include "cuda/crf.cuh"

#include "cuda/api.h"

namespace xdf {
namespace cuda {
namespace {

template <class T, CrfTask kTask>
void run(const CrfArgs<T>& args, Stream stream) {
  const int blocks = divide_up(args.slots, kCrfWarps);
  if (args.num_tags <= kSharedTags)
    launch<Crf<T, kTask, true>>(args, {blocks, 1, kCrfWarps, 1, crf_shared_bytes<T>(args.num_tags)},
                                stream);
  else
    launch<Crf<T, kTask, false>>(args, {blocks, 1, kCrfWarps, 1, 0}, stream);
}

}  // namespace

// Enough warps to fill a GPU, but no more than 64 Mi elements of their sums.
int crf_slots(int num_tags, int batch) {
  const int64_t C = num_tags, limit = (int64_t{1} << 26) / (C * C + 2 * C);
  const int64_t most = limit < 1 ? 1 : limit > 4096 ? 4096 : limit;
  return static_cast<int>(batch < most ? batch : most);
}

template <class T>
void crf_run(CrfTask task, const CrfArgs<T>& args, const CrfModelGrads<T>& grads, Stream stream) {
  switch (task) {
    case CrfTask::kLikelihood:
      return run<T, CrfTask::kLikelihood>(args, stream);
    case CrfTask::kMarginals:
      return run<T, CrfTask::kMarginals>(args, stream);
    case CrfTask::kViterbi:
      return run<T, CrfTask::kViterbi>(args, stream);
    case CrfTask::kGradient: {
      run<T, CrfTask::kGradient>(args, stream);
      using Reduce = CrfReduce<T>;
      const int width = args.num_tags * (args.num_tags + 2);
      launch<Reduce>(
          {args.num_tags, args.slots, args.partial, grads.transitions, grads.start, grads.end},
          {divide_up(width, Reduce::kWarps), 1, Reduce::kWarps, 1, 0}, stream);
    }
  }
}

template void crf_run<float>(CrfTask, const CrfArgs<float>&, const CrfModelGrads<float>&, Stream);
template void crf_run<double>(CrfTask, const CrfArgs<double>&, const CrfModelGrads<double>&,
                              Stream);

}  // namespace cuda
}  // namespace xdf
