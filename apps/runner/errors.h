// What can go wrong, as exit codes. Every failure is one line on stderr: "error: ...".
#pragma once
#include <stdexcept>
#include <string>

namespace runner {

enum ExitCode { kUsage = 2, kBadModel = 3, kBadInput = 4, kRunFailed = 5, kCannotWrite = 6, kNativeAbort = 7 };

struct Failure : std::runtime_error {
  Failure(ExitCode code, const std::string& message) : std::runtime_error(message), code(code) {}
  ExitCode code;
};

}  // namespace runner
