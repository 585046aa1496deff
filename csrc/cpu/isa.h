// One build of every kernel for each instruction set, chosen at run time.
//
// rlhf_fast/build.py compiles each csrc/cpu/*.cpp once for every set below, with that set's compiler flags. The macro
// RLHF_FAST_ISA then names the set, and the kernels live in a namespace of that name, so that the linker can never
// merge a function compiled for AVX-512 into one that an older CPU runs. For the same reason the kernels use no
// templates of the standard library.
//
// RLHF_FAST_ONLY names the only set that is there: on a CPU of another kind, and where build.py was asked for one.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define RLHF_FAST_ISA avx512
#define RLHF_FAST_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define RLHF_FAST_ISA avx2
#define RLHF_FAST_AVX2 1
#else
#define RLHF_FAST_ISA baseline
#endif

#if !defined(__x86_64__) && !defined(RLHF_FAST_ONLY)
#define RLHF_FAST_ONLY baseline
#endif

#if !defined(RLHF_FAST_ONLY)
#define RLHF_FAST_FOR_EACH_ISA(DO) DO(baseline) DO(avx2) DO(avx512)
// The kernel of that name for the set `isa`.
#define RLHF_FAST_KERNEL(isa, name) (isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : baseline::name)
// Calls it, also where the name is overloaded.
#define RLHF_FAST_CALL(isa, name, ...)                                   \
  (isa == Isa::avx512 ? avx512::name(__VA_ARGS__)                        \
   : isa == Isa::avx2 ? avx2::name(__VA_ARGS__) : baseline::name(__VA_ARGS__))
#else
#define RLHF_FAST_FOR_EACH_ISA(DO) DO(RLHF_FAST_ONLY)
#define RLHF_FAST_KERNEL(isa, name) (RLHF_FAST_ONLY::name)
#define RLHF_FAST_CALL(isa, name, ...) (RLHF_FAST_ONLY::name(__VA_ARGS__))
#endif

namespace rlhf_fast {

enum class Isa { baseline, avx2, avx512 };

}  // namespace rlhf_fast
