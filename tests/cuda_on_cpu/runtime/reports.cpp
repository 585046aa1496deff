// Says what went wrong, in which kernel, block and thread, and where in its source.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "checker.h"
#include "machine.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

// Lines that a program of the binary utilities prints about an address in a loaded library.
std::string about(const char* options, const void* address) {
  Dl_info library{};
  if (!dladdr(address, &library) || !library.dli_fname) return "";
  char command[4096];
  snprintf(command, sizeof command, "addr2line %s -e '%s' %#zx 2>/dev/null", options, library.dli_fname,
           size_t(static_cast<const char*>(address) - static_cast<const char*>(library.dli_fbase)));
  FILE* const pipe = popen(command, "r");
  if (!pipe) return "";
  std::string text;
  for (int c = fgetc(pipe); c != EOF; c = fgetc(pipe)) text += char(c);
  pclose(pipe);
  return text;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string kernel_name(const void* kernel) {
  std::string name = first_line(about("-Cf", kernel));
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at = name.find(unnamed); at != std::string::npos; at = name.find(unnamed)) name.erase(at, unnamed.size());
  name = name.substr(0, name.find('('));
  return name.empty() || name == "??" ? "kernel" : name;
}

std::string place() {
  char text[200];
  const uint3 b = blockIdx, t = threadIdx;
  if (!machine.launch) return "";
  std::string result = kernel_name(machine.launch->kernel);
  if (machine.current) {
    snprintf(text, sizeof text, ", block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    result += text;
  }
  return result + ": ";
}

void keep(const char* format, va_list arguments) {
  char text[2000];
  vsnprintf(text, sizeof text, format, arguments);
  if (machine.report.empty()) machine.report = place() + text;
}

}  // namespace

std::string where(const void* address) {
  std::istringstream frames(about("-i", static_cast<const char*>(address) - 1));  // innermost of inlined calls first
  std::string line, innermost;
  while (std::getline(frames, line)) {
    const std::string place = line.substr(line.rfind('/') + 1);
    if (innermost.empty()) innermost = place;
    const bool ours = place.rfind("device.h:", 0) == 0 || line.find("/cuda_on_cpu/" + place) != std::string::npos;
    if (ours && place.find(".h:") != std::string::npos) continue;  // the kernel's line says more
    innermost = place;
    break;
  }
  return innermost.substr(0, innermost.find(' '));  // a "(discriminator 2)" may follow
}

std::string where(const Site& site) { return where(site.caller); }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep(format, arguments);
  va_end(arguments);
  machine.running = false;
  return_to_launcher(machine.current->fiber);
  abort();
}

void refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep(format, arguments);
  va_end(arguments);
}

// Nobody can run and somebody waits.
void report_deadlock() {
  std::ostringstream text;
  text << "deadlock in block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  int finished = 0;
  std::vector<bool> told(size_t(machine.count), false);
  for (int i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.threads[i];
    finished += thread.finished;
    if (thread.finished || told[size_t(i)]) continue;
    int count = 0, last = i;
    for (int j = i; j < machine.count; ++j) {
      const Thread& other = machine.threads[j];
      if (other.finished || other.site != thread.site || other.mask != thread.mask) continue;
      if (thread.mask && other.warp() != thread.warp()) continue;
      told[size_t(j)] = true;
      last = j;
      ++count;
    }
    text << "\n  " << count << (count == 1 ? " thread (" : " threads (") << i;
    if (count > 1) text << " to " << last;
    text << ") wait in " << thread.waits_in << " at " << where(thread.site);
    const Warp& warp = machine.warps[thread.warp()];
    for (unsigned rest = thread.mask ? warp.open : 0; rest; rest &= rest - 1) {
      const Meeting& meeting = warp.meetings[__builtin_ctz(rest)];
      if (meeting.to_leave || meeting.mask != thread.mask) continue;
      text << " for lanes 0x" << std::hex << (meeting.mask & ~meeting.arrived) << std::dec;
    }
  }
  if (finished) text << "\n  " << finished << (finished == 1 ? " has" : " have") << " returned";
  refuse("%s", text.str().c_str());
}

#if defined(CUDA_ON_CPU_ASAN)
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

// Loaded into a process that was not started for it (Python), it must neither insist on coming first nor end the
// process; a fault is ours to report.
extern "C" const char* __asan_default_options() {
  return "verify_asan_link_order=0:halt_on_error=0:suppress_equal_pcs=0:detect_leaks=0:handle_segv=0:handle_sigbus=0:"
         "handle_sigill=0:handle_sigfpe=0:detect_stack_use_after_return=0:print_legend=0:use_sigaltstack=0:symbolize=0";
}

[[gnu::constructor]] static void listen() { __asan_set_error_report_callback(keep_sanitizer_report); }
#endif

namespace {

std::string last_taken;
bool told = false;  // to cudaGetLastError

}  // namespace

const char* take_report() {
  told = false;
  last_taken.clear();
  last_taken.swap(machine.report);
  return last_taken.c_str();
}

}  // namespace cuda_on_cpu

cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::told || cuda_on_cpu::machine.report.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  cuda_on_cpu::told |= error != cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : cuda_on_cpu::machine.report.c_str(); }
