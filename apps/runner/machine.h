// State of the machine: clocks, temperatures, memory, affinity. What cannot be read is left out.
#pragma once
#include <map>
#include <string>
#include <vector>

namespace runner {

std::vector<double> cpu_mhz();                // cpufreq, one a CPU
std::map<std::string, double> thermal_c();    // zone -> degrees Celsius
double resident_kb();                         // now
double peak_kb();                             // since start, or since reset_peak()
void reset_peak();
double process_peak_kb();                     // since start
std::vector<int> affinity();                  // CPUs this process may use
void pin(const std::vector<int>& cpus);       // throws Failure(kUsage)
const char* architecture();

}  // namespace runner
