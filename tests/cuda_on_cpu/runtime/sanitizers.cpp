// AddressSanitizer's findings become reports. It is loaded into a process that was not started for it, so it must
// neither insist on coming first nor end the process. What it finds is kept until the thread comes to the machine
// again.
#include "sanitizers.h"

#if defined(CUDA_ON_CPU_ASAN)

#include <sanitizer/asan_interface.h>

#include <sstream>

#include "machine.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

std::string found;  // by AddressSanitizer

// Its report is long: what happened and where (first line), and the access.
void keep_sanitizer_report(const char* text) {
  if (!machine.running || !found.empty()) return;
  std::istringstream lines(text);
  std::string line, kind, access, place = "?", what = "?";
  while (std::getline(lines, line)) {
    const size_t error = line.find("AddressSanitizer: ");
    if (kind.empty() && error != std::string::npos) {
      kind = line.substr(error, line.find(" on ") - error);
      const auto pointer_behind = [&](const std::string& words) {
        const size_t at = line.find(words);
        return reinterpret_cast<const void*>(
            at == std::string::npos ? 0 : std::stoull(line.substr(at + words.size()), nullptr, 16));
      };
      what = described(pointer_behind(" on address "));
      place = where(pointer_behind(" at pc "));
    }
    if (access.empty() && (line.rfind("READ", 0) == 0 || line.rfind("WRITE", 0) == 0)) {
      access = line.substr(0, line.find(" at "));
      access = access.substr(0, access.find(" thread "));
    }
  }
  found = "out of bounds: " + access + ", " + what + ", at " + place + " (" + kind + ")";
}

}  // namespace

void check_sanitizers() {
  if (found.empty()) return;
  std::string text;
  text.swap(found);
  fail("%s", text.c_str());
}

void forget_sanitizers() { found.clear(); }

// A fault is ours to report.
extern "C" const char* __asan_default_options() {
  return "verify_asan_link_order=0:halt_on_error=0:suppress_equal_pcs=0:detect_leaks=0:handle_segv=0:handle_sigbus=0:"
         "handle_sigill=0:handle_sigfpe=0:detect_stack_use_after_return=0:print_legend=0:use_sigaltstack=0:symbolize=0";
}

[[gnu::constructor]] static void listen() { __asan_set_error_report_callback(keep_sanitizer_report); }

}  // namespace cuda_on_cpu

#endif
