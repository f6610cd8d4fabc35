// One ExecuTorch program: checked, loaded, fed, run.
#pragma once
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace runner {

class Model {
 public:
  // inputs: raw little-endian tensors, one file an input; empty makes noise. trace_to: write an ETDump there.
  // Throws Failure(kBadModel, kBadInput or kRunFailed).
  Model(const std::string& path, const std::vector<std::string>& inputs, const std::string& trace_to = "");

  double run();                                   // one inference, ms
  void save_outputs(const std::string& path);     // of the last run; throws Failure(kCannotWrite)
  void save_trace();                              // throws Failure(kCannotWrite)
  std::string outputs_json() const;               // [{"dtype":..,"shape":[..],"nbytes":..}]

  const std::string path;
  double load_ms = 0, init_ms = 0, first_ms = 0, growth_kb = 0, bytes = 0;
  int warmup_runs = 0;
  bool stable = false;
  std::vector<double> samples;

 private:
  void load();
  void feed(const std::vector<std::string>& files);

  std::string trace_to_;
  std::unique_ptr<executorch::extension::Module> module_;
  std::vector<std::vector<uint8_t>> buffers_;
  std::vector<executorch::extension::TensorPtr> tensors_;
  std::vector<executorch::runtime::EValue> arguments_, results_;
};

void write_file(const std::string& path, const void* data, size_t size);

}  // namespace runner
