// Percentiles, and when a warm-up may end. The same rules as edge_ibtm/probe/statistics.py.
#pragma once
#include <chrono>
#include <vector>

namespace runner {

using Clock = std::chrono::steady_clock;

inline double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

double percentile(std::vector<double> samples, double q);  // q in 0..100, linear between order statistics
bool settled(const std::vector<double>& samples);          // medians of the last two windows of 5 agree within 5 %

}  // namespace runner
