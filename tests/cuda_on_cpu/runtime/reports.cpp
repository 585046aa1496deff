// Says what went wrong, in which kernel, block and thread, and where in its source.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "machine.h"

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

const char* take_report() {
  static std::string taken;
  taken.clear();
  taken.swap(machine.report);
  machine.report_told = false;
  return taken.c_str();
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::machine;

cudaError_t cudaPeekAtLastError() {
  return machine.report_told || machine.report.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  machine.report_told |= error != cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : machine.report.c_str(); }
