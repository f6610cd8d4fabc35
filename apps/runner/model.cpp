#include "model.h"

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/runtime/core/error.h>
#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "errors.h"
#include "json.h"
#include "machine.h"
#include "timing.h"

namespace runner {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::Error;

namespace {

std::string shape_of(const executorch::runtime::TensorInfo& info) {
  std::vector<std::string> sizes;
  for (int32_t size : info.sizes()) sizes.push_back(std::to_string(size));
  return array(sizes) + " " + executorch::runtime::toString(info.scalar_type());
}

uint64_t little_endian(const uint8_t* at, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) value = value << 8 | at[i];
  return value;
}

// The header of a program holds its length: a file that was cut short must not reach the runtime, which maps it.
double check_header(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Failure(kBadModel, path + ": " + std::strerror(errno));
  const auto size = (uint64_t)file.tellg();
  uint8_t head[64] = {};
  file.seekg(0);
  file.read((char*)head, sizeof head);
  if (size < 8 || head[4] != 'E' || head[5] != 'T')
    throw Failure(kBadModel, path + " is not an ExecuTorch program (no ET magic)");
  uint64_t whole = 64;
  if (std::memcmp(head + 8, "eh00", 4) == 0) {
    const uint64_t program = little_endian(head + 16, 8), segments = little_endian(head + 24, 8);
    const uint64_t data = little_endian(head + 12, 4) >= 32 ? little_endian(head + 32, 8) : 0;
    whole = std::max(program, segments + data);
  }
  if (size < whole)
    throw Failure(kBadModel, path + " is cut short: " + std::to_string(size) + " of " + std::to_string(whole) + " bytes");
  return (double)size;
}

std::vector<uint8_t> read_input(const std::string& path, size_t bytes, const std::string& shape) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Failure(kBadInput, path + ": " + std::strerror(errno));
  const size_t size = (size_t)file.tellg();
  if (size != bytes)
    throw Failure(kBadInput, path + " holds " + std::to_string(size) + " bytes, the program takes " + shape + ", " +
                                 std::to_string(bytes) + " bytes");
  std::vector<uint8_t> data(bytes);
  file.seekg(0);
  file.read((char*)data.data(), (std::streamsize)bytes);
  return data;
}

// Repeatable values in [-1, 1) for floats, zeros for everything else.
std::vector<uint8_t> noise(size_t bytes, ScalarType type) {
  std::vector<uint8_t> data(bytes);
  if (type != ScalarType::Float) return data;
  uint32_t state = 1;
  for (size_t at = 0; at + 4 <= bytes; at += 4) {
    state = state * 1664525u + 1013904223u;
    const float value = (float)(state >> 8) / (float)(1 << 23) - 1;
    std::memcpy(&data[at], &value, 4);
  }
  return data;
}

}  // namespace

Model::Model(const std::string& path, const std::vector<std::string>& inputs, const std::string& trace_to)
    : path(path), trace_to_(trace_to) {
  bytes = check_header(path);
  const double before = resident_kb();
  reset_peak();
  load();
  feed(inputs);
  first_ms = run();
  growth_kb = std::max(0.0, peak_kb() - before);
}

void Model::load() {
  std::unique_ptr<executorch::etdump::ETDumpGen> tracer;
  if (!trace_to_.empty()) tracer = std::make_unique<executorch::etdump::ETDumpGen>();
  auto start = Clock::now();
  module_ = std::make_unique<Module>(path, Module::LoadMode::Mmap, std::move(tracer));
  Error error = module_->load(executorch::runtime::Program::Verification::InternalConsistency);
  const double read_ms = ms_since(start);
  if (error != Error::Ok)
    throw Failure(kBadModel, path + " is not a program this runtime can read: " + executorch::runtime::to_string(error));
  start = Clock::now();
  error = module_->load_method("forward");
  init_ms = ms_since(start);
  load_ms = read_ms + init_ms;
  if (error != Error::Ok)
    throw Failure(kBadModel, path + " does not load here (" + executorch::runtime::to_string(error) +
                                 "); the lines above name the missing backend or operator");
}

void Model::feed(const std::vector<std::string>& files) {
  auto meta = module_->method_meta("forward");
  if (!meta.ok()) throw Failure(kBadModel, path + " has no description of its inputs");
  const size_t count = meta->num_inputs();
  if (!files.empty() && files.size() != count)
    throw Failure(kBadInput, path + " takes " + std::to_string(count) + " inputs, " + std::to_string(files.size()) +
                                 " files given");
  for (size_t i = 0; i < count; ++i) {
    auto info = meta->input_tensor_meta(i);
    if (!info.ok()) throw Failure(kBadInput, path + ": input " + std::to_string(i) + " is not a tensor");
    const auto sizes = info->sizes();
    buffers_.push_back(files.empty() ? noise(info->nbytes(), info->scalar_type())
                                     : read_input(files[i], info->nbytes(), shape_of(*info)));
    tensors_.push_back(executorch::extension::from_blob(
        buffers_.back().data(), {sizes.begin(), sizes.end()}, info->scalar_type()));
    arguments_.emplace_back(tensors_.back());
  }
}

double Model::run() {
  const auto start = Clock::now();
  auto result = module_->forward(arguments_);
  const double taken = ms_since(start);
  if (!result.ok())
    throw Failure(kRunFailed, path + " failed to run: " + executorch::runtime::to_string(result.error()));
  results_ = std::move(*result);
  return taken;
}

void Model::save_outputs(const std::string& to) {
  std::string data;
  for (const auto& value : results_)
    if (value.isTensor()) {
      const auto tensor = value.toTensor();
      data.append((const char*)tensor.const_data_ptr(), tensor.nbytes());
    }
  write_file(to, data.data(), data.size());
}

void Model::save_trace() {
  auto* tracer = dynamic_cast<executorch::etdump::ETDumpGen*>(module_->event_tracer());
  auto dump = tracer->get_etdump_data();
  if (!dump.buf || !dump.size) throw Failure(kRunFailed, path + ": the runtime recorded no events");
  write_file(trace_to_, dump.buf, dump.size);
  std::free(dump.buf);
}

std::string Model::outputs_json() const {
  std::vector<std::string> items;
  for (const auto& value : results_) {
    if (!value.isTensor()) continue;
    const auto tensor = value.toTensor();
    std::vector<double> sizes(tensor.sizes().begin(), tensor.sizes().end());
    items.push_back(Object()
                        .add("dtype", quote(executorch::runtime::toString(tensor.scalar_type())))
                        .add("shape", numbers(sizes))
                        .add("nbytes", std::to_string(tensor.nbytes()))
                        .str());
  }
  return array(items);
}

void write_file(const std::string& path, const void* data, size_t size) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write((const char*)data, (std::streamsize)size);
  file.close();
  if (!file) throw Failure(kCannotWrite, "cannot write " + path + ": " + std::strerror(errno));
}

}  // namespace runner
