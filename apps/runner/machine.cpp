#include "machine.h"

#include <dirent.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "errors.h"

namespace runner {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

double status_kb(const std::string& field) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.rfind(field + ":", 0) == 0) return std::strtod(line.c_str() + field.size() + 1, nullptr);
  return 0;
}

}  // namespace

std::vector<double> cpu_mhz() {
  std::vector<double> rates;
  for (int cpu = 0; cpu < 64; ++cpu) {
    const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
    const std::string line = first_line(base + "/cpufreq/scaling_cur_freq");
    if (!line.empty()) rates.push_back(std::strtod(line.c_str(), nullptr) / 1000);
  }
  return rates;
}

std::map<std::string, double> thermal_c() {
  std::map<std::string, double> zones;
  DIR* folder = opendir("/sys/class/thermal");
  if (!folder) return zones;
  while (const dirent* entry = readdir(folder)) {
    const std::string name = entry->d_name;
    if (name.rfind("thermal_zone", 0) != 0) continue;
    const std::string base = "/sys/class/thermal/" + name, temp = first_line(base + "/temp");
    if (!temp.empty()) zones[name + ":" + first_line(base + "/type")] = std::strtod(temp.c_str(), nullptr) / 1000;
  }
  closedir(folder);
  return zones;
}

double resident_kb() { return status_kb("VmRSS"); }
double peak_kb() { return status_kb("VmHWM"); }

void reset_peak() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5";
}

double process_peak_kb() {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)usage.ru_maxrss;
}

std::vector<int> affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

void pin(const std::vector<int>& cpus) {
  const std::vector<int> allowed = affinity();
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) {
    if (std::find(allowed.begin(), allowed.end(), cpu) == allowed.end())
      throw Failure(kUsage, "--cpus: CPU " + std::to_string(cpu) + " is not one this process may use");
    CPU_SET(cpu, &set);
  }
  if (sched_setaffinity(0, sizeof set, &set) != 0) throw Failure(kUsage, "--cpus: the system refused to pin");
}

const char* architecture() {
#if defined(__aarch64__)
  return "aarch64";
#elif defined(__x86_64__)
  return "x86_64";
#else
  return "other";
#endif
}

}  // namespace runner
