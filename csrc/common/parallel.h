// Threads for the CPU kernels: those of the OpenMP runtime that torch has already loaded, if it is known.
//
// This library links no OpenMP of its own: a second runtime beside torch's pins threads to one core
// (pytorch#149422). Threads of our own are no answer beside torch's GEMMs either: after a GEMM its OpenMP
// workers spin on their cores for milliseconds, and a thread started then waits for one of them (measured:
// a 3 ms kernel took 26 ms). So the loader hands over the entry point of the runtime in the process; without
// one (another OpenMP, macOS), std::thread is used.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyelastic {

// `gomp_parallel`: address of libgomp's GOMP_parallel in this process, or null for std::thread.
void use_openmp(void* gomp_parallel);

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), each a multiple of `grain`
// long but the last; at most `threads` run at once. Which thread runs a range never changes a result:
// ranges own their outputs.
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const void* context,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end));

// The same for a callable. Kept out of line above so that no std:: template is instantiated in a
// file compiled for an instruction set the machine may lack.
template <class Body>
inline void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Body& body) {
  parallel_for(count, grain, threads, &body,
               [](const void* context, std::int64_t begin, std::int64_t end) {
                 (*static_cast<const Body*>(context))(begin, end);
               });
}

// At least `bytes` of memory of this thread's own, on a 64-byte boundary. Kept for the next call; asking for more
// loses what it held. Throws std::bad_alloc.
void* thread_scratch(std::size_t bytes);

}  // namespace pyelastic
