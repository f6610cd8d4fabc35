// edge_ibtm_runner: latency of ExecuTorch programs on the machine it runs on. See options.cpp for the flags.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>

#include "errors.h"
#include "json.h"
#include "machine.h"
#include "model.h"
#include "options.h"
#include "timing.h"

// The wheel exports these symbols but does not ship their header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace runner {
namespace {

using executorch::extension::threadpool::get_threadpool;

// The runtime aborts on what it takes for a programming error; the user gets a line and an exit code all the same.
void on_native_abort(int signal) {
  static const char message[] = "error: the native runtime aborted (damaged program or a bug in a kernel)\n";
  if (write(STDERR_FILENO, message, sizeof message - 1) < 0) _exit(kNativeAbort + 1);
  _exit(kNativeAbort);
}

void warm_up(Model& model, const Options& options) {
  std::vector<double> taken;
  const auto start = Clock::now();
  const bool exact = options.warmup_seconds == 0;
  while ((int)taken.size() < options.warmup || (!exact && !settled(taken))) {
    if ((int)taken.size() >= options.warmup && ms_since(start) > 1000 * options.warmup_seconds) break;
    taken.push_back(model.run());
  }
  model.warmup_runs = (int)taken.size();
  model.stable = settled(taken);
}

// One timed run of each model a round; the order rotates, so that no model always follows the same other one.
void sample(std::deque<Model>& models, const Options& options) {
  std::ofstream progress;
  if (!options.progress.empty()) {
    progress.open(options.progress, std::ios::app);
    if (!progress) throw Failure(kCannotWrite, "cannot write " + options.progress + ": " + std::strerror(errno));
  }
  const auto start = Clock::now();
  for (int round = 0; round < options.executions; ++round) {
    if (round >= 5 && options.seconds > 0 && ms_since(start) > 1000 * options.seconds) break;
    for (size_t step = 0; step < models.size(); ++step) {
      Model& model = models[(round + step) % models.size()];
      model.samples.push_back(model.run());
    }
    if (!progress.is_open()) continue;
    std::vector<double> row;
    for (const Model& model : models) row.push_back(model.samples.back());
    progress << numbers(row) << std::endl;
  }
}

std::string zones_json(const std::map<std::string, double>& zones) {
  Object object;
  for (const auto& [zone, celsius] : zones) object.add(zone, number(celsius));
  return object.str();
}

std::string model_json(const Model& model) {
  return Object()
      .add("model_path", quote(model.path))
      .add("bytes", std::to_string((long long)model.bytes))
      .add("load_ms", number(model.load_ms))
      .add("init_ms", number(model.init_ms))
      .add("first_ms", number(model.first_ms))
      .add("warmup_runs", std::to_string(model.warmup_runs))
      .add("stable", model.stable ? "true" : "false")
      .add("p50_ms", number(percentile(model.samples, 50)))
      .add("p90_ms", number(percentile(model.samples, 90)))
      .add("p99_ms", number(percentile(model.samples, 99)))
      .add("rss_growth_kb", number(model.growth_kb))
      .add("outputs", model.outputs_json())
      .add("samples_ms", numbers(model.samples))
      .str();
}

std::vector<std::string> inputs_of(const Options& options, size_t index) {
  if (options.inputs.empty()) return {};
  return options.inputs.size() == 1 ? options.inputs[0] : options.inputs[index];
}

void trace(const Options& options) {
  for (size_t i = 0; i < options.etdumps.size(); ++i) {
    Model model(options.models[i], inputs_of(options, i), options.etdumps[i]);
    for (int run = 1; run < options.traced; ++run) model.run();
    model.save_trace();
  }
}

void measure(const Options& options) {
  if (!options.cpus.empty()) pin(options.cpus);
  if (options.threads) get_threadpool()->_unsafe_reset_threadpool((uint32_t)options.threads);
  std::deque<Model> models;
  for (size_t i = 0; i < options.models.size(); ++i) {
    models.emplace_back(options.models[i], inputs_of(options, i));
    if (!options.outputs.empty()) models.back().save_outputs(options.outputs[i]);
  }
  for (Model& model : models) warm_up(model, options);
  const auto mhz = cpu_mhz();
  const auto zones = thermal_c();
  sample(models, options);
  Object report;
  std::vector<double> cpus;
  for (int cpu : affinity()) cpus.push_back(cpu);
  std::vector<std::string> rows;
  for (const Model& model : models) rows.push_back(model_json(model));
  report.add("runner", quote("edge_ibtm_runner"))
      .add("executorch", quote(EXECUTORCH_VERSION))
      .add("arch", quote(architecture()))
      .add("threads", std::to_string(get_threadpool()->get_thread_count()))
      .add("cpus", numbers(cpus))
      .add("cpu_mhz_before", numbers(mhz))
      .add("cpu_mhz_after", numbers(cpu_mhz()))
      .add("thermal_c_before", zones_json(zones))
      .add("thermal_c_after", zones_json(thermal_c()))
      .add("peak_rss_kb", number(process_peak_kb()));
  trace(options);
  if (!options.json_only)
    for (const Model& model : models)
      printf("%s: p50 %.3f ms, p90 %.3f, p99 %.3f (%zu runs, load %.1f, first %.1f)\n", model.path.c_str(),
             percentile(model.samples, 50), percentile(model.samples, 90), percentile(model.samples, 99),
             model.samples.size(), model.load_ms, model.first_ms);
  printf("%s\n", report.add("models", array(rows)).str().c_str());
}

}  // namespace
}  // namespace runner

int main(int argc, char** argv) {
  for (int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) ::signal(signal, runner::on_native_abort);
  try {
    const runner::Options options = runner::parse(argc, argv);
    if (options.help) {
      fputs(runner::usage(), stdout);
      return 0;
    }
    runner::measure(options);
  } catch (const runner::Failure& failure) {
    fprintf(stderr, "error: %s\n", failure.what());
    return failure.code;
  } catch (const std::exception& error) {
    fprintf(stderr, "error: %s\n", error.what());
    return runner::kRunFailed;
  }
  if (fflush(stdout) != 0 || ferror(stdout)) {
    fprintf(stderr, "error: cannot write the results to stdout\n");
    return runner::kCannotWrite;
  }
  return 0;
}
