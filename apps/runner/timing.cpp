#include "timing.h"

#include <algorithm>
#include <cmath>

namespace runner {

double percentile(std::vector<double> samples, double q) {
  if (samples.empty()) return NAN;
  std::sort(samples.begin(), samples.end());
  const double rank = q / 100 * (samples.size() - 1);
  const size_t low = (size_t)rank, high = std::min(low + 1, samples.size() - 1);
  return samples[low] + (rank - low) * (samples[high] - samples[low]);
}

bool settled(const std::vector<double>& samples) {
  const size_t window = 5;
  if (samples.size() < 2 * window) return false;
  const auto end = samples.end();
  const double before = percentile({end - 2 * window, end - window}, 50), now = percentile({end - window, end}, 50);
  return std::fabs(now - before) <= 0.05 * before;
}

}  // namespace runner
