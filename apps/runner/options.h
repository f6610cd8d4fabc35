// Command line of the runner, in the style of ExecuTorch's executor_runner.
#pragma once
#include <string>
#include <vector>

namespace runner {

struct Options {
  std::vector<std::string> models;                // --model_path a.pte,b.pte or repeated
  std::vector<std::vector<std::string>> inputs;   // --inputs x.bin,y.bin: raw tensors of one model, repeat per model
  std::vector<std::string> outputs;               // --output_file, one per model: raw tensors, one after the other
  std::vector<std::string> etdumps;               // --etdump_path, one per model
  std::string progress;                           // --progress_file: one line of samples a round, as they are taken
  std::vector<int> cpus;                          // --cpus 4,5: pin the process
  int warmup = 5;                                 // --warmup: least number of untimed runs
  double warmup_seconds = 10;                     // --warmup_seconds: give up waiting for stable runs; 0: exactly --warmup
  int executions = 50;                            // --num_executions: timed runs of each model
  double seconds = 0;                             // --seconds: stop sampling after this long; 0: never
  int threads = 0;                                // --cpu_threads; 0: the runtime's choice
  int traced = 10;                                // --etdump_runs
  bool json_only = false;                         // --json: nothing but the JSON line on stdout
  bool help = false;
};

// Throws Failure(kUsage) that names the flag.
Options parse(int argc, char** argv);
const char* usage();

}  // namespace runner
