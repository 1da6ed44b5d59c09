// The same student on every instruction set that the machine has: scores as those of the generic
// set, and a sequence's the same to the bit alone and among others. Without Python, so that it
// also runs on a processor that is only emulated (make aarch64).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/student.h"

namespace {

using xdf::Precision;

// Sizes that fill neither registers nor chunks.
constexpr int kVocab = 50, kEmbedding = 21, kHidden = 45, kTags = 9, kProjected = 70;
constexpr int32_t kLengths[] = {7, 1, 0, 40, 13, 13, 2, 25, 1, 3, 60};

std::vector<float> random_floats(std::mt19937& rng, size_t size, float scale) {
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<float> values(size);
  for (float& value : values) value = uniform(rng);
  return values;
}

// A weight matrix [N, K] as floats and as bytes with the scales of its rows.
struct Matrix {
  Matrix(std::mt19937& rng, int N, int K)
      : floats(random_floats(rng, static_cast<size_t>(N * K), 0.4f)),
        bytes(floats.size()),
        scales(static_cast<size_t>(N)) {
    xdf::quantize_rows(floats.data(), N, K, bytes.data(), scales.data());
  }
  std::vector<float> floats;
  std::vector<int8_t> bytes;
  std::vector<float> scales;
};

struct Direction {
  explicit Direction(std::mt19937& rng)
      : w_ih(random_floats(rng, 4 * kHidden * kEmbedding, 0.4f)),
        bias(random_floats(rng, 4 * kHidden, 0.4f)),
        w_hh(rng, 4 * kHidden, kHidden) {}
  xdf::TokenBiLstm::Direction view(bool int8) const {
    return {w_ih.data(), bias.data(), int8 ? nullptr : w_hh.floats.data(),
            int8 ? w_hh.bytes.data() : nullptr, int8 ? w_hh.scales.data() : nullptr};
  }
  std::vector<float> w_ih, bias;
  Matrix w_hh;
};

struct Student {
  explicit Student(std::mt19937& rng)
      : embedding(random_floats(rng, kVocab * kEmbedding, 1)),
        forward(rng),
        reverse(rng),
        projection(rng, kProjected, 2 * kHidden),
        projection_bias(random_floats(rng, kProjected, 0.4f)),
        output(rng, kTags, 2 * kHidden),
        projected_output(rng, kTags, kProjected),
        bias(random_floats(rng, kTags, 0.4f)) {}

  static xdf::StudentWeights::Layer layer(const Matrix& weight, const std::vector<float>& bias,
                                          bool int8) {
    return {static_cast<int>(bias.size()), int8 ? nullptr : weight.floats.data(),
            int8 ? weight.bytes.data() : nullptr, int8 ? weight.scales.data() : nullptr,
            bias.data()};
  }

  // Packed for the active set. Half of the ids have no row in the table.
  xdf::StudentWeights weights(Precision precision, bool projected) const {
    const bool int8 = precision == Precision::kInt8;
    std::vector<int32_t> table_ids;
    for (int32_t id = 0; id < kVocab; id += 2) table_ids.push_back(id);
    const xdf::StudentWeights::Layer middle = layer(projection, projection_bias, int8);
    return {precision,
            {kVocab, kEmbedding, kHidden},
            embedding.data(),
            forward.view(int8),
            reverse.view(int8),
            projected ? &middle : nullptr,
            layer(projected ? projected_output : output, bias, int8),
            xdf::Pooling::kNone,
            table_ids.data(),
            static_cast<int64_t>(table_ids.size()),
            1};
  }

  std::vector<float> embedding;
  Direction forward, reverse;
  Matrix projection;
  std::vector<float> projection_bias;
  Matrix output, projected_output;
  std::vector<float> bias;
};

struct Case {
  const char* name;
  Precision precision;
  bool projected;
  // On scores of size 1. What is rounded to fewer bits may fall on either side of a tie.
  float tolerance;
};
constexpr Case kCases[] = {{"float32", Precision::kFloat32, false, 1e-5f},
                           {"bfloat16", Precision::kBf16, false, 1e-3f},
                           {"int8", Precision::kInt8, false, 2e-2f},
                           {"float32, projected", Precision::kFloat32, true, 1e-5f},
                           {"bfloat16, projected", Precision::kBf16, true, 1e-3f},
                           {"int8, projected", Precision::kInt8, true, 2e-2f}};

float max_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float difference = std::abs(a[i] - b[i]);
    if (std::isnan(difference)) return difference;
    most = std::max(most, difference);
  }
  return most;
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  const Student student(rng);
  std::vector<int32_t> cu_seqlens = {0};
  for (const int32_t length : kLengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  const int batch = static_cast<int>(cu_seqlens.size()) - 1;
  const size_t total = static_cast<size_t>(cu_seqlens.back());
  std::vector<int32_t> ids(total);
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % kVocab);

  bool good = true;
  for (const Case& test : kCases) {
    std::vector<float> expected;
    for (const std::string& isa : xdf::isas_available()) {
      xdf::set_isa(isa);
      const xdf::StudentWeights weights = student.weights(test.precision, test.projected);
      std::vector<float> scores(total * kTags), alone(total * kTags);
      weights.forward(ids.data(), cu_seqlens.data(), batch, scores.data(), 2);
      for (int b = 0; b < batch; ++b) {
        const int32_t first = cu_seqlens[static_cast<size_t>(b)], one[] = {0, kLengths[b]};
        weights.forward(ids.data() + first, one, 1, alone.data() + first * kTags, 1);
      }
      if (expected.empty()) expected = scores;
      const float difference = max_difference(scores, expected);
      const bool agrees = difference <= test.tolerance;
      const bool same = std::memcmp(scores.data(), alone.data(), total * kTags * 4) == 0;
      std::printf("%-9s %-11s differs from generic by %.1e: %s; batch and single: %s\n", test.name,
                  isa.c_str(), static_cast<double>(difference), agrees ? "ok" : "TOO MUCH",
                  same ? "the same bits" : "DIFFERENT");
      good = good && agrees && same;
    }
  }
  return good ? 0 : 1;
}
