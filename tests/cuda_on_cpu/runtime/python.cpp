// The machine's face for ctypes: settings, reports, buffers.
#include <string>

#include "machine.h"
#include "memory.h"

using namespace cuda_on_cpu;

extern "C" {

void cuda_on_cpu_set_order(int order) { set_order(order); }

void cuda_on_cpu_set_most_milliseconds(int time) { machine.most_milliseconds = time; }

const char* cuda_on_cpu_take_report() { return take_report(); }

void* cuda_on_cpu_allocate(size_t bytes, size_t offset, int unwritten) {
  return allocate(bytes, offset, unwritten != 0);
}

void cuda_on_cpu_release(void* data) { release(data); }

// The barrier at that line does nothing from now on; line 0: all do what they should.
void cuda_on_cpu_drop(const char* file, int line) {
  static std::string kept;
  kept = file;
  machine.dropped = {kept.c_str(), line};
}

// From now on barriers are recorded where they are met; what was recorded before is returned, as lines "file:line".
const char* cuda_on_cpu_record_sites(int on) {
  static std::string text;
  text.clear();
  for (const Site& site : machine.sites) text += std::string(site.file) + ":" + std::to_string(site.line) + "\n";
  machine.sites.clear();
  machine.record_sites = on != 0;
  return text.c_str();
}

}
