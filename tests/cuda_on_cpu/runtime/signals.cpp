#include "signals.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <memory>

#include "checker.h"
#include "machine.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
constexpr int kSignalCount = sizeof(kSignals) / sizeof(int);
constexpr size_t kSignalStackBytes = 64 << 10;

sigjmp_buf launcher_context;
pid_t launcher_thread = 0;
struct {
  int signal;
  const char* address;
  const void* instruction;
  bool no_address;
} caught;

pid_t this_thread() { return pid_t(syscall(SYS_gettid)); }

void handle(int signal, siginfo_t* information, void* context) {
  if (this_thread() != launcher_thread) {  // the timer's may come to any thread; the others are no business of ours
    if (signal == SIGVTALRM) {
      syscall(SYS_tgkill, getpid(), launcher_thread, signal);
    } else {
      ::signal(signal, SIG_DFL);
    }
    return;
  }
  if (!machine.running) {  // the machine's own code, or a call just ended
    if (signal != SIGVTALRM) ::signal(signal, SIG_DFL);
    return;
  }
  const auto* registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
  caught.signal = signal;
  caught.address = static_cast<const char*>(information->si_addr);
  caught.instruction = reinterpret_cast<const char*>(registers[REG_RIP]) + 1;
  caught.no_address = information->si_code == SI_KERNEL;
  siglongjmp(launcher_context, 1);
}

void report_fault() {
  const std::string at = where(caught.instruction);
  if (caught.signal == SIGVTALRM) {
    const std::string last = machine.last_access ? where(machine.last_access) : at;
    refuse("still runs after %g s, at %s: a loop without end, or a block that waits for another",
           machine.most_milliseconds * 1e-3, last.c_str());
  } else if (caught.signal == SIGILL) {
    refuse("undefined behaviour at %s: an index beyond its array, a misaligned access, or a bad shift or conversion",
           at.c_str());
  } else if (caught.signal == SIGFPE) {
    refuse("integer division by zero at %s", at.c_str());
  } else if (caught.no_address) {
    refuse("misaligned: a 16-byte access at %s, or one to an address that cannot be", at.c_str());
  } else if (below_a_stack(caught.address)) {
    refuse("a thread's stack of %zu bytes is full at %s", kStackBytes, at.c_str());
  } else {
    refuse("out of bounds: %s, at %s", described(caught.address).c_str(), at.c_str());
  }
}

void set_timer(int milliseconds) {
  const itimerval value{{0, 0}, {milliseconds / 1000, milliseconds % 1000 * 1000}};
  setitimer(ITIMER_VIRTUAL, &value, nullptr);
}

}  // namespace

void run_guarded(void (*body)(void*), void* argument) {
  // The kernel's own stack may be what is full.
  thread_local const std::unique_ptr<char[]> signal_stack(new char[kSignalStackBytes]);
  stack_t stack{}, stack_before{};
  stack.ss_sp = signal_stack.get();
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &stack_before);
  launcher_thread = this_thread();
  struct sigaction action{}, before[kSignalCount];
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &before[i]);
  set_timer(machine.most_milliseconds);
  if (sigsetjmp(launcher_context, 1) == 0) {
    body(argument);
  } else {
    machine.running = false;
    left_by_jump();
    report_fault();
  }
  set_timer(0);
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}

}  // namespace cuda_on_cpu
