#include "options.h"

#include <sys/stat.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <sstream>

#include "errors.h"

namespace runner {
namespace {

bool exists(const std::string& path) {
  struct stat found;
  return stat(path.c_str(), &found) == 0;
}

// A list at commas, unless the whole text is the name of a file.
std::vector<std::string> files(const std::string& text) {
  if (exists(text)) return {text};
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

double number(const std::string& flag, const std::string& text, double least) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= least) || value > 1e9)
    throw Failure(kUsage, flag + " " + text + " is not a number of at least " + std::to_string((int)least));
  return value;
}

std::vector<int> cpu_list(const std::string& flag, const std::string& text) {
  std::vector<int> cpus;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) cpus.push_back((int)number(flag, part, 0));
  return cpus;
}

void append(std::vector<std::string>& to, const std::vector<std::string>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

void check(const Options& options) {
  if (options.models.empty()) throw Failure(kUsage, "no --model_path; give a .pte file (--help lists the flags)");
  const size_t models = options.models.size();
  if (options.inputs.size() > 1 && options.inputs.size() != models)
    throw Failure(kUsage, "--inputs given " + std::to_string(options.inputs.size()) + " times for " +
                              std::to_string(models) + " models; give it once, or once for each");
  for (auto [flag, count] : {std::pair("--output_file", options.outputs.size()),
                             std::pair("--etdump_path", options.etdumps.size())})
    if (count && count != models)
      throw Failure(kUsage, std::string(flag) + " names " + std::to_string(count) + " files for " +
                                std::to_string(models) + " models; name one for each");
}

}  // namespace

Options parse(int argc, char** argv) {
  Options options;
  using Setter = std::function<void(const std::string&, const std::string&)>;
  const std::map<std::string, Setter> setters = {
      {"--model_path", [&](auto&, auto& v) { append(options.models, files(v)); }},
      {"--inputs", [&](auto&, auto& v) { options.inputs.push_back(files(v)); }},
      {"--output_file", [&](auto&, auto& v) { options.outputs.push_back(v); }},
      {"--etdump_path", [&](auto&, auto& v) { options.etdumps.push_back(v); }},
      {"--progress_file", [&](auto&, auto& v) { options.progress = v; }},
      {"--cpus", [&](auto& f, auto& v) { options.cpus = cpu_list(f, v); }},
      {"--warmup", [&](auto& f, auto& v) { options.warmup = (int)number(f, v, 0); }},
      {"--warmup_seconds", [&](auto& f, auto& v) { options.warmup_seconds = number(f, v, 0); }},
      {"--num_executions", [&](auto& f, auto& v) { options.executions = (int)number(f, v, 1); }},
      {"--seconds", [&](auto& f, auto& v) { options.seconds = number(f, v, 0); }},
      {"--cpu_threads", [&](auto& f, auto& v) { options.threads = (int)number(f, v, 0); }},
      {"--etdump_runs", [&](auto& f, auto& v) { options.traced = (int)number(f, v, 1); }},
  };
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i], value;
    if (flag == "--json") {
      options.json_only = true;
      continue;
    }
    if (flag == "--help" || flag == "-h") {
      options.help = true;
      return options;
    }
    const size_t equals = flag.find('=');
    const bool joined = flag.rfind("--", 0) == 0 && equals != std::string::npos;
    if (joined) value = flag.substr(equals + 1), flag = flag.substr(0, equals);
    const auto setter = setters.find(flag);
    if (setter == setters.end()) throw Failure(kUsage, "unknown argument " + flag + " (--help lists the flags)");
    if (!joined) {
      if (i + 1 >= argc) throw Failure(kUsage, flag + " needs a value");
      value = argv[++i];
    }
    setter->second(flag, value);
  }
  check(options);
  return options;
}

const char* usage() {
  return "edge_ibtm_runner: latency of ExecuTorch programs; prints one line of JSON (times in ms)\n"
         "  --model_path A.pte[,B.pte]  programs, run round-robin; may be repeated\n"
         "  --inputs X.bin[,Y.bin]      raw input tensors of a program; once for all, or once for each (default: noise)\n"
         "  --output_file OUT.bin       raw output tensors, one after the other; once for each program\n"
         "  --warmup N                  least number of untimed runs (5)\n"
         "  --warmup_seconds S          wait at most this long for stable runs (10); 0: exactly --warmup runs\n"
         "  --num_executions N          timed runs of each program (50)\n"
         "  --seconds S                 stop sampling after this long (0: never)\n"
         "  --cpu_threads N             threads of the runtime (0: its choice)\n"
         "  --cpus 4,5,6,7              pin to these CPUs\n"
         "  --etdump_path OUT.etdp      trace operators after timing; once for each program\n"
         "  --etdump_runs N             traced runs (10)\n"
         "  --progress_file FILE        append the samples of each round as it ends\n"
         "  --json                      print the JSON line only\n"
         "exit codes: 2 usage, 3 bad program, 4 bad input, 5 run failed, 6 cannot write, 7 native abort\n";
}

}  // namespace runner
